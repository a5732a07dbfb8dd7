"""Several workers: Ray Train's TorchTrainer around the training loop, with DDP between them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from vitray.dataset import training_url
from vitray.errors import ClusterError, TakenOver, count, one_line
from vitray.pipeline.cluster import RETRIES, alive_nodes, ray_session, root_error
from vitray.storage import exists, store_for
from vitray.training.config import TrainingConfig
from vitray.training.fitting import WorkerGroup
from vitray.training.training_run import TrainingRun

START_S = 600.0  # until a worker begins; Ray would wait forever
POLL_S = 2.0


def fit_with_ray(config: TrainingConfig, owner: str, address: str | None, allow_open: bool) -> None:
    """Train to the end on config.workers workers. The result is in the state of OUT.

    If a worker dies, all begin again from the last checkpoint, at most three times. Raises
    ClusterError, and what a worker raises.
    """
    began = training_url(config.out, f"began-{uuid.uuid4().hex}")
    with ray_session(address, allow_open), tempfile.TemporaryDirectory(prefix="vitray-") as scratch:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # of the cluster: the machine of this command may have none
        has_gpus = any(node["Resources"].get("GPU", 0) for node in alive_nodes())
        on_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus)
        _require_resources(config.workers, "GPU" if on_gpu else "CPU")
        limits = FailureConfig(max_failures=RETRIES, controller_failure_limit=RETRIES)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                # unset fields stay unset: the validation depends on which fields are set
                "config": config.model_dump(mode="json", exclude_unset=True),
                "directory": os.getcwd(),
                "began": began,
                "owner": owner,
            },
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=on_gpu),
            run_config=RunConfig(storage_path=scratch, failure_config=limits),
        )
        try:
            run_watched(trainer.fit, began)
        finally:
            store_for(began).delete([began])


def train_worker(settings: dict[str, Any]) -> None:
    """One worker, in a process of Ray: makes a TrainingRun from the config and trains it."""
    from ray.train import get_context, report
    from ray.train.torch import get_device

    # Ray starts workers in a folder of its own, where relative paths mean something else
    with contextlib.suppress(OSError):
        os.chdir(settings["directory"])
    store_for(settings["began"]).create(settings["began"], b"")
    context = get_context()
    group = WorkerGroup(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(get_device()),
        owner=settings["owner"],
    )
    # Ray would begin again; the command itself raises TakenOver
    with contextlib.suppress(TakenOver):
        TrainingRun.of(TrainingConfig(**settings["config"])).fitting(group).run(report)


def _require_resources(workers: int, resource: str) -> None:
    """Raises ClusterError if the cluster has too few of them: Ray would wait for more."""
    available = sum(node["Resources"].get(resource, 0) for node in alive_nodes())
    if available < workers:
        raise ClusterError(
            f"{count(workers, 'worker')} need a {resource} each, and the cluster has "
            f"{available:g}. Set fewer `workers`, add machines, or set device: cpu."
        )


def run_watched(fit: Callable[[], object], began: str) -> None:
    """Call `fit` in a thread, so that Ctrl-C reaches this process and not Ray.

    began: the object that a worker creates first. Raises ClusterError if it does not exist after
    START_S, and what a worker raises.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="vitray-training", daemon=True)
    thread.start()
    started = time.monotonic()
    has_begun = False
    while thread.is_alive():
        thread.join(POLL_S)
        has_begun = has_begun or exists(began)
        if not has_begun and time.monotonic() - started > START_S:
            raise ClusterError(
                f"no worker has begun in {START_S:g} s. Look at `ray status`, "
                "and check that every machine can read `out`; then run again."
            )
    if failures:
        other = ClusterError(f"the training failed: {one_line(failures[0])}. Run again to resume.")
        raise root_error(failures[0]) or other from failures[0]
