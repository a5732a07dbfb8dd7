"""What a failure means for a shard: try again, try it alone, or set it aside. Pure.

A shard that cannot be read names itself. A worker that dies does not: any shard that it had may be
the cause. Those that were there twice run alone, and one that was run alone by a worker that dies
is to blame.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

ATTEMPTS = 3
SUSPICIOUS_DEATHS = 2  # of workers that had a shard, until the shard runs alone
FATAL_SHARDS = 5  # when this many shards in a row fail alone, the fault is not in the shards
IDLE_DEATHS = 4  # of workers without a shard, in a row, when none is left: they cannot even start


class Verdict(Enum):
    """What becomes of a shard."""

    AGAIN = auto()
    ALONE = auto()  # again, by a worker that has no other shard
    SET_ASIDE = auto()


@dataclass
class RetryPolicy:
    """Counts failures. attempts: failed ones by shard."""

    attempts: dict[str, int] = field(default_factory=dict)
    _deaths: dict[str, int] = field(default_factory=dict)
    _died_alone: set[str] = field(default_factory=set)
    _set_aside: set[str] = field(default_factory=set)
    _idle_deaths: int = 0

    @property
    def set_aside(self) -> int:
        """The number of shards that are given up."""
        return len(self._set_aside)

    @property
    def died_alone(self) -> list[str]:
        """The shards that failed alone since the last commit."""
        return sorted(self._died_alone)

    def is_fatal(self, has_workers: bool) -> bool:
        """Whether the fault is in no shard: another attempt at anything is in vain.

        has_workers: whether there are others than those that died.
        """
        never_start = self._idle_deaths >= IDLE_DEATHS and not has_workers
        return len(self._died_alone) >= FATAL_SHARDS or never_start

    def shard_failed(self, shard: str) -> Verdict:
        """A shard could not be read or committed."""
        return self._count(shard, Verdict.AGAIN)

    def shard_broken(self, shard: str) -> None:
        """No attempt at a shard helps."""
        self.attempts[shard] = ATTEMPTS
        self._set_aside.add(shard)

    def shard_committed(self, shard: str) -> None:
        self._deaths.pop(shard, None)
        self._died_alone.clear()
        self._idle_deaths = 0

    def worker_died(
        self, shards: Collection[str], suspects: Collection[str] = (), ran_alone: bool = False
    ) -> dict[str, Verdict]:
        """A worker is gone that had these shards, while its machine is still there.

        suspects: those that the process had which died, where that is known. ran_alone: the only
        shard had the verdict ALONE before.
        """
        if not shards:
            self._idle_deaths += 1
        if ran_alone:
            (shard,) = shards
            self._died_alone.add(shard)
            return {shard: self._count(shard, Verdict.ALONE)}
        verdicts = dict.fromkeys(shards, Verdict.AGAIN)
        for shard in suspects or shards:
            self._deaths[shard] = self._deaths.get(shard, 0) + 1
            if self._deaths[shard] >= SUSPICIOUS_DEATHS:
                verdicts[shard] = Verdict.ALONE
        return verdicts

    def _count(self, shard: str, otherwise: Verdict) -> Verdict:
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] < ATTEMPTS:
            return otherwise
        self._set_aside.add(shard)
        return Verdict.SET_ASIDE
