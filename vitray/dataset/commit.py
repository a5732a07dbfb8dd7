"""The commit: fragments of a whole shard become its one data file, by one conditional create.

The protocol, in the order of the code: look; cover; look at the input again; write on scratch disk;
create; when the answer is "refused" or none at all, look who won; then the file of error rows, then
staging.
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

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitray.crash import crash_point
from vitray.dataset.files import parquet_bytes
from vitray.dataset.identity import Dataset
from vitray.dataset.staging import Staged, drop_staging, read_fragment, staged
from vitray.errors import CommitError, ObjectChanged, ObjectMissing, StorageError
from vitray.schema import (
    ERROR_SCHEMA,
    End,
    Shard,
    ipc_bytes,
    ipc_table,
    rebuilt_type,
    without_list_views,
)
from vitray.storage import is_local, store_for
from vitray.version import __version__

log = logging.getLogger(__name__)

ROW_GROUP_ROWS = (
    16_384  # 50 MB of a 768-float vector: small enough for a laptop, large enough for a scan
)
DIGEST_ROWS = 1024
READS = 3  # of a file that makes no sense: the way here may have spoilt it
_TEXTS = (
    "write_id",
    "fingerprint",
    "shard",
    "url",
    "source_version",
    "rows_sha256",
)  # of a Footer, the same in the file
_SPEC_FIELDS = (
    "model",
    "revision",
    "weights_sha256",
    "dimension",
    "precision",
    "engine",
)  # of ModelSpec
_IN_HEADER = re.compile(
    r"[!-~]{1,64}"
)  # object metadata are HTTP headers: visible ASCII, 2 kB in all


@dataclass(frozen=True, slots=True)
class Footer:
    """What a data file says of itself. reasons: errors by reason. truncated_at: byte at which its
    shard was cut.

    left_out: what of its shard has no row, by left_out.LEFT_OUT. image_members: images by the tar
    member they came from.
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
    """A data file that was seen to exist. adopted: another run (or an earlier try) made it."""

    shard: str
    rows: int
    errors: int
    reasons: dict[str, int]
    truncated_at: int | None
    adopted: bool
    seconds: float = field(default=0.0, compare=False)


def commit_shard(dataset: Dataset, shard: Shard) -> Commit | None:
    """Make the shard's data file exist, or adopt the one that does. None: fragments are missing,
    plan it again.

    Raises CommitError when a file is there that this job could not have written, ObjectChanged when
    the input is no longer the planned version.
    """
    footer, adopted = _look(dataset, shard.id), True
    if footer is None:
        # when there is nothing to make it from, another run may have finished this shard and
        # cleaned up meanwhile
        footer, adopted = _make(dataset, shard) or (_look(dataset, shard.id), True)
    if footer is None:
        return None
    crash_point("commit-created", shard.id)
    repair_errors(dataset, footer)
    crash_point("commit-errors", shard.id)
    drop_staging(dataset, shard.id)
    crash_point("commit-cleaned", shard.id)
    return Commit(
        shard.id, footer.rows, footer.errors, footer.reasons, footer.truncated_at, adopted
    )


def commit_rows(dataset: Dataset, origin: Footer, rows: Iterable[pa.Table]) -> Commit:
    """Make the data file out of the rows of another dataset's, whose footer says shard, input,
    errors and verdict. Raises like commit_shard.
    """
    shard, digest = Shard(origin.shard, "", origin.url, 0, origin.source_version), RowsDigest()

    def counted() -> Iterator[pa.Table]:
        for table in rows:
            good = table.select(dataset.schema.names).cast(dataset.schema)
            digest.add(good)
            yield good

    end = End(origin.total, origin.truncated_at, "", origin.left_out, origin.image_members)
    made = parquet_of(
        dataset, counted(), lambda: _metadata(dataset, shard, end, digest, origin.error_rows)
    )
    footer, adopted = _create(dataset, shard, *made)
    repair_errors(dataset, footer)
    return Commit(
        shard.id, footer.rows, footer.errors, footer.reasons, footer.truncated_at, adopted
    )


def read_footer(url: str) -> Footer:
    """The footer of a data file. Raises ObjectMissing, or CommitError when vitray did not write
    it.
    """
    for attempt in range(1, READS + 1):
        try:
            with store_for(url).open(url) as stream:
                metadata = pq.read_metadata(stream).metadata or {}
            return _footer(
                {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"vitray.")}
            )
        except (ValueError, KeyError, OSError) as error:
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # the disk; pyarrow's own, for damaged bytes, has none
                raise
            if attempt == READS:
                what = " ".join(str(error).split())
                raise CommitError(
                    f"{url} is not a data file of vitray ({what}). Move it away and run again."
                ) from error
    raise AssertionError


def repair_errors(dataset: Dataset, footer: Footer) -> None:
    """Write the shard's file of error rows from what the data file carries, when it has errors."""
    if footer.errors:
        store_for(dataset.out).replace(
            dataset.errors_url(footer.shard), parquet_bytes(footer.error_rows)
        )


class RowsDigest:
    """SHA-256 of rows, the same however they are cut into tables, row groups or dictionaries, and
    read back from Parquet.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._digest = hashlib.sha256()
        self._held: pa.Table | None = None

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        table = _plain(table.replace_schema_metadata(None))
        held = table if self._held is None else pa.concat_tables([self._held, table])
        while held.num_rows >= DIGEST_ROWS:
            self._digest.update(_canonical(held.slice(0, DIGEST_ROWS)))
            held = held.slice(DIGEST_ROWS)
        self._held = held

    def hexdigest(self) -> str:
        """The digest of all that was added; nothing may be added after it."""
        if self._held is not None and self._held.num_rows:
            self._digest.update(_canonical(self._held))
            self._held = None
        return self._digest.hexdigest()


def _plain(table: pa.Table) -> pa.Table:
    """The same values in types whose bytes follow from them: dictionaries and views may be laid out
    in several ways.
    """
    for at, name in enumerate(table.column_names):
        column = without_list_views(table.column(at))
        if (kind := _plain_type(column.type)) != table.schema.field(at).type:
            table = table.set_column(at, name, column.cast(kind))
    return table


def _plain_type(kind: pa.DataType) -> pa.DataType:
    def leaf(kind: pa.DataType) -> pa.DataType:
        if isinstance(kind, pa.BaseExtensionType):
            return _plain_type(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return _plain_type(kind.value_type)
        return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(
            kind, kind
        )

    return rebuilt_type(kind, leaf)


def _canonical(table: pa.Table) -> bytes:
    # take() makes fresh arrays: no offsets, no leftover bits behind the end
    batches = table.take(pa.array(range(table.num_rows))).combine_chunks().to_batches()
    # without the schema: Parquet renames the children of lists
    return b"\0".join(
        [
            *(name.encode() for name in table.column_names),
            *(bytes(batch.serialize()) for batch in batches),
        ]
    )


def _look(dataset: Dataset, shard_id: str) -> Footer | None:
    """The footer of the shard's data file, None when there is none. Raises CommitError when this
    job did not make it.
    """
    try:
        footer = read_footer(dataset.data_url(shard_id))
    except ObjectMissing:
        return None
    if footer.fingerprint != dataset.fingerprint or footer.shard != shard_id:
        raise CommitError(
            f"{dataset.data_url(shard_id)} exists with fingerprint {footer.fingerprint[:8]}… "
            f"(this job: "
            f"{dataset.fingerprint[:8]}…). Choose another `out`, or move that file away."
        )
    return footer


def _make(dataset: Dataset, shard: Shard) -> tuple[Footer, bool] | None:
    """The data file's footer, and whether another run made it. None: fragments are missing or
    damaged, or were while we read.
    """
    there = staged(dataset, shard.id)
    if len(there.ends) > 1:  # its readers disagreed: start anew
        drop_staging(dataset, shard.id)
    if not there.covers():
        return None
    _require_same_input(shard)
    try:
        return _write(dataset, shard, there)
    except ObjectMissing:
        return None


def _require_same_input(shard: Shard) -> None:
    """The input once more. Members of a group on S3 were read with If-Match, so their rows are true
    to the version.
    """
    planned = [(shard.url, shard.version)]
    if shard.kind == "files":
        planned = (
            [(m.url, m.version) for m in shard.members if m.size >= 0]
            if is_local(shard.url)
            else []
        )
    for url, version in planned:
        try:
            same = store_for(url).stat(url).version == version
        except ObjectMissing as error:
            raise ObjectChanged(f"{url} was deleted while it was read") from error
        if not same:
            raise ObjectChanged(f"{url} changed while it was read")


def _write(dataset: Dataset, shard: Shard, there: Staged) -> tuple[Footer, bool]:
    return _create(dataset, shard, *_parquet_of(dataset, shard, there))


def _create(
    dataset: Dataset, shard: Shard, data: bytes, metadata: dict[str, str]
) -> tuple[Footer, bool]:
    url = dataset.data_url(shard.id)
    headers = {
        k.replace("vitray.", "vitray-").replace("_", "-"): v
        for k, v in metadata.items()
        if _IN_HEADER.fullmatch(v)
    }
    headers["vitray-sha256"] = hashlib.sha256(data).hexdigest()
    mine = _footer(metadata)
    crash_point("commit-written", shard.id)
    lost: StorageError | None = None
    try:
        if store_for(url).create(url, data, headers):
            return mine, False
    except StorageError as error:
        lost = error  # the answer may be what was lost: look
    winner = _look(dataset, shard.id)
    if winner is None:
        raise lost or CommitError(f"{url}: the create was refused but nothing is there. Run again.")
    if winner.write_id == mine.write_id:
        return mine, False
    if (winner.total, winner.truncated_at) != (mine.total, mine.truncated_at):
        raise CommitError(
            f"{url}: another run committed {winner.total} images (cut at {winner.truncated_at}), "
            f"this one saw {mine.total} (cut at {mine.truncated_at}). Check the input, then "
            f"`vitray redo --shard {shard.id}`."
        )
    if winner.errors != mine.errors:
        log.warning(
            "%s: another run committed %d errors, this one saw %d; the first stays",
            shard.id,
            winner.errors,
            mine.errors,
        )
    return winner, True


def parquet_of(
    dataset: Dataset, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> tuple[bytes, dict[str, str]]:
    """Tables of rows as one Parquet file, and `metadata`: what its footer says, asked for when all
    rows are written.

    It grows on the scratch disk, without a name there, so that a death leaves nothing.
    """
    try:
        number, name = tempfile.mkstemp(prefix="vitray-")
        with open(number, "rb") as scratch:
            said = _write_parquet(dataset, Path(name), tables, metadata)
            return scratch.read(), said
    except OSError as error:
        raise StorageError(
            f"scratch disk {tempfile.gettempdir()}: {error}. Free space there or set TMPDIR."
        ) from error


def _write_parquet(
    dataset: Dataset, path: Path, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> dict[str, str]:
    schema, vectors = dataset.schema, {v.column for v in dataset.vectors}
    held = list[pa.Table]()
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
            held.append(table.select(schema.names).cast(schema))
            if sum(t.num_rows for t in held) >= ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP_ROWS)
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP_ROWS)
        said = metadata()
        writer.add_key_value_metadata(said)
    return said


def _parquet_of(dataset: Dataset, shard: Shard, there: Staged) -> tuple[bytes, dict[str, str]]:
    """A shard's fragments as its data file, and what the footer says, as text."""
    errors, digest, end = list[pa.Table](), RowsDigest(), there.ends[0]
    left_out = Counter(end.left_out)

    def rows() -> Iterator[pa.Table]:
        for start, stop in there.ranges():
            fragment = read_fragment(dataset, shard.id, start, stop)
            if fragment is None:
                raise ObjectMissing(
                    f"{shard.id}: fragment {start}-{stop} is damaged"
                )  # the next reader makes it anew
            good = fragment.rows.select(dataset.schema.names).cast(dataset.schema)
            errors.append(fragment.errors)
            left_out.update(fragment.left_out)
            digest.add(good)
            yield good

    def metadata() -> dict[str, str]:
        error_rows = pa.concat_tables(errors or [ERROR_SCHEMA.empty_table()])
        return _metadata(dataset, shard, replace(end, left_out=dict(left_out)), digest, error_rows)

    return parquet_of(dataset, rows(), metadata)


def _metadata(
    dataset: Dataset, shard: Shard, end: End, digest: RowsDigest, errors: pa.Table
) -> dict[str, str]:
    metadata = {
        "write_id": uuid.uuid4().hex,
        "fingerprint": dataset.fingerprint,
        "shard": shard.id,
        "url": shard.url,
        "source_version": shard.version,
        "rows": digest.rows,
        "errors": errors.num_rows,
        "truncated_at": end.truncated_at,
        "rows_sha256": digest.hexdigest(),
        "reasons": json.dumps(
            {
                item["values"]: item["counts"]
                for item in pc.value_counts(errors["reason"]).to_pylist()
            }
        ),
        "left_out": json.dumps(end.left_out) if end.left_out else "",
        "image_members": json.dumps(end.image_members) if end.image_members else "",
        "source_rules": dataset.job.rules,
        "key_column": dataset.job.key_column,
        # base64: footer values are text to other readers of Parquet
        "error_rows": base64.b64encode(ipc_bytes(errors, "zstd")).decode()
        if errors.num_rows
        else "",
        **{name: getattr(dataset.spec, name) for name in _SPEC_FIELDS},
        "id2label_sha256": dataset.spec.labels_sha256(),
        "decode": dataset.job.decode,
        "version": __version__,
    }
    return {
        f"vitray.{name}": "" if value is None else str(value) for name, value in metadata.items()
    }


def _footer(metadata: dict[str, str]) -> Footer:
    get = {name.removeprefix("vitray."): value for name, value in metadata.items()}
    return Footer(
        **{name: get[name] for name in _TEXTS},
        rows=int(get["rows"]),
        errors=int(get["errors"]),
        truncated_at=int(get["truncated_at"]) if get["truncated_at"] else None,
        reasons=json.loads(get["reasons"]),
        error_rows=ipc_table(base64.b64decode(get["error_rows"]))
        if get["error_rows"]
        else ERROR_SCHEMA.empty_table(),
        left_out=json.loads(
            get.get("left_out") or "{}"
        ),  # files written before December 2026 have neither
        image_members=json.loads(get.get("image_members") or "{}"),
        source_rules=int(get.get("source_rules") or 1),
        key_column=get.get("key_column") or None,
    )
