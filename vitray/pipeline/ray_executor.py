"""The line as Ray Data runs it: four operators, bounded retries, one fragment a row. Nothing here
decides what is right.

With queues.py the only file that imports ray.data.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from vitray.dataset import Commit, Dataset, dataset_url
from vitray.errors import VitrayError
from vitray.models import open_model
from vitray.pipeline.cluster import RETRIES, Shares, alive_nodes, outcome, require_seen, sees
from vitray.pipeline.stages import (
    commit_step,
    decode_step,
    open_device_decoder,
    predict_step,
    read_step,
    stage_step,
    unpack,
)
from vitray.schema import Shard, ShardEvent
from vitray.storage import is_local


class RayExecutor:
    """Shards through Ray Data, commits as Ray tasks."""

    def __init__(self, dataset: Dataset, shards: list[Shard], shares: Shares) -> None:
        import ray

        self._dataset, self._refs = ray.put(dataset), {shard.id: ray.put(shard) for shard in shards}
        self._actors: list[str] = []
        self._line = build_pipeline(
            list(self._refs.values()), dataset, self._dataset, shares, self._actors
        )
        self._commit = ray.remote(_commit).options(num_cpus=0, max_retries=RETRIES)
        self._running: dict[Any, str] = {}
        self._nodes = {node["NodeID"] for node in alive_nodes()}
        self._executor: Any = None
        make = self._line._create_executor

        def remembered() -> Any:  # Ray itself keeps it after the first output only
            self._executor = make()
            return self._executor

        self._line._create_executor = remembered

    def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
        """Ray's iterator waits without a deadline, so it runs in a thread."""
        self._arrived = arrived

        def consume() -> None:
            try:
                for block in self._line.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                ):
                    for batch in unpack(block):
                        arrived.put(batch.event)
                arrived.put(None)
            except Exception as error:
                arrived.put(error)

        self._thread = threading.Thread(target=consume, name="vitray-receipts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._arrived.put(
            None
            # Ray has no way to end its reading alone: what is in the line is lost, what is staged
            # stays
        )

    def commit(self, shard_id: str) -> None:
        self._running[self._commit.remote(self._dataset, self._refs[shard_id])] = shard_id

    def commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        import ray

        ready = ray.wait(list(self._running), timeout=wait_s)[0]
        return [(self._running.pop(ref), ray.get(ref)) for ref in ready]

    def is_short(self) -> bool:
        return not self._nodes <= {node["NodeID"] for node in alive_nodes()}

    def is_waiting(self) -> bool:
        import ray
        from ray._private.state import actors

        is_named = False
        for name in list(self._actors):
            with contextlib.suppress(
                ValueError, KeyError
            ):  # there is none of that name, or no more
                if actors(ray.get_actor(name)._actor_id.hex())["Address"]["IPAddress"]:
                    return False
                is_named = True
        return is_named

    def state(self) -> str:
        steps = getattr(self._executor, "_topology", None) or {}
        said = (
            f"{op.name}: {op.num_active_tasks()} tasks, {at.total_enqueued_input_blocks()} waiting"
            for op, at in steps.items()
        )
        return "; ".join(said) or "Ray has not begun"

    def close(self) -> None:
        import ray

        if self._executor is not None:
            self._executor.shutdown(force=True)  # else it works on, until it is collected
        self._thread.join(30)
        # whoever keeps an error keeps Ray's handles, which keep the CPUs: the next run would wait
        # for ever
        for name in self._actors:
            with contextlib.suppress(ValueError):  # it is gone
                ray.kill(ray.get_actor(name))


def _commit(dataset: Dataset, shard: Shard) -> Commit | VitrayError | None:
    return outcome(require_seen, dataset_url(dataset.out)) or commit_step(dataset, shard)


def require_source(shards: list[Shard]) -> None:
    """Raises ClusterError where this machine sees none of these: what it says of a shard is not the
    shard's fault.
    """
    if all(is_local(shard.url) and not sees(shard.url) for shard in shards):
        require_seen(shards[0].url)


def build_pipeline(
    shards: list[Any], dataset: Dataset, dataset_ref: Any, shares: Shares, actors: list[str]
) -> Any:
    """The Ray dataset of events. shards, dataset_ref: object references, fetched where they are
    used.

    actors: grows by the names of the actors that Ray Data makes.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    mark = dataset_url(
        dataset.out
    )  # a machine that joins later may lack the disk: what it wrote would be nowhere

    def read(block: pa.Table) -> Iterator[pa.Table]:
        for n in block["n"].to_pylist():
            require_seen(mark)
            for batch in read_step(ray.get(dataset_ref), ray.get(shards[n])):
                if batch.event.kind in ("broken", "changed"):
                    require_source(ray.get([shards[0], shards[-1]]))
                yield batch.pack()

    def decode(block: pa.Table) -> Iterator[pa.Table]:
        for batch in unpack(block):
            yield decode_step(ray.get(dataset_ref), batch).pack()

    def stage(block: pa.Table) -> Iterator[pa.Table]:
        for batch in unpack(block):
            require_seen(mark)
            yield stage_step(ray.get(dataset_ref), batch).pack()

    def named() -> dict[str, Any]:
        actors.append(f"vitray-{uuid.uuid4().hex}")
        return {"max_restarts": RETRIES, "max_task_retries": RETRIES, "name": actors[-1]}

    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(
            logging.CRITICAL
        )  # it prints tracebacks of what we say in one line
    warnings.filterwarnings(
        "ignore", message=".*ray_remote_args_fn.*"
    )  # the only way to bound retries: see docs/decisions/0006
    warnings.filterwarnings(
        "ignore", message="The maximum number of concurrent tasks"
    )  # fewer shards than machines
    from vitray.pipeline.queues import keep_queues_short

    context = DataContext.get_current()
    keep_queues_short(context, shares.queue_blocks)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.target_max_block_size = (
        1  # every batch is a block of its own: a retried task yields the same blocks again
    )
    shape: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    task: dict[str, Any] = {**shape, "ray_remote_args_fn": lambda: {"max_retries": RETRIES}}
    items = ray.data.from_items(
        [{"n": n} for n in range(len(shards))], override_num_blocks=len(shards)
    )
    encoded = items.map_batches(
        read, compute=TaskPoolStrategy(shares.readers), num_cpus=shares.reader_cpus, **task
    )
    decoded = encoded.map_batches(decode, num_cpus=shares.decoder_cpus, **task)
    # a GPU computes one fragment while Python unpacks the next and packs the last; a CPU has
    # nothing to hide it behind
    pool = {"max_tasks_in_flight_per_actor": 2}
    if shares.actor_gpus:
        pool = {
            "max_tasks_in_flight_per_actor": 3,
            "max_concurrent_calls_per_actor": 2,
            "enable_true_multi_threading": True,
        }
    predicted = decoded.map_batches(
        Predict,
        fn_constructor_args=(
            dataset,
            shares.threads,
            shares.compiled,
        ),  # by value: a restarted actor must not need a reference
        compute=ActorPoolStrategy(size=shares.actors, **pool),
        num_cpus=shares.actor_cpus,
        num_gpus=shares.actor_gpus,
        ray_remote_args_fn=named,
        **shape,
    )
    return predicted.map_batches(
        stage, compute=TaskPoolStrategy(shares.stagers), num_cpus=0, **task
    )


class Predict:
    """The actor: holds the model, and is called from two threads where that is a GPU's.

    Raises ModelError at its start when the weights are not the frozen ones.
    """

    def __init__(self, dataset: Dataset, threads: int, compiled: bool) -> None:
        require_seen(dataset_url(dataset.out))
        job = dataset.job
        self._dataset = dataset
        self._model = open_model(
            dataset.spec,
            list(dataset.vectors),
            job.top_k,
            job.labelled,
            job.device,
            threads,
            compiled,
        )
        self._decoder = open_device_decoder(dataset, threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        steps = (
            predict_step(self._dataset, self._model, batch, self._decoder)
            for batch in unpack(block)
        )
        return pa.concat_tables([batch.pack() for batch in steps])
