"""What is committed and what is left: the manifest, _SUCCESS.json, the log of groups, run records, redo and clean.

data/ is the truth; everything here is derived from it and can be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.commit import Footer, read_footer, read_table, repair_errors
from vitray.dataset.identity import Dataset
from vitray.dataset.staging import drop_staging, staged_shards
from vitray.errors import FingerprintError, JobError, ObjectMissing, StorageError
from vitray.storage import ObjectInfo, exists, is_local, join, read, sha256_of, store_for

THREADS = 16
MANIFEST_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("url", pa.string()),
        ("source_version", pa.string()),
        ("path", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("truncated_at", pa.int64()),
        ("sha256", pa.string()),
        ("state", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The outcome of a manifest step. truncated: {shard: byte at which it was cut}; pending: planned shards without a data
    file; gone: inputs no longer listed.
    """

    shards: int
    rows: int
    errors: int
    truncated: dict[str, int]
    pending: int
    gone: int
    manifest: str


def committed(out: str) -> dict[str, ObjectInfo]:
    """Every data file, by shard id."""
    return {_shard_of(info.url): info for info in _under(out, "data") if info.url.endswith(".parquet")}


def read_manifest(out: str) -> pa.Table | None:
    """The manifest that _SUCCESS.json names, else the one there is; None when there is none."""
    info = _manifest_info(out)
    return None if info is None else _parquet(info)


def finish(dataset: Dataset, listed: Sequence[str], planned: Sequence[str], prune: bool = False) -> Ledger:
    """The manifest step. listed: every shard id of the current listing; planned: those of them that `limit` leaves.

    Removes superseded files and, with prune, those whose input is gone; repairs errors/; writes the manifest and
    _SUCCESS.json. Writes nothing that is there already.
    """
    store = store_for(dataset.out)
    before = _directly_in_vitray(dataset.out, "manifest-")
    data, wanted = committed(dataset.out), set(listed)
    bases, pending = {base_of(s) for s in listed}, set(planned) - data.keys()
    waiting = {base_of(shard) for shard in wanted - data.keys()}
    old = [s for s in data if s not in wanted and base_of(s) in bases and base_of(s) not in waiting]
    gone = [s for s in data if s not in wanted and base_of(s) not in bases]
    drop = old + (gone if prune else [])
    if drop:
        unmark_success(dataset.out)
        store.delete(dataset.data_url(s) for s in drop)
        store.delete(dataset.errors_url(s) for s in drop)
    admitted = {s: info for s, info in data.items() if s in wanted or (s in gone and not prune)}
    table = _manifest(dataset, admitted, wanted)
    _repair_error_files(dataset, table)
    name, body = _named(table)
    url = join(dataset.out, "_vitray", name)
    _keep(url, body)
    ledger = _totals(table, pending=len(pending), gone=0 if prune else len(gone), name=name)
    if pending:
        unmark_success(dataset.out)
    else:
        _mark_success(dataset, ledger)
    store.delete(info.url for info in before if info.url != url)
    for shard in set(staged_shards(dataset)) & data.keys():  # of a run that was slower than another
        drop_staging(dataset, shard)
    return ledger


def footers_of(dataset: Dataset, shards: Iterable[str]) -> dict[str, Footer]:
    """The footers of data files, by shard id."""
    names = list(shards)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda s: read_footer(dataset.data_url(s)), names)))


def require_own(dataset: Dataset, footers: Iterable[Footer]) -> None:
    """Raises FingerprintError when one of these data files is not of this dataset."""
    foreign = [footer for footer in footers if footer.fingerprint != dataset.fingerprint]
    if foreign:
        raise FingerprintError(
            f"{dataset.out}/data holds {len(foreign)} files of another job (fingerprint {foreign[0].fingerprint[:8]}…, this job: "
            f"{dataset.fingerprint[:8]}…), such as {foreign[0].shard}.parquet. Choose another `out`, or move them away."
        )


def unmark_success(out: str) -> None:
    """_SUCCESS.json is there exactly while nothing is pending."""
    if exists(join(out, "_SUCCESS.json")):
        store_for(out).delete([join(out, "_SUCCESS.json")])


def base_of(shard_id: str) -> str:
    """What stays the same in an id when the version of its input changes; a name that is no id stays itself."""
    parts = shard_id.split("-")
    return parts[-2] if len(parts) > 2 else shard_id


def version_of(shard_id: str) -> str:
    return shard_id.rsplit("-", 1)[-1]


def write_run_record(dataset: Dataset, run_id: str, record: dict[str, object]) -> None:
    store_for(dataset.out).create(join(dataset.out, "_vitray", "runs", f"{run_id}.json"), json.dumps(record, indent=1).encode())


def read_run_records(out: str) -> list[dict[str, object]]:
    """Every run record, oldest first."""
    return [json.loads(read(info.url)) for info in _under(out, "_vitray", "runs")]


def load_group_log(out: str) -> list[tuple[int, str]]:
    """(group number, url) of every grouped object, in the order of the log."""
    rows: list[tuple[int, str]] = []
    for info in _under(out, "_vitray", "shards"):
        table = _parquet(info)
        rows += zip(table["group"].to_pylist(), table["url"].to_pylist())
    return rows


def append_group_log(out: str, members: Sequence[tuple[int, str]]) -> bool:
    """Append new groups. False: another run appended first (a group or a URL is in the log); read it and plan again."""
    # the number of parts is read before their content: what is appended after that takes the name that we want
    name = f"{len(_under(out, '_vitray', 'shards')):06d}.parquet"
    groups, urls = zip(*members)
    known = load_group_log(out)
    if {group for group, _ in known} & set(groups) or {url for _, url in known} & set(urls):
        return False
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"group": pa.array(groups, pa.int32()), "url": pa.array(urls, pa.string())}), sink)
    return store_for(out).create(join(out, "_vitray", "shards", name), sink.getvalue().to_pybytes())


def shards_to_redo(dataset: Dataset, shards: Iterable[str], reasons: Iterable[str]) -> list[str]:
    """The ids of the data files of these shards, or that hold an error with one of these reasons. forget() deletes them."""
    data, asked, causes = committed(dataset.out), set(shards), set(reasons)
    unknown = asked - data.keys()
    if unknown:
        raise JobError(f"{dataset.out} holds no shard {', '.join(sorted(unknown))}. Ids are the names in data/ without .parquet.")
    chosen = set(asked)
    if causes:
        for shard, footer in footers_of(dataset, [s for s in data if s not in asked]).items():
            if causes & footer.reasons.keys():
                chosen.add(shard)
    return sorted(chosen)


def forget(dataset: Dataset, shards: Iterable[str]) -> None:
    """Delete data files, so that the next run makes them again."""
    unmark_success(dataset.out)
    store_for(dataset.out).delete(info.url for info in _directly_in_vitray(dataset.out, "manifest-"))
    for shard in shards:
        store_for(dataset.out).delete([dataset.data_url(shard), dataset.errors_url(shard)])


def clean(dataset: Dataset, listed: Iterable[str]) -> list[str]:
    """Delete the staging of shards that are committed or not listed any more, and what killed processes left; returns names."""
    data, wanted = committed(dataset.out), set(listed)
    orphans = [s for s in staged_shards(dataset) if s in data or s not in wanted]
    for shard in orphans:
        drop_staging(dataset, shard)
    left = [info.url for info in _directly_in_vitray(dataset.out, "probe-")] + store_for(dataset.out).abandoned(dataset.out)
    store_for(dataset.out).delete(left)
    return orphans + [url.removeprefix(dataset.out + "/") for url in left]


def _manifest(dataset: Dataset, admitted: dict[str, ObjectInfo], wanted: set[str]) -> pa.Table:
    """One row a data file, from the last manifest where the file is the same, else from its footer."""
    known = {}
    if (last := _manifest_info(dataset.out)) is not None:
        seen = {row["shard"]: row for row in _parquet(last).to_pylist()}
        known = {s: row for s, row in seen.items() if s in admitted and _is_same(row, admitted[s], last)}
    new = [s for s in admitted if s not in known]
    footers = footers_of(dataset, new)
    require_own(dataset, footers.values())
    rows = []
    for shard, info in sorted(admitted.items()):
        row = known.get(shard) or _row(dataset, info, footers[shard])
        rows.append({**row, "state": "current" if shard in wanted else "gone"})
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def _is_same(row: dict[str, object], info: ObjectInfo, manifest: ObjectInfo) -> bool:
    """Whether a data file is the one that the manifest saw. On a local disk: it is older than the manifest."""
    same = _modified_ns(info) < _modified_ns(manifest) if is_local(info.url) else row["etag"] == info.version
    return same and row["size_bytes"] == info.size


def _modified_ns(info: ObjectInfo) -> int:
    return int(info.version.rpartition("-")[2])


def _row(dataset: Dataset, info: ObjectInfo, footer: Footer) -> dict[str, object]:
    return {
        "shard": footer.shard,
        "url": footer.url,
        "source_version": footer.source_version,
        "path": f"data/{footer.shard}.parquet",
        "etag": "" if is_local(info.url) else info.version,  # a local version is a time
        "size_bytes": info.size,
        "rows": footer.rows,
        "errors": footer.errors,
        "truncated_at": footer.truncated_at,
        "sha256": sha256_of(info.url) if is_local(info.url) else hashlib.sha256(read(info.url)).hexdigest(),
    }


def _repair_error_files(dataset: Dataset, manifest: pa.Table) -> None:
    """errors/ holds exactly the copies of what the admitted data files carry."""
    there = {_shard_of(info.url) for info in _under(dataset.out, "errors")}
    should = {row["shard"] for row in manifest.select(["shard", "errors"]).to_pylist() if row["errors"]}
    for footer in footers_of(dataset, sorted(should - there)).values():
        repair_errors(dataset, footer)
    store_for(dataset.out).delete(dataset.errors_url(s) for s in sorted(there - should))


def _named(manifest: pa.Table) -> tuple[str, bytes]:
    sink = pa.BufferOutputStream()
    pq.write_table(manifest, sink, compression="zstd")
    body = sink.getvalue().to_pybytes()
    return f"manifest-{hashlib.sha256(body).hexdigest()[:16]}.parquet", body


def _totals(manifest: pa.Table, pending: int, gone: int, name: str) -> Ledger:
    rows, errors = (sum(manifest[c].to_pylist()) for c in ("rows", "errors"))
    cuts = zip(manifest["shard"].to_pylist(), manifest["truncated_at"].to_pylist())
    truncated = {shard: at for shard, at in cuts if at is not None}
    return Ledger(manifest.num_rows, rows, errors, truncated, pending, gone, name)


def _mark_success(dataset: Dataset, ledger: Ledger) -> None:
    url = join(dataset.out, "_SUCCESS.json")
    totals = {"shards": ledger.shards, "rows": ledger.rows, "errors": ledger.errors, "truncated": len(ledger.truncated)}
    document = {**totals, "gone": ledger.gone, "manifest": ledger.manifest, "fingerprint": dataset.fingerprint}
    _keep(url, json.dumps(document, indent=1).encode())


def _keep(url: str, body: bytes) -> None:
    """Make an object hold these bytes; writes nothing when it does."""
    if not exists(url) or read(url) != body:
        store_for(url).replace(url, body)


def _under(out: str, *parts: str) -> list[ObjectInfo]:
    try:
        return store_for(out).find(join(out, *parts))
    except ObjectMissing:
        return []


def _directly_in_vitray(out: str, start: str) -> list[ObjectInfo]:
    """The objects OUT/_vitray/<start>..., not those in its folders, whose names come from inputs."""
    inside = join(out, "_vitray", start)
    return [i for i in _under(out, "_vitray") if i.url.startswith(inside) and "/" not in i.url.removeprefix(inside)]


def _manifest_info(out: str) -> ObjectInfo | None:
    found = _directly_in_vitray(out, "manifest-")
    try:
        named = join(out, "_vitray", json.loads(read(join(out, "_SUCCESS.json")))["manifest"])
    except (ObjectMissing, ValueError, KeyError, TypeError):  # absent or damaged: the next run writes it
        named = ""
    # a manifest step that was killed can leave two, or a name without its manifest
    return next((info for info in found if info.url == named), found[-1] if found else None)


def _parquet(info: ObjectInfo) -> pa.Table:
    try:
        return read_table(pa.BufferReader(read(info.url)))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{info.url} is damaged ({error}). Delete it and run the job again: it is made anew from data/."
        ) from error


def _shard_of(url: str) -> str:
    return url.rsplit("/", 1)[-1].removesuffix(".parquet")
