"""Whether a job would start: every check, each with the next step where something is wrong.

Loads torch only where the job needs a check that does.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from rich.filesize import decimal

from vitray.dataset import (
    Dataset,
    check_store,
    committed_files,
    open_dataset,
    with_frozen,
    with_source_rules,
)
from vitray.errors import (
    AccessError,
    ObjectRefused,
    ShardError,
    StorageError,
    VitrayError,
    count,
    one_line,
)
from vitray.exit_codes import ExitCode
from vitray.job import Job
from vitray.models import (
    CheckedModel,
    require_machine,
    with_label_names,
)
from vitray.operations.refusals import require_fitting_model, require_same_job
from vitray.pipeline import list_source, with_absolute_paths
from vitray.schema import Encoded, Shard
from vitray.sources import (
    Listing,
    count_selection,
    estimate_images,
    list_shards,
    read_shard,
    select_shards,
)
from vitray.storage import is_local, missing_folders, store_for

COLUMNS = 80
INDENT = 24
T = TypeVar("T")


class CheckName(StrEnum):
    """The checks, in the order in which they are listed."""

    FIELDS = "fields"
    SOURCE = "source"
    MODEL = "model"
    MACHINE = "machine"
    OUT = "out"
    FINGERPRINT = "fingerprint"


class Verdict(StrEnum):
    """The result of one check, spelled as in JSON."""

    OK = "ok"
    WRONG = "wrong"  # the job, or what it names, must change
    NO_ANSWER = "no answer"  # a system does not work: running again may help
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. text: what was found; where something is wrong, also the next step."""

    check: CheckName
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return textwrap.fill(
            f"{self.check:<13}{self.verdict:<11}{self.text}",
            COLUMNS,
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a job would start, and why not."""

    would_start: bool
    findings: list[Finding]

    @property
    def exit_code(self) -> ExitCode:
        """BAD_USAGE where something is wrong, BROKEN_SYSTEM where a store gives no answer."""
        return _code_of(self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        bad = [f for f in self.findings if f.verdict in (Verdict.WRONG, Verdict.NO_ANSWER)]
        end = "The job would start."
        if bad:
            end = f"The job would not start: {count(len(bad), 'problem')}."
        return "\n".join([*lines, "", end])


def _code_of(findings: Sequence[Finding]) -> ExitCode:
    verdicts = {finding.verdict for finding in findings}
    if Verdict.WRONG in verdicts:
        return ExitCode.BAD_USAGE
    return ExitCode.BROKEN_SYSTEM if Verdict.NO_ANSWER in verdicts else ExitCode.DONE


def _check_of(findings: list[Finding]) -> Check:
    return Check(_code_of(findings) == ExitCode.DONE, findings)


def check(job: Job, *, runs_here: bool = True) -> Check:
    """Whether a run of the job would start. Everything is checked, and nothing is left behind.

    runs_here: also whether this machine has the engine and the device; False for a cluster.
    """
    fields = _find(CheckName.FIELDS, lambda: _with_absolute_paths(job), lambda _: "all are valid")
    if fields.value is None:
        return _only_fields(fields.finding)
    whole_job = fields.value
    out = _find(CheckName.OUT, lambda: _open_place(whole_job), str)
    place = out.value
    final_job = whole_job if place is None else place.job
    source = _find(CheckName.SOURCE, lambda: _list(final_job, place), _source_text(final_job))
    dataset = None if place is None else place.dataset
    model = _find(
        CheckName.MODEL,
        lambda: require_fitting_model(final_job, dataset, reads_weights=_has_rows(place)),
        _describe_model,
    )
    findings = [fields.finding, source.finding, model.finding]
    if runs_here:
        machine = _find(CheckName.MACHINE, lambda: _machine(final_job, dataset), str)
        findings.append(machine.finding)
    findings.append(out.finding)
    findings.append(_fingerprint(place, source.value, model.value))
    return _check_of(findings)


def _fingerprint(
    place: _Place | None, listing: Listing | None, model: CheckedModel | None
) -> Finding:
    if place is None or listing is None or model is None:
        text = "not compared, because of what is wrong above"
        return Finding(CheckName.FINGERPRINT, Verdict.SKIPPED, text)
    return _find(CheckName.FINGERPRINT, lambda: _compare(place, listing, model), str).finding


def refused_fields(error: VitrayError) -> Check:
    """The result for a job that cannot be read."""
    return _only_fields(_finding_of(CheckName.FIELDS, error))


def _only_fields(fields: Finding) -> Check:
    """The result where the fields are wrong, so that nothing else was checked."""
    text = "not checked, because the fields are wrong"
    others = [name for name in CheckName if name is not fields.check]
    return _check_of([fields, *(Finding(name, Verdict.SKIPPED, text) for name in others)])


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """The value of a check, None where it failed, and its finding."""

    value: T | None
    finding: Finding


def _find(name: CheckName, work: Callable[[], T], describe: Callable[[T], str]) -> _Outcome[T]:
    """The outcome of one check. describe: raises, too, where something is wrong."""
    try:
        value = work()
        return _Outcome(value, Finding(name, Verdict.OK, describe(value)))
    except VitrayError as error:
        return _Outcome(None, _finding_of(name, error))


def _finding_of(name: CheckName, error: VitrayError) -> Finding:
    is_wrong = error.exit_code == ExitCode.BAD_USAGE
    return Finding(name, Verdict.WRONG if is_wrong else Verdict.NO_ANSWER, one_line(error, 1000))


def _with_absolute_paths(job: Job) -> Job:
    """The job as a run takes it, with its file of labels read. Raises JobError."""
    return with_label_names(with_absolute_paths(job))


@dataclass(frozen=True, slots=True)
class _Place:
    """The job's `out`. job: with the source rules of the dataset in it."""

    job: Job
    dataset: Dataset | None
    shards: int

    def __str__(self) -> str:
        content = "no dataset yet"
        if self.dataset is not None or self.shards:
            content = f"a dataset with {count(self.shards, 'shard')}"
        return f"{self.job.out} ({content}): can list, create, read and delete there"


def _open_place(job: Job) -> _Place:
    """`out`, which can be listed, created in conditionally, read and deleted from."""
    shards = len(committed_files(job.out))
    dataset = open_dataset(job.out)
    is_folder = is_local(job.out) and os.path.isdir(job.out)
    folders = missing_folders(job.out) if is_local(job.out) else []
    try:
        check_store(job.out)
    finally:
        for folder in folders:
            store_for(job.out).delete_folder(folder)
        if is_folder:  # the check of a store removes an empty folder
            os.makedirs(job.out, exist_ok=True)
    return _Place(with_source_rules(job), dataset, shards)


def _has_rows(place: _Place | None) -> bool:
    return place is not None and (place.dataset is not None or place.shards > 0)


def _list(job: Job, place: _Place | None) -> Listing:
    """The source; as a new dataset would see it where `out` cannot be read."""
    return list_shards(job, []) if place is None else list_source(job)


def _source_text(job: Job) -> Callable[[Listing], str]:
    return lambda listing: _describe_source(listing, job)


def _describe_source(listing: Listing, job: Job) -> str:
    """The source as text. Raises AccessError or ObjectRefused where its images are refused."""
    selection = count_selection(listing, job)
    shards = select_shards(listing.shards, job)
    images, is_exact = estimate_images(shards, job)
    about = "" if is_exact else "about "
    size = decimal(sum(shard.size for shard in shards))
    kind = "shard" if listing.kind is None else listing.kind.noun
    text = f"{count(len(shards), kind)}, {about}{count(images, 'image')}, {size}"
    if selection.is_set:
        text += f" ({selection})"
    return f"{text}; {_describe_first(shards, job)}" if shards else text


def _describe_first(shards: list[Shard], job: Job) -> str:
    """Whether the first image can be read, as text."""
    try:
        first = next((item for item in read_shard(shards[0], job, lambda index: index == 0)), None)
    except (AccessError, ObjectRefused):
        raise
    except (ShardError, StorageError) as error:
        return f"the first shard would be set aside: {one_line(error)}"
    if not isinstance(first, Encoded):
        return "the first shard has no image"
    if first.data is None:
        return f"the first image has an error: {one_line(first.message)}"
    return "the first image can be read"


def _describe_model(model: CheckedModel) -> str:
    spec = model.spec
    labels = count(len(spec.labels), "label") if spec.labels else "no labels"
    vectors = ", ".join(f"{count(vector.dimension, 'value')}" for vector in model.vectors)
    height, width = spec.pixels.shape
    return f"{spec.family}, {labels}, {vectors or 'no embedding'}, {height}x{width} pixels"


def _machine(job: Job, dataset: Dataset | None) -> str:
    """What this machine has, as text. Raises ModelError."""
    frozen_job = job if dataset is None else with_frozen(job)
    require_machine(frozen_job, thoroughly=True)
    fields = ("engine", "precision", "device")
    named = [f"{name} {getattr(frozen_job, name)}" for name in fields]
    named = [text for text in named if not text.endswith(" auto")]
    return f"has {', '.join(named)}" if named else "any will do: nothing about it is in the job"


def _compare(place: _Place, listing: Listing, model: CheckedModel) -> str:
    """Whether the rows in `out` are the job's, as text. Raises FingerprintError."""
    require_same_job(place.job, place.dataset, listing, model)
    if place.dataset is None and not place.shards:
        return "no dataset there yet: a run would begin one"
    text = "the rows in `out` are of this job"
    return text if model.is_hashed else f"{text}, if the weights are (they were not read)"
