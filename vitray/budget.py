"""What a run costs, and the limits at which it ends.

Prices are a mapping of names (PRICES) to amounts, in the user's own currency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vitray.errors import JobError

PRICES = {
    "machine_hour": "one machine like the one measured, per hour",
    "put_1000": "a thousand PUT, LIST and COPY requests",
    "get_1000": "a thousand GET and HEAD requests",
    "gb_month": "a gigabyte stored for a month",
}
# requests per shard on S3, measured: see BENCHMARKS.md. Each fragment adds a PUT, a HEAD and a GET.
WRITES_PER_SHARD = 6
READS_PER_SHARD = 13


class Limit(StrEnum):
    """The limit that ended a run. The values are stored in run records."""

    MAX_HOURS = "max_hours"
    MAX_COST = "max_cost"


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a run, in the currency of the prices.

    machines: of the time that they were there. requests: to the store, estimated from the shards
    and fragments that the run wrote. total: their sum.
    """

    machines: float
    requests: float
    total: float


@dataclass(slots=True)
class Usage:
    """What a run has used so far.

    machines: of this moment. machine_seconds: the sum over all machines. shards, fragments: those
    that this run wrote; others that it found cost next to nothing.
    """

    machines: int = 1
    seconds: float = 0.0
    machine_seconds: float = 0.0
    shards: int = 0
    fragments: int = 0

    def advance(self, seconds: float) -> None:
        """Count the time since the last call. seconds: since the start of the run."""
        self.machine_seconds += max(0.0, seconds - self.seconds) * self.machines
        self.seconds = max(self.seconds, seconds)


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run ends early, and the prices that it counts with. Without prices it has no cost.

    Raises JobError for a limit that is not positive, and for max_cost without `machine_hour`.
    """

    max_hours: float | None = None
    max_cost: float | None = None
    prices: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("max_hours", self.max_hours), ("max_cost", self.max_cost)):
            if value is not None and not (0 < value < math.inf):
                raise JobError(f"{name} is {value:g}. Give a number above 0.")
        if self.max_cost is not None and not self.prices.get("machine_hour"):
            raise JobError(
                "max_cost needs a price for time. Give prices with machine_hour above 0 "
                "(vitray run --prices PRICES.yaml)."
            )

    def cost(self, usage: Usage) -> Cost | None:
        """The cost so far; None without prices."""
        if not self.prices:
            return None
        machines = usage.machine_seconds / 3600 * self.prices.get("machine_hour", 0)
        requests = request_cost(usage.shards, usage.fragments, self.prices)
        return Cost(round(machines, 6), round(requests, 6), round(machines + requests, 6))

    def reached(self, usage: Usage) -> Limit | None:
        """The limit that is used up, if one is."""
        if self.max_hours is not None and usage.seconds >= 3600 * self.max_hours:
            return Limit.MAX_HOURS
        cost = self.cost(usage)
        if self.max_cost is not None and cost is not None and cost.total >= self.max_cost:
            return Limit.MAX_COST
        return None


def request_cost(shards: int, fragments: int, prices: Mapping[str, float]) -> float:
    """The cost of the requests that complete so many shards and fragments on S3."""
    writes = shards * WRITES_PER_SHARD + fragments
    reads = shards * READS_PER_SHARD + 2 * fragments
    return writes / 1000 * prices.get("put_1000", 0) + reads / 1000 * prices.get("get_1000", 0)
