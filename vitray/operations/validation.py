"""Check a dataset: every data file against the manifest, against itself, and against the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vitray.dataset import (
    MANIFEST_GLOB,
    Dataset,
    Footer,
    RemovedKeys,
    accepted_ids,
    committed_files,
    data_path,
    is_marked_complete,
    manifest_url,
    read_manifest,
    removed_keys,
    require_dataset,
    success_manifest,
)
from vitray.errors import JobError, StorageError, count, one_line
from vitray.left_out import describe
from vitray.operations.data_file_checks import UNREADABLE, check_file, check_leftovers
from vitray.operations.source_checks import check_content, count_in_source
from vitray.pipeline import list_source
from vitray.schema import Shard
from vitray.sources import Listing, select_shards
from vitray.storage import exists

ManifestRows = dict[str, dict[str, object]]  # by shard


@dataclass(frozen=True, slots=True)
class Validation:
    """What was checked, and what is wrong.

    problems: one line each, with the name of the file. pending: shards of the source without a data
    file; gone: data files whose input is no longer listed.

    compared: number of data files whose images were read again; None unless `content` was asked
    for. images: number in the committed shards, counted in the source again: there
    rows + errors + left_out["removed"] = images. None unless `inputs` was asked for. uncounted:
    committed tars on a store that were not counted, because only `content` reads them.

    left_out: what the source holds besides these images, by left_out.LEFT_OUT; suffixes: of the
    files among it. truncated: {shard: byte at which it was cut}; images behind that byte are in no
    count. accepted: shards without a data file that a person accepted; they are not pending.
    blocked_keys: that `vitray remove` took out. blocked_rows: rows, error rows and staged fragments
    that hold one of them; each is among the problems.
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
    accepted: int = 0
    blocked_keys: int = 0
    blocked_rows: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        files = count(self.files, "file")
        lines = [
            f"{self.out}: {self._verdict()}; {files}, {count(self.rows, 'row')}, "
            f"{count(self.errors, 'error')}"
        ]
        if self.pending or self.gone:
            lines.append(
                f"inputs: {count(self.pending, 'shard')} not committed yet, "
                f"{self.gone} committed ones no longer listed"
            )
        if self.images is not None:
            images = count(self.images, "image")
            lines.append(f"source: {images} in the committed shards{self._uncounted_note()}")
        lines += [
            f"cut short  {shard}: at byte {byte:,}; what follows is not counted"
            for shard, byte in self.truncated.items()
        ]
        if self.left_out:
            lines.append(f"left out   {describe(self.left_out, self.suffixes)}")
        if self.accepted:
            lines.append(f"accepted   {count(self.accepted, 'shard')} without rows")
        if self.blocked_keys:
            lines.append(f"removed    {self._removed()}")
        if self.compared is not None:
            lines.append(f"images read again: those of {self.compared} of {files}")
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])

    def _verdict(self) -> str:
        if self.problems:
            return f"NOT valid: {count(len(self.problems), 'problem')}"
        return "valid so far" if self.pending else "valid"

    def _removed(self) -> str:
        keys = f"{count(self.blocked_keys, 'key')} blocked"
        if self.blocked_rows:
            return f"{keys}; {count(self.blocked_rows, 'row')} or staged fragments hold one"
        return f"{keys}; no row, error row or staged fragment holds one"

    def _uncounted_note(self) -> str:
        if not self.uncounted:
            return ""
        return f"; {count(self.uncounted, 'tar')} not counted (--content counts them)"


def validate(out: str, inputs: bool = True, content: bool = False) -> Validation:
    """Check a whole dataset.

    inputs: list the source again, too. content: read every image's bytes again and compare hashes.
    Raises JobError if there is no dataset. All else that is wrong is in `problems` of the result.
    """
    dataset = require_dataset(out)
    is_complete = is_marked_complete(dataset.out)
    manifest_rows, problems = _read_manifest_rows(dataset, is_complete)
    shard_ids = sorted(committed_files(dataset.out))
    if manifest_rows is not None:
        problems += _compare_with_manifest(shard_ids, manifest_rows, is_complete)
    listing: Listing | None = None
    if inputs or content:
        listing, unlistable = _list_inputs(dataset)
        problems += unlistable
    # without _SUCCESS.json the manifest is older than some of the files
    expected = manifest_rows if manifest_rows is not None and is_complete else {}
    removed = removed_keys(dataset.out)
    totals = _check_files(dataset, shard_ids, expected, listing, content, removed)
    leftovers = check_leftovers(dataset, removed)
    inputs_by_id = _by_id(listing)
    selected = select_shards(list(inputs_by_id.values()), dataset.job)
    uncommitted = {shard.id for shard in selected} - set(shard_ids)
    accepted = accepted_ids(dataset.out)
    return Validation(
        out=dataset.out,
        files=len(shard_ids),
        rows=totals.rows,
        errors=totals.errors,
        pending=len(uncommitted - accepted),
        gone=len(set(shard_ids) - inputs_by_id.keys()) if inputs_by_id else 0,
        problems=(*problems, *totals.problems, *leftovers.problems),
        compared=totals.compared if content else None,
        images=totals.images if listing is not None else None,
        uncounted=totals.uncounted,
        left_out=dict(+totals.left_out),
        suffixes=listing.suffixes if listing is not None else {},
        truncated=totals.truncated,
        accepted=len(uncommitted & accepted),
        blocked_keys=len(removed.hashes),
        blocked_rows=totals.removed + leftovers.removed,
    )


@dataclass(slots=True)
class _Totals:
    """Sums over all data files."""

    rows: int = 0
    errors: int = 0
    compared: int = 0
    images: int = 0
    uncounted: int = 0
    removed: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    truncated: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_footer(self, shard_id: str, footer: Footer) -> None:
        self.rows += footer.rows
        self.errors += footer.errors
        self.left_out.update(footer.left_out)
        if footer.truncated_at is not None:
            self.truncated[shard_id] = footer.truncated_at

    def add_problems(self, shard_id: str, problems: Iterator[str] | list[str]) -> None:
        self.problems += [f"{data_path(shard_id)}: {problem}" for problem in problems]

    def add_images(self, images: int | None) -> None:
        if images is None:
            self.uncounted += 1
        else:
            self.images += images


def _check_files(
    dataset: Dataset,
    shard_ids: list[str],
    manifest_rows: ManifestRows,
    listing: Listing | None,
    content: bool,
    removed: RemovedKeys,
) -> _Totals:
    totals = _Totals(left_out=Counter(listing.left_out if listing is not None else {}))
    inputs_by_id = _by_id(listing)
    with ThreadPoolExecutor(2) as pool:
        checks = pool.map(
            lambda shard_id: check_file(dataset, shard_id, manifest_rows.get(shard_id), removed),
            shard_ids,
        )
        for shard_id, check in zip(shard_ids, checks):
            totals.add_problems(shard_id, check.problems)
            totals.removed += check.removed
            if check.footer is None:
                continue
            totals.add_footer(shard_id, check.footer)
            shard = inputs_by_id.get(shard_id)
            if shard is None:
                continue
            if content:
                totals.compared += 1
                totals.add_problems(shard_id, check_content(dataset, shard, check.footer))
            source_count = count_in_source(dataset, shard, check.footer, content)
            totals.add_images(source_count.images)
            totals.add_problems(shard_id, source_count.problems)
    return totals


def _by_id(listing: Listing | None) -> dict[str, Shard]:
    return {} if listing is None else {shard.id: shard for shard in listing.shards}


def _read_manifest_rows(
    dataset: Dataset, is_complete: bool
) -> tuple[ManifestRows | None, list[str]]:
    """The manifest's rows by shard, None if there is none, and what is wrong with it."""
    try:
        manifest = read_manifest(dataset.out)
        if is_complete and not exists(manifest_url(dataset.out, success_manifest(dataset.out))):
            raise StorageError("the one that _SUCCESS.json names does not exist.")
        if manifest is None:
            return None, []
        return {row["shard"]: row for row in manifest.to_pylist()}, []
    except (StorageError, *UNREADABLE) as error:
        step = f"Delete _SUCCESS.json and {MANIFEST_GLOB}, then run the job again to recreate them."
        return None, [f"the manifest cannot be read: {one_line(error)}. {step}"]


def _compare_with_manifest(
    shard_ids: Collection[str], manifest_rows: ManifestRows, is_complete: bool
) -> Iterator[str]:
    for shard_id in sorted(manifest_rows.keys() - set(shard_ids)):
        yield f"{data_path(shard_id)} is in the manifest but missing"
    if is_complete:
        for shard_id in sorted(set(shard_ids) - manifest_rows.keys()):
            yield f"{data_path(shard_id)}: is not in the manifest, though _SUCCESS.json exists"


def _list_inputs(dataset: Dataset) -> tuple[Listing | None, list[str]]:
    """What the source holds now, or why it cannot be listed."""
    try:
        return list_source(dataset.job, dataset.out), []
    except JobError as error:
        return None, [f"the source cannot be listed: {one_line(error)} --no-inputs leaves it out."]
