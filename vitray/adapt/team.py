"""Several workers: Ray Train's TorchTrainer around the same loop, DDP between its workers."""

from __future__ import annotations

import tempfile
from typing import Any

from vitray.adapt.finetuning import Study
from vitray.adapt.fitting import Team
from vitray.adapt.recipe import Recipe
from vitray.errors import ClusterError, VitrayError, one_line
from vitray.models import machine
from vitray.pipeline.cluster import RETRIES, ray_session


def fit_with_ray(recipe: Recipe, address: str | None, allow_open: bool) -> None:
    """Train to the end on recipe.workers workers; how it ended is in the state of OUT.

    A worker that dies takes the others with it: all begin again from the last checkpoint, three times at most. Raises ClusterError.
    """
    on_gpu = machine.resolve_device(recipe.device) == "cuda"
    with ray_session(address, allow_open), tempfile.TemporaryDirectory(prefix="vitray-") as scratch:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            work,
            train_loop_config=recipe.model_dump(mode="json"),
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=on_gpu),
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=RETRIES)),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised
            cause = _ours(error)
            raise cause or ClusterError(
                f"training on {recipe.workers} workers failed: {one_line(error)}. Run again to go on."
            ) from error


def work(fields: dict[str, Any]) -> None:
    """One worker, in a process of Ray's: makes everything from the recipe, as the others do."""
    from ray.train import get_context, report
    from ray.train.torch import get_device

    context = get_context()
    team = Team(context.get_world_rank(), context.get_world_size(), str(get_device()))
    Study.of(Recipe(**fields)).fitting(team).run(report)


def _ours(error: BaseException | None) -> VitrayError | None:
    while error is not None and not isinstance(error, VitrayError):
        error = error.__cause__ or next(iter(getattr(error, "worker_failures", {}).values()), None)
    return error
