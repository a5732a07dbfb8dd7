"""URL patterns become shards; a shard becomes its encoded images in order. One file per format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from vitray.errors import JobError, ObjectMissing, ShardError, VitrayError, count
from vitray.job import Job
from vitray.schema import Encoded, End, Shard, ShardKind, rebuilt_type, short_hash
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
    "count_again",
    "count_selection",
    "estimate_images",
    "file_passthrough_schema",
    "find_key_column",
    "kind_of",
    "list_shards",
    "passthrough_schema",
    "python_value",
    "read_shard",
    "require_passthrough",
    "select_shards",
    "wider",
]

Reader = Callable[[Shard, Job, Callable[[int], bool]], Iterator[Encoded | End]]
READERS_BY_KIND: Mapping[ShardKind, Reader] = {
    ShardKind.TAR: tar.read_tar,
    ShardKind.FILES: files.read_files,
    ShardKind.PARQUET: parquet.read_parquet,
    ShardKind.MANIFEST: manifest.read_manifest,
}
SCHEMAS_BY_KIND: Mapping[ShardKind, Callable[[Shard, Job], pa.Schema]] = {
    ShardKind.TAR: tar.file_passthrough_schema,
    ShardKind.FILES: files.file_passthrough_schema,
    ShardKind.PARQUET: tables.file_passthrough_schema,
    ShardKind.MANIFEST: tables.file_passthrough_schema,
}
ESTIMATE_SHARDS = 5
SCHEMA_FILES = 100  # files whose types decide those of a new dataset


def read_shard(shard: Shard, job: Job, is_wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The wanted images in the order of their index, then one End, whose total counts all images.

    Raises ShardError for a broken shard, ObjectChanged for another version than the planned one,
    StorageError.
    """
    try:
        yield from READERS_BY_KIND[shard.kind](shard, job, is_wanted)
    except JobError as error:
        # Listing found the job's columns in the first file, so a shard without them is broken.
        raise ShardError(f"{shard.url}: {error}") from error


def select_shards(shards: Sequence[Shard], job: Job) -> list[Shard]:
    """The shards that `since`, `sample` and `limit` select, applied in this order.

    Shards are selected whole. The same ones are selected when the source has grown.
    """
    since = job.since_s()
    recent = [
        shard
        for shard in shards
        if since is None or shard.modified is None or shard.modified >= since
    ]
    sampled = [shard for shard in recent if job.sample is None or _lot(shard) < job.sample]
    return sampled[: job.limit]


@dataclass(frozen=True, slots=True)
class Selection:
    """How many shards and images `since`, `sample` and `limit` choose.

    fields: those that are set, as text. images, all_images: estimates unless exact.
    """

    fields: str = ""
    kind: ShardKind | None = None
    shards: int = 0
    all_shards: int = 0
    images: int = 0
    all_images: int = 0
    exact: bool = True

    @property
    def is_set(self) -> bool:
        """Whether `since`, `sample` or `limit` is set."""
        return bool(self.fields)

    @property
    def images_left(self) -> int:
        return self.all_images - self.images

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        noun = f"{self.kind} shard" if self.kind else "shard"
        shards = f"{self.shards:,} of {count(self.all_shards, noun)}"
        images = f"{about}{self.images:,} of {count(self.all_images, 'image')}"
        verb = "choose" if "," in self.fields else "chooses"
        return f"{self.fields} {verb} whole shards: {shards}, {images}"


def count_selection(listing: Listing, job: Job) -> Selection:
    """The size of what `since`, `sample` and `limit` select.

    Where one of them is set and the source is of tars, one tar is walked for the estimate.

    Raises JobError when `sample` leaves no shard.
    """
    shards = select_shards(listing.shards, job)
    without_since = job.model_copy(update={"since": None})
    if job.sample is not None and not shards and not select_shards(listing.shards, without_since):
        step = "Raise `sample`, or use `limit`."
        if listing.kind in (ShardKind.FILES, ShardKind.MANIFEST):
            step += " With a smaller `group_size` the images become more shards."
        raise JobError(
            f"sample: {job.sample:g} of {count(len(listing.shards), 'shard')} is none. {step}"
        )
    names = ("since", "sample", "limit")
    fields = ", ".join(name for name in names if getattr(job, name) is not None)
    if not fields:
        return Selection(fields, listing.kind, len(shards), len(shards))
    if listing.kind == ShardKind.TAR:
        per_byte = _images_per_byte(shards or listing.shards, job)
        images = round(sum(shard.size for shard in shards) * per_byte)
        all_images = round(sum(shard.size for shard in listing.shards) * per_byte)
    else:
        images = sum(shard.rows or 0 for shard in shards)
        all_images = sum(shard.rows or 0 for shard in listing.shards)
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
    """A number in 0..1 from the part of the id that stays when the shard's bytes change."""
    return int(short_hash(shard.id.rpartition("-")[0], 12), 16) / 16**12


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
    if job.rules == 1:
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
    is_list = (
        pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
    return field.with_type(pa.list_(kind.value_field) if is_list else kind)


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
        if both_integers and job.rules > 1:
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


def estimate_images(shards: Sequence[Shard], job: Job) -> tuple[int, bool]:
    """(number of images, whether it is exact).

    The number in a tar is only known after a walk over its headers. A few tars are walked at their
    start, and the other ones are assumed to be like them.
    """
    counted = sum(shard.rows or 0 for shard in shards)
    tars = [shard for shard in shards if shard.kind == ShardKind.TAR]
    unreadable = any(shard.rows is None for shard in shards if shard.kind != ShardKind.TAR)
    images = 0
    walked = 0
    complete_walks = 0
    for shard in tars[:: math.ceil(len(tars) / ESTIMATE_SHARDS) or 1]:
        try:
            samples, size, _ = tar.count_samples(shard, job)
        except (ShardError, ObjectMissing):
            continue
        images += samples
        walked += size
        complete_walks += size == shard.size
    if complete_walks == len(tars):
        return counted + images, not unreadable
    total_size = sum(shard.size for shard in tars)
    return counted + round(total_size * images / walked if walked else 0), False


def count_again(shard: Shard, job: Job) -> tuple[int, dict[str, int] | None]:
    """(number of images, what has no row; None where only reading the images would tell).

    A tar is walked from end to end. Raises ShardError, ObjectMissing, StorageError.
    """
    if shard.kind == ShardKind.TAR:
        return tar.count_all_samples(shard, job)
    if shard.rows is None:
        raise ShardError(f"{shard.url} cannot be read")
    return shard.rows, None


def find_key_column(shards: Sequence[Shard], job: Job) -> str | None:
    """The column that names the rows of a new dataset from Parquet files.

    It has a usual name and unique values, and all of the first files have it; else None.
    """
    if job.key_column or job.rules == 1:
        return job.key_column
    first_of_each_file = {shard.url: shard for shard in shards}.values()
    files = [shard for shard in first_of_each_file if shard.kind == ShardKind.PARQUET]
    files = files[:SCHEMA_FILES]
    for shard in files[:ESTIMATE_SHARDS]:
        with suppress(JobError, ShardError, ObjectMissing):
            name = tables.find_key_column(shard, job)
            return name if name and all(_has_column(file, name, job) for file in files) else None
    return None


def _has_column(shard: Shard, name: str, job: Job) -> bool:
    """Whether a file has a column; True for a file that cannot be read."""
    with suppress(ShardError, ObjectMissing):
        return name in tables.read_schema(shard, job).names
    return True
