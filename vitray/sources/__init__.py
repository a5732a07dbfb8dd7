"""From URL patterns to shards, and from a shard to its encoded images in order. One file a
format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from vitray.errors import JobError, ObjectMissing, ShardError, VitrayError, count
from vitray.job import Job
from vitray.schema import Encoded, End, Shard, rebuilt_type, short_hash
from vitray.sources import files, manifest, parquet, tables, tar
from vitray.sources.files import Group
from vitray.sources.listing import Listing, list_shards
from vitray.sources.names import kind_of
from vitray.sources.objects import READERS
from vitray.sources.tables import python_value
from vitray.sources.tar import absent_members

__all__ = [
    "Group",
    "Listing",
    "Selection",
    "absent_members",
    "chosen",
    "count_again",
    "estimate_images",
    "file_passthrough_schema",
    "find_key_column",
    "kind_of",
    "list_shards",
    "passthrough_schema",
    "python_value",
    "read_shard",
    "require_passthrough",
    "select",
    "wider",
]  # fmt: skip

READ = {
    "tar": tar.read_tar,
    "files": files.read_files,
    "parquet": parquet.read_parquet,
    "manifest": manifest.read_manifest,
}
FILE_SCHEMAS = {
    "tar": tar.file_passthrough_schema,
    "files": files.file_passthrough_schema,
    "parquet": tables.file_passthrough_schema,
    "manifest": tables.file_passthrough_schema,
}
ESTIMATE_SHARDS = 5
LOOK_INTO = 100  # files whose types decide those of a new dataset


def read_shard(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The wanted images in the order of their index, then exactly one End, whose total counts all.

    Raises ShardError when the shard is broken, ObjectChanged when it is not what was planned,
    StorageError.
    """
    try:
        yield from READ[shard.kind](shard, job, wanted)
    except (
        JobError
    ) as error:  # listing saw the job's columns in the first file: one without is broken
        raise ShardError(f"{shard.url}: {error}") from error


def chosen(shards: Sequence[Shard], job: Job) -> list[Shard]:
    """Those that `since`, `sample` and `limit` leave, one after the other: whole shards, and the
    same ones when the source has grown.
    """
    least = job.since_s()
    recent = [
        shard
        for shard in shards
        if least is None or shard.modified is None or shard.modified >= least
    ]
    return [shard for shard in recent if job.sample is None or _lot(shard) < job.sample][
        : job.limit
    ]


@dataclass(frozen=True, slots=True)
class Selection:
    """How many shards and images since, sample and limit choose, out of how many. images are
    estimated unless exact.
    """

    fields: str = ""
    kind: str = ""
    shards: int = 0
    all_shards: int = 0
    images: int = 0
    all_images: int = 0
    exact: bool = True

    @property
    def images_left(self) -> int:
        return self.all_images - self.images

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        of = f"{self.shards:,} of {count(self.all_shards, f'{self.kind} shard'.strip())}"
        images = f"{about}{self.images:,} of {count(self.all_images, 'image')}"
        verb = "choose" if "," in self.fields else "chooses"
        return f"{self.fields} {verb} whole shards: {of}, {images}"


def select(listing: Listing, job: Job) -> Selection:
    """What since, sample and limit choose. One tar is walked for an estimate, where they choose at
    all.

    Raises JobError when `sample` leaves no shard.
    """
    shards = chosen(listing.shards, job)
    if (
        job.sample is not None
        and not shards
        and not chosen(listing.shards, job.model_copy(update={"since": None}))
    ):
        step = "Raise `sample`, or use `limit`."
        if listing.kind in ("files", "manifest"):
            step += " With a smaller `group_size` the images become more shards."
        raise JobError(
            f"sample: {job.sample:g} of {count(len(listing.shards), 'shard')} is none. {step}"
        )
    fields = ", ".join(
        name for name in ("since", "sample", "limit") if getattr(job, name) is not None
    )
    if len(shards) == len(listing.shards):
        return Selection(fields, listing.kind, len(shards), len(shards))
    if listing.kind == "tar":
        per_byte = _images_per_byte(shards or listing.shards, job)
        images, all_images = (
            round(sum(s.size for s in some) * per_byte) for some in (shards, listing.shards)
        )
    else:
        images, all_images = (
            sum(shard.rows or 0 for shard in some) for some in (shards, listing.shards)
        )
    exact = all(shard.rows is not None for shard in listing.shards)
    return Selection(
        fields, listing.kind, len(shards), len(listing.shards), images, all_images, exact
    )


def _images_per_byte(tars: Sequence[Shard], job: Job) -> float:
    for shard in tars[:ESTIMATE_SHARDS]:
        with suppress(ShardError, ObjectMissing):
            images, walked, _ = tar.count_samples(shard, job)
            return images / walked if walked else 0.0
    return 0.0


def _lot(shard: Shard) -> float:
    """0..1, by what stays of the id when the shard's bytes change."""
    return int(short_hash(shard.id.rpartition("-")[0], 12), 16) / 16**12


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """The types of the job's passthrough columns as this shard has them, in the order of job.keep.

    Raises JobError for a column that the shard has not, ShardError when it cannot be read.
    """
    schema = FILE_SCHEMAS[shard.kind](shard, job)
    return pa.schema([field.with_name(job.passthrough_name(field.name)) for field in schema])


def passthrough_schema(shards: Sequence[Shard], job: Job) -> pa.Schema:
    """The types of the passthrough columns in a new dataset: wide enough for all of the first
    files, text where none has a value.

    Raises ShardError when no file can be read, JobError for a column that is not there.
    """
    fields, errors = list[pa.Field](), list[VitrayError]()
    first_of_each_file = (
        list({shard.url: shard for shard in shards}.values())[:LOOK_INTO] if job.keep else []
    )
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda shard: _file_schema_or_error(shard, job), first_of_each_file))
    for schema in found:
        if isinstance(schema, VitrayError):  # it will be set aside when it is read
            errors.append(schema)
        else:
            fields = [wider(old, new, job) for old, new in zip(fields or schema, schema)]
    if errors and not fields:
        raise next((error for error in errors if isinstance(error, JobError)), errors[0])
    fields = [field.with_type(rebuilt_type(field.type, _text_for_null)) for field in fields]
    # as it is read back: a map names its parts otherwise
    return pa.ipc.read_schema(pa.schema(fields).remove_metadata().serialize())


def _text_for_null(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_null(kind) else kind


def _file_schema_or_error(shard: Shard, job: Job) -> pa.Schema | JobError | ShardError:
    try:
        return file_passthrough_schema(shard, job)
    except (JobError, ShardError) as error:
        return error


def wider(old: pa.Field, new: pa.Field, job: Job) -> pa.Field:
    """A field that holds the values of both, `old` where there is none: it stays as it was in the
    first file.
    """
    if pa.types.is_null(old.type) or job.rules == 1:
        return new if pa.types.is_null(old.type) else old
    return _unified(old, new) or _unified(_decoded(old), _decoded(new)) or old


def _unified(old: pa.Field, new: pa.Field) -> pa.Field | None:
    if old.type == new.type:
        return old
    try:
        return pa.unify_schemas(
            [pa.schema([old]), pa.schema([new])], promote_options="permissive"
        ).field(0)
    except pa.ArrowException:
        return None


def _decoded(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _narrowed(field: pa.Field) -> pa.Field:
    """Without what says nothing of the values: the width of offsets, and views."""

    def leaf(kind: pa.DataType) -> pa.DataType:
        return tables.SAME_VALUES.get(kind, kind)

    kind = rebuilt_type(field.type, leaf)
    is_list = (
        pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
    return field.with_type(pa.list_(kind.value_field) if is_list else kind)


def require_passthrough(shard: Shard, job: Job, passthrough: pa.Schema) -> None:
    """Raises ShardError when a passthrough column's type does not go into the dataset's, JobError
    when there is none.

    Integers go into integers of any width here; a value that does not fit is seen when it is read.
    """
    if shard.kind == "files":  # folders spell out text, or nothing
        return
    for mine, field in zip(file_passthrough_schema(shard, job), passthrough, strict=True):
        both_integers = pa.types.is_integer(mine.type) and pa.types.is_integer(field.type)
        if both_integers and job.rules > 1:
            continue
        same_values = (_decoded(mine), _decoded(field))
        if (
            _goes_into(mine, field)
            or _goes_into(*same_values)
            or _goes_into(*map(_narrowed, same_values))
        ):
            continue
        raise ShardError(
            f"{shard.url}: column `{mine.name}` is {mine.type}, in this dataset it is "
            f"{field.type}. Write it with that type, or "
            "give this input an `out` of its own."
        )


def _goes_into(mine: pa.Field, field: pa.Field) -> bool:
    both = _unified(field, mine)
    return both is not None and both.type == field.type


def estimate_images(shards: Sequence[Shard], job: Job) -> tuple[int, bool]:
    """(images, exact?). Tars do not tell: the headers of a few are walked, and the rest is taken to
    be like them.
    """
    known = sum(shard.rows or 0 for shard in shards)
    tars = [shard for shard in shards if shard.kind == "tar"]
    unreadable = any(shard.rows is None for shard in shards if shard.kind != "tar")
    images, walked, whole = 0, 0, 0
    for shard in tars[:: math.ceil(len(tars) / ESTIMATE_SHARDS) or 1]:
        try:
            count, size, _ = tar.count_samples(shard, job)
        except (ShardError, ObjectMissing):
            continue
        images, walked, whole = images + count, walked + size, whole + (size == shard.size)
    if whole == len(tars):
        return known + images, not unreadable
    return known + round(
        sum(shard.size for shard in tars) * images / walked if walked else 0
    ), False


def count_again(shard: Shard, job: Job) -> tuple[int, dict[str, int] | None]:
    """How many images a shard holds, and what of it has no row; None where only reading the images
    tells.

    A tar is walked from end to end. Raises ShardError, ObjectMissing, StorageError.
    """
    if shard.kind == "tar":
        return tar.count_whole(shard, job)
    if shard.rows is None:
        raise ShardError(f"{shard.url} cannot be read")
    return shard.rows, None


def find_key_column(shards: Sequence[Shard], job: Job) -> str | None:
    """The column that names the rows of a new dataset from Parquet files, where one is called so
    and its values are unique.
    """
    if job.key_column or job.rules == 1:
        return job.key_column
    files = [
        shard
        for shard in {shard.url: shard for shard in shards}.values()
        if shard.kind == "parquet"
    ][:LOOK_INTO]
    for shard in files[:ESTIMATE_SHARDS]:
        with suppress(JobError, ShardError, ObjectMissing):
            name = tables.find_key_column(shard, job)
            return name if name and all(_has_column(file, name, job) for file in files) else None
    return None


def _has_column(shard: Shard, name: str, job: Job) -> bool:
    """Whether a file has a column; one that cannot be read does not object."""
    with suppress(ShardError, ObjectMissing):
        return name in tables.read_schema(shard, job).names
    return True
