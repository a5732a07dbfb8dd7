"""What reaches the driver of a run: facts about shards and workers, never rows or pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

from vitray.dataset import Commit
from vitray.schema import End


@dataclass(frozen=True, slots=True)
class FragmentWritten:
    """A fragment was computed and stored.

    seconds: by stage. size_bytes: of the encoded images. left_out: images of its rows that have no
    row of their own. copied_bytes: pixels that were copied between the decoder and the model.
    """

    shard: str
    start: int
    stop: int
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FragmentSkipped:
    """A fragment was stored before, by an earlier run or an earlier attempt."""

    shard: str
    start: int
    stop: int
    reasons: dict[str, int] = field(default_factory=dict)


FragmentEvent = FragmentWritten | FragmentSkipped


def errors_of(event: FragmentEvent) -> int:
    """The number of bad images."""
    return sum(event.reasons.values())


@dataclass(frozen=True, slots=True)
class ShardEnded:
    """A shard was read to its end, or found to be staged completely."""

    shard: str
    end: End


@dataclass(frozen=True, slots=True)
class ShardCommitted:
    """A shard's data file exists."""

    shard: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """A system fault kept a shard from being read. Another attempt may help."""

    shard: str
    why: str


@dataclass(frozen=True, slots=True)
class ShardBroken:
    """A shard's bytes are not a shard of its kind, or lack a column. No attempt helps."""

    shard: str
    why: str


@dataclass(frozen=True, slots=True)
class ShardChanged:
    """A shard is not the planned version any more."""

    shard: str


@dataclass(frozen=True, slots=True)
class ShardReturned:
    """A shard was not computed because a machine is gone, which is no fault of the shard."""

    shard: str


ShardOutcome = ShardCommitted | ShardFailed | ShardBroken | ShardChanged | ShardReturned


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker runs and can be given shards, or more of them than before.

    shards_at_once, images_at_once: what keeps its stages busy.
    """

    worker: str
    shards_at_once: int
    images_at_once: int


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker has finished what it had begun, after `Executor.stop`."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, and with it the fragments that it had not stored.

    error: what ended it. is_machine: its machine is gone, so that no shard is to blame.
    suspects: the shards of the process that died, where only one of several did.
    """

    worker: str
    error: Exception
    is_machine: bool = False
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImagesPredicted:
    """So many images went through a worker's model since its start, also of later fragments."""

    worker: str
    images: int


ShardEvent = FragmentEvent | ShardEnded | ShardOutcome
Event = ShardEvent | ImagesPredicted | WorkerReady | WorkerStopped | WorkerLost
