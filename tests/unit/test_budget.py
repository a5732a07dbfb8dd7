"""When a run ends early, and what it costs."""

from __future__ import annotations

import math

import pytest

from vitray.budget import Budget, Cost, Limit, Usage, request_cost
from vitray.errors import JobError

PRICES = {"machine_hour": 2.0, "put_1000": 0.005, "get_1000": 0.0004}


def usage(hours: float, machines: int = 1, shards: int = 0, fragments: int = 0) -> Usage:
    return Usage(machines, 3600 * hours, 3600 * hours * machines, shards, fragments)


@pytest.mark.parametrize(
    ("budget", "used", "reached"),
    [
        (Budget(), usage(1000), None),
        (Budget(max_hours=2), usage(1.99), None),
        (Budget(max_hours=2), usage(2), Limit.MAX_HOURS),
        (Budget(max_cost=4, prices=PRICES), usage(1.9), None),
        (Budget(max_cost=4, prices=PRICES), usage(2), Limit.MAX_COST),
        (Budget(max_cost=4, prices=PRICES), usage(0.5, machines=4), Limit.MAX_COST),
        (Budget(max_cost=4, prices=PRICES), usage(1.9, shards=9000), Limit.MAX_COST),
        (Budget(1, 4, PRICES), usage(3), Limit.MAX_HOURS),
        (Budget(prices=PRICES), usage(1000), None),
    ],
)
def test_a_run_ends_at_the_limit_that_is_used_up(
    budget: Budget, used: Usage, reached: Limit | None
) -> None:
    assert budget.reached(used) == reached


def test_the_cost_has_the_time_of_all_machines_and_the_requests() -> None:
    used = usage(0.5, machines=3, shards=1000, fragments=2000)
    requests = request_cost(1000, 2000, PRICES)
    assert requests == pytest.approx((6000 + 2000) / 1000 * 0.005 + (13000 + 4000) / 1000 * 0.0004)
    assert Budget(prices=PRICES).cost(used) == Cost(3.0, round(requests, 6), round(3 + requests, 6))
    assert Budget().cost(used) is None


def test_machines_are_counted_while_they_are_there() -> None:
    used = Usage()
    used.advance(10)
    used.machines = 3
    used.advance(15)
    used.advance(15)
    used.machines = 1
    used.advance(20)
    assert (used.seconds, used.machine_seconds) == (20, 10 + 3 * 5 + 5)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_limit_that_is_no_amount_is_refused(value: float) -> None:
    with pytest.raises(JobError, match=r"max_hours is .*above 0"):
        Budget(max_hours=value)
    with pytest.raises(JobError, match=r"max_cost is .*above 0"):
        Budget(max_cost=value, prices=PRICES)


@pytest.mark.parametrize("prices", [{}, {"put_1000": 1.0}, {"machine_hour": 0.0}])
def test_a_limit_of_cost_needs_a_price_of_time(prices: dict[str, float]) -> None:
    with pytest.raises(JobError, match="machine_hour above 0"):
        Budget(max_cost=1, prices=prices)
