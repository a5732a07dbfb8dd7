"""`vitray run` on the command line: its arguments, its summary and its refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vitray
from factories.shards import Picture, pictures, put, put_tars
from support.whole_runs import shape_job
from vitray.dataset import open_dataset


def test_a_store_that_fails_in_the_middle_is_one_sentence(
    ray: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:40], 1, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), fragment_rows=16)
    put(f"{job.out}/_vitray/staging", b"in the way of a folder")
    with pytest.raises(vitray.VitrayError, match=r"staging/s_000.*-.*\.arrow: ") as caught:
        vitray.run(job)
    assert (
        "Traceback" not in str(caught.value)
        and "\n" not in str(caught.value)
        and len(str(caught.value)) < 400
    )
    os.remove(tmp_path / "out" / "_vitray" / "staging")
    assert vitray.run(job).rows == 40


def test_the_pipeline_has_four_operators_that_never_fuse(
    ray: None, tmp_path: Path, shapes_model: str
) -> None:
    import ray as ray_module

    from vitray.pipeline.cluster import alive_nodes, share_out
    from vitray.pipeline.ray_executor import build_pipeline

    put_tars(str(tmp_path / "in"), pictures(8), 1, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"))
    vitray.run(job)
    dataset = open_dataset(job.out)
    assert dataset is not None
    shares = share_out([n["Resources"] for n in alive_nodes()], "auto")
    from vitray.sources import list_shards

    shards = list_shards(job, []).shards
    pipeline = build_pipeline(
        [ray_module.put(s) for s in shards], dataset, ray_module.put(dataset), shares, []
    ).materialize()
    names = [line.strip() for line in pipeline.stats().splitlines() if line.startswith("Operator")]
    assert [n.split()[2].rstrip(":") for n in names[-4:]] == [
        "MapBatches(read)",
        "MapBatches(decode)",
        "MapBatches(Predict)",
        "MapBatches(write)",
    ]
