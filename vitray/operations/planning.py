"""What a run would do, and how far a dataset is. Reads only; loads neither torch nor Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from vitray.dataset import (
    FROZEN_FIELDS,
    Dataset,
    committed_files,
    is_marked_complete,
    last_source,
    list_staged,
    manifest_row,
    open_dataset,
    read_footer,
    read_manifest,
    read_run_records,
    require_dataset,
    staged_shards,
)
from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.models import describe_compile, require_precision
from vitray.pipeline import list_source, prepare_job
from vitray.sources import count_selection, estimate_images, passthrough_schema, select_shards

# what a plan shows of the values that the first run chooses
SHOWN_FIELDS = ("model", *FROZEN_FIELDS, "fragment_rows")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do.

    images: of the selected shards, exact or estimated. decided: frozen values; None before the
    first run. left_out: files without a row, by left_out.LEFT_OUT; suffixes: of these files. Other
    members of tars are known when a run reads them. shards_not_selected, images_not_selected: what
    since, sample and limit exclude; for tars images are estimated. selection: what these choose,
    as text; "" if they are not set.
    """

    out: str
    kind: str
    shards: int
    images: int
    images_exact: bool
    size_bytes: int
    committed: int
    pending: int
    pending_images: int
    left_out: dict[str, int]
    suffixes: dict[str, int]
    shards_not_selected: int
    images_not_selected: int
    selection: str
    compile: str
    decided: dict[str, str] | None

    def __str__(self) -> str:
        about = "" if self.images_exact else "about "
        shards = count(self.shards, f"{self.kind} shard".replace("files", "file").strip())
        images = f"{about}{count(self.images, 'image')}"
        pending_images = f"{about}{count(self.pending_images, 'image')}"
        lines = [
            f"source     {shards}, {images}, {decimal(self.size_bytes)}",
            f"committed  {count(self.committed, 'shard')}",
        ]
        if self.left_out:
            lines.append(f"left out   {describe(self.left_out, self.suffixes)}")
        if self.selection:
            lines.append(f"selected   {self.selection}")
        if self.shards_not_selected:
            lines.append(f"excluded   {self._excluded()}")
        lines.append(f"to do      {count(self.pending, 'shard')}, {pending_images}")
        decided = self.decided or dict.fromkeys(SHOWN_FIELDS, "chosen by the first run")
        lines += [f"{name:<10} {value}" for name, value in decided.items()]
        lines += [f"compile    {self.compile}", f"out        {self.out}"]
        return "\n".join(lines)

    def _excluded(self) -> str:
        return describe_excluded(
            self.shards_not_selected, self.images_not_selected, self.images_exact
        )


@dataclass(frozen=True, slots=True)
class Status:
    """How far a dataset is.

    complete: _SUCCESS.json exists, and so does every file that it counts. truncated: {shard: byte
    at which it was cut}; notes: {such a shard: what its run noted}. staged: {pending shard: images
    staged of it}.

    left_out: what has no row, by left_out.LEFT_OUT: files in the source at the last run, and other
    contents of the committed shards. suffixes: of these files. image_members: images by the tar
    member that they came from.
    """

    out: str
    complete: bool
    shards: int
    rows: int
    errors: int
    truncated: dict[str, int]
    staged: dict[str, int]
    decided: dict[str, str]
    last_run: dict[str, Any] | None
    notes: dict[str, str]
    left_out: dict[str, int]
    suffixes: dict[str, int]
    image_members: dict[str, int]

    def __str__(self) -> str:
        staged_images = count(sum(self.staged.values()), "image")
        lines = [
            f"{self.out}: {self._state()}",
            f"committed  {count(self.shards, 'shard')}, {count(self.rows, 'row')}, "
            f"{count(self.errors, 'error')}, {count(len(self.truncated), 'shard')} cut short",
            *(f"cut short  {self._cut(shard)}" for shard in self.truncated),
        ]
        if self.left_out:
            lines.append(f"left out   {describe(self.left_out, self.suffixes)}")
        if self._last().get("shards_not_selected"):
            lines.append(f"excluded   {self._excluded()}")
        if self.image_members:
            lines.append(f"members    {self._members()}")
        lines.append(f"staged     {staged_images} of {count(len(self.staged), 'shard')}")
        lines += [f"{name:<10} {value}" for name, value in self.decided.items()]
        return "\n".join(lines + self._last_run_lines())

    def _last(self) -> dict[str, Any]:
        return self.last_run or {}

    def _state(self) -> str:
        if self.complete:
            return "complete"
        if self._last().get("set_aside"):
            return "not complete: repair or remove the shards set aside, then run the job again"
        return "not complete: run the job again to continue"

    def _cut(self, shard: str) -> str:
        note = f": {self.notes[shard]}" if shard in self.notes else ""
        return f"{shard}: at byte {self.truncated[shard]:,}{note}"

    def _last_run_lines(self) -> list[str]:
        last = self._last()
        if not last:
            return []
        figures = ""  # a run that failed before it read an image recorded none
        if "images" in last:
            figures = f": {last['images']:,} images, {last['images_per_s']}/s"
        lines = [f"last run   {last['finished']}{figures}"]
        if "ended" in last:
            lines.append(f"ended      {last['ended']}")
        if "seconds_over_planned" in last:
            lines.append(
                f"planned    took {last['seconds_over_planned']} of the time that was planned"
            )
        set_aside = last.get("set_aside")
        if isinstance(set_aside, dict) and not self.complete:
            lines += [f"set aside  {shard}: {why}" for shard, why in set_aside.items()]
        return lines

    def _excluded(self) -> str:
        shards = int(self._last().get("shards_not_selected") or 0)
        images = int(self._last().get("images_not_selected") or 0)
        return f"{describe_excluded(shards, images)} of the last run"

    def _members(self) -> str:
        most = sorted(self.image_members.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count(images, 'image')} from .{name}" for name, images in most)


def describe_excluded(shards: int, images: int, is_exact: bool = True) -> str:
    """What `since`, `sample` and `limit` exclude from a run, as text."""
    about = "" if is_exact else "about "
    return (
        f"{count(shards, 'shard')} with {about}{count(images, 'image')}, by since, sample or limit"
    )


def plan(job: Job) -> Plan:
    """What `run` would do now.

    Raises SourceError for an empty or unreadable source, JobError for an `out` inside it,
    ModelError for an engine without the precision.
    """
    require_precision(job.engine, job.precision)
    job = prepare_job(job)
    listing = list_source(job)
    shards = select_shards(listing.shards, job)
    selection = count_selection(listing, job)
    committed_ids = committed_files(job.out).keys()
    pending = [shard for shard in shards if shard.id not in committed_ids]
    images, exact = estimate_images(shards, job)
    pending_images = images
    if len(pending) < len(shards):
        pending_images = estimate_images(pending, job)[0] if pending else 0
    dataset = open_dataset(job.out)
    if dataset is None and job.keep:
        passthrough_schema(listing.shards, job)  # refuses what a run would refuse
    return Plan(
        out=job.out,
        kind="/".join(sorted({shard.kind for shard in shards})),
        shards=len(shards),
        images=images,
        images_exact=exact,
        size_bytes=sum(shard.size for shard in shards),
        committed=len(shards) - len(pending),
        pending=len(pending),
        pending_images=pending_images,
        left_out=listing.left_out,
        suffixes=listing.suffixes,
        shards_not_selected=len(listing.shards) - len(shards),
        images_not_selected=selection.images_left,
        selection=str(selection) if selection.is_set else "",
        compile=describe_compile(job.engine, job.compile, pending_images),
        decided=None if dataset is None else frozen_values(dataset),
    )


def status(out: str) -> Status:
    """How far the dataset in `out` is. Raises JobError if there is none."""
    dataset = require_dataset(out)
    manifest = read_manifest(dataset.out)
    manifest_rows = {}
    if manifest is not None:
        manifest_rows = {row["shard"]: row for row in manifest.to_pylist()}
    committed_ids = committed_files(dataset.out).keys()
    rows = [
        manifest_rows.get(shard) or manifest_row(read_footer(dataset.data_url(shard)))
        for shard in committed_ids
    ]
    source = last_source(dataset.out)
    left_out = Counter(source.left_out)
    image_members = Counter[str]()
    for row in rows:
        left_out.update(json.loads(row.get("left_out") or "{}"))
        image_members.update(json.loads(row.get("image_members") or "{}"))
    records = read_run_records(dataset.out)
    return Status(
        out=dataset.out,
        complete=is_marked_complete(dataset.out) and manifest_rows.keys() <= committed_ids,
        shards=len(rows),
        rows=sum(row["rows"] for row in rows),
        errors=sum(row["errors"] for row in rows),
        truncated={
            row["shard"]: row["truncated_at"] for row in rows if row["truncated_at"] is not None
        },
        staged=_staged_images(dataset, committed_ids),
        decided=frozen_values(dataset),
        last_run=records[-1] if records else None,
        notes=_notes(records, committed_ids),
        left_out=dict(left_out),
        suffixes=source.suffixes,
        image_members=dict(image_members),
    )


def _staged_images(dataset: Dataset, committed_ids: Collection[str]) -> dict[str, int]:
    """{pending shard: images staged of it}, without shards that have none."""
    staged_images = {}
    for shard in staged_shards(dataset):
        if shard not in committed_ids:
            ranges = list_staged(dataset, shard).ranges()
            images = sum(stop - start for start, stop in ranges)
            if images:
                staged_images[shard] = images
    return staged_images


def _notes(records: list[dict[str, Any]], committed_ids: Collection[str]) -> dict[str, str]:
    """What the runs noted about committed shards; the latest note of each."""
    notes: dict[str, str] = {}
    for record in records:
        for shard, text in record.get("notes", {}).items():
            if shard in committed_ids:
                notes[shard] = text
    return notes


def frozen_values(dataset: Dataset) -> dict[str, str]:
    """The frozen values, as text, with the head or the prompts if the dataset has such labels."""
    spec = dataset.spec
    values = {"model": spec.model + (f"@{spec.revision}" if spec.revision else "")}
    if spec.prompts:
        more = f" and {len(spec.prompts) - 1} more" if len(spec.prompts) > 1 else ""
        values["prompts"] = f"{spec.prompts[0]!r}{more} for {len(spec.labels)} labels"
    elif spec.head:
        column = f", over the stored {spec.head_column}" if spec.head_column else ""
        values["head"] = f"{spec.head} (sha256 {spec.head_sha256[:12]}…){column}"
    values["precision"] = spec.precision
    values["engine"] = spec.engine + (f" ({spec.engine_why})" if spec.engine_why else "")
    values["batch_size"] = str(spec.batch_size)
    values["fragment_rows"] = str(dataset.fragment_rows)
    if dataset.job.key_column:
        values["key_column"] = dataset.job.key_column
    return values
