"""What a failure means for a shard: again, alone, or set aside; and when the run itself fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from vitray.pipeline.retry import ATTEMPTS, FATAL_SHARDS, IDLE_DEATHS, RetryPolicy, Verdict

AGAIN, ALONE, SET_ASIDE = Verdict.AGAIN, Verdict.ALONE, Verdict.SET_ASIDE


@dataclass(frozen=True)
class Died:
    """A worker that died, with the shards that it had."""

    shards: tuple[str, ...]
    suspects: tuple[str, ...] = ()
    ran_alone: bool = False


Step = Died | str  # or a shard that names itself


def died(*shards: str, suspects: tuple[str, ...] = ()) -> Died:
    return Died(shards, suspects)


def died_alone(shard: str) -> Died:
    return Died((shard,), ran_alone=True)


def verdicts_of(policy: RetryPolicy, steps: list[Step]) -> list[Verdict | dict[str, Verdict]]:
    """What the policy says about each of these failures."""
    verdicts = list[Verdict | dict[str, Verdict]]()
    for step in steps:
        if isinstance(step, str):
            verdicts.append(policy.shard_failed(step))
        else:
            verdicts.append(policy.worker_died(step.shards, step.suspects, step.ran_alone))
    return verdicts


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(["a"], [AGAIN], id="a transient failure"),
        pytest.param(["a", "b", "a"], [AGAIN, AGAIN, AGAIN], id="shards are counted apart"),
        pytest.param(["a", "a", "a"], [AGAIN, AGAIN, SET_ASIDE], id="three failures"),
        pytest.param(
            [died("a", "b")], [{"a": AGAIN, "b": AGAIN}], id="one death with several shards"
        ),
        pytest.param(
            [died("a", "b"), died("a", "c")],
            [{"a": AGAIN, "b": AGAIN}, {"a": ALONE, "c": AGAIN}],
            id="who was there twice runs alone",
        ),
        pytest.param(
            [died("a")] * 3,
            [{"a": AGAIN}, {"a": ALONE}, {"a": ALONE}],
            id="a worker that happened to have one shard",
        ),
        pytest.param(
            [died("a", "b", "c", suspects=("b",))] * 2,
            [{"a": AGAIN, "b": AGAIN, "c": AGAIN}, {"a": AGAIN, "b": ALONE, "c": AGAIN}],
            id="only the shards of the process that died are suspects",
        ),
        pytest.param(
            [died_alone("a")] * 3,
            [{"a": ALONE}, {"a": ALONE}, {"a": SET_ASIDE}],
            id="three deaths alone",
        ),
        pytest.param(
            [died("a", "b"), died("a", "b"), died_alone("a"), died_alone("a"), died_alone("a")],
            [
                {"a": AGAIN, "b": AGAIN},
                {"a": ALONE, "b": ALONE},
                {"a": ALONE},
                {"a": ALONE},
                {"a": SET_ASIDE},
            ],
            id="deaths with several shards are no attempts",
        ),
        pytest.param(
            ["a", died_alone("a"), "a"],
            [AGAIN, {"a": ALONE}, SET_ASIDE],
            id="failures and deaths alone count together",
        ),
        pytest.param([died()], [{}], id="a worker without shards"),
    ],
)
def test_verdicts(steps: list[Step], expected: list[Verdict | dict[str, Verdict]]) -> None:
    policy = RetryPolicy()
    assert verdicts_of(policy, steps) == expected
    assert not policy.is_fatal(has_workers=False)


def test_broken_shard_is_set_aside_at_once() -> None:
    policy = RetryPolicy()
    policy.shard_broken("a")
    assert policy.attempts == {"a": ATTEMPTS} and policy.set_aside == 1
    assert policy.died_alone == [] and not policy.is_fatal(has_workers=False)


def test_number_of_shards_set_aside_grows_with_the_last_attempt() -> None:
    policy = RetryPolicy()
    found = list[int]()
    for shard in ("a", "b", "a", "b", "a", "b"):
        policy.shard_failed(shard)
        found.append(policy.set_aside)
    assert found == [0, 0, 0, 0, 1, 2]


def test_commit_ends_the_suspicion_of_a_shard() -> None:
    """It was there by chance when two workers died."""
    policy = RetryPolicy()
    policy.worker_died(["a", "b"])
    policy.shard_committed("a")
    assert policy.worker_died(["a", "b"]) == {"a": AGAIN, "b": ALONE}


def lone_deaths(policy: RetryPolicy, count: int) -> None:
    for n in range(count):
        policy.worker_died([f"shard {n}"], ran_alone=True)


def idle_deaths(policy: RetryPolicy, count: int) -> None:
    for _ in range(count):
        policy.worker_died([])


@pytest.mark.parametrize(("die", "most"), [(lone_deaths, FATAL_SHARDS), (idle_deaths, IDLE_DEATHS)])
def test_deaths_without_a_commit_between_them_are_fatal(
    die: Callable[[RetryPolicy, int], None], most: int
) -> None:
    policy = RetryPolicy()
    die(policy, most - 1)
    assert not policy.is_fatal(has_workers=False)
    policy.shard_committed("other")
    die(policy, most - 1)
    assert not policy.is_fatal(has_workers=False)
    die(policy, most)
    assert policy.is_fatal(has_workers=False)


def test_workers_that_cannot_start_are_not_fatal_beside_others() -> None:
    """As on one broken machine of many."""
    policy = RetryPolicy()
    idle_deaths(policy, 10 * IDLE_DEATHS)
    assert not policy.is_fatal(has_workers=True) and policy.is_fatal(has_workers=False)


def test_the_same_shard_alone_again_and_again_is_not_fatal() -> None:
    """Its own fault: it is set aside, and the others go on."""
    policy = RetryPolicy()
    for _ in range(FATAL_SHARDS):
        policy.worker_died(["a"], ran_alone=True)
    assert policy.died_alone == ["a"] and not policy.is_fatal(has_workers=False)


def test_deaths_with_several_shards_are_never_fatal() -> None:
    """They become deaths of suspects that are alone, which are counted."""
    policy = RetryPolicy()
    for _ in range(10 * FATAL_SHARDS):
        policy.worker_died(["a", "b"])
    assert (
        not policy.is_fatal(has_workers=False) and policy.attempts == {} and policy.died_alone == []
    )
