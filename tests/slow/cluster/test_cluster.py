"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import vitray
from factories.shards import pictures, put_tars
from support.clusters import RUN, Cluster


def test_a_cluster_that_asks_for_no_token_is_refused(
    on_open_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    refused = on_open_cluster()
    assert refused.returncode == 1 and "answers without a token" in refused.stderr, refused.stderr
    assert not (tmp_path / "out" / "data").exists()


def test_a_run_joins_a_cluster_of_two_nodes(
    cluster: Cluster, shapes_model: str, tmp_path: Path
) -> None:
    address, environment = cluster.address, cluster.environment
    put_tars(str(tmp_path / "in"), pictures(96), 3, tmp_path)
    argv = [*RUN, str(tmp_path / "in"), "--model", shapes_model, "--out", str(tmp_path / "out")]
    first = subprocess.run(
        [*argv, "--address", address], env=environment, capture_output=True, text=True, timeout=200
    )
    assert first.returncode == 0, first.stderr
    assert sorted(vitray.read(str(tmp_path / "out"))["key"].to_pylist()) == [
        f"{n:05d}" for n in range(96)
    ]
    assert not list(
        (tmp_path / "out" / "_vitray").glob("probe-*")
    )  # the nonce that all nodes had to see is gone
    wrong = {**environment, "RAY_AUTH_TOKEN": "wrong"}
    again = subprocess.run(
        [*argv[:-1], str(tmp_path / "out-2"), "--address", address],
        env=wrong,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 1, again.stderr
    assert again.stderr.splitlines()[-1].startswith("ClusterError: Ray at"), again.stderr
