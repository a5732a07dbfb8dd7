"""`vitray run` on the command line: its arguments, its summary and its refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from factories import hand_made
from support.command_line import Call, plan_of, refused, snapshot, write_job
from vitray.cli.summary import summary
from vitray.job import Job


def only_files(folder: Path) -> dict[str, tuple[int, int]]:
    return {path: marks for path, marks in snapshot(folder).items() if os.path.isfile(path)}


LINE = [
    "--set",
    "max_error_rate=0.2",
    "--set",
    "precision=fp32",
    "--set",
    "fragment_rows=4",
    "--set",
    "top_k=2",
    "--set",
    "embeddings=[{normalize: true}]",
]


def test_source_model_out_on_the_line_equal_the_job_file(vitray: Call, labelled: Path) -> None:
    before = only_files(labelled)
    code, out, err = vitray("run", labelled / "a job.yaml", "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)
    line = [f"{labelled}/in/*.tar", "--model", labelled / "model", "--out", labelled / "out", *LINE]
    code, out, err = vitray("run", *line, "--json")
    assert (code, err) == (0, "")
    second = json.loads(out)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert (
        first["shards"],
        first["rows"],
        first["errors"],
        first["committed"],
        first["pending"],
    ) == (3, 27, 3, 0, 0)
    plans = [vitray("plan", *argv, "--json") for argv in ([labelled / "a job.yaml"], line)]
    assert plans[0] == plans[1]
    after = only_files(labelled)
    assert after.pop(f"{labelled}/out/_vitray/source.json")  # a dataset made by hand has none
    records = [path for path in after if path.startswith(f"{labelled}/out/_vitray/runs/")]
    assert len(records) == 2  # a run with nothing to do leaves its record, and nothing else
    assert {path: marks for path, marks in after.items() if path not in records} == before


def test_a_run_with_nothing_to_do_says_so_and_leaves_a_record(vitray: Call, labelled: Path) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "nothing to do: every selected shard is committed"
    (record,) = json.loads(vitray("runs", labelled / "out", "--last", "1", "--json")[1])["runs"]
    assert (record["images"], record["exit_code"], record["pruned"]) == (0, 0, 0)


def test_run_says_what_it_did(vitray: Call, labelled: Path) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"{labelled}/out: 3 shards, 27 rows, 3 errors"


def test_run_says_when_there_was_nothing_to_see(
    vitray: Call, labelled: Path, tmp_path: Path
) -> None:
    from vitray.models import identify

    hand_made.write_tar(tmp_path / "in" / "s.tar", {})
    hand_made.make_dataset(tmp_path, spec=identify(hand_made.job_of(labelled)))
    argv = [f"{tmp_path}/in/*.tar", "--model", labelled / "model", "--out", tmp_path / "out", *LINE]
    code, out, err = vitray("run", *argv)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "nothing to do: every selected shard is committed",
        f"{tmp_path}/out: 1 shard, 0 rows, 0 errors",
        "the shards held no image: check `source`",
    ]


def test_run_says_that_too_many_images_were_bad(vitray: Call, labelled: Path) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml", "--set", "max_error_rate=0.05")
    says = (
        f"too many bad images: 3 of 30, more than max_error_rate=0.05; see {labelled}/out/_errors, "
        f"or raise max_error_rate"
    )
    assert (code, err, out.splitlines()[2:]) == (4, "", [says])


def test_the_summary_counts_in_proper_words() -> None:
    counts = {
        "shards": 1,
        "rows": 1,
        "errors": 3,
        "committed": 1,
        "adopted": 0,
        "images": 1,
        "seconds": 1.0,
        "gone": 1,
        "pruned": 0,
        "cost": None,
        "ended_by": None,
        "accepted": {},
        "deleted": 1,
        "pending": 0,
        "shards_not_selected": 2,
        "images_not_selected": 20,
        "left_out": {"hidden": 1, "other_suffix": 2},
        "suffixes": {".txt": 2},
        "errors_path": "/o/_errors",
    }
    found = {
        "set_aside": {},
        "truncated": {},
        "notes": {"s": "links"},
        "reasons": {"empty": 2},
        "too_many_errors": True,
    }
    job = Job(source="a", model="m", out="o", max_error_rate=0.5)
    assert summary(SimpleNamespace(out="/o", **counts, **found), job).splitlines() == [
        "1 shard committed now (1 image computed in 1.0 s, 1.0 images/s with start-up)",
        "/o: 1 shard, 1 row, 3 errors",
        "  2 empty in this run",
        "note       s: links",
        "no longer in the source: 1 committed shard; --prune removes the rows",
        "left out   3: 1 hidden, 2 other_suffix; by suffix: 2 .txt",
        "excluded   2 shards with 20 images, by since, sample or limit",
        "too many bad images: 2 of 3, more than max_error_rate=0.5; see /o/_errors, or raise "
        "max_error_rate",
    ]


@pytest.mark.parametrize(
    ("sets", "names"),
    [
        (["top_k=3"], ["top_k differs (2, this job: 3)"]),
        (["precision=bf16"], ["precision differs (fp32, this job: bf16)"]),
        (["max_pixels=1000", "formats=jpeg"], ["max_pixels differs", "formats differs"]),
        (["embeddings=[{layer: 2}]"], ["embeddings differs"]),
    ],
)
def test_an_out_of_another_job_is_refused_and_the_fields_are_named(
    vitray: Call, labelled: Path, sets: list[str], names: list[str]
) -> None:
    argv: list[object] = ["run", labelled / "a job.yaml"]
    for pair in sets:
        argv += ["--set", pair]
    err = refused(
        vitray,
        labelled,
        argv,
        2,
        f"FingerprintError: {labelled}/out belongs to fingerprint",
        "Choose another `out`",
        *names,
    )
    assert err.count(" differs ") == len(names)


def test_a_model_that_does_not_exist_is_named(vitray: Call, labelled: Path) -> None:
    argv = ["run", labelled / "a job.yaml", "--model", "nobody/no-such-model"]
    refused(
        vitray, labelled, argv, 2, "ModelError: model nobody/no-such-model", "check the spelling"
    )
    argv[-1] = str(labelled / "nowhere")
    refused(vitray, labelled, argv, 2, f"{labelled}/nowhere")
    argv[-1] = str(labelled / "a job.yaml")
    refused(vitray, labelled, argv, 2, "a job.yaml is a file. Give the directory")


def test_labels_from_a_model_without_head_are_refused(vitray: Call, labelled: Path) -> None:
    argv = ["run", labelled / "a job.yaml", "--model", labelled / "headless"]
    refused(
        vitray,
        labelled,
        argv,
        2,
        "ModelError: ",
        "headless has no trained classification head",
        "labels: false",
    )


def test_set_wins_over_the_file_and_flags_over_both(
    vitray: Call, labelled: Path, tmp_path: Path
) -> None:
    hand_made.write_tars(tmp_path / "in")
    job = write_job(tmp_path / "a job file.yml", model=f"{labelled}/model", limit=3)
    plan = plan_of(vitray, job)
    assert (plan["shards"], plan["out"]) == (3, f"{tmp_path}/out")
    plan = plan_of(
        vitray, job, "--set", "limit=2", "--set", f"out={tmp_path}/x", "--out", f"{tmp_path}/other"
    )
    assert (plan["shards"], plan["out"]) == (2, f"{tmp_path}/other")
    assert plan_of(vitray, job, "--set", "limit=2", "--set", "limit=1")["shards"] == 1
    two = f"source=[{tmp_path}/in/s-000.tar, {tmp_path}/in/s-002.tar]"
    assert plan_of(vitray, job, "--set", two)["shards"] == 2
