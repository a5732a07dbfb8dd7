"""Is it whole? Every data file against the manifest, against itself, and against the inputs."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset import (
    Dataset,
    Footer,
    RowsDigest,
    committed,
    is_marked_complete,
    manifest_url,
    read_footer,
    read_manifest,
    read_table,
    require_dataset,
    success_manifest,
)
from vitray.errors import (
    CommitError,
    JobError,
    ObjectChanged,
    ObjectMissing,
    ShardError,
    StorageError,
    count,
    one_line,
)
from vitray.left_out import LeftOut, describe
from vitray.pipeline import list_source
from vitray.schema import Encoded, End, ScoreFunction, Shard, content_hash
from vitray.sources import Listing, count_again, read_shard, select_shards
from vitray.storage import exists, is_local, read, store_for

NORM_TOLERANCE = {
    "float32": 1e-4,
    "float16": 5e-3,
}  # of a unit vector after rounding to that type, D up to 4096
# what damaged bytes raise, depending on where
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, SystemError)


@dataclass(frozen=True, slots=True)
class Validation:
    """What was checked and what is wrong. problems: one line each, naming the file. pending: inputs
    not labelled yet.

    compared: the data files whose input is still where the last run looked, and was read again;
    None where nobody asked.
    images: in the committed shards, counted in the source again: for them rows + errors = images.
    None where nobody asked.
    uncounted: committed tars on a store that were not read for that; `content` reads them.
    left_out: what the source holds beside those images, by left_out.LEFT_OUT; suffixes: of the
    files among it.
    truncated: {shard: byte at which it was cut}; images behind that byte are in no count.
    """

    out: str
    files: int
    rows: int
    errors: int
    pending: int
    gone: int
    problems: tuple[str, ...]
    compared: int | None = None
    images: int | None = None
    uncounted: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        good = "valid so far" if self.pending else "valid"
        verdict = good if self.ok else f"NOT valid: {count(len(self.problems), 'problem')}"
        held = (
            f"{count(self.files, 'file')}, {count(self.rows, 'row')}, {count(self.errors, 'error')}"
        )
        lines = [f"{self.out}: {verdict}; {held}"]
        if self.pending or self.gone:
            lines.append(
                f"inputs: {count(self.pending, 'shard')} not committed yet, {self.gone} committed "
                f"ones no longer listed"
            )
        if self.images is not None:
            more = (
                f"; {count(self.uncounted, 'tar')} not counted (--content counts them)"
                if self.uncounted
                else ""
            )
            lines.append(f"source: {count(self.images, 'image')} in the committed shards{more}")
        lines += [
            f"cut short  {shard}: at byte {at:,}; what follows is not counted"
            for shard, at in self.truncated.items()
        ]
        if self.left_out:
            lines.append(f"left out   {describe(self.left_out, self.suffixes)}")
        if self.compared is not None:
            lines.append(
                f"images read again: those of {self.compared} of {count(self.files, 'file')}"
            )
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


def validate(out: str, inputs: bool = True, content: bool = False) -> Validation:
    """Check a whole dataset. inputs: list the source again too; content: read every image's bytes
    again and compare hashes.

    Raises JobError when there is no dataset. Everything else that is wrong is a problem in the
    answer.
    """
    dataset = require_dataset(out)
    listed, problems = _manifest_rows(dataset)
    data = committed(dataset.out)
    problems += [
        f"data/{shard}.parquet is in the manifest but missing"
        for shard in sorted((listed or {}).keys() - data.keys())
    ]
    is_done = is_marked_complete(dataset.out)
    if listed is not None and is_done:
        unlisted = sorted(data.keys() - listed.keys())
        problems += [
            f"data/{shard}.parquet: is not in the manifest, though _SUCCESS.json is there"
            for shard in unlisted
        ]
    listing, unlistable = _inputs(dataset) if inputs or content else (None, [])
    problems += unlistable
    by_id = {shard.id: shard for shard in listing.shards} if listing else {}
    rows = errors = compared = images = uncounted = 0
    left_out, truncated = Counter(listing.left_out if listing else {}), dict[str, int]()
    with ThreadPoolExecutor(
        2
    ) as pool:  # a manifest of before the work that is going on tells nothing of a file
        for shard, (footer, found) in zip(
            sorted(data),
            pool.map(
                lambda s: _check_file(dataset, s, (listed or {}).get(s) if is_done else None),
                sorted(data),
            ),
        ):
            problems += [f"data/{shard}.parquet: {problem}" for problem in found]
            if footer is None:
                continue
            rows, errors = rows + footer.rows, errors + footer.errors
            left_out.update(footer.left_out)
            if footer.truncated_at is not None:
                truncated[shard] = footer.truncated_at
            if shard not in by_id:
                continue
            if content:
                compared += 1
                problems += [
                    f"data/{shard}.parquet: {p}"
                    for p in _check_content(dataset, by_id[shard], footer)
                ]
            held, more = _count_again(dataset, by_id[shard], footer, content)
            images, uncounted = images + (held or 0), uncounted + (held is None)
            problems += [f"data/{shard}.parquet: {p}" for p in more]
    pending = len(
        {shard.id for shard in select_shards(list(by_id.values()), dataset.job)} - data.keys()
    )
    return Validation(
        dataset.out,
        len(data),
        rows,
        errors,
        pending,
        len(data.keys() - by_id.keys()) if by_id else 0,
        tuple(problems),
        compared if content else None,
        images if listing else None,
        uncounted,
        dict(+left_out),
        listing.suffixes if listing else {},
        truncated,
    )


def _count_again(
    dataset: Dataset, shard: Shard, footer: Footer, content: bool
) -> tuple[int | None, list[str]]:
    """How many images the source holds in a committed shard, and what is wrong with that; None
    where a tar on a store was not read.
    """
    if shard.kind == "tar" and not is_local(shard.url) and not content:
        return None, []
    try:
        images, left_out = count_again(shard, dataset.job)
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        return footer.total, [] if content else [
            f"the source cannot be counted again: {one_line(error)}"
        ]
    problems = []
    if images != footer.total and not content:  # with the content the total was compared already
        problems.append(f"the source holds {images} images, the dataset {footer.total}")
    if (
        left_out is not None
        and footer.source_rules > 1
        and left_out != _without_pages(footer.left_out)
    ):
        problems.append(
            f"the source has {describe(left_out)} without a row, the dataset counted "
            f"{describe(footer.left_out)}"
        )
    return images, problems


def _without_pages(left_out: dict[str, int]) -> dict[str, int]:
    """What can be counted without decoding."""
    return {reason: count for reason, count in left_out.items() if reason != LeftOut.FURTHER_PAGE}


def _manifest_rows(dataset: Dataset) -> tuple[dict[str, dict[str, object]] | None, list[str]]:
    """The manifest's rows by shard, None when there is none, and what is wrong with it."""
    try:
        manifest = read_manifest(dataset.out)
        if is_marked_complete(dataset.out) and not exists(
            manifest_url(dataset.out, success_manifest(dataset.out))
        ):
            raise StorageError("the one that _SUCCESS.json names does not exist.")
        return None if manifest is None else {row["shard"]: row for row in manifest.to_pylist()}, []
    except (StorageError, *UNREADABLE) as error:
        step = (
            "Delete _SUCCESS.json and _vitray/manifest-*.parquet, then run the job again to make "
            "them anew."
        )
        return None, [f"the manifest cannot be read: {one_line(error)}. {step}"]


def _inputs(dataset: Dataset) -> tuple[Listing | None, list[str]]:
    """What the source holds now, or why it cannot be listed."""
    try:
        return list_source(dataset.job, dataset.out), []
    except JobError as error:
        return None, [f"the source cannot be listed: {one_line(error)} --no-inputs leaves it out."]


def _check_file(
    dataset: Dataset, shard: str, listed: dict[str, object] | None
) -> tuple[Footer | None, list[str]]:
    url = dataset.data_url(shard)
    try:
        footer = read_footer(url)
        body = read(url)
    except (CommitError, ObjectMissing, *UNREADABLE) as error:
        return None, [one_line(error)]
    found = []
    if footer.fingerprint != dataset.fingerprint:
        found.append(f"fingerprint {footer.fingerprint[:8]}… is not the dataset's")
    if footer.shard != shard:
        found.append(f"its footer names shard {footer.shard}")
    if listed is not None:
        mine = {
            "sha256": hashlib.sha256(body).hexdigest(),
            "rows": footer.rows,
            "errors": footer.errors,
        }
        found += [
            f"{name} differs from the manifest"
            for name, value in mine.items()
            if listed[name] != value
        ]
    try:
        found += list(
            _check_rows(
                dataset, shard, footer, pq.ParquetFile(pa.BufferReader(body), pre_buffer=False)
            )
        )
    except UNREADABLE as error:
        found.append(f"cannot be read: {one_line(error)}")
    return footer, found + (list(_check_errors(dataset, shard, footer)) if footer.errors else [])


def _check_errors(dataset: Dataset, shard: str, footer: Footer) -> Iterator[str]:
    try:
        copy = read_table(pa.BufferReader(read(dataset.errors_url(shard))))
        if not copy.equals(footer.error_rows):
            yield (
                "its error rows differ from what the data file carries; run the job again to "
                "repair it"
            )
    except ObjectMissing:
        yield "its file of error rows is missing; run the job again to repair it"
    except UNREADABLE as error:
        yield (
            f"its file of error rows cannot be read; delete it and run the job again to repair it "
            f"({one_line(error)})"
        )


def _check_rows(
    dataset: Dataset, shard: str, footer: Footer, file: pq.ParquetFile
) -> Iterator[str]:
    if not file.schema_arrow.remove_metadata().equals(dataset.schema):
        yield "its schema is not the dataset's"
        return
    digest, seen, bad = RowsDigest(), list[int](), set[str]()
    for batch in file.iter_batches(batch_size=4096, use_threads=False):
        table = pa.Table.from_batches([batch])
        with contextlib.suppress(
            pa.ArrowInvalid
        ):  # a null vector does not fit: named below, and the hash differs
            digest.add(table.cast(dataset.schema))
        seen += table["index"].to_pylist()
        bad |= set(_check_values(dataset, shard, table))
    yield from sorted(bad)
    if len(seen) != footer.rows:
        yield f"{len(seen)} rows, but its footer says {footer.rows}"
    if seen != sorted(set(seen)):
        yield "rows are not in the order of their shard, or one is there twice"
    if sorted(seen + footer.error_rows["index"].to_pylist()) != list(range(footer.total)):
        yield f"rows and errors do not make up 0..{footer.total - 1}"
    if digest.hexdigest() != footer.rows_sha256:
        yield "the hash of its rows differs from its footer"


def _check_values(dataset: Dataset, shard: str, table: pa.Table) -> Iterator[str]:
    if set(table["shard"].to_pylist()) - {shard}:
        yield "a row names another shard"
    if dataset.job.labelled:
        ids = table["label_id"].to_numpy()
        if len(ids) and not ((ids >= 0) & (ids < len(dataset.spec.labels))).all():
            yield "a label_id is not a class of the model"
        elif table["label"].to_pylist() != [dataset.spec.labels[i] for i in ids]:
            yield "a label is not the name of its label_id"
        scores = table["score"].to_numpy()
        if dataset.spec.score_function is ScoreFunction.NONE:
            if not np.isfinite(scores).all():
                yield "a score is not finite"
        elif not ((scores >= 0) & (scores <= 1.0001)).all():
            yield "a score is not within 0 and 1"
    for v in dataset.vectors:
        column = table[v.column].combine_chunks()
        if column.null_count:
            yield f"{v.column} holds a null"
            continue
        values = (
            column.flatten()
            .to_numpy(zero_copy_only=False)
            .astype(np.float32)
            .reshape(-1, v.dimension)
        )
        if not np.isfinite(values).all():
            yield f"{v.column} holds NaN or infinity"
        elif (
            v.normalize
            and np.abs(np.linalg.norm(values, axis=1) - 1).max(initial=0) > NORM_TOLERANCE[v.dtype]
        ):
            yield f"{v.column} is not of unit length"


def _check_content(dataset: Dataset, shard: Shard, footer: Footer) -> Iterator[str]:
    """The source's bytes once more: the same images, in the same order, with the same keys."""
    try:
        with store_for(dataset.out).open(dataset.data_url(shard.id)) as stream:
            table = read_table(stream, names := ["index", "key", "content_hash"])
        known = {
            i: (k, h)
            for t in (table, footer.error_rows)
            for i, k, h in zip(*(t[name].to_pylist() for name in names))
        }
    except UNREADABLE:
        return  # _check_file said so
    left_out = Counter[str]()
    try:
        for item in read_shard(shard, dataset.job, lambda _: True):
            if isinstance(item, End):
                if item.total != footer.total:
                    yield f"the source holds {item.total} images, the dataset {footer.total}"
                left_out.update(item.left_out)
            elif isinstance(item, Encoded):
                left_out[LeftOut.FURTHER_IMAGE] += item.further_images
                mine = (item.key, None if item.data is None else content_hash(item.data))
                if known.get(item.index) != mine:
                    yield f"image {item.index} ({item.key}) is not what was labelled"
                    return
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        yield f"the source cannot be read again: {one_line(error)}"
        return
    if footer.source_rules > 1 and dict(+left_out) != _without_pages(footer.left_out):
        yield (
            f"the source has {describe(+left_out)} without a row, the dataset counted "
            f"{describe(footer.left_out)}"
        )
