"""What a run would do, and how far a dataset is. Reads only; loads neither torch nor Ray."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.filesize import decimal

from vitray.dataset import (
    FROZEN_FIELDS,
    Dataset,
    accepted_ids,
    base_of,
    committed_files,
    is_marked_complete,
    is_run,
    last_source,
    list_staged,
    manifest_row,
    open_dataset,
    read_acceptances,
    read_footer,
    read_manifest,
    read_run_records,
    require_dataset,
    staged_shards,
    with_frozen,
)
from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.models import (
    describe_compile,
    require_machine,
    require_precision,
    with_label_names,
)
from vitray.operations.refusals import require_fitting_model, require_same_job
from vitray.operations.runs import age_of_complete
from vitray.pipeline import list_source, prepare_job
from vitray.sources import count_selection, estimate_images, select_shards

# what a plan shows of the values that the first run chooses
SHOWN_FIELDS = ("model", *FROZEN_FIELDS, "fragment_rows")
PLAN_FOOTERS = 64  # of data files that no manifest lists, which a plan reads


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do.

    images: of the selected shards, exact or estimated. decided: frozen values; None before the
    first run. left_out: files without a row, by left_out.LEFT_OUT; suffixes: of these files. Other
    members of tars are known when a run reads them. shards_not_selected, images_not_selected: what
    since, sample and limit exclude; for tars images are estimated. selection: what these choose,
    as text; "" if they are not set. accepted: shards that a person accepted without rows: a run
    does not read them.
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
    accepted: int = 0

    def __str__(self) -> str:
        about = "" if self.images_exact else "about "
        shards = count(self.shards, f"{self.kind} shard".replace("files", "file").strip())
        images = f"{about}{count(self.images, 'image')}"
        pending_images = f"{about}{count(self.pending_images, 'image')}"
        lines = [
            f"source     {shards}, {images}, {decimal(self.size_bytes)}",
            f"committed  {count(self.committed, 'shard')}",
        ]
        if self.accepted:
            lines.append(f"accepted   {count(self.accepted, 'shard')} as they are, not read")
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
    staged of it}. accepted: {shard: its problem, and who accepted that}, of shards that are cut
    short or not committed.

    left_out: what has no row, by left_out.LEFT_OUT: files in the source at the last run, and other
    contents of the committed shards. suffixes: of these files. image_members: images by the tar
    member that they came from. complete_age_s: seconds since a run last ended with exit code 0,
    also one with nothing to do; None if none did. max_age_s: of --max-age; None without it. stale:
    whether complete_age_s is more, or unknown; None without --max-age.
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
    accepted: dict[str, str] = field(default_factory=dict)
    complete_age_s: float | None = None
    max_age_s: float | None = None
    stale: bool | None = None

    def __str__(self) -> str:
        staged_images = count(sum(self.staged.values()), "image")
        lines = [
            f"{self.out}: {self._state()}",
            f"committed  {count(self.shards, 'shard')}, {count(self.rows, 'row')}, "
            f"{count(self.errors, 'error')}, {count(len(self.truncated), 'shard')} cut short",
            *(
                f"cut short  {self._cut(shard)}"
                for shard in self.truncated
                if shard not in self.accepted
            ),
            *(f"accepted   {shard}: {text}" for shard, text in self.accepted.items()),
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
        set_aside = self._last().get("set_aside") or {}
        if set_aside and not set(set_aside) - self.accepted.keys():
            return "not complete: run the job again to mark it complete"
        if set_aside:
            return (
                "not complete: repair or remove the shards set aside, then run the job again; "
                f"or accept them (vitray accept {shlex.quote(self.out)} --reason set-aside)"
            )
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
            figures = f": {count(last['images'], 'image')}, {last['images_per_s']}/s"
        lines = [f"last run   {last['finished']}{figures}"]
        if "ended" in last:
            lines.append(f"ended      {last['ended']}")
        if "seconds_over_planned" in last:
            lines.append(
                f"planned    took {last['seconds_over_planned']} of the time that was planned"
            )
        set_aside = last.get("set_aside")
        if isinstance(set_aside, dict) and not self.complete:
            lines += [
                f"set aside  {shard}: {why}"
                for shard, why in set_aside.items()
                if shard not in self.accepted
            ]
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


def plan(job: Job, *, runs_here: bool = True) -> Plan:
    """What `run` would do now.

    runs_here: False for a job that runs on other machines, which may have other engines.

    Raises what `run` would raise before any work: SourceError for an empty or unreadable source,
    JobError for an `out` inside it, ModelError for a model that is missing, does not fit or cannot
    run here, FingerprintError for an `out` of another job. Weights of more than 1 GB, and those
    that are not on this machine, are not read.
    """
    require_precision(job.engine, job.precision)
    job = with_label_names(prepare_job(job))
    listing = list_source(job)
    shards = select_shards(listing.shards, job)
    selection = count_selection(listing, job)
    dataset = open_dataset(job.out)
    committed_ids = committed_files(job.out).keys()
    if runs_here:
        require_machine(with_frozen(job))
    is_description_lost = dataset is None and bool(committed_ids)
    model = require_fitting_model(job, dataset, reads_weights=is_description_lost)
    require_same_job(job, dataset, listing, model, PLAN_FOOTERS)
    uncommitted = [shard for shard in shards if shard.id not in committed_ids]
    accepted = accepted_ids(job.out)
    pending = [shard for shard in uncommitted if shard.id not in accepted]
    images, exact = estimate_images(shards, job)
    pending_images = images
    if len(pending) < len(shards):
        pending_images = estimate_images(pending, job)[0] if pending else 0
    return Plan(
        out=job.out,
        kind="/".join(sorted({shard.kind for shard in shards})),
        shards=len(shards),
        images=images,
        images_exact=exact,
        size_bytes=sum(shard.size for shard in shards),
        committed=len(shards) - len(uncommitted),
        pending=len(pending),
        pending_images=pending_images,
        left_out=listing.left_out,
        suffixes=listing.suffixes,
        shards_not_selected=len(listing.shards) - len(shards),
        images_not_selected=selection.images_left,
        selection=str(selection) if selection.is_set else "",
        compile=describe_compile(job.engine, job.compile, pending_images),
        decided=None if dataset is None else frozen_values(dataset),
        accepted=len(uncommitted) - len(pending),
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
    records = [record for record in read_run_records(dataset.out) if is_run(record)]
    newest = [(str(record.get("run", "")), record) for record in reversed(records)]
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
        accepted=_accepted(dataset, rows, committed_ids, records[-1] if records else {}),
        complete_age_s=age_of_complete(newest, datetime.now(UTC)),
    )


def _accepted(
    dataset: Dataset,
    rows: list[dict[str, Any]],
    committed_ids: Collection[str],
    last_run: dict[str, Any],
) -> dict[str, str]:
    """The acceptances that still count, as text: none of a shard that has a newer version."""
    truncated = {row["shard"] for row in rows if row["truncated_at"] is not None}
    set_aside = set(last_run.get("set_aside") or ())
    newer = {base_of(shard) for shard in {*committed_ids, *set_aside}}
    return {
        shard: str(acceptance)
        for shard, acceptance in read_acceptances(dataset.out).items()
        if shard in truncated | set_aside
        or (shard not in committed_ids and base_of(shard) not in newer)
    }


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
        values["prompts"] = f"{spec.prompts[0]!r}{more} for {count(len(spec.labels), 'label')}"
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
