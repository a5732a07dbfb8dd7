"""How an export is compared with its original: on other images, by label and score."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.model_exports import UNSEEN, export_job
from vitray.dataset import Dataset
from vitray.decoding.decode import decode
from vitray.errors import Disagreement, JobError
from vitray.evaluation import agreement
from vitray.model_export import samples
from vitray.models import identify
from vitray.schema import Encoded
from vitray.vectors import top_k


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def test_calibration_and_comparison_share_no_image_and_copies_count_once(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    job = export_job(shapes_model, photos)
    spec = identify(job.model_copy(update={"engine": "torch"}))
    found = samples.sample_images(job, spec, calibrates=True)
    seen = [{image.tobytes() for image in images} for images in (found.calibration, found.compared)]
    assert not seen[0] & seen[1] and (len(found.calibration), len(found.compared)) == (120, 120)
    folder = tmp_path / "few"
    folder.mkdir()
    for n, path in enumerate(sorted(Path(photos).rglob("*.png"))[::8]):
        shutil.copy(path, folder / f"{n}.png")
        shutil.copy(path, folder / f"{n}-again.png")
    (folder / "bad.png").write_bytes(b"no image")
    few = samples.sample_images(export_job(shapes_model, str(folder)), spec, calibrates=True)
    assert (len(few.calibration), len(few.compared), few.is_disjoint) == (30, 30, False)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(photos, ".")
    assert (
        len(
            samples.sample_images(
                export_job(shapes_model, f"{tmp_path}/t.tar"), spec, calibrates=False
            ).compared
        )
        == 240
    )


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_a_sample_of_a_shard_in_which_classes_lie_side_by_side_has_all_of_them(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    paths = sorted(Path(photos).rglob("*.png"))
    source = str(tmp_path / f"shard.{kind}")
    if kind == "files":
        source = photos
    elif kind == "tar":
        with tarfile.open(source, "w") as tar:
            for n, path in enumerate(paths):
                tar.add(path, f"{n:04d}.png")
    else:
        pq.write_table(pa.table({"image": [path.read_bytes() for path in paths]}), source)
    monkeypatch.setattr(samples, "COMPARED", 90)
    monkeypatch.setattr(samples, "CALIBRATION", 60)
    job = export_job(shapes_model, source)
    spec = identify(job.model_copy(update={"engine": "torch"}))
    decode_spec = Dataset("o", job, spec, (), pa.schema([]), 1).decode_spec
    kinds = {
        decode([Encoded(0, path.name, "", path.read_bytes())], decode_spec)[0][
            0
        ].tobytes(): path.parent.name
        for path in paths
    }
    found = samples.sample_images(job, spec, calibrates=True)
    assert (len(found.calibration), len(found.compared)) == (75, 75)
    for images in (found.calibration, found.compared):
        counts = Counter(kinds[image.tobytes()] for image in images)
        assert len(counts) == 6 and min(counts.values()) >= 5


def test_equal_scores_are_ranked_by_id() -> None:
    scores, ids = top_k(np.array([[0.25, 0.5, 0.25]], np.float32), 2)
    assert ids.tolist() == [[1, 0]] and scores.tolist() == [[0.5, 0.25]]


def test_disagreement_is_an_error_of_its_own() -> None:
    assert Disagreement.exit_code == 5 and not issubclass(Disagreement, JobError)
