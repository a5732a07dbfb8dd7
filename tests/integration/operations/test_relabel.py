"""`vitray relabel` gives a finished dataset the labels of a head."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vitray
from support.linear_heads import NAMES, expected_scores, make_head
from support.s3 import new_bucket
from support.schemas import checked
from vitray.cli.json_output import json_text
from vitray.dataset import open_dataset
from vitray.errors import FingerprintError
from vitray.job import Job
from vitray.models.linear_head import read_head, write_head
from vitray.operations.relabelling import relabel
from vitray.storage import join, store_for


def test_a_dataset_that_has_no_labels_gets_some_and_goes_on_after_a_kill(
    job: Job, vit: str, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlabelled = job.model_copy(update={"labels": False})
    vitray.run(unlabelled)
    bucket = new_bucket(mock_s3, monkeypatch)
    local, head, into = (
        make_head(tmp_path / "head", vit),
        join(bucket, "head"),
        join(bucket, "into"),
    )
    for name in ("head.json", "head.safetensors"):
        store_for(head).create(join(head, name), Path(local, name).read_bytes())
    assert checked(json_text(relabel(unlabelled.out, head, into)))["written"] == 2
    rows = vitray.read(into)
    shard = rows["shard"][0].as_py()
    store_for(into).delete([join(into, "_SUCCESS.json"), join(into, "data", f"{shard}.parquet")])
    assert relabel(unlabelled.out, head, into).written == 1
    assert vitray.read(into).equals(rows) and vitray.validate(into).ok
    scores = expected_scores(np.stack(rows["embedding_raw"].to_pylist()), read_head(head))
    assert rows["label_id"].to_pylist() == scores.argmax(1).tolist()


def test_the_command_says_what_it_did_and_a_run_takes_the_head_as_a_field(
    job: Job, vit: str, tmp_path: Path
) -> None:
    head = make_head(tmp_path / "head", vit)
    vitray.run(job.model_copy(update={"head": head}))
    dataset = open_dataset(job.out)
    assert dataset is not None and (dataset.spec.head, dataset.spec.labels) == (head, NAMES)
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "relabel",
        job.out,
        "--head",
        head,
        "--into",
        f"{tmp_path}/into",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"{tmp_path}/into: 2 shards relabelled by embedding_raw, 2 of them now, 14 rows, 1 "
        f"error\n"
    )
    assert not {"torch", "transformers"} & set(_modules_of(argv[3:]))
    write_head(head, replace(read_head(head), bias=np.ones(4, np.float32)))
    with pytest.raises(FingerprintError, match="head differs"):
        vitray.run(job.model_copy(update={"head": head}))


def _modules_of(arguments: list[str]) -> list[str]:
    code = (
        f"import sys\nsys.argv = ['vitray', *{arguments!r}]\nfrom vitray.cli import main\ntry:\n   "
        f" main()\nexcept SystemExit:\n    print('\\n', *sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    ).stdout.split()
