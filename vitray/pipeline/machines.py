"""Divides machines between workers. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitray.errors import ClusterError, count

MODEL_THREADS = 4  # of a worker with a GPU
CPUS_PER_GPU = 24  # at 2 ms of decoding per image: 12,000 images/s, a ViT-B/16 on an H200


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What a worker gets of its machine, and how many threads each of its stages has.

    cpus, gpus: what Ray reserves. threads: that the model computes with. queue_blocks: blocks that
    wait for each stage. decoder_processes: whether decoders are processes (process_decoders.py).
    """

    cpus: float
    gpus: float
    threads: int
    readers: int
    decoders: int
    writers: int
    queue_blocks: int
    compiled: bool = False
    decoder_processes: bool = False

    def capacity(self, fragment_rows: int) -> tuple[int, int]:
        """(shards, images) that keep its stages busy."""
        if self.decoder_processes:
            # Each process reads one shard while it decodes another, and a third one waits for it.
            blocks = 3 * self.decoders + 2 * self.queue_blocks
            return 3 * self.decoders, blocks * fragment_rows
        blocks = self.readers + self.decoders + 2 * self.queue_blocks
        return self.readers + 1, blocks * fragment_rows


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one worker: its machine, and what it gets there.

    number: among the slots of the machine.
    """

    node: str
    number: int
    share: WorkerShare

    @property
    def place(self) -> tuple[str, int]:
        return self.node, self.number


def local_share(cpus: int, has_gpu: bool) -> WorkerShare:
    """The share of the only worker of this machine."""
    if has_gpu:
        return _gpu_share(cpus, 1)
    # Short queues: after a kill, the fragments in them are computed again.
    return replace(_cpu_share(cpus), queue_blocks=1)


def decoding_machines(nodes: Sequence[dict[str, Any]], device: str) -> list[tuple[str, int]]:
    """(id, CPUs) of the machines that only decode: those without a GPU where others have one."""
    if device not in ("auto", "cuda"):
        return []
    sizes = [(node["NodeID"], node["Resources"]) for node in nodes]
    if not any(int(resources.get("GPU", 0)) for _, resources in sizes):
        return []
    return [
        (node, int(resources.get("CPU", 0)))
        for node, resources in sizes
        if not int(resources.get("GPU", 0)) and resources.get("CPU", 0) >= 2
    ]


def further_machine(nodes: Sequence[dict[str, Any]], device: str) -> float:
    """All CPUs of a further machine that would help; 0 where there are enough.

    Without GPUs, another worker always helps. With GPUs, machines that decode do, until there are
    CPUS_PER_GPU. The size is that of the smallest such machine that is there.
    """
    decoding = decoding_machines(nodes, device)
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    if device not in ("auto", "cuda") or not gpus:
        return min((slot.share.cpus + 1 for slot in _cpu_slots(nodes)), default=0)
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
    if not decoding or cpus >= CPUS_PER_GPU * gpus:
        return 0
    return min(cpus for _, cpus in decoding)


def share_out(nodes: Sequence[dict[str, Any]], device: str) -> list[Slot]:
    """A slot for each GPU, or for each machine of 2 CPUs or more where no GPU can be used.

    nodes: as Ray lists them, with NodeID and Resources. Raises ClusterError, with the sizes that
    are needed.
    """
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
    if cpus < 2:
        raise ClusterError(
            f"the cluster has {count(int(cpus), 'CPU')}; vitray needs 2: one for the model, "
            "one for all else"
        )
    slots = _gpu_slots(nodes) if device in ("auto", "cuda") else []
    slots = slots or _cpu_slots(nodes)
    if not slots:
        raise ClusterError(
            "no machine of the cluster has 2 CPUs, which the model needs on one machine"
        )
    return slots


def _gpu_slots(nodes: Sequence[dict[str, Any]]) -> list[Slot]:
    """A slot for each GPU, except on machines with too few CPUs.

    Raises ClusterError where that leaves none.
    """
    slots = list[Slot]()
    too_small = ""
    for node in nodes:
        cpus, gpus = int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))
        if gpus and cpus <= gpus:
            too_small = f"a machine has {count(cpus, 'CPU')} for {count(gpus, 'GPU')}"
        else:
            slots += [Slot(node["NodeID"], n, _gpu_share(cpus, gpus)) for n in range(gpus)]
    if too_small and not slots:
        raise ClusterError(f"{too_small}; it needs one per GPU and at least one more")
    return slots


def _gpu_share(cpus: int, gpus: int) -> WorkerShare:
    """Of one GPU of a machine with so many CPUs and GPUs."""
    own = max(1, cpus // gpus)
    return WorkerShare(
        cpus=max(1, (cpus - 1) // gpus),
        gpus=1.0,
        threads=MODEL_THREADS,
        readers=max(2, own // 4),
        decoders=own,
        writers=max(4, own // 4),
        queue_blocks=max(2, own // 2),
        decoder_processes=True,
    )


def _cpu_slots(nodes: Sequence[dict[str, Any]]) -> list[Slot]:
    sizes = [(node["NodeID"], int(node["Resources"].get("CPU", 0))) for node in nodes]
    return [Slot(node, 0, _cpu_share(cpus)) for node, cpus in sizes if cpus >= 2]


def _cpu_share(cpus: int) -> WorkerShare:
    """Of a machine without a GPU. One CPU stays free for what else runs on Ray."""
    return WorkerShare(
        cpus=cpus - 1,
        gpus=0.0,
        threads=cpus,
        readers=2,
        decoders=cpus,
        writers=4,
        queue_blocks=1,
    )
