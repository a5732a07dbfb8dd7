"""The executor on Ray Data: four operators, bounded retries, one fragment per row.

Nothing here decides whether a shard is correct or complete: see rounds.py.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from vitray.dataset import Commit, Dataset, dataset_url
from vitray.errors import VitrayError
from vitray.models import open_model
from vitray.pipeline.cluster import (
    RETRIES,
    Shares,
    alive_nodes,
    is_visible,
    require_visible,
    result_or_error,
)
from vitray.pipeline.rounds import EventQueue
from vitray.pipeline.stages import (
    commit_or_error,
    decode_stage,
    open_device_decoder,
    predict_stage,
    read_stage,
    unpack,
    write_stage,
)
from vitray.schema import EventKind, Shard
from vitray.storage import is_local

CLOSE_TIMEOUT_S = 30
# How map_batches passes blocks: each as it is, an Arrow table on the object store's memory.
BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}


class RayExecutor:
    """Shards go through Ray Data, commits are Ray tasks."""

    def __init__(self, dataset: Dataset, shards: list[Shard], shares: Shares) -> None:
        import ray

        from vitray.pipeline.ray_internals import capture_executor

        self._dataset = ray.put(dataset)
        self._refs = {shard.id: ray.put(shard) for shard in shards}
        self._actors: list[str] = []
        self._pipeline = build_pipeline(
            list(self._refs.values()), dataset, self._dataset, shares, self._actors
        )
        self._commit = ray.remote(_commit).options(num_cpus=0, max_retries=RETRIES)
        self._running: dict[Any, str] = {}
        self._nodes = {node["NodeID"] for node in alive_nodes()}
        self._ray_executor: Any = None
        capture_executor(self._pipeline, lambda executor: setattr(self, "_ray_executor", executor))

    def start(self, events: EventQueue) -> None:
        """Ray's iterator waits without a deadline, so it runs in a thread."""
        self._events = events

        def consume() -> None:
            try:
                for block in self._pipeline.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                ):
                    for batch in unpack(block):
                        events.put(batch.event)
                events.put(None)
            except Exception as error:
                events.put(error)

        self._thread = threading.Thread(target=consume, name="vitray-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        # Ray cannot end only the reading. Fragments in flight are lost, staged ones stay.
        self._events.put(None)

    def start_commit(self, shard_id: str) -> None:
        self._running[self._commit.remote(self._dataset, self._refs[shard_id])] = shard_id

    def finished_commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        import ray

        ready = ray.wait(list(self._running), timeout=wait_s)[0]
        return [(self._running.pop(ref), ray.get(ref)) for ref in ready]

    def has_lost_machine(self) -> bool:
        return not self._nodes <= {node["NodeID"] for node in alive_nodes()}

    def is_waiting_for_machine(self) -> bool:
        from vitray.pipeline.ray_internals import are_all_unplaced

        return are_all_unplaced(list(self._actors))

    def describe(self) -> str:
        from vitray.pipeline.ray_internals import describe_operators

        return describe_operators(self._ray_executor) or "Ray has not begun"

    def close(self) -> None:
        import ray

        if self._ray_executor is not None:
            # Without it, Ray works on until the executor is garbage-collected.
            self._ray_executor.shutdown(force=True)
        self._thread.join(CLOSE_TIMEOUT_S)
        # A stored exception keeps Ray's handles alive, and with them the actors' CPUs: the next run
        # would wait for these forever.
        for name in self._actors:
            with contextlib.suppress(ValueError):  # it is gone
                ray.kill(ray.get_actor(name))


def _commit(dataset: Dataset, shard: Shard) -> Commit | VitrayError | None:
    error = result_or_error(require_visible, dataset_url(dataset.out))
    return error or commit_or_error(dataset, shard)


def require_source(shards: list[Shard]) -> None:
    """Raise ClusterError where this machine sees no shard: then the machine is at fault."""
    if all(is_local(shard.url) and not is_visible(shard.url) for shard in shards):
        require_visible(shards[0].url)


def build_pipeline(
    shards: list[Any], dataset: Dataset, dataset_ref: Any, shares: Shares, actors: list[str]
) -> Any:
    """The Ray dataset of events.

    shards, dataset_ref: object references, fetched where they are used.
    actors: the names of the actors are appended when Ray Data creates them.
    """
    import ray
    from ray.data import TaskPoolStrategy

    def named_actor() -> dict[str, Any]:
        actors.append(f"vitray-{uuid.uuid4().hex}")
        return {"max_restarts": RETRIES, "max_task_retries": RETRIES, "name": actors[-1]}

    _hide_ray_messages()
    _configure_ray_data(shares.queue_blocks)
    task: dict[str, Any] = {**BLOCKS, "ray_remote_args_fn": lambda: {"max_retries": RETRIES}}
    read, decode, write = _task_functions(shards, dataset, dataset_ref)
    numbers = [{"n": n} for n in range(len(shards))]
    items = ray.data.from_items(numbers, override_num_blocks=len(shards))
    encoded = items.map_batches(
        read, compute=TaskPoolStrategy(shares.readers), num_cpus=shares.reader_cpus, **task
    )
    decoded = encoded.map_batches(decode, num_cpus=shares.decoder_cpus, **task)
    predicted = decoded.map_batches(
        Predict,
        # By value: a restarted actor must not need a reference.
        fn_constructor_args=(dataset, shares.threads, shares.compiled),
        compute=_actor_pool(shares),
        num_cpus=shares.actor_cpus,
        num_gpus=shares.actor_gpus,
        ray_remote_args_fn=named_actor,
        **BLOCKS,
    )
    return predicted.map_batches(
        write, compute=TaskPoolStrategy(shares.stagers), num_cpus=0, **task
    )


BlockFunction = Callable[[pa.Table], Iterator[pa.Table]]


def _task_functions(
    shards: list[Any], dataset: Dataset, dataset_ref: Any
) -> tuple[BlockFunction, BlockFunction, BlockFunction]:
    """The read, decode and write stages as functions of blocks.

    Where `out` is a local path, each task checks that its machine sees it. A machine that joins
    later may lack the disk, and what it writes would be lost.
    """
    import ray

    out_file = dataset_url(dataset.out)

    def read(block: pa.Table) -> Iterator[pa.Table]:
        for n in block["n"].to_pylist():
            require_visible(out_file)
            for batch in read_stage(ray.get(dataset_ref), ray.get(shards[n])):
                if batch.event.kind in (EventKind.SHARD_BROKEN, EventKind.SHARD_CHANGED):
                    require_source(ray.get([shards[0], shards[-1]]))
                yield batch.pack()

    def decode(block: pa.Table) -> Iterator[pa.Table]:
        for batch in unpack(block):
            yield decode_stage(ray.get(dataset_ref), batch).pack()

    def write(block: pa.Table) -> Iterator[pa.Table]:
        for batch in unpack(block):
            require_visible(out_file)
            yield write_stage(ray.get(dataset_ref), batch).pack()

    return read, decode, write


def _hide_ray_messages() -> None:
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        # It prints tracebacks of errors that vitray reports in one line.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # vitray uses this parameter, because it is the only way to bound retries: see
    # docs/decisions/0006.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
    # Ray warns where there are fewer shards than machines.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")


def _configure_ray_data(queue_blocks: int) -> None:
    from ray.data import DataContext

    from vitray.pipeline.ray_internals import keep_queues_short

    context = DataContext.get_current()
    keep_queues_short(context, queue_blocks)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    # One byte, so every batch is a block: a retried task yields the same blocks again.
    context.target_max_block_size = 1


def _actor_pool(shares: Shares) -> Any:
    from ray.data import ActorPoolStrategy

    if not shares.actor_gpus:
        return ActorPoolStrategy(size=shares.actors, max_tasks_in_flight_per_actor=2)
    # A GPU computes one fragment while Python unpacks the next one and packs the last one. On a
    # CPU the same threads do both, so nothing is gained.
    return ActorPoolStrategy(
        size=shares.actors,
        max_tasks_in_flight_per_actor=3,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )


class Predict:
    """The actor with the model. Two threads call it where it has a GPU.

    Raises ModelError at its start when the weights are not the frozen ones.
    """

    def __init__(self, dataset: Dataset, threads: int, compiled: bool) -> None:
        require_visible(dataset_url(dataset.out))
        self._dataset = dataset
        self._model = open_model(
            dataset.spec, dataset.outputs, dataset.job.device, threads, compiled
        )
        self._decoder = open_device_decoder(dataset, threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        batches = (
            predict_stage(self._dataset, self._model, batch, self._decoder)
            for batch in unpack(block)
        )
        return pa.concat_tables([batch.pack() for batch in batches])
