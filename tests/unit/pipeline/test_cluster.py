"""How a cluster's CPUs and GPUs are shared between the stages."""

from __future__ import annotations

import pytest

from vitray.errors import ClusterError, ModelError
from vitray.pipeline.cluster import root_error, share_out


def test_shares_leave_a_cpu_beside_the_actors_and_refuse_too_small_clusters() -> None:
    small = share_out([{"CPU": 2}], "auto")
    assert (small.actors, small.actor_cpus, small.decoder_cpus, small.threads) == (1, 1, 0.5, 2)
    gpus = share_out([{"CPU": 16, "GPU": 2}, {"CPU": 8}], "auto")
    assert (gpus.actors, gpus.actor_cpus, gpus.actor_gpus, gpus.decoder_cpus) == (2, 1, 1, 1)
    assert share_out([{"CPU": 16, "GPU": 2}], "cpu").actor_gpus == 0
    for nodes, text in (
        ([{"CPU": 1}], "needs 2"),
        ([{"CPU": 2, "GPU": 2}], "one per GPU"),
        ([{"CPU": 1}, {"CPU": 1}], "no machine"),
    ):
        with pytest.raises(ClusterError, match=text):
            share_out(nodes, "auto")


def wrapped(**attributes: object) -> Exception:
    error = RuntimeError("text of Ray")
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def test_root_error_is_found_in_what_ray_wraps_around_it() -> None:
    root = ModelError("no such layer")
    as_task_error = ModelError("a traceback, as Ray raises it")
    as_task_error.cause = root
    for error in (
        root,
        as_task_error,
        wrapped(cause=root),
        wrapped(__cause__=wrapped(cause=root)),
        wrapped(worker_failures={0: as_task_error}),
    ):
        assert root_error(error) is root
    assert root_error(wrapped()) is None
