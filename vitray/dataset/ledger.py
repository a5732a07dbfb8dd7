"""What is committed and what is pending: the manifest, _SUCCESS.json, redo and clean.

data/ is the truth; everything here is derived from it and can be made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from vitray.crash import crash_point
from vitray.dataset.data_file import repair_errors
from vitray.dataset.files import parquet_bytes, read_parquet, under
from vitray.dataset.footer import Footer, read_footer
from vitray.dataset.identity import Dataset
from vitray.dataset.layout import (
    MANIFEST_PREFIX,
    data_folder,
    data_path,
    internal_url,
    manifest_url,
    shard_of,
    success_url,
)
from vitray.dataset.leases import drop_abandoned_leases
from vitray.dataset.reconcile import Actions, FileState, reconcile
from vitray.dataset.removal import drop_rows
from vitray.dataset.removed_keys import removed_keys
from vitray.dataset.scratch_space import drop_scratch
from vitray.dataset.staging import drop_staging, staged_shards
from vitray.errors import (
    CommitError,
    FingerprintError,
    JobError,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    count,
)
from vitray.schema import ERROR_SCHEMA
from vitray.storage import ObjectInfo, exists, is_local, read, sha256_of, store_for

THREADS = 16
ATTEMPTS = 4  # when another run changes what this one reads
T = TypeVar("T")
# of a Footer, as JSON; manifests written before December 2026 have neither
COUNTS = ("left_out", "image_members")
MANIFEST_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("shard", "url", "source_version", "path", "etag")]
    + [(name, pa.int64()) for name in ("size_bytes", "rows", "errors", "truncated_at")]
    + [(name, pa.string()) for name in ("sha256", "state", *COUNTS)]
)


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """The outcome of a manifest step.

    truncated: {shard: byte at which it was cut}. pending: planned shards without a data file.
    gone: inputs no longer listed. pruned: {shard: images} of the files that prune removed.
    left_out: images of committed shards without a row, by left_out.LEFT_OUT.
    """

    shards: int
    rows: int
    errors: int
    truncated: dict[str, int]
    pending: int
    gone: int
    pruned: dict[str, int]
    manifest: str
    left_out: dict[str, int]


def committed_files(out: str) -> dict[str, ObjectInfo]:
    """Every data file, by shard id."""
    return {
        shard_of(info.url): info
        for info in under(data_folder(out))
        if info.url.endswith(".parquet")
    }


def error_files(dataset: Dataset) -> list[str]:
    """The URL of every file of error rows."""
    return [info.url for info in _error_files(dataset).values()]


def is_marked_complete(out: str) -> bool:
    """Whether _SUCCESS.json exists: nothing was pending after the last run."""
    return exists(success_url(out))


def success_manifest(out: str) -> str:
    """The name of the manifest in _SUCCESS.json.

    Raises ObjectMissing where the file is absent; ValueError, KeyError or TypeError where it is
    damaged.
    """
    name: str = json.loads(read(success_url(out)))["manifest"]
    return name


def read_manifest(out: str) -> pa.Table | None:
    """The manifest that _SUCCESS.json names, else the latest one; None without any."""

    def look() -> pa.Table | None:
        info = _manifest_info(out)
        return None if info is None else read_parquet(info.url)

    return _again(look)


def write_manifest(
    dataset: Dataset,
    list_ids: Callable[[], tuple[Sequence[str], Sequence[str]]],
    prune: bool = False,
    agreed: Container[str] | None = None,
    fresh: Container[str] = (),
) -> ManifestSummary:
    """The manifest step.

    list_ids: lists the source now: every shard id, and those of them that `limit` leaves.
    agreed: with prune, the only data files to delete because their input is gone; None for all.
    fresh: ids of data files that the last manifest cannot contain, even if a clock says otherwise.

    Removes superseded files and, with prune, those whose input is gone; repairs error files; writes
    the manifest and _SUCCESS.json. Writes nothing that exists already. Starts over when another
    run commits or removes something meanwhile.
    """
    return _again(lambda: _write_manifest_once(dataset, list_ids, prune, agreed, fresh))


def _again(work: Callable[[], T]) -> T:
    """The result of `work`, which starts over when another run removes what it reads."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except ObjectMissing:
            if attempt == ATTEMPTS:
                raise
    raise AssertionError


def _write_manifest_once(
    dataset: Dataset,
    list_ids: Callable[[], tuple[Sequence[str], Sequence[str]]],
    prune: bool,
    agreed: Container[str] | None,
    fresh: Container[str],
) -> ManifestSummary:
    crash_point("manifest-started")
    removals = _drop_removed_rows(dataset)
    seen = committed_files(dataset.out)  # before the listing: no other file may be removed
    listed, planned = list_ids()
    error_files = _error_files(dataset)  # before the data files: they are written after them
    existing = committed_files(dataset.out)
    actions = reconcile(listed, planned, existing.keys(), seen.keys(), prune, agreed)
    if actions.unlisted:
        raise ObjectMissing(
            f"{dataset.out}: another run committed {min(actions.unlisted)}, which was not listed. "
            "Run the same command again."
        )
    old_manifests = _manifests(dataset.out)
    pruned = count_rows(dataset, actions.pruned)
    _delete_data(dataset, actions.delete)
    last = _last_manifest(dataset.out)
    rows = _manifest_rows(dataset, last, existing, actions.admit, fresh)
    _repair_error_files(dataset, {row["shard"] for row in rows if row["errors"]}, error_files)
    summary = _summary_of(rows, _store_manifest(dataset, last, rows), actions, pruned)
    crash_point("manifest-written")
    _mark_or_unmark(dataset, summary, actions.pending)
    if removals:
        _require_same_files(dataset, {shard: existing[shard] for shard in actions.admit})
    crash_point("manifest-marked")
    current = manifest_url(dataset.out, summary.manifest)
    store_for(dataset.out).delete(info.url for info in old_manifests if info.url != current)
    # of a run that was slower than another
    for shard in set(staged_shards(dataset)) & existing.keys():
        drop_staging(dataset, shard)
    return summary


def _drop_removed_rows(dataset: Dataset) -> int:
    """Take removed keys out of data files that the last manifest does not contain.

    A run that was killed right after a create may leave some. Returns the number of lists of
    removed keys.
    """
    removed = removed_keys(dataset.out)
    if removed.lists:
        data = committed_files(dataset.out)
        unchecked = data.keys() - _unchanged_rows(_last_manifest(dataset.out), data).keys()
        _of_each(unchecked, lambda shard: drop_rows(dataset, shard, removed))
    return removed.lists


def _require_same_files(dataset: Dataset, expected: Mapping[str, ObjectInfo]) -> None:
    """Raises ObjectMissing where a removal rewrote a data file of the new manifest."""
    now = committed_files(dataset.out)
    if changed := [shard for shard in expected if now.get(shard) != expected[shard]]:
        raise ObjectMissing(
            f"{dataset.data_url(changed[0])} was rewritten meanwhile. Run the same command again."
        )


def refresh_manifest(dataset: Dataset) -> None:
    """The manifest, the error files and _SUCCESS.json, after data files were rewritten.

    Which files count, and whether the dataset is complete, stay as they are; without a manifest
    nothing is written. Reads no source.
    """
    for _ in range(ATTEMPTS):
        with contextlib.suppress(ObjectMissing):  # another command deleted what this one reads
            if _refresh_manifest_once(dataset):
                return
    raise StorageError(
        f"{dataset.out}: other commands keep writing its manifest. Run the same command again."
    )


def _refresh_manifest_once(dataset: Dataset) -> bool:
    """False: a run wrote _SUCCESS.json meanwhile."""
    success = _info(success_url(dataset.out))
    old_manifests = _manifests(dataset.out)
    manifest = read_manifest(dataset.out)
    if manifest is None:
        return True
    error_files = _error_files(dataset)
    data = committed_files(dataset.out)
    states = {
        row["shard"]: FileState(row.get("state") or FileState.CURRENT)
        for row in manifest.to_pylist()
        if row["shard"] in data
    }
    last = _last_manifest(dataset.out)
    rows = _manifest_rows(dataset, last, data, states, ())
    with_errors = {row["shard"] for row in rows if row["errors"]}
    # not those of data files that the next run adds to the manifest
    repairable = {
        shard: info for shard, info in error_files.items() if shard in states or shard not in data
    }
    _repair_error_files(dataset, with_errors, repairable)
    nothing = frozenset[str]()
    actions = Actions(
        unlisted=nothing, delete=nothing, pruned=nothing, admit=states, pending=nothing
    )
    summary = _summary_of(rows, _store_manifest(dataset, last, rows), actions, {})
    if success is not None:
        body = _success_document(dataset, summary)
        try:
            is_same = read(success.url, success.version) == body
        except (ObjectChanged, ObjectMissing):
            return False
        store = store_for(success.url)
        if not is_same and not store.replace_version(success.url, success.version, body):
            return False
    current = manifest_url(dataset.out, summary.manifest)
    store_for(dataset.out).delete(info.url for info in old_manifests if info.url != current)
    return True


def _info(url: str) -> ObjectInfo | None:
    try:
        return store_for(url).stat(url)
    except ObjectMissing:
        return None


def _delete_data(dataset: Dataset, shards: Collection[str]) -> None:
    if not shards:
        return
    unmark_success(dataset.out)
    store = store_for(dataset.out)
    store.delete(dataset.data_url(shard) for shard in sorted(shards))
    store.delete(dataset.errors_url(shard) for shard in sorted(shards))


def _store_manifest(
    dataset: Dataset, last: _LastManifest | None, rows: list[dict[str, Any]]
) -> str:
    """The name of the manifest with these rows; the same rows have the same name.

    The last manifest stays if it has them. To write one, pyarrow imports pandas where that is
    installed, which takes longer than all else in a run with nothing to do.
    """
    if last is not None and last.rows == rows and exists(last.info.url):
        return last.info.url.rpartition("/")[2]
    body = parquet_bytes(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    name = f"{MANIFEST_PREFIX}{hashlib.sha256(body).hexdigest()[:16]}.parquet"
    _replace_if_different(manifest_url(dataset.out, name), body)
    return name


def count_rows(dataset: Dataset, shards: Iterable[str]) -> dict[str, int]:
    """The number of images, good and bad, in these data files, by shard id."""
    footers = footers_of(dataset, shards)
    return {shard: footer.rows + footer.errors for shard, footer in footers.items()}


def _summary_of(
    rows: list[dict[str, Any]], manifest: str, actions: Actions, pruned: dict[str, int]
) -> ManifestSummary:
    return ManifestSummary(
        shards=len(rows),
        rows=sum(row["rows"] for row in rows),
        errors=sum(row["errors"] for row in rows),
        truncated={
            row["shard"]: row["truncated_at"] for row in rows if row["truncated_at"] is not None
        },
        pending=len(actions.pending),
        gone=actions.gone,
        pruned=pruned,
        manifest=manifest,
        left_out=total_counts(row["left_out"] for row in rows),
    )


def _mark_or_unmark(dataset: Dataset, summary: ManifestSummary, pending: frozenset[str]) -> None:
    if not pending:
        _mark_success(dataset, summary)
    elif pending - committed_files(dataset.out).keys():  # another run may have committed meanwhile
        unmark_success(dataset.out)


def total_counts(texts: Iterable[str | None]) -> dict[str, int]:
    """The sum of counts by name. texts: as the manifest stores them, JSON or null."""
    total = Counter[str]()
    for text in texts:
        total.update(json.loads(text or "{}"))
    return dict(total)


def footers_of(dataset: Dataset, shards: Iterable[str]) -> dict[str, Footer]:
    """The footers of data files, by shard id, without their error rows.

    The error rows of a large dataset may not fit into memory.
    """

    def footer_of(shard: str) -> Footer:
        footer = read_footer(dataset.data_url(shard))
        return replace(footer, error_rows=ERROR_SCHEMA.empty_table())

    return _of_each(shards, footer_of)


def _of_each(shards: Iterable[str], work: Callable[[str], T]) -> dict[str, T]:
    """The result of `work` for each shard, computed by several threads."""
    names = sorted(shards)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(work, names)))


def require_own(dataset: Dataset, footers: Mapping[str, Footer]) -> None:
    """Require that data files belong to this dataset and to the shards that name them.

    Raises FingerprintError for a file of another dataset, CommitError for a renamed one.
    """
    foreign = [
        name for name, footer in footers.items() if footer.fingerprint != dataset.fingerprint
    ]
    if foreign:
        raise FingerprintError(
            f"{data_folder(dataset.out)} holds {count(len(foreign), 'file')} of another job "
            f"(fingerprint {footers[foreign[0]].fingerprint[:8]}…, "
            f"this job: {dataset.fingerprint[:8]}…), such as {foreign[0]}.parquet. "
            "Choose another `out`, or move them away."
        )
    for name, footer in footers.items():
        if footer.shard != name:
            raise CommitError(
                f"{dataset.data_url(name)} holds shard {footer.shard}: it was renamed. "
                "Delete it and run again."
            )


def require_own_data_files(dataset: Dataset, most_footers: int | None = None) -> None:
    """Require, before any work, that all data files are this dataset's. Raises like require_own.

    Footers are read only of files that the last manifest does not contain, and at most as many.
    """
    data = committed_files(dataset.out)
    manifest_rows = _unchanged_rows(_last_manifest(dataset.out), data)
    unlisted = [shard for shard in data if shard not in manifest_rows]
    require_own(dataset, footers_of(dataset, unlisted[:most_footers]))


def require_own_remaining_files(dataset: Dataset) -> None:
    """Like require_own_data_files, while another command may delete the files of this dataset."""
    data = committed_files(dataset.out)
    manifest_rows = _unchanged_rows(_again(lambda: _last_manifest(dataset.out)), data)

    def footer_of(shard: str) -> Footer | None:
        try:
            return read_footer(dataset.data_url(shard))
        except ObjectMissing:
            return None

    footers = _of_each(data.keys() - manifest_rows.keys(), footer_of)
    require_own(dataset, {shard: footer for shard, footer in footers.items() if footer})


def unmark_success(out: str) -> None:
    """Delete _SUCCESS.json, which exists exactly while nothing is pending."""
    if is_marked_complete(out):
        store_for(out).delete([success_url(out)])


def shards_to_redo(dataset: Dataset, shards: Iterable[str], reasons: Iterable[str]) -> list[str]:
    """The ids of these shards, and of all others that have an error with one of these reasons.

    Raises JobError for a shard without a data file. delete_data_files() deletes the files.
    """
    existing = committed_files(dataset.out).keys()
    chosen = set(shards)
    causes = set(reasons)
    if unknown := chosen - existing:
        raise JobError(
            f"{dataset.out} holds no shard {', '.join(sorted(unknown))}. "
            "Ids are the names in data/ without .parquet."
        )
    footers = footers_of(dataset, existing - chosen if causes else ())
    with_cause = {shard for shard, footer in footers.items() if causes & footer.reasons.keys()}
    return sorted(chosen | with_cause)


def delete_data_files(dataset: Dataset, shards: Iterable[str]) -> None:
    """Delete data files, so that the next run makes them again."""
    unmark_success(dataset.out)
    store_for(dataset.out).delete(info.url for info in _manifests(dataset.out))
    for shard in shards:
        store_for(dataset.out).delete([dataset.data_url(shard), dataset.errors_url(shard)])


def clean(dataset: Dataset, listed: Iterable[str]) -> list[str]:
    """Delete what no run needs any more; returns the names.

    That is the staging of shards that are committed or no longer listed, and the files of killed
    processes.
    """
    pending = set(listed) - committed_files(dataset.out).keys()
    orphans = [shard for shard in staged_shards(dataset) if shard not in pending]
    for shard in orphans:
        drop_staging(dataset, shard)
    half_written = store_for(dataset.out).abandoned(dataset.out)
    store_for(dataset.out).delete(half_written)
    urls = [*drop_scratch(dataset.out), *drop_abandoned_leases(dataset.out), *half_written]
    return orphans + [url.removeprefix(dataset.out + "/") for url in urls]


def _manifest_rows(
    dataset: Dataset,
    last: _LastManifest | None,
    data: Mapping[str, ObjectInfo],
    states: Mapping[str, FileState],
    fresh: Container[str],
) -> list[dict[str, Any]]:
    """One row per admitted data file, in the order of shard ids.

    A row comes from the last manifest where the file is unchanged, else from the file's footer.
    """
    rows = _unchanged_rows(last, {s: data[s] for s in states if s not in fresh})
    footers = footers_of(dataset, states.keys() - rows.keys())
    require_own(dataset, footers)
    rows |= _of_each(footers, lambda shard: _row(data[shard], footers[shard]))
    return [
        {**dict.fromkeys(COUNTS), **rows[shard], "state": states[shard].value}
        for shard in sorted(rows)
    ]


def unchanged_counts(dataset: Dataset) -> dict[str, int]:
    """Good rows by the path of the data file, of files that are as the last manifest says."""
    rows = _unchanged_rows(_last_manifest(dataset.out), committed_files(dataset.out))
    return {row["path"]: row["rows"] for row in rows.values()}


@dataclass(frozen=True, slots=True)
class _LastManifest:
    """The last manifest: its object and its rows."""

    info: ObjectInfo
    rows: list[dict[str, Any]]


def _last_manifest(out: str) -> _LastManifest | None:
    info = _manifest_info(out)
    return None if info is None else _LastManifest(info, read_parquet(info.url).to_pylist())


def _unchanged_rows(
    last: _LastManifest | None, data: Mapping[str, ObjectInfo]
) -> dict[str, dict[str, Any]]:
    """The last manifest's rows of the data files that have not changed since, by shard id."""
    if last is None:
        return {}
    rows = {row["shard"]: row for row in last.rows}
    return {s: row for s, row in rows.items() if s in data and _is_same(row, data[s], last.info)}


def _is_same(row: dict[str, object], info: ObjectInfo, manifest: ObjectInfo) -> bool:
    """Whether a data file is unchanged since the manifest; on a local disk: older than it."""
    same = _is_older(info, manifest) if is_local(info.url) else row["etag"] == info.version
    return same and row["size_bytes"] == info.size


def _modified_ns(info: ObjectInfo) -> int:
    return int(info.version.rpartition("-")[2])


def _row(info: ObjectInfo, footer: Footer) -> dict[str, object]:
    return {
        **manifest_row(footer),
        "path": data_path(footer.shard),
        "etag": "" if is_local(info.url) else info.version,  # a local version is a time
        "size_bytes": info.size,
        "sha256": sha256_of(info.url),
    }


def manifest_row(footer: Footer) -> dict[str, Any]:
    """The manifest's row of a data file, as far as the footer alone decides it."""
    names = ("shard", "url", "source_version", "rows", "errors", "truncated_at")
    values = {name: getattr(footer, name) for name in names}
    return values | {name: json.dumps(getattr(footer, name)) for name in COUNTS}


def _repair_error_files(
    dataset: Dataset, needed: set[str], existing: Mapping[str, ObjectInfo]
) -> None:
    """Write the missing files of error rows, repair different ones, and delete superfluous ones.

    needed: admitted shards with errors. existing: the files, by shard, before the data files were
    listed. Files older than the last manifest were compared when that was written.
    """
    manifest = _manifest_info(dataset.out) if existing else None
    compared = set[str]()
    if manifest is not None:
        compared = {shard for shard, info in existing.items() if _is_older(info, manifest)}
    _of_each(
        needed - compared,
        lambda shard: repair_errors(dataset, read_footer(dataset.data_url(shard))),
    )
    superfluous = sorted(existing.keys() - needed)
    store_for(dataset.out).delete(dataset.errors_url(shard) for shard in superfluous)


def _error_files(dataset: Dataset) -> dict[str, ObjectInfo]:
    """Every file of error rows, by shard id."""
    infos = under(dataset.out, dataset.errors_folder)
    return {shard_of(info.url): info for info in infos if info.url.endswith(".parquet")}


def _is_older(info: ObjectInfo, manifest: ObjectInfo) -> bool:
    """Whether an object was written before the manifest, by the clock of the store."""
    if is_local(info.url):
        return _modified_ns(info) < _modified_ns(manifest)
    if info.modified is None or manifest.modified is None:
        return False
    return info.modified < manifest.modified


def _mark_success(dataset: Dataset, summary: ManifestSummary) -> None:
    _replace_if_different(success_url(dataset.out), _success_document(dataset, summary))


def _success_document(dataset: Dataset, summary: ManifestSummary) -> bytes:
    document = {
        **asdict(summary),
        "truncated": len(summary.truncated),
        "fingerprint": dataset.fingerprint,
    }
    for name in ("pending", "pruned"):  # of the run, not of the dataset
        del document[name]
    return json.dumps(document, indent=1).encode()


def _replace_if_different(url: str, body: bytes) -> None:
    """Make an object hold these bytes; writes nothing when it does already."""
    if not exists(url) or read(url) != body:
        store_for(url).replace(url, body)


def _manifests(out: str) -> list[ObjectInfo]:
    """Every manifest: one, or two where a manifest step was killed.

    Folders are left out: the names in them come from inputs.
    """
    prefix = internal_url(out, MANIFEST_PREFIX)
    return [
        info
        for info in under(internal_url(out))
        if info.url.startswith(prefix) and "/" not in info.url.removeprefix(prefix)
    ]


def _manifest_info(out: str) -> ObjectInfo | None:
    """The manifest that _SUCCESS.json names, else the last one."""
    manifests = _manifests(out)
    try:
        named_url = manifest_url(out, success_manifest(out))
    except (ObjectMissing, ValueError, KeyError, TypeError):
        named_url = ""  # absent or damaged: the next run writes it
    # a manifest step that was killed can leave two, or a name without its manifest
    latest = manifests[-1] if manifests else None
    return next((info for info in manifests if info.url == named_url), latest)
