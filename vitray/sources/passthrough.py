"""The types of the passthrough columns: in a shard, in a new dataset, and whether both fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from vitray.arrow_types import is_list, rebuilt_type
from vitray.errors import JobError, ShardError, VitrayError
from vitray.job import Job
from vitray.schema import Shard, ShardKind, SourceRules
from vitray.sources import files, tables, tar
from vitray.sources.objects import READERS

SCHEMAS_BY_KIND: Mapping[ShardKind, Callable[[Shard, Job], pa.Schema]] = {
    ShardKind.TAR: tar.file_passthrough_schema,
    ShardKind.FILES: files.file_passthrough_schema,
    ShardKind.PARQUET: tables.file_passthrough_schema,
    ShardKind.MANIFEST: tables.file_passthrough_schema,
}
SCHEMA_FILES = 100  # files whose types decide those of a new dataset


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """The types of the passthrough columns in this shard, in the order of job.keep.

    Raises JobError for a column that the shard lacks, ShardError when it cannot be read.
    """
    schema = SCHEMAS_BY_KIND[shard.kind](shard, job)
    return pa.schema([field.with_name(job.passthrough_name(field.name)) for field in schema])


def passthrough_schema(shards: Sequence[Shard], job: Job) -> pa.Schema:
    """The types of the passthrough columns in a new dataset.

    They are wide enough for all of the first files. A column without any value becomes text.

    Raises ShardError when no file can be read, JobError for a column that does not exist.
    """
    if not job.keep:
        return pa.schema([])
    first_of_each_file = list({shard.url: shard for shard in shards}.values())[:SCHEMA_FILES]
    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(lambda shard: _schema_or_error(shard, job), first_of_each_file))
    fields = list[pa.Field]()
    errors = list[VitrayError]()  # these files are set aside when they are read
    for result in results:
        if isinstance(result, VitrayError):
            errors.append(result)
        else:
            fields = [wider(old, new, job) for old, new in zip(fields or result, result)]
    if errors and not fields:
        raise next((error for error in errors if isinstance(error, JobError)), errors[0])
    fields = [field.with_type(rebuilt_type(field.type, _text_for_null)) for field in fields]
    # Serialised and read back, because a map then names its parts as it does in a data file.
    return pa.ipc.read_schema(pa.schema(fields).remove_metadata().serialize())


def _text_for_null(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_null(kind) else kind


def _schema_or_error(shard: Shard, job: Job) -> pa.Schema | JobError | ShardError:
    try:
        return file_passthrough_schema(shard, job)
    except (JobError, ShardError) as error:
        return error


def wider(old: pa.Field, new: pa.Field, job: Job) -> pa.Field:
    """A field that holds the values of both; `old`, the first file's, where no type does."""
    if pa.types.is_null(old.type):
        return new
    if job.rules == SourceRules.V1:
        return old
    return _unified(old, new) or _unified(_decoded(old), _decoded(new)) or old


def _unified(old: pa.Field, new: pa.Field) -> pa.Field | None:
    if old.type == new.type:
        return old
    schemas = [pa.schema([old]), pa.schema([new])]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except pa.ArrowException:
        return None


def _decoded(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _narrowed(field: pa.Field) -> pa.Field:
    """The field with plain lists and 32-bit offsets, which do not change its values."""

    def leaf(kind: pa.DataType) -> pa.DataType:
        return tables.SAME_VALUES.get(kind, kind)

    kind = rebuilt_type(field.type, leaf)
    is_variable = is_list(kind) and not pa.types.is_fixed_size_list(kind)
    return field.with_type(pa.list_(kind.value_field) if is_variable else kind)


def require_passthrough(shard: Shard, job: Job, passthrough: pa.Schema) -> None:
    """Check that the shard's passthrough columns fit the dataset's types.

    Integers of any width fit here; a value that is too large fails when it is read.

    Raises ShardError for a type that does not fit, JobError for a missing column.
    """
    if shard.kind == ShardKind.FILES:  # folder names are text, and a missing one is null
        return
    schema = file_passthrough_schema(shard, job)
    for own_field, field in zip(schema, passthrough, strict=True):
        both_integers = pa.types.is_integer(own_field.type) and pa.types.is_integer(field.type)
        if both_integers and job.rules >= SourceRules.V2:
            continue
        if not _fits(own_field, field):
            raise ShardError(
                f"{shard.url}: column `{own_field.name}` is {own_field.type}, in this dataset it "
                f"is {field.type}. Write it with that type, or give this input an `out` of its own."
            )


def _fits(own_field: pa.Field, field: pa.Field) -> bool:
    own_values = _decoded(own_field)
    values = _decoded(field)
    return (
        _goes_into(own_field, field)
        or _goes_into(own_values, values)
        or _goes_into(_narrowed(own_values), _narrowed(values))
    )


def _goes_into(own_field: pa.Field, field: pa.Field) -> bool:
    both = _unified(field, own_field)
    return both is not None and both.type == field.type
