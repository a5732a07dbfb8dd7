"""Exports that are refused or fail are one line, and leave nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.model_exports import FLOATS, UNSEEN, export_job, predictions
from vitray.cli import main
from vitray.decoding.decode import load_decoders
from vitray.errors import ModelError
from vitray.evaluation import agreement
from vitray.job import Embedding
from vitray.model_export import graphs
from vitray.model_export.export import ExportedModel, export_model
from vitray.models import identify


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def test_what_an_export_cannot_do_is_refused_with_what_it_can(
    small: tuple[str, ExportedModel], shapes_model: str, photos: str, tmp_path: Path
) -> None:
    into, _ = small
    for more, message in (
        (
            {"engine": "torch"},
            r"was exported for engine onnx, so engine torch cannot run it\. Set engine: auto\.",
        ),
        ({"precision": "bf16"}, "engine onnx computes in fp32, not in bf16"),
        (
            {"embeddings": [Embedding(layer=1)]},
            r"gives mean of layer 2, cls of layer last, and not cls of layer 1: .*export .* again",
        ),
    ):
        with pytest.raises(ModelError, match=message):
            identify(export_job(into, photos, **more))
    with pytest.raises(ModelError, match=r"is an export already \(onnx\)\. Give the checkpoint"):
        export_model(export_job(into, photos), "openvino", "", str(tmp_path / "y"))
    unlabelled = str(tmp_path / "z")
    export_model(export_job(shapes_model, photos, labels=False), "openvino", "", unlabelled)
    with pytest.raises(
        ModelError, match=r"was exported without labels; set labels: false, or export .* with them"
    ):
        identify(export_job(unlabelled, photos))
    assert predictions(unlabelled, labels=False).ids is None


def test_below_min_agreement_nothing_is_written_and_the_exit_code_is_5(
    tmp_path: Path,
    shapes_model: str,
    photos: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = graphs.quantise_with_nncf

    def spoiled(graph: object, how: str, calibration: np.ndarray) -> object:
        return real(
            graph, how, np.zeros_like(calibration)
        )  # calibrated on black images: no range fits

    monkeypatch.setattr(graphs, "quantise_with_nncf", spoiled)
    command = [
        "vitray",
        "export",
        shapes_model,
        "--to",
        "openvino",
        "--int8",
        "--calibrate",
        photos,
        "--into",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--min-agreement", "0.99"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 5 and "same label" in said.out and len(said.err.splitlines()) == 1
    assert (
        "agree with the original, below --min-agreement 0.99; nothing was written. Calibrate on "
        "more images" in said.err
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", FLOATS)
def test_a_disk_that_is_really_full_is_one_line_and_the_process_lives(
    tmp_path: Path, shapes_model: str, photos: str, to: str
) -> None:
    limit = 300_000  # bytes a file may have: less than the weights
    load_decoders("exact")  # Numba keeps what it compiled

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    into = str(tmp_path / "x")
    command = [
        sys.executable,
        "-m",
        "vitray",
        "export",
        shapes_model,
        "--to",
        to,
        "--calibrate",
        photos,
        "--into",
        into,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=few_bytes
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert done.stderr.startswith(f"StorageError: {into}: ") and done.stderr.endswith(
        "and that the disk has room.\n"
    )
    assert os.listdir(tmp_path) == []
