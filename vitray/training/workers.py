"""Several workers: Ray Train's TorchTrainer around the same loop, DDP between its workers."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from vitray.dataset import internal_url
from vitray.errors import ClusterError, VitrayError, one_line
from vitray.pipeline.cluster import RETRIES, alive_nodes, ray_session
from vitray.storage import exists, store_for
from vitray.training.checkpoints import TakenOver
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import TrainingRun
from vitray.training.fitting import WorkerGroup

START_S = 600.0  # for the workers to begin; Ray would wait for ever
LOOK_S = 2.0


def fit_with_ray(config: TrainingConfig, owner: str, address: str | None, allow_open: bool) -> None:
    """Train to the end on config.workers workers; how it ended is in the state of OUT.

    A worker that dies takes the others with it: all begin again from the last checkpoint, three
    times at most. Raises ClusterError.
    """
    began = internal_url(config.out, f"began-{uuid.uuid4().hex}")
    with ray_session(address, allow_open), tempfile.TemporaryDirectory(prefix="vitray-") as scratch:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        has_gpus = any(
            node["Resources"].get("GPU", 0) for node in alive_nodes()
        )  # where this command runs there may be none
        on_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus)
        _require_room(config.workers, "GPU" if on_gpu else "CPU")
        limits = FailureConfig(max_failures=RETRIES, controller_failure_limit=RETRIES)
        trainer = TorchTrainer(
            work,
            train_loop_config={  # unset fields stay unset: which ones were given is checked, too
                "config": config.model_dump(mode="json", exclude_unset=True),
                "home": os.getcwd(),
                "began": began,
                "owner": owner,
            },
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=on_gpu),
            run_config=RunConfig(storage_path=scratch, failure_config=limits),
        )
        try:
            _watched(trainer.fit, began)
        finally:
            store_for(began).delete([began])


def work(told: dict[str, Any]) -> None:
    """One worker, in a process of Ray's: makes everything from the config, as the others do."""
    from ray.train import get_context, report
    from ray.train.torch import get_device

    with contextlib.suppress(
        OSError
    ):  # Ray has put it into a folder of its own, where relative paths name nothing
        os.chdir(told["home"])
    store_for(told["began"]).create(told["began"], b"")
    context = get_context()
    group = WorkerGroup(
        context.get_world_rank(), context.get_world_size(), str(get_device()), told["owner"]
    )
    with contextlib.suppress(TakenOver):  # Ray would begin again; the command itself says it
        TrainingRun.of(TrainingConfig(**told["config"])).fitting(group).run(report)


def _require_room(workers: int, what: str) -> None:
    """Raises ClusterError for what Ray would wait for."""
    there = sum(node["Resources"].get(what, 0) for node in alive_nodes())
    if there < workers:
        raise ClusterError(
            f"{workers} workers take a {what} each, and there are {there:g}. Set fewer `workers`, "
            f"add machines, or set device: cpu."
        )


def _watched(fit: Callable[[], object], began: str) -> None:
    """Call it in a thread, so that what never returns from Ray ends in ClusterError, too, and Ray
    leaves Ctrl-C to us.

    Raises what a worker raised.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as error:
            failed.append(error)

    thread, started, is_begun = (
        threading.Thread(target=run, name="vitray-training", daemon=True),
        time.monotonic(),
        False,
    )
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        is_begun = is_begun or exists(began)
        if not is_begun and time.monotonic() - started > START_S:
            raise ClusterError(
                f"no worker has begun in {START_S:g} s. Look at `ray status`, and that every "
                f"machine sees `out`; then run again."
            )
    if failed:
        other = ClusterError(f"the training failed: {one_line(failed[0])}. Run again to go on.")
        raise _ours(failed[0]) or other from failed[0]


def _ours(error: BaseException | None) -> VitrayError | None:
    """What a worker raised, which Ray wraps."""
    while error is not None and not isinstance(error, VitrayError):
        error = error.__cause__ or next(iter(getattr(error, "worker_failures", {}).values()), None)
    return error
