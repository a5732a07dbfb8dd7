"""A cluster with a machine without a GPU: it decodes for the one that says it has a GPU."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import vitray
from factories.shards import Picture, pictures, put_tars
from support.clusters import RUN, Cluster, cluster_of
from vitray.dataset import read_run_records

IMAGES = 400


@pytest.fixture
def cluster() -> object:
    with cluster_of(0, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as found:
        found.join("--num-gpus=1")
        found.join()
        yield found


def write_inputs(folder: Path) -> Path:
    """40 tars, of which three images are broken."""
    items = pictures(IMAGES)
    broken = {7: b"", 50: b"no image", 90: items[90].data[:200]}
    items = [Picture(p.key, broken.get(n, p.data), p.truth, p.suffix) for n, p in enumerate(items)]
    put_tars(str(folder / "in"), items, 40, folder)
    return folder / "in"


def start(cluster: Cluster, inputs: Path, model: str, out: Path) -> subprocess.Popen[str]:
    argv = [*RUN, str(inputs), "--model", model, "--out", str(out), "--address", cluster.address]
    argv += ["--set", "fragment_rows=16", "--set", "precision=fp32", "--json"]
    return subprocess.Popen(
        argv, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_rows_are_those_of_one_machine(cluster: Cluster, shapes_model: str, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    process = start(cluster, inputs, shapes_model, tmp_path / "out")
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    assert (result["rows"], result["errors"]) == (IMAGES - 3, 3)
    alone = vitray.Job(
        source=[str(inputs)],
        model=shapes_model,
        out=str(tmp_path / "alone"),
        engine="torch",
        precision="fp32",
        fragment_rows=16,
        device="cpu",
    )
    vitray.run(alone)
    exact = ["key", "index", "width", "height", "content_hash", "label"]
    table, expected = (vitray.read(out) for out in (str(tmp_path / "out"), alone.out))
    assert table.select(exact).equals(expected.select(exact))
    # Several small shards share a batch here, which changes the last digits.
    scores = [t["score"].to_numpy() for t in (table, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-4)
    assert vitray.validate(str(tmp_path / "out"), content=True).ok
    (record,) = read_run_records(str(tmp_path / "out"))
    assert record["shares"]["gpus"] == 1


def test_a_lost_decoding_machine_costs_no_row(
    cluster: Cluster, shapes_model: str, tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path)
    process = start(cluster, inputs, shapes_model, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "data").glob("*.parquet")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    cluster.nodes[1].kill()  # the whole group goes with Ray's own supervision
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert len(vitray.read(str(tmp_path / "out"))) == IMAGES - 3
    assert vitray.validate(str(tmp_path / "out"), content=True).ok
