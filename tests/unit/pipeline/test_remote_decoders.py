"""Which machines without a GPU decode for which worker."""

from __future__ import annotations

from collections import Counter

import pytest

from vitray.pipeline.machines import decoding_machines
from vitray.pipeline.remote_decoders import Feed, pair_up


def node(name: str, cpus: int, gpus: int = 0) -> dict[str, object]:
    return {"NodeID": name, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        ([node("a", 16, 1), node("b", 32)], "auto", [("b", 32)]),
        ([node("a", 16, 1), node("b", 32)], "cpu", []),  # all machines run the model
        ([node("a", 16), node("b", 32)], "auto", []),
        ([node("a", 16, 2), node("b", 1)], "cuda", []),  # too small
    ],
)
def test_only_machines_beside_gpus_decode(
    nodes: list[dict[str, object]], device: str, expected: list[tuple[str, int]]
) -> None:
    assert decoding_machines(nodes, device) == expected


def test_one_machine_is_divided_between_the_workers() -> None:
    assert pair_up([8], 3) == [Feed(0, 0, 3), Feed(0, 1, 3), Feed(0, 2, 3)]


@pytest.mark.parametrize(("machines", "workers"), [(1, 1), (2, 8), (3, 8), (8, 8), (20, 8)])
def test_every_worker_is_fed_and_every_core_is_used(machines: int, workers: int) -> None:
    feeds = pair_up([16] * machines, workers)
    by_worker = Counter[int]()
    by_machine = Counter[int]()
    for feed in feeds:
        by_worker[feed.worker] += feed.streams
        by_machine[feed.decoder] += feed.streams
    assert set(by_worker) == set(range(workers)) and set(by_machine) == set(range(machines))
    assert all(streams >= 16 for streams in by_machine.values())
    assert max(by_worker.values()) <= 2 * min(by_worker.values())
