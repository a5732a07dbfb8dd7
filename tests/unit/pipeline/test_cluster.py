"""What a run finds out about a cluster: the cause of an error, and whether disks are there."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from vitray.errors import ClusterError, ModelError
from vitray.pipeline import cluster
from vitray.pipeline.cluster import require_visible, root_error


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


@pytest.mark.parametrize("comes", [True, False])
def test_a_disk_that_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(cluster, "DISK_TIMEOUT_S", 2.0)
    require_visible(str(tmp_path), "s3://nowhere/x")
    if comes:
        threading.Timer(0.5, (tmp_path / "disk").mkdir).start()
        require_visible(str(tmp_path), str(tmp_path / "disk"))
    else:
        with pytest.raises(
            ClusterError,
            match=f"{tmp_path}/disk cannot be seen from {socket.gethostname()}: .* then run again",
        ):
            require_visible(str(tmp_path), str(tmp_path / "disk"))
