"""`vitray check` says whether a job would start: a line for each check, and the next step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, snapshot, write_job
from support.paths import TESTS

MODEL = TESTS / "data" / "dataset-v1" / "model"
CHECKS = ["fields", "source", "model", "machine", "out", "fingerprint"]


def verdicts(vitray: Call, *argv: object) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and each check's verdict and text."""
    code, out, err = vitray("check", *argv, "--json")
    assert err == "" and out.count("\n") == 1
    result = json.loads(out)
    assert result["would_start"] is (code == 0)
    return code, {f["check"]: (f["verdict"], f["text"]) for f in result["findings"]}


def only_files(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: state for name, state in snapshot(folder).items() if Path(name).is_file()}


def same_job(folder: Path) -> Path:
    """The job of a dataset that hand_made.make_dataset has begun."""
    return write_job(folder / "job.yaml", top_k=2, embeddings=[{"normalize": True}])


def test_check_of_a_new_job_is_a_page_of_80_columns(vitray: Call, tmp_path: Path) -> None:
    hand_made.write_tars(tmp_path / "in")
    before = snapshot(tmp_path)
    argv = [f"{tmp_path}/in", "--model", MODEL, "--out", f"{tmp_path}/new/below"]
    code, out, err = vitray("check", *argv)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == [*CHECKS, "The"]
    assert lines[0] == "fields       ok         all are valid"
    assert lines[1].startswith("source       ok         3 tar shards, 30 images, ")
    assert "first image can be read" in " ".join(out.split())
    assert "model        ok         vit, 3 labels, 8 values, 16x16 pixels" in lines
    assert "can list, create, read and delete there" in " ".join(out.split())
    assert lines[-1] == "The job would start."
    paths = str(tmp_path)
    assert all(len(line) <= 80 for line in lines if paths not in line)
    assert snapshot(tmp_path) == before


def test_check_of_a_dataset_compares_its_job(vitray: Call, tmp_path: Path) -> None:
    hand_made.make_dataset(tmp_path, commit=2, spec=hand_made.checkpoint_spec(tmp_path))
    job = same_job(tmp_path)
    before = only_files(tmp_path)
    code, found = verdicts(vitray, job)
    assert code == 0 and list(found) == CHECKS
    assert found["fingerprint"] == ("ok", "the rows in `out` are of this job")
    assert "a dataset with 2 shards" in found["out"][1]
    code, found = verdicts(vitray, job, "--set", "top_k=3")
    assert code == 2 and found["fingerprint"][0] == "wrong"
    assert "top_k differs (2, this job: 3). Choose another `out`" in found["fingerprint"][1]
    assert {name: value[0] for name, value in found.items()} == {
        **dict.fromkeys(CHECKS, "ok"),
        "fingerprint": "wrong",
    }
    assert only_files(tmp_path) == before


def test_check_names_every_fault_at_once(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    argv = [f"{tmp_path}/none", "--model", f"{tmp_path}/model", "--out", f"{tmp_path}/file/out"]
    code, found = verdicts(vitray, *argv)
    assert code == 2
    assert {name: value[0] for name, value in found.items()} == {
        "fields": "ok",
        "source": "wrong",
        "model": "wrong",
        "machine": "ok",
        "out": "wrong",
        "fingerprint": "skipped",
    }
    assert found["source"][1].endswith("Correct `source`, or put the images there.")
    assert "does not exist. Give a local directory" in found["model"][1]
    assert found["out"][1].endswith("A file stands where a folder must be: choose another path.")
    code, out, _ = vitray("check", *argv)
    assert out.splitlines()[-1] == "The job would not start: 3 problems."


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ("batchsize=8", "fields", "unknown field `batchsize`; did you mean `batch_size`?"),
        ("labels=none.txt", "fields", "none.txt does not exist"),
        ("labels=[cat, dog]", "model", "without a text tower"),
        ("embeddings=[{layer: 7}]", "model", "has no layer 7: layers are 1..1 or last"),
        ("format=parquet", "source", "holds nothing of format parquet"),
    ],
)
def test_check_names_what_is_wrong(
    vitray: Call, tmp_path: Path, change: str, name: str, says: str
) -> None:
    hand_made.write_tars(tmp_path / "in")
    job = write_job(tmp_path / "job.yaml", model=str(MODEL))
    code, found = verdicts(vitray, job, "--set", change)
    assert code == 2 and found[name][0] == "wrong" and says in found[name][1]
    assert not (tmp_path / "out").exists()
    if name == "fields":
        assert {value[0] for key, value in found.items() if key != "fields"} == {"skipped"}


def test_check_keeps_an_empty_folder(vitray: Call, tmp_path: Path) -> None:
    hand_made.write_tars(tmp_path / "in")
    (tmp_path / "out").mkdir()
    job = write_job(tmp_path / "job.yaml", model=str(MODEL))
    assert vitray("check", job)[0] == 0
    assert list((tmp_path / "out").iterdir()) == []


def test_check_mentions_a_first_image_that_is_no_image(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("path\nimages/none.jpg\n")
    argv = [f"{tmp_path}/in.csv", "--model", MODEL, "--out", f"{tmp_path}/out"]
    code, found = verdicts(vitray, *argv)
    assert code == 0 and "the first image has an error: " in found["source"][1]
    assert "none.jpg does not exist" in found["source"][1]
