"""Exports that are refused or fail are one line, and leave nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from support.model_exports import UNSEEN, export_job
from vitray.cli import main
from vitray.errors import JobError, ModelError, SourceError, StorageError
from vitray.evaluation import agreement
from vitray.model_export import graphs
from vitray.model_export.export import export_model


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "few").mkdir()
    for path in sorted(Path(photos).rglob("*.png"))[:3]:
        shutil.copy(path, tmp_path / "few" / path.name)
    (tmp_path / "there").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    job, into = export_job(shapes_model, photos), str(tmp_path / "x")
    for act, kind, message in (
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/few"), "onnx", "", into),
            SourceError,
            "holds 3 different good images\\. .* 16",
        ),
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/none"), "onnx", "", into),
            SourceError,
            "none",
        ),
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/nowhere"), "onnx", "", into),
            JobError,
            "nowhere",
        ),
        (
            lambda: export_model(job, "onnx", "", str(tmp_path / "there")),
            JobError,
            "--into .* exists already: choose a new folder",
        ),
        (
            lambda: export_model(job, "onnx", "", "s3://bucket/x"),
            JobError,
            "an export is a local folder",
        ),
        (
            lambda: export_model(job, "onnx", "", "/proc/x"),
            StorageError,
            "Check the path, and that the disk has room",
        ),
        (
            lambda: export_model(job, "torch-export", "int8", into),
            JobError,
            r"has no --int8: torch's own int8 \(torchao\) needs a GPU",
        ),
        (
            lambda: export_model(
                export_job(shapes_model, photos, head="h"), "torch-export", "", into
            ),
            JobError,
            "keeps the checkpoint's own labels",
        ),
        (
            lambda: export_model(
                export_job(shapes_model, photos, labels=["a"]), "torch-export", "", into
            ),
            JobError,
            "Use --to onnx or openvino",
        ),
        (
            lambda: export_model(job, "coreml", "int8", into),
            JobError,
            "--to coreml has no --int8: .*Use --fp16",
        ),
        (
            lambda: export_model(job, "tflite", "", into),
            JobError,
            "choose one of onnx, openvino, torch-export, coreml",
        ),
        (
            lambda: export_model(export_job(f"{tmp_path}/none", photos), "onnx", "", into),
            ModelError,
            r"holds no config\.json",
        ),
    ):
        with pytest.raises(kind, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_within_a_library_is_a_storage_error(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(source: graphs.Source, how: str, folder: Path) -> None:
        """As a library of C++ that looks at no answer of the disk; the judge cannot open what it
        left.
        """
        real(source, how, folder)
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:50_000])
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096)
        )

    real, into = graphs.WRITERS["onnx"], str(tmp_path / "x")
    monkeypatch.setitem(graphs.WRITERS, "onnx", cut_short)
    with pytest.raises(
        StorageError, match=rf"^{into}: .*\. Check the path, and that the disk has room\.$"
    ) as raised:
        export_model(export_job(shapes_model, photos), "onnx", "", into)
    assert "\n" not in str(raised.value) and os.listdir(tmp_path) == []


def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = export_job(shapes_model, photos)
    for module, to, how, extra in (
        ("nncf", "openvino", "int8", "quantise"),
        ("coremltools", "coreml", "", "coreml"),
        ("onnxscript", "onnx", "", "onnx"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(JobError, match=rf"needs {module}: pip install 'vitray\[{extra}\]'"):
                export_model(job, to, how, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--calibrate SOURCE is missing"),
        (["--calibrate", "p", "--int8", "--fp16"], "choose one of --int8, --fp16"),
        (
            ["--calibrate", "p", "--vectors"],
            "vitray export-model takes no --vectors: that is an option of vitray export",
        ),
    ],
)
def test_the_command_says_which_options_belong_together(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["vitray", "export", "m", "--to", "onnx", "--into", "x", *more]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setattr(
        sys,
        "argv",
        ["vitray", "export", "out", "--to", "npy", "--into", "x", "--int8"],
    )
    with pytest.raises(SystemExit):
        main()
    message = "vitray export takes no --int8: that is an option of vitray export-model"
    assert message in capsys.readouterr().err
