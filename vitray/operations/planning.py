"""What would be done, and how far it is. Reads only; starts neither torch nor Ray."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from vitray.dataset import (
    Dataset,
    committed,
    is_marked_complete,
    last_source,
    manifest_row,
    open_dataset,
    read_footer,
    read_manifest,
    read_run_records,
    require_dataset,
    staged,
    staged_shards,
)
from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.models import require_precision, will_compile
from vitray.pipeline import list_source, prepared
from vitray.sources import count_selection, estimate_images, passthrough_schema, select_shards


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do. images: of the selected shards, exact or estimated. decided: frozen
    values, None before the first run.

    left_out: files that have no row, by left_out.LEFT_OUT; suffixes: theirs. What tars hold beside
    images is known when they are read.
    shards_not_selected, images_not_selected: what since, sample and limit leave; images are
    estimated for tars.
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
    selection: str  # what since, sample or limit choose, for people; "" where they are not set
    compile: str
    decided: dict[str, str] | None

    def __str__(self) -> str:
        about = "" if self.images_exact else "about "
        decided = self.decided or dict.fromkeys(
            ("model", "precision", "engine", "batch_size", "fragment_rows"), "decided at run"
        )
        lines = [
            f"source     {count(self.shards, f'{self.kind} shard'.strip())}, "
            f"{about}{count(self.images, 'image')}, {decimal(self.size_bytes)}",
            f"committed  {count(self.committed, 'shard')}",
            *([f"left out   {describe(self.left_out, self.suffixes)}"] if self.left_out else []),
            *([f"chosen     {self.selection}"] if self.selection else []),
            *([f"not chosen {self._not_selected()}"] if self.shards_not_selected else []),
            f"to do      {count(self.pending, 'shard')}, "
            f"{about}{count(self.pending_images, 'image')}",
            *(f"{name:<10} {value}" for name, value in decided.items()),
            f"compile    {self.compile}",
            f"out        {self.out}",
        ]
        return "\n".join(lines)

    def _not_selected(self) -> str:
        about = "" if self.images_exact else "about "
        return (
            f"{count(self.shards_not_selected, 'shard')} with "
            f"{about}{count(self.images_not_selected, 'image')}, by since, sample or limit"
        )


@dataclass(frozen=True, slots=True)
class Status:
    """How far a dataset is. complete: _SUCCESS.json is there, and every file that it counts.
    staged: {pending shard: images staged of it}.

    left_out: what has no row, by left_out.LEFT_OUT: files in the source as the last run saw it, and
    what the committed shards hold beside their images. suffixes: of those files. image_members:
    images by the tar member they came from.
    """

    out: str
    complete: bool
    shards: int
    rows: int
    errors: int
    truncated: dict[str, int]  # {shard: byte at which it was cut}
    staged: dict[str, int]
    decided: dict[str, str]
    last_run: dict[str, object] | None
    notes: dict[str, str]  # {shard cut short: what its run said of it}
    left_out: dict[str, int]
    suffixes: dict[str, int]
    image_members: dict[str, int]

    def __str__(self) -> str:
        aside = (self.last_run or {}).get("set_aside")
        state = "complete" if self.complete else "not complete: run the job again to go on"
        if aside and not self.complete:
            state = "not complete: mend or remove the shards set aside, then run the job again"
        lines = [
            f"{self.out}: {state}",
            f"committed  {count(self.shards, 'shard')}, {count(self.rows, 'row')}, "
            f"{count(self.errors, 'error')}, "
            f"{count(len(self.truncated), 'shard')} cut short",
            *(
                f"cut short  {shard}: at byte {at:,}"
                + (f": {self.notes[shard]}" if shard in self.notes else "")
                for shard, at in self.truncated.items()
            ),
            *([f"left out   {describe(self.left_out, self.suffixes)}"] if self.left_out else []),
            *(
                [f"not chosen {self._not_selected()}"]
                if (self.last_run or {}).get("shards_not_selected")
                else []
            ),
            *([f"members    {self._members()}"] if self.image_members else []),
            f"staged     {count(sum(self.staged.values()), 'image')} of "
            f"{count(len(self.staged), 'shard')}",
            *(f"{name:<10} {value}" for name, value in self.decided.items()),
        ]
        if self.last_run is not None:
            lines.append(f"last run   {self.last_run['finished']}{self._work_of_last_run()}")
            lines += [f"ended      {self.last_run['ended']}"] if "ended" in self.last_run else []
            if "seconds_over_planned" in self.last_run:
                lines.append(
                    f"planned    took {self.last_run['seconds_over_planned']} of the time that "
                    f"was planned"
                )
            if isinstance(aside, dict) and not self.complete:
                lines += [f"set aside  {shard}: {why}" for shard, why in aside.items()]
        return "\n".join(lines)

    def _work_of_last_run(self) -> str:
        """Nothing for a run that failed before it read an image: its record has no figures."""
        last: dict[str, Any] = self.last_run or {}
        if "images" not in last:
            return ""
        return f": {last['images']:,} images, {last['images_per_s']}/s"

    def _not_selected(self) -> str:
        last: dict[str, Any] = self.last_run or {}
        shards, images = (
            int(last.get(name) or 0) for name in ("shards_not_selected", "images_not_selected")
        )
        return (
            f"{count(shards, 'shard')} with {count(images, 'image')}, by since, sample or limit of "
            f"the last run"
        )

    def _members(self) -> str:
        most = sorted(self.image_members.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count(images, 'image')} from .{name}" for name, images in most)


def plan(job: Job) -> Plan:
    """What `run` would do now. Raises SourceError for an empty or unreadable source, JobError for
    an `out` inside it, ModelError for an engine without the precision.
    """
    require_precision(job)
    job = prepared(job)
    out = job.out
    listing = list_source(job)
    shards = select_shards(listing.shards, job)
    selection = count_selection(listing, job)
    done = committed(out).keys()
    pending = [s for s in shards if s.id not in done]
    images, exact = estimate_images(shards, job)
    left = (
        images
        if len(pending) == len(shards)
        else estimate_images(pending, job)[0]
        if pending
        else 0
    )
    dataset = open_dataset(out)
    if dataset is None and job.keep:
        passthrough_schema(listing.shards, job)  # refuses what a run would refuse
    return Plan(
        out=out,
        kind="/".join(sorted({s.kind for s in shards})),
        shards=len(shards),
        images=images,
        images_exact=exact,
        size_bytes=sum(s.size for s in shards),
        committed=len(shards) - len(pending),
        pending=len(pending),
        pending_images=left,
        left_out=listing.left_out,
        suffixes=listing.suffixes,
        shards_not_selected=len(listing.shards) - len(shards),
        images_not_selected=selection.images_left,
        selection=str(selection) if selection.is_set else "",
        compile=will_compile(job, left),
        decided=None if dataset is None else decided_values(dataset),
    )


def status(out: str) -> Status:
    """How far the dataset in `out` is. Raises JobError when there is none."""
    dataset = require_dataset(out)
    data, manifest = committed(dataset.out), read_manifest(dataset.out)
    known = {row["shard"]: row for row in manifest.to_pylist()} if manifest is not None else {}
    rows, errors, truncated = 0, 0, dict[str, int]()
    source = last_source(dataset.out)
    left_out, image_members = Counter(source.left_out), Counter[str]()
    for shard in data:
        found = known.get(shard) or manifest_row(read_footer(dataset.data_url(shard)))
        rows, errors = rows + found["rows"], errors + found["errors"]
        left_out.update(json.loads(found.get("left_out") or "{}"))
        image_members.update(json.loads(found.get("image_members") or "{}"))
        if found["truncated_at"] is not None:
            truncated[shard] = found["truncated_at"]
    waiting = {
        shard: there
        for shard in staged_shards(dataset)
        if shard not in data and (there := _staged_images(dataset, shard))
    }
    records = read_run_records(dataset.out)
    complete = is_marked_complete(dataset.out) and known.keys() <= data.keys()
    last = records[-1] if records else None
    said = {
        shard: text
        for record in records
        for shard, text in record.get("notes", {}).items()
        if shard in data
    }
    return Status(
        dataset.out,
        complete,
        len(data),
        rows,
        errors,
        truncated,
        waiting,
        decided_values(dataset),
        last,
        said,
        dict(left_out),
        source.suffixes,
        dict(image_members),
    )


def decided_values(dataset: Dataset) -> dict[str, str]:
    """The frozen values a person asks for; by what it labels, where that is not the checkpoint's
    own head.
    """
    spec, more = dataset.spec, dict[str, str]()
    if spec.head:
        over = f", over the stored {spec.head_column}" if spec.head_column else ""
        more = {"head": f"{spec.head} (sha256 {spec.head_sha256[:12]}…){over}"}
    if spec.prompts:
        first, others = (
            spec.prompts[0],
            f" and {len(spec.prompts) - 1} more" if len(spec.prompts) > 1 else "",
        )
        more = {"prompts": f"{first!r}{others} for {len(spec.labels)} labels"}
    keys = {"key_column": dataset.job.key_column} if dataset.job.key_column else {}
    return {
        "model": spec.model + (f"@{spec.revision}" if spec.revision else ""),
        **more,
        "precision": spec.precision,
        "engine": spec.engine + (f" ({spec.engine_why})" if spec.engine_why else ""),
        "batch_size": str(spec.batch_size),
        "fragment_rows": str(dataset.fragment_rows),
        **keys,
    }


def _staged_images(dataset: Dataset, shard: str) -> int:
    return sum(stop - start for start, stop in staged(dataset, shard).ranges())
