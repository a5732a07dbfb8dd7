"""The commit: the fragments of a shard become its one data file, by one conditional create.

The protocol, in the order of the code:
1. Look for a data file.
2. Require fragments that cover the shard.
3. Look at the input again.
4. Write the file on the scratch disk.
5. Create the object. If it is refused, or no answer comes, look which run created it.
6. Write the file of error rows, then delete the staging.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitray.crash import crash_point
from vitray.dataset.files import parquet_bytes
from vitray.dataset.identity import Dataset
from vitray.dataset.staging import Staged, drop_staging, read_fragment, staged
from vitray.errors import CommitError, ObjectChanged, ObjectMissing, StorageError, one_line
from vitray.schema import (
    ERROR_SCHEMA,
    End,
    Shard,
    ShardKind,
    ipc_bytes,
    ipc_table,
    rebuilt_type,
    without_list_views,
)
from vitray.storage import is_local, store_for
from vitray.version import __version__

log = logging.getLogger(__name__)

# 50 MB of a 768-float vector: small enough for a laptop, large enough for a scan
ROW_GROUP_ROWS = 16_384
DIGEST_ROWS = 1024
READS = 3  # of a file that cannot be parsed: the transfer may have damaged it
# fields of a Footer that the file stores as they are
_TEXTS = ("write_id", "fingerprint", "shard", "url", "source_version", "rows_sha256")
# fields of ModelSpec
_SPEC_FIELDS = ("model", "revision", "weights_sha256", "dimension", "precision", "engine")
# object metadata are HTTP headers: visible ASCII, 2 kB in all
_IN_HEADER = re.compile(r"[!-~]{1,64}")


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata in the footer of a data file.

    reasons: errors by reason. truncated_at: the byte at which its shard was cut.
    left_out: images of its shard without a row, by left_out.LEFT_OUT. image_members: images by the
    tar member that they came from.
    """

    write_id: str
    fingerprint: str
    shard: str
    url: str
    source_version: str
    rows: int
    errors: int
    truncated_at: int | None
    rows_sha256: str
    reasons: dict[str, int]
    error_rows: pa.Table
    left_out: dict[str, int] = field(default_factory=dict)
    image_members: dict[str, int] = field(default_factory=dict)
    source_rules: int = 1
    key_column: str | None = None

    @property
    def total(self) -> int:
        return self.rows + self.errors


@dataclass(frozen=True, slots=True)
class Commit:
    """A data file that exists. adopted: another run, or an earlier attempt, made it."""

    shard: str
    rows: int
    errors: int
    reasons: dict[str, int]
    truncated_at: int | None
    adopted: bool
    seconds: float = field(default=0.0, compare=False)


class _Input(NamedTuple):
    """The shard id of a data file, and the URL and version of its input."""

    shard: str
    url: str
    version: str


def commit_shard(dataset: Dataset, shard: Shard) -> Commit | None:
    """Make the shard's data file exist, or adopt the existing one.

    None: fragments are missing; plan the shard again. Raises CommitError for an existing file that
    this job could not have written, ObjectChanged when the input is no longer the planned version.
    """
    footer, adopted = _look(dataset, shard.id), True
    if footer is None:
        # without fragments, another run may have committed the shard and deleted them meanwhile
        footer, adopted = _make(dataset, shard) or (_look(dataset, shard.id), True)
    if footer is None:
        return None
    crash_point("commit-created", shard.id)
    repair_errors(dataset, footer)
    crash_point("commit-errors", shard.id)
    drop_staging(dataset, shard.id)
    crash_point("commit-cleaned", shard.id)
    return _commit_of(footer, adopted)


def _commit_of(footer: Footer, adopted: bool) -> Commit:
    return Commit(
        shard=footer.shard,
        rows=footer.rows,
        errors=footer.errors,
        reasons=footer.reasons,
        truncated_at=footer.truncated_at,
        adopted=adopted,
    )


def commit_rows(dataset: Dataset, origin: Footer, rows: Iterable[pa.Table]) -> Commit:
    """Make the data file out of rows of another dataset's data file. Raises like commit_shard.

    origin: the footer of that file, which names the shard, its input, errors and end.
    """
    source = _Input(origin.shard, origin.url, origin.source_version)
    digest = RowsDigest()

    def counted() -> Iterator[pa.Table]:
        for table in rows:
            good = table.select(dataset.schema.names).cast(dataset.schema)
            digest.add(good)
            yield good

    end = End(origin.total, origin.truncated_at, "", origin.left_out, origin.image_members)
    data, metadata = parquet_of(
        dataset, counted(), lambda: _metadata(dataset, source, end, digest, origin.error_rows)
    )
    footer, adopted = create_data_file(dataset, data, metadata)
    repair_errors(dataset, footer)
    return _commit_of(footer, adopted)


def read_footer(url: str) -> Footer:
    """The footer of a data file. Raises ObjectMissing; CommitError for another program's file."""
    for attempt in range(1, READS + 1):
        try:
            with store_for(url).open(url) as stream:
                metadata = pq.read_metadata(stream).metadata or {}
            return parse_footer(
                {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"vitray.")}
            )
        except (ValueError, KeyError, OSError) as error:
            # an error of the disk; pyarrow's own error for damaged bytes has no errno
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if attempt == READS:
                reason = one_line(error)
                raise CommitError(
                    f"{url} is not a data file of vitray ({reason}). Move it away and run again."
                ) from error
    raise AssertionError


def repair_errors(dataset: Dataset, footer: Footer) -> None:
    """Write the shard's file of error rows from the footer, when it has errors."""
    if footer.errors:
        store_for(dataset.out).replace(
            dataset.errors_url(footer.shard), parquet_bytes(footer.error_rows)
        )


class RowsDigest:
    """SHA-256 of rows: the same for any split into tables or row groups, and read from Parquet."""

    def __init__(self) -> None:
        self.rows = 0
        self._digest = hashlib.sha256()
        self._pending: pa.Table | None = None  # fewer than DIGEST_ROWS rows

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        table = _with_unique_layout(table.replace_schema_metadata(None))
        pending = table if self._pending is None else pa.concat_tables([self._pending, table])
        while pending.num_rows >= DIGEST_ROWS:
            self._digest.update(_canonical(pending.slice(0, DIGEST_ROWS)))
            pending = pending.slice(DIGEST_ROWS)
        self._pending = pending

    def hexdigest(self) -> str:
        """The digest of all added rows. Add none afterwards."""
        if self._pending is not None and self._pending.num_rows:
            self._digest.update(_canonical(self._pending))
            self._pending = None
        return self._digest.hexdigest()


def _with_unique_layout(table: pa.Table) -> pa.Table:
    """The same values in types without dictionaries and views, which have several layouts."""
    for at, name in enumerate(table.column_names):
        column = without_list_views(table.column(at))
        if (kind := _unique_layout_type(column.type)) != table.schema.field(at).type:
            table = table.set_column(at, name, column.cast(kind))
    return table


def _unique_layout_type(kind: pa.DataType) -> pa.DataType:
    large = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}

    def leaf(kind: pa.DataType) -> pa.DataType:
        if isinstance(kind, pa.BaseExtensionType):
            return _unique_layout_type(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return _unique_layout_type(kind.value_type)
        return large.get(kind, kind)

    return rebuilt_type(kind, leaf)


def _canonical(table: pa.Table) -> bytes:
    """The rows as bytes that depend on their values alone."""
    # take() makes new arrays: no offsets, no leftover bits after the end
    batches = table.take(pa.array(range(table.num_rows))).combine_chunks().to_batches()
    # without the schema: Parquet renames the children of lists
    names = [name.encode() for name in table.column_names]
    return b"\0".join(names + [bytes(batch.serialize()) for batch in batches])


def _look(dataset: Dataset, shard_id: str) -> Footer | None:
    """The footer of the shard's data file; None without one. CommitError for another job's file."""
    try:
        footer = read_footer(dataset.data_url(shard_id))
    except ObjectMissing:
        return None
    if footer.fingerprint != dataset.fingerprint or footer.shard != shard_id:
        raise CommitError(
            f"{dataset.data_url(shard_id)} exists with fingerprint {footer.fingerprint[:8]}… "
            f"(this job: {dataset.fingerprint[:8]}…). Choose another `out`, or move that file "
            f"away."
        )
    return footer


def _make(dataset: Dataset, shard: Shard) -> tuple[Footer, bool] | None:
    """The data file's footer, and whether another run made it.

    None: fragments are missing or damaged, or disappeared while they were read.
    """
    parts = staged(dataset, shard.id)
    if len(parts.ends) > 1:  # its readers disagreed: start over
        drop_staging(dataset, shard.id)
    if not parts.covers():
        return None
    _require_same_input(shard)
    try:
        data, metadata = _parquet_of(dataset, shard, parts)
        return create_data_file(dataset, data, metadata)
    except ObjectMissing:
        return None


def _require_same_input(shard: Shard) -> None:
    """Raises ObjectChanged where the input is no longer the planned version.

    Members of a group on S3 are not looked at: they were read with If-Match.
    """
    planned = [(shard.url, shard.version)]
    if shard.kind == ShardKind.FILES:
        members = shard.members if is_local(shard.url) else ()
        planned = [(member.url, member.version) for member in members if member.size >= 0]
    for url, version in planned:
        try:
            same = store_for(url).stat(url).version == version
        except ObjectMissing as error:
            raise ObjectChanged(f"{url} was deleted while it was read") from error
        if not same:
            raise ObjectChanged(f"{url} changed while it was read")


def create_data_file(
    dataset: Dataset, data: bytes, metadata: dict[str, str]
) -> tuple[Footer, bool]:
    """Create the data file. Returns the footer that counts, and whether another run made it."""
    own_footer = parse_footer(metadata)
    shard_id = own_footer.shard
    url = dataset.data_url(shard_id)
    crash_point("commit-written", shard_id)
    failure: StorageError | None = None
    try:
        if store_for(url).create(url, data, _headers(data, metadata)):
            return own_footer, False
    except StorageError as error:
        failure = error  # the object may exist, and only the answer be lost: look
    footer = _look(dataset, shard_id)
    if footer is None:
        raise failure or CommitError(
            f"{url}: the store refused to create it, but it does not exist. Run again."
        )
    if footer.write_id == own_footer.write_id:
        return own_footer, False
    _require_equal_totals(url, footer, own_footer)
    return footer, True


def _headers(data: bytes, metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of the object: those of the footer that fit into an HTTP header, and SHA-256."""
    headers = {
        name.replace("vitray.", "vitray-").replace("_", "-"): value
        for name, value in metadata.items()
        if _IN_HEADER.fullmatch(value)
    }
    return headers | {"vitray-sha256": hashlib.sha256(data).hexdigest()}


def _require_equal_totals(url: str, committed: Footer, own: Footer) -> None:
    """Raises CommitError where another run saw another number of images, or another end."""
    if (committed.total, committed.truncated_at) != (own.total, own.truncated_at):
        raise CommitError(
            f"{url}: another run committed {committed.total} images (cut at "
            f"{committed.truncated_at}), this one saw {own.total} (cut at {own.truncated_at}). "
            f"Check the input, then `vitray redo --shard {own.shard}`."
        )
    if committed.errors != own.errors:
        log.warning(
            "%s: another run committed %d errors, this one saw %d; the first stays",
            own.shard,
            committed.errors,
            own.errors,
        )


def parquet_of(
    dataset: Dataset, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> tuple[bytes, dict[str, str]]:
    """Tables of rows as one Parquet file, and the metadata of its footer.

    metadata: called when all rows are written. The file is written on the scratch disk without a
    name there, so that a killed process leaves nothing.
    """
    try:
        descriptor, path = tempfile.mkstemp(prefix="vitray-")
        with open(descriptor, "rb") as scratch:
            values = _write_parquet(dataset, Path(path), tables, metadata)
            return scratch.read(), values
    except OSError as error:
        raise StorageError(
            f"scratch disk {tempfile.gettempdir()}: {error}. Free space there or set TMPDIR."
        ) from error


def _write_parquet(
    dataset: Dataset, path: Path, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> dict[str, str]:
    schema, vectors = dataset.schema, {v.column for v in dataset.vectors}
    buffered = list[pa.Table]()
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[
            f.name for f in schema if f.name not in vectors and not pa.types.is_nested(f.type)
        ],
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
    ) as writer:
        path.unlink()
        for table in tables:
            buffered.append(table.select(schema.names).cast(schema))
            if sum(t.num_rows for t in buffered) >= ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(buffered), row_group_size=ROW_GROUP_ROWS)
                buffered.clear()
        if buffered:
            writer.write_table(pa.concat_tables(buffered), row_group_size=ROW_GROUP_ROWS)
        values = metadata()
        writer.add_key_value_metadata(values)
    return values


def _parquet_of(dataset: Dataset, shard: Shard, parts: Staged) -> tuple[bytes, dict[str, str]]:
    """A shard's fragments as its data file, and the metadata of the footer."""
    source = _Input(shard.id, shard.url, shard.version)
    errors, digest, end = list[pa.Table](), RowsDigest(), parts.ends[0]
    left_out = Counter(end.left_out)

    def rows() -> Iterator[pa.Table]:
        for start, stop in parts.ranges():
            fragment = read_fragment(dataset, shard.id, start, stop)
            if fragment is None:  # the next reader makes it again
                raise ObjectMissing(f"{shard.id}: fragment {start}-{stop} is damaged")
            good = fragment.rows.select(dataset.schema.names).cast(dataset.schema)
            errors.append(fragment.errors)
            left_out.update(fragment.left_out)
            digest.add(good)
            yield good

    def metadata() -> dict[str, str]:
        error_rows = pa.concat_tables(errors or [ERROR_SCHEMA.empty_table()])
        whole_end = replace(end, left_out=dict(left_out))
        return _metadata(dataset, source, whole_end, digest, error_rows)

    return parquet_of(dataset, rows(), metadata)


def _metadata(
    dataset: Dataset, source: _Input, end: End, digest: RowsDigest, errors: pa.Table
) -> dict[str, str]:
    """The metadata of a data file's footer, as text, by their stored names."""
    reasons = pc.value_counts(errors["reason"]).to_pylist()
    metadata = {
        "write_id": uuid.uuid4().hex,
        "fingerprint": dataset.fingerprint,
        "shard": source.shard,
        "url": source.url,
        "source_version": source.version,
        "rows": digest.rows,
        "errors": errors.num_rows,
        "truncated_at": end.truncated_at,
        "rows_sha256": digest.hexdigest(),
        "reasons": json.dumps({item["values"]: item["counts"] for item in reasons}),
        "left_out": json.dumps(end.left_out) if end.left_out else "",
        "image_members": json.dumps(end.image_members) if end.image_members else "",
        "source_rules": dataset.job.rules,
        "key_column": dataset.job.key_column,
        "error_rows": _encoded_rows(errors),
        **{name: getattr(dataset.spec, name) for name in _SPEC_FIELDS},
        "id2label_sha256": dataset.spec.labels_sha256(),
        "decode": dataset.job.decode,
        "version": __version__,
    }
    return {
        f"vitray.{name}": "" if value is None else str(value) for name, value in metadata.items()
    }


def _encoded_rows(rows: pa.Table) -> str:
    """Rows as base64, since footer values are text to other readers of Parquet; empty for none."""
    return base64.b64encode(ipc_bytes(rows, "zstd")).decode() if rows.num_rows else ""


def _decoded_rows(text: str) -> pa.Table:
    return ipc_table(base64.b64decode(text)) if text else ERROR_SCHEMA.empty_table()


def parse_footer(metadata: dict[str, str]) -> Footer:
    """The footer of stored metadata. Raises KeyError or ValueError for another program's."""
    values = {name.removeprefix("vitray."): value for name, value in metadata.items()}
    return Footer(
        **{name: values[name] for name in _TEXTS},
        rows=int(values["rows"]),
        errors=int(values["errors"]),
        truncated_at=int(values["truncated_at"]) if values["truncated_at"] else None,
        reasons=json.loads(values["reasons"]),
        error_rows=_decoded_rows(values["error_rows"]),
        # files written before December 2026 have neither of these two
        left_out=json.loads(values.get("left_out") or "{}"),
        image_members=json.loads(values.get("image_members") or "{}"),
        source_rules=int(values.get("source_rules") or 1),
        key_column=values.get("key_column") or None,
    )
