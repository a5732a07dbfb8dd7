"""Every exception that vitray raises on purpose.

    VitrayError             exit code 1: a broken system
    |- JobError             exit code 2: bad usage, a bad job, a model or an input that does not fit it
    |  |- SourceError           nothing to read, or not what was said
    |  |- ModelError            no such checkpoint, no trained head, a layer that does not exist
    |  `- FingerprintError      OUT belongs to another job
    |- StorageError         a store that does not answer, refuses, or is full
    |  |- ObjectMissing         no object there
    |  |- ObjectChanged         the object is not the version that was planned
    |  |- ObjectRefused         this object cannot be had, however often one asks; a ShardError too
    |  `- UnsafeStore           the store ignores a conditional create
    |- CommitError          a data file exists that this run could not have written
    |- ShardError           one shard cannot be read: set aside, the rest goes on
    |- ClusterError         Ray is missing, too small, open, or stalled
    |- Disagreement         exit code 5: an exported model says too often what the original does not
    |- ErrorRateExceeded    exit code 4: more bad images than `max_error_rate` allows
    `- Interrupted          exit code 143: it was asked to end

A bad image is none of these: it is an error row (schema.REASONS).
"""

from __future__ import annotations


class VitrayError(Exception):
    """A message for a person: what is wrong, with its name, then the next step."""

    exit_code = 1


class JobError(VitrayError):
    exit_code = 2


class SourceError(JobError): ...


class ModelError(JobError): ...


class FingerprintError(JobError): ...


class StorageError(VitrayError): ...


class ObjectMissing(StorageError): ...


class ObjectChanged(StorageError): ...


class UnsafeStore(StorageError): ...


class ShardError(VitrayError): ...


class ObjectRefused(StorageError, ShardError): ...


class CommitError(VitrayError): ...


class ClusterError(VitrayError): ...


class ErrorRateExceeded(VitrayError):
    exit_code = 4


class Disagreement(VitrayError):
    """judged: what disagrees, which says itself as text."""

    exit_code = 5

    def __init__(self, message: str, judged: object) -> None:
        super().__init__(message)
        self.judged = judged


class Interrupted(VitrayError):
    exit_code = 143


def one_line(error: BaseException) -> str:
    """What another library's error says, as part of a message of ours."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def shortened(text: str, most: int) -> str:
    """Without its middle where it is longer: keys and labels stand at a message's begin, the next
    step at its end.
    """
    return text if len(text) <= most else f"{text[: most - most // 3]}…{text[-(most // 3) :]}"


def count(number: int, noun: str) -> str:
    """The number and its noun, which takes an s."""
    return f"{number:,} {noun}" + "s" * (number != 1)
