"""The commit: the fragments of a shard become its one data file, by one conditional create.

The protocol, in the order of the code:
1. Require fragments that cover the shard.
2. Look at the input again.
3. Write the file on the scratch disk.
   Rows with removed keys stay out of it.
4. Create the object. If it is refused, or no answer comes, look which run created it.
5. Write the file of error rows. Then take out keys that were removed meanwhile, also from it.
6. Delete the staging.

Nothing looks for a data file before the create, which is refused where one exists. Where a step
before it fails, a data file that exists counts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import pyarrow as pa

from vitray.crash import crash_point
from vitray.dataset.data_file import object_metadata, parquet_of, write_errors
from vitray.dataset.footer import Footer, ShardInput, footer_metadata, parse_footer, read_footer
from vitray.dataset.identity import Dataset
from vitray.dataset.removal import drop_rows
from vitray.dataset.removed_keys import (
    Fragment,
    RemovedKeys,
    recent_removed_keys,
    removed_keys,
)
from vitray.dataset.row_digest import RowsDigest
from vitray.dataset.staging import (
    Staged,
    drop_staging,
    list_staged,
    read_fragment,
    require_span,
)
from vitray.errors import CommitError, ObjectChanged, ObjectMissing, StorageError, count
from vitray.schema import ERROR_SCHEMA, End, Shard, ShardKind
from vitray.storage import exists, is_local, store_for

log = logging.getLogger(__name__)

LOOK_THREADS = 16


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


def commit_shard(dataset: Dataset, shard: Shard) -> Commit | None:
    """Make the shard's data file exist from its staged fragments, or adopt the existing one.

    None: fragments are missing; plan the shard again. Raises CommitError for an existing file that
    this job could not have written, ObjectChanged when the input is no longer the planned version.
    """
    # without fragments, another run may have committed the shard and deleted them
    result = _commit_staged(dataset, shard) or _find_adopted(dataset, shard.id)
    if result is None:
        return None
    return _finished(dataset, *result, staged=True)


def commit_whole(
    dataset: Dataset,
    shard: Shard,
    rows: pa.Table,
    errors: pa.Table,
    end: End,
    *,
    left_out: dict[str, int] | None = None,
    staged: bool = False,
) -> Commit:
    """Make the data file of a shard whose rows are all in memory, or adopt the existing one.

    rows, errors: of [0, end.total), each in the order of `index`; else ValueError.
    left_out: further images of these rows, by left_out.LEFT_OUT. staged: the shard may have
    staging, which is deleted afterwards. Raises like commit_shard.
    """
    require_span(rows, errors, (0, end.total))
    # an empty shard has no fragment
    fragments = [Fragment(rows, errors, {})] if end.total else []
    counts = Counter(end.left_out)
    counts.update(left_out or {})
    whole_end = replace(end, left_out=dict(counts))
    footer, adopted = _create_or_adopt(dataset, shard, whole_end, fragments)
    return _finished(dataset, footer, adopted, staged=staged)


def uncommitted(dataset: Dataset, shard_ids: Sequence[str]) -> list[str]:
    """Those of a few shards that have no data file, by one look at each."""
    with ThreadPoolExecutor(LOOK_THREADS) as pool:
        committed = list(pool.map(exists, map(dataset.data_url, shard_ids)))
    return [shard for shard, is_committed in zip(shard_ids, committed) if not is_committed]


def _finished(dataset: Dataset, footer: Footer, adopted: bool, staged: bool) -> Commit:
    """The commit of a data file that exists, after everything else that follows from it."""
    crash_point("commit-created", footer.shard)
    write_errors(dataset, footer)
    crash_point("commit-errors", footer.shard)
    # only now: a removal that this look misses begins after the write, and repairs the error rows
    footer = _checked_again(dataset, footer)
    if staged:
        drop_staging(dataset, footer.shard)
    crash_point("commit-cleaned", footer.shard)
    return _commit_of(footer, adopted)


def find_commit(dataset: Dataset, shard_id: str) -> Commit | None:
    """The commit of a shard whose data file exists. Raises CommitError for another job's file."""
    footer = _find_committed(dataset, shard_id)
    return None if footer is None else _commit_of(footer, adopted=True)


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
    source = ShardInput(origin.shard, origin.url, origin.source_version)
    end = End(origin.total, origin.truncated_at, "", origin.left_out, origin.image_members)
    parts = chain(
        (Fragment(table, ERROR_SCHEMA.empty_table(), {}) for table in rows),
        [Fragment(pa.Table.from_batches([], dataset.schema), origin.error_rows, {})],
    )
    footer, adopted = _create_data_file(dataset, source, end, parts)
    return _finished(dataset, footer, adopted, staged=False)


def _find_committed(dataset: Dataset, shard_id: str) -> Footer | None:
    """The footer of the shard's data file; None without one. CommitError for another job's file."""
    try:
        footer = read_footer(dataset.data_url(shard_id))
    except ObjectMissing:
        return None
    if footer.fingerprint != dataset.fingerprint or footer.shard != shard_id:
        raise CommitError(
            f"{dataset.data_url(shard_id)} exists with fingerprint {footer.fingerprint[:8]}… "
            f"(this job: {dataset.fingerprint[:8]}…). "
            "Choose another `out`, or move that file away."
        )
    return footer


def _find_adopted(dataset: Dataset, shard_id: str) -> tuple[Footer, bool] | None:
    """Like _commit_staged, from a data file that another run or an earlier attempt made."""
    footer = _find_committed(dataset, shard_id)
    return None if footer is None else (footer, True)


def _commit_staged(dataset: Dataset, shard: Shard) -> tuple[Footer, bool] | None:
    """The data file's footer, and whether another run or an earlier attempt made it.

    None: fragments are missing or damaged, or disappeared while they were read.
    """
    parts = list_staged(dataset, shard.id)
    if len(parts.ends) > 1:  # its readers disagreed: start over
        drop_staging(dataset, shard.id)
    if not parts.covers():
        return None
    try:
        fragments = _read_fragments(dataset, shard.id, parts)
        return _create_or_adopt(dataset, shard, parts.ends[0], fragments)
    except ObjectMissing:
        return None


def _read_fragments(dataset: Dataset, shard_id: str, parts: Staged) -> Iterator[Fragment]:
    """The staged fragments in order. Raises ObjectMissing for one that is damaged or absent."""
    for start, stop in parts.ranges():
        fragment = read_fragment(dataset, shard_id, start, stop)
        if fragment is None:  # the next reader makes it again
            raise ObjectMissing(f"{shard_id}: fragment {start}-{stop} is damaged")
        yield fragment


def _create_or_adopt(
    dataset: Dataset, shard: Shard, end: End, fragments: Iterable[Fragment]
) -> tuple[Footer, bool]:
    """The footer of the shard's data file, and whether another run or an earlier attempt made it.

    Raises ObjectChanged where the input is no longer the planned version and no file exists.
    """
    try:
        _require_same_input(shard)
    except ObjectChanged:
        if result := _find_adopted(dataset, shard.id):
            return result
        raise
    source = ShardInput(shard.id, shard.url, shard.version)
    return _create_data_file(dataset, source, end, fragments)


def _create_data_file(
    dataset: Dataset, source: ShardInput, end: End, fragments: Iterable[Fragment]
) -> tuple[Footer, bool]:
    """The footer that counts, and whether another run made the file."""
    removed = recent_removed_keys(dataset.out)
    data, metadata = _parquet_of(dataset, source, end, fragments, removed)
    return create_data_file(dataset, data, metadata)


def _checked_again(dataset: Dataset, footer: Footer) -> Footer:
    """The footer of a data file that exists, without keys that were removed meanwhile.

    A removal stores its keys before it lists data files. So either it sees this file, or the file
    is changed here. Its file of error rows follows.
    """
    removed = removed_keys(dataset.out)
    if footer.removals >= removed.lists:
        return footer
    return drop_rows(dataset, footer.shard, removed).footer or footer


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
        if store_for(url).create(url, data, object_metadata(data, metadata)):
            return own_footer, False
    except StorageError as error:
        failure = error  # the object may exist, and only the answer be lost: look
    footer = _find_committed(dataset, shard_id)
    if footer is None:
        raise failure or CommitError(
            f"{url}: the store refused to create it, but it does not exist. Run again."
        )
    if footer.write_id == own_footer.write_id:
        return own_footer, False
    _require_equal_totals(url, footer, own_footer)
    return footer, True


def _require_equal_totals(url: str, committed: Footer, own: Footer) -> None:
    """Raises CommitError where another run saw another number of images, or another end."""
    if (committed.total, committed.truncated_at) != (own.total, own.truncated_at):
        raise CommitError(
            f"{url}: another run committed {count(committed.total, 'image')} (cut at "
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


def _parquet_of(
    dataset: Dataset,
    source: ShardInput,
    end: End,
    fragments: Iterable[Fragment],
    removed: RemovedKeys,
) -> tuple[bytes, dict[str, str]]:
    """A shard's fragments as its data file, and the metadata of the footer."""
    errors = list[pa.Table]()
    digest = RowsDigest()
    left_out = Counter(end.left_out)

    def rows() -> Iterator[pa.Table]:
        for fragment in map(removed.filter, fragments):
            good = fragment.rows.select(dataset.schema.names).cast(dataset.schema)
            errors.append(fragment.errors)
            left_out.update(fragment.left_out)
            digest.add(good)
            yield good

    def metadata() -> dict[str, str]:
        # one chunk: the footer does not show how the rows were split into fragments
        error_rows = pa.concat_tables(errors or [ERROR_SCHEMA.empty_table()]).combine_chunks()
        whole_end = replace(end, left_out=dict(left_out))
        return footer_metadata(
            dataset, source, whole_end, digest, error_rows, removals=removed.lists
        )

    return parquet_of(dataset, rows(), metadata)
