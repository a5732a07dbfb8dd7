"""Every exception that vitray raises on purpose.

    VitrayError             exit code 1: a system does not work
    |- JobError             exit code 2: wrong usage, a bad job, or a model that does not fit
    |  |- SourceError           nothing to read, or the source is not what the job says
    |  |- ModelError            no such checkpoint, no trained head, or no such layer
    |  `- FingerprintError      OUT belongs to another job
    |- StorageError         a store does not answer, or is full
    |  |- AccessError           exit code 2: no such bucket, wrong credentials, or no rights
    |  |- ObjectMissing         the object does not exist
    |  |- ObjectChanged         the object is not the version that was planned
    |  |- ObjectRefused         exit code 2: this object can never be read; it is a ShardError too
    |  |- UnsafeStore           exit code 2: the store ignores a conditional create or replace
    |  `- TakenOver             another command trains into the same OUT
    |- CommitError          a data file exists that this run could not have written
    |- ShardError           one shard cannot be read: it is set aside, and the run continues
    |- ClusterError         Ray is missing, too small, open to anyone, or stalled
    |- Diverged             the loss of a training is no longer a number
    |- Disagreement         exit code 5: an exported model agrees too little with the original
    |- ErrorRateExceeded    exit code 4: more bad images than `max_error_rate` allows
    `- Interrupted          exit code 143: the run was asked to stop

Running again may help after exit code 1, and does not help after exit code 2.

A bad image raises none of these. It becomes an error row (schema.REASONS).
"""

from __future__ import annotations

from vitray.exit_codes import ExitCode

MESSAGE_CHARS = 400  # of another library's message within one of ours


class VitrayError(Exception):
    """A message for a person: what is wrong, where, and what to do next."""

    exit_code = ExitCode.BROKEN_SYSTEM


class JobError(VitrayError):
    """The usage or the job is wrong, or the model does not fit."""

    exit_code = ExitCode.BAD_USAGE


class SourceError(JobError):
    """There is nothing to read, or the source is not what the job says."""


class ModelError(JobError):
    """The checkpoint does not exist, or has no trained head or no such layer."""


class FingerprintError(JobError):
    """The output directory belongs to another job."""


class StorageError(VitrayError):
    """A store does not answer, or is full: running again may help."""


class ObjectMissing(StorageError):
    """The object does not exist."""


class ObjectChanged(StorageError):
    """The object is not the version that was planned."""


class AccessError(StorageError):
    """The store serves others, and not this job: no such bucket, wrong credentials, no rights."""

    exit_code = ExitCode.BAD_USAGE


class UnsafeStore(StorageError):
    """The store ignores a conditional create or replace."""

    exit_code = ExitCode.BAD_USAGE


class TakenOver(StorageError):
    """Another command owns the states of this training now."""


class ShardError(VitrayError):
    """The shard cannot be read. It is set aside, and the run continues."""


class ObjectRefused(StorageError, ShardError):
    """The object can never be read."""

    exit_code = ExitCode.BAD_USAGE


class CommitError(VitrayError):
    """A data file exists that this run could not have written."""


class ClusterError(VitrayError):
    """Ray is missing, too small, open to anyone, or stalled."""


class Diverged(VitrayError):
    """The loss of a training is no longer a number."""


class ErrorRateExceeded(VitrayError):
    """More images are bad than `max_error_rate` allows."""

    exit_code = ExitCode.TOO_MANY_BAD_IMAGES


class Disagreement(VitrayError):
    """An exported model agrees too little with the original.

    export: the refused export; str(export) is the comparison table.
    """

    exit_code = ExitCode.TOO_LITTLE_AGREEMENT

    def __init__(self, message: str, export: object) -> None:
        super().__init__(message)
        self.export = export


class Interrupted(VitrayError):
    """The run was asked to stop."""

    exit_code = ExitCode.TERMINATED


def one_line(error: BaseException | str, limit: int = MESSAGE_CHARS) -> str:
    """The text of an error on one line, at most `limit` characters.

    An error without a text gives the name of its type; an empty text stays empty.
    """
    text = " ".join(str(error).split())[:limit]
    return text or ("" if isinstance(error, str) else type(error).__name__)


def shortened(text: str, limit: int) -> str:
    """The text, without its middle if it is longer than `limit` characters.

    The start of a message has keys and labels, and the end has the next step.
    """
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail]}…{text[-tail:]}"


def count(number: int, noun: str) -> str:
    """The number and its noun, in the plural unless the number is one."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"
