"""What is committed and what is left: the manifest, _SUCCESS.json, redo and clean.

data/ is the truth; everything here is derived from it and can be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from vitray.crash import crash_point
from vitray.dataset.commit import Footer, read_footer, repair_errors
from vitray.dataset.files import parquet_bytes, read_parquet, under
from vitray.dataset.identity import Dataset
from vitray.dataset.staging import drop_staging, staged_shards
from vitray.errors import CommitError, FingerprintError, JobError, ObjectMissing
from vitray.schema import ERROR_SCHEMA
from vitray.storage import (
    ObjectInfo,
    drop_scratch,
    exists,
    is_local,
    join,
    read,
    sha256_of,
    store_for,
)

THREADS = 16
LOOKS = 4  # when another run changes what this one reads
T = TypeVar("T")
COUNTS = (
    "left_out",
    "image_members",
)  # of a Footer, as JSON; manifests written before December 2026 have neither
MANIFEST_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("shard", "url", "source_version", "path", "etag")]
    + [(name, pa.int64()) for name in ("size_bytes", "rows", "errors", "truncated_at")]
    + [(name, pa.string()) for name in ("sha256", "state", *COUNTS)]
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The outcome of a manifest step.

    truncated: {shard: byte at which it was cut}. pending: planned shards without a data file.
    gone: inputs no longer listed. left_out: what the committed shards have no row for, by
    left_out.LEFT_OUT.
    """

    shards: int
    rows: int
    errors: int
    truncated: dict[str, int]
    pending: int
    gone: int
    manifest: str
    left_out: dict[str, int]


def committed(out: str) -> dict[str, ObjectInfo]:
    """Every data file, by shard id."""
    return {
        shard_of(info.url): info for info in under(out, "data") if info.url.endswith(".parquet")
    }


def read_manifest(out: str) -> pa.Table | None:
    """The manifest that _SUCCESS.json names, else the one there is; None when there is none."""

    def look() -> pa.Table | None:
        info = _manifest_info(out)
        return None if info is None else read_parquet(info.url)

    return _again(look)


def finish(
    dataset: Dataset,
    list_ids: Callable[[], tuple[Sequence[str], Sequence[str]]],
    prune: bool = False,
    fresh: Container[str] = (),
) -> Ledger:
    """The manifest step. list_ids: lists the source now: every shard id, and those of them that
    `limit` leaves.

    fresh: ids of data files that the last manifest cannot have seen, whatever a clock says.

    Removes superseded files and, with prune, those whose input is gone; repairs error files; writes
    the manifest and _SUCCESS.json. Writes nothing that is there already. Begins again when another
    run commits or removes something meanwhile.
    """
    return _again(lambda: _finish(dataset, list_ids, prune, fresh))


def _again(work: Callable[[], T]) -> T:
    """What `work` says; it begins again when another run removes what it reads."""
    for left in reversed(range(LOOKS)):
        try:
            return work()
        except ObjectMissing:
            if not left:
                raise
    raise AssertionError


def _finish(
    dataset: Dataset,
    list_ids: Callable[[], tuple[Sequence[str], Sequence[str]]],
    prune: bool,
    fresh: Container[str],
) -> Ledger:
    crash_point("manifest-started")
    seen = committed(dataset.out).keys()  # before the listing: no other may be removed
    listed, planned = list_ids()
    error_files = {
        shard_of(info.url) for info in under(dataset.out, dataset.errors_folder)
    }  # first: they are written after their data files
    data = committed(dataset.out)
    if newer := data.keys() - seen - set(listed):
        raise ObjectMissing(
            f"{dataset.out}: another run committed {min(newer)}, which was not listed. Run the "
            f"same command again."
        )
    store, before = store_for(dataset.out), _directly_in_vitray(dataset.out, "manifest-")
    wanted, pending = set(listed), set(planned) - data.keys()
    bases = {base_of(s) for s in listed}
    waiting = {base_of(s) for s in wanted - data.keys()}
    outdated = {s for s in data if s not in wanted and base_of(s) in waiting}
    gone = {s for s in data if s not in wanted and base_of(s) not in bases}
    drop = seen & (data.keys() - wanted - outdated - (set() if prune else gone))
    if drop:
        unmark_success(dataset.out)
        store.delete(dataset.data_url(s) for s in sorted(drop))
        store.delete(dataset.errors_url(s) for s in sorted(drop))
    states = (
        dict.fromkeys(data.keys() & wanted, "current")
        | dict.fromkeys(gone - drop, "gone")
        | dict.fromkeys(outdated, "outdated")
    )
    known = _known(dataset, {s: data[s] for s in states if s not in fresh})
    rows = _manifest_rows(dataset, {s: data[s] for s in states}, known, states)
    _repair_error_files(dataset, {row["shard"] for row in rows if row["errors"]}, error_files)
    body = parquet_bytes(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    name = f"manifest-{hashlib.sha256(body).hexdigest()[:16]}.parquet"
    url = join(dataset.out, "_vitray", name)
    _keep(url, body)
    crash_point("manifest-written")
    good, bad = (sum(row[column] for row in rows) for column in ("rows", "errors"))
    cuts = {row["shard"]: row["truncated_at"] for row in rows if row["truncated_at"] is not None}
    left_out = total_counts(row["left_out"] for row in rows)
    ledger = Ledger(len(rows), good, bad, cuts, len(pending), len(gone - drop), name, left_out)
    if pending and pending - committed(dataset.out).keys():  # another run may have ended meanwhile
        unmark_success(dataset.out)
    elif not pending:
        _mark_success(dataset, ledger)
    crash_point("manifest-marked")
    store.delete(info.url for info in before if info.url != url)
    for shard in set(staged_shards(dataset)) & data.keys():  # of a run that was slower than another
        drop_staging(dataset, shard)
    return ledger


def total_counts(texts: Iterable[str | None]) -> dict[str, int]:
    """The sum of counts by name, as they stand in the manifest: JSON, or nothing."""
    total = Counter[str]()
    for text in texts:
        total.update(json.loads(text or "{}"))
    return dict(total)


def footers_of(dataset: Dataset, shards: Iterable[str]) -> dict[str, Footer]:
    """The footers of data files, by shard id, without their error rows: those of a whole dataset
    may not fit into memory.
    """
    return _of_each(
        shards,
        lambda shard: replace(
            read_footer(dataset.data_url(shard)), error_rows=ERROR_SCHEMA.empty_table()
        ),
    )


def _of_each(shards: Iterable[str], work: Callable[[str], T]) -> dict[str, T]:
    names = sorted(shards)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(work, names)))


def require_own(dataset: Dataset, footers: Mapping[str, Footer]) -> None:
    """Raises FingerprintError when one of these data files is not of this dataset, CommitError when
    it is of another shard.
    """
    foreign = [
        name for name, footer in footers.items() if footer.fingerprint != dataset.fingerprint
    ]
    if foreign:
        raise FingerprintError(
            f"{dataset.out}/data holds {len(foreign)} files of another job (fingerprint "
            f"{footers[foreign[0]].fingerprint[:8]}…, "
            f"this job: {dataset.fingerprint[:8]}…), such as {foreign[0]}.parquet. Choose another "
            f"`out`, or move them away."
        )
    for name, footer in footers.items():
        if footer.shard != name:
            raise CommitError(
                f"{dataset.data_url(name)} holds shard {footer.shard}: it was renamed. Delete it "
                f"and run again."
            )


def check_data(dataset: Dataset) -> None:
    """Refuse data files that the last manifest does not know and this dataset did not make, before
    any work. Raises like require_own.
    """
    data = committed(dataset.out)
    known = _known(dataset, data)
    require_own(dataset, footers_of(dataset, [s for s in data if s not in known]))


def unmark_success(out: str) -> None:
    """_SUCCESS.json is there exactly while nothing is pending."""
    if exists(join(out, "_SUCCESS.json")):
        store_for(out).delete([join(out, "_SUCCESS.json")])


def base_of(shard_id: str) -> str:
    """What stays the same in an id when the version of its input changes; a name that is no id
    stays itself.
    """
    parts = shard_id.split("-")
    return f"{parts[0]}-{parts[-2]}" if len(parts) > 2 else shard_id


def version_of(shard_id: str) -> str:
    return shard_id.rsplit("-", 1)[-1]


def shards_to_redo(dataset: Dataset, shards: Iterable[str], reasons: Iterable[str]) -> list[str]:
    """The ids of the data files of these shards, or that hold an error with one of these reasons.
    forget() deletes them.
    """
    data, asked, causes = committed(dataset.out), set(shards), set(reasons)
    unknown = asked - data.keys()
    if unknown:
        raise JobError(
            f"{dataset.out} holds no shard {', '.join(sorted(unknown))}. Ids are the names in "
            f"data/ without .parquet."
        )
    others = footers_of(dataset, [s for s in data if causes and s not in asked])
    return sorted(
        asked | {shard for shard, footer in others.items() if causes & footer.reasons.keys()}
    )


def forget(dataset: Dataset, shards: Iterable[str]) -> None:
    """Delete data files, so that the next run makes them again."""
    unmark_success(dataset.out)
    store_for(dataset.out).delete(
        info.url for info in _directly_in_vitray(dataset.out, "manifest-")
    )
    for shard in shards:
        store_for(dataset.out).delete([dataset.data_url(shard), dataset.errors_url(shard)])


def clean(dataset: Dataset, listed: Iterable[str]) -> list[str]:
    """Delete the staging of shards that are committed or not listed any more, and what killed
    processes left; returns names.
    """
    data, wanted = committed(dataset.out), set(listed)
    orphans = [s for s in staged_shards(dataset) if s in data or s not in wanted]
    for shard in orphans:
        drop_staging(dataset, shard)
    left = store_for(dataset.out).abandoned(dataset.out)
    store_for(dataset.out).delete(left)
    return orphans + [
        url.removeprefix(dataset.out + "/") for url in [*drop_scratch(dataset.out), *left]
    ]


def _manifest_rows(
    dataset: Dataset,
    admitted: dict[str, ObjectInfo],
    known: dict[str, dict[str, Any]],
    states: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row a data file, from the last manifest where the file is the same, else from its
    footer.
    """
    footers = footers_of(dataset, admitted.keys() - known.keys())
    require_own(dataset, footers)
    rows = known | _of_each(footers, lambda shard: _row(admitted[shard], footers[shard]))
    return [
        {**dict.fromkeys(COUNTS), **rows[shard], "state": states[shard]} for shard in sorted(rows)
    ]


def _known(dataset: Dataset, data: dict[str, ObjectInfo]) -> dict[str, dict[str, Any]]:
    """The last manifest's rows of the data files that are still what it saw."""
    if (last := _manifest_info(dataset.out)) is None:
        return {}
    rows = {row["shard"]: row for row in read_parquet(last.url).to_pylist()}
    return {s: row for s, row in rows.items() if s in data and _is_same(row, data[s], last)}


def _is_same(row: dict[str, object], info: ObjectInfo, manifest: ObjectInfo) -> bool:
    """Whether a data file is the one that the manifest saw. On a local disk: it is older than the
    manifest.
    """
    same = (
        _modified_ns(info) < _modified_ns(manifest)
        if is_local(info.url)
        else row["etag"] == info.version
    )
    return same and row["size_bytes"] == info.size


def _modified_ns(info: ObjectInfo) -> int:
    return int(info.version.rpartition("-")[2])


def _row(info: ObjectInfo, footer: Footer) -> dict[str, object]:
    return {
        **manifest_row(footer),
        "path": f"data/{footer.shard}.parquet",
        "etag": "" if is_local(info.url) else info.version,  # a local version is a time
        "size_bytes": info.size,
        "sha256": sha256_of(info.url),
    }


def manifest_row(footer: Footer) -> dict[str, Any]:
    """What the manifest says of a data file by its footer alone."""
    names = ("shard", "url", "source_version", "rows", "errors", "truncated_at")
    return {name: getattr(footer, name) for name in names} | {
        name: json.dumps(getattr(footer, name)) for name in COUNTS
    }


def _repair_error_files(dataset: Dataset, should: set[str], there: set[str]) -> None:
    """The folder of error rows holds exactly the copies of what the admitted data files carry.
    there: those that it held before they were listed.
    """
    _of_each(
        should - there, lambda shard: repair_errors(dataset, read_footer(dataset.data_url(shard)))
    )
    store_for(dataset.out).delete(dataset.errors_url(s) for s in sorted(there - should))


def _mark_success(dataset: Dataset, ledger: Ledger) -> None:
    document = {
        **asdict(ledger),
        "truncated": len(ledger.truncated),
        "fingerprint": dataset.fingerprint,
    }
    del document["pending"]
    _keep(join(dataset.out, "_SUCCESS.json"), json.dumps(document, indent=1).encode())


def _keep(url: str, body: bytes) -> None:
    """Make an object hold these bytes; writes nothing when it does."""
    if not exists(url) or read(url) != body:
        store_for(url).replace(url, body)


def _directly_in_vitray(out: str, start: str) -> list[ObjectInfo]:
    """The objects OUT/_vitray/<start>..., not those in its folders, whose names come from
    inputs.
    """
    inside = join(out, "_vitray", start)
    return [
        i
        for i in under(out, "_vitray")
        if i.url.startswith(inside) and "/" not in i.url.removeprefix(inside)
    ]


def _manifest_info(out: str) -> ObjectInfo | None:
    found = _directly_in_vitray(out, "manifest-")
    try:
        named = join(out, "_vitray", json.loads(read(join(out, "_SUCCESS.json")))["manifest"])
    except (
        ObjectMissing,
        ValueError,
        KeyError,
        TypeError,
    ):  # absent or damaged: the next run writes it
        named = ""
    # a manifest step that was killed can leave two, or a name without its manifest
    return next((info for info in found if info.url == named), found[-1] if found else None)


def shard_of(url: str) -> str:
    """The id in the name of a data file."""
    return url.rsplit("/", 1)[-1].removesuffix(".parquet")
