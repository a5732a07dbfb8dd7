"""How machines are divided between workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitray.errors import ClusterError
from vitray.pipeline.machines import MODEL_THREADS, local_share, share_out


def nodes_of(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """Machines by their CPUs and GPUs, as Ray lists them: it leaves out what is 0."""
    return [
        {
            "NodeID": f"node{n}",
            "Resources": {
                name: float(size) for name, size in (("CPU", cpus), ("GPU", gpus)) if size
            },
        }
        for n, (cpus, gpus) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "device", "expected"),
    [
        pytest.param([(2, 0)], "auto", [("node0", 0, 1, 0)], id="the smallest cluster"),
        pytest.param(
            [(2, 0), (1, 0), (16, 0)],
            "auto",
            [("node0", 0, 1, 0), ("node2", 0, 15, 0)],
            id="a machine of one CPU has no worker",
        ),
        pytest.param(
            [(16, 2), (8, 0)],
            "auto",
            [("node0", 0, 7, 1), ("node0", 1, 7, 1)],
            id="one for each GPU",
        ),
        pytest.param([(16, 2)], "cpu", [("node0", 0, 15, 0)], id="GPUs that the job does not use"),
        pytest.param([(4, 0)], "cuda", [("node0", 0, 3, 0)], id="no GPU where one is wanted"),
        pytest.param(
            [(3, 2)], "cuda", [("node0", 0, 1, 1), ("node0", 1, 1, 1)], id="few CPUs for GPUs"
        ),
        pytest.param(
            [(64, 8), (4, 1)],
            "auto",
            [*(("node0", n, 7, 1) for n in range(8)), ("node1", 0, 3, 1)],
            id="machines of two kinds",
        ),
    ],
)
def test_slots(
    sizes: list[tuple[int, int]], device: str, expected: list[tuple[str, int, int, int]]
) -> None:
    slots = share_out(nodes_of(*sizes), device)
    assert [
        (slot.node, slot.number, slot.share.cpus, slot.share.gpus) for slot in slots
    ] == expected
    assert len({slot.place for slot in slots}) == len(slots)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([], "has 0 CPUs; vitray needs 2"),
        ([(1, 0)], "has 1 CPU; vitray needs 2"),
        ([(2, 2)], "2 CPUs for 2 GPUs; it needs one per GPU"),
        ([(1, 0), (1, 0)], "no machine"),
    ],
)
def test_too_small_clusters_are_refused(sizes: list[tuple[int, int]], text: str) -> None:
    with pytest.raises(ClusterError, match=text):
        share_out(nodes_of(*sizes), "auto")


@pytest.mark.parametrize("cpus", [2, 3, 8, 16, 64, 192])
@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_workers_leave_a_cpu_of_their_machine_free(cpus: int, gpus: int) -> None:
    """Else what Ray runs beside them waits for ever."""
    if cpus <= gpus:
        return
    shares = [slot.share for slot in share_out(nodes_of((cpus, gpus)), "auto")]
    assert sum(share.cpus for share in shares) <= cpus - 1
    assert sum(share.gpus for share in shares) == gpus
    for share in shares:
        assert min(share.readers, share.decoders, share.writers, share.queue_blocks) >= 1
        assert share.threads == (MODEL_THREADS if gpus else cpus)
        assert share.decoders == max(1, cpus // max(1, gpus))
        assert not share.compiled


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_share_of_this_machine(cpus: int) -> None:
    share = local_share(cpus, has_gpu=False)
    assert (share.gpus, share.threads, share.decoders) == (0, cpus, cpus)
    assert share.queue_blocks == 1  # what waits in queues is computed again after a kill
    on_gpu = local_share(cpus, has_gpu=True)
    assert (on_gpu.gpus, on_gpu.threads, on_gpu.decoders) == (1, MODEL_THREADS, cpus)
    assert on_gpu.queue_blocks >= 2


def test_capacity_is_what_keeps_every_stage_busy() -> None:
    share = replace(local_share(2, has_gpu=False), readers=3, decoders=5, queue_blocks=2)
    assert share.capacity(256) == (4, (3 + 5 + 2 * 2) * 256)
    shards, images = replace(share, decoder_processes=True).capacity(256)
    assert shards == 3 * 5 and images == (3 * 5 + 2 * 2) * 256
