"""`vitray runs` and `status --max-age`: what a user reads about the runs of a dataset."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from factories import hand_made
from support.command_line import Call, refused
from vitray.dataset import Dataset, write_run_record
from vitray.operations.runs import Outcome, summary_of

NIGHT: dict[str, Any] = {
    "kind": "run",
    "started": "2026-12-01T03:00:05+00:00",
    "finished": "2026-12-01T04:02:05+00:00",
    "seconds": 3720.4,
    "images": 1234567,
    "images_per_s": 331.8,
    "reasons": {"empty": 3},
    "committed": 40,
    "set_aside": {},
    "truncated": {},
    "pending": 0,
    "pruned": 12,
    "exit_code": 0,
    "cost": None,
}
IDLE = {**NIGHT, "images": 0, "committed": 0, "reasons": {}, "seconds": 1.2, "pruned": 0}
OLD = {  # of a version before `started`, `exit_code` and `kind`
    "run": "20261130T202649-dca2b6ef",
    "finished": "2026-11-30T20:26:56+00:00",
    "seconds": 6.9,
    "images": 6,
    "committed": 2,
    "set_aside": {},
    "truncated": {},
    "too_many_errors": False,
}


@pytest.mark.parametrize(
    ("record", "outcome", "code"),
    [
        (NIGHT, Outcome.DONE, 0),
        (IDLE, Outcome.NOTHING_TO_DO, 0),
        ({**NIGHT, "set_aside": {"s": "cut"}, "exit_code": 3}, Outcome.INCOMPLETE, 3),
        ({**NIGHT, "exit_code": 4}, Outcome.TOO_MANY_BAD_IMAGES, 4),
        ({**NIGHT, "exit_code": 7, "ended": "max_hours"}, Outcome.BUDGET_SPENT, 7),
        ({**NIGHT, "exit_code": 143, "ended": "Interrupted: x"}, Outcome.INTERRUPTED, 143),
        ({**NIGHT, "exit_code": 1, "ended": "StorageError: x"}, Outcome.FAILED, 1),
        (OLD, Outcome.DONE, 0),
        ({**OLD, "images": 0, "committed": 0}, Outcome.NOTHING_TO_DO, 0),
        ({**OLD, "set_aside": {"s": "cut"}}, Outcome.INCOMPLETE, 3),
        ({**OLD, "truncated": {"s": 5}}, Outcome.INCOMPLETE, 3),
        ({**OLD, "too_many_errors": True}, Outcome.TOO_MANY_BAD_IMAGES, 4),
        ({**OLD, "ended": "Interrupted: run again"}, Outcome.INTERRUPTED, 143),
        ({**OLD, "ended": "ErrorRateExceeded: 9 of 9"}, Outcome.TOO_MANY_BAD_IMAGES, 4),
        ({"run": "r", "ended": "StorageError: away"}, Outcome.FAILED, 1),
        ({"kind": "remove", "exit_code": 0}, Outcome.DONE, 0),
    ],
)
def test_every_record_says_how_its_run_ended(
    record: dict[str, Any], outcome: Outcome, code: int
) -> None:
    summary = summary_of(record)
    assert (summary.outcome, summary.exit_code) == (outcome, code)


def test_the_start_of_an_old_run_is_in_its_id() -> None:
    assert summary_of(OLD).started == "2026-11-30T20:26:49+00:00"
    assert summary_of({"run": "remove-1"}).started is None


@pytest.fixture
def nights(tmp_path: Path) -> Dataset:
    """A dataset with five runs, a removal and a record that is cut."""
    dataset = hand_made.make_dataset(tmp_path)
    cost = {"machines": 3.6, "requests": 0.01, "total": 3.61}
    for run, record in {
        "20261130T202649-dca2b6ef": OLD,
        "20261201T030005-00000001": {**NIGHT, "cost": cost},
        "20261202T030005-00000002": {
            "started": "2026-12-02T03:00:05+00:00",
            "finished": "2026-12-02T03:00:06+00:00",
            "exit_code": 1,
            "ended": "StorageError: s3://photos does not answer",
        },
        "20261203T030005-00000003": {**IDLE, "started": "2026-12-03T03:00:05+00:00"},
        "20261203T120000-00000004": {
            "kind": "remove",
            "started": "2026-12-03T12:00:00+00:00",
            "exit_code": 0,
            "pruned": 4,
        },
        "20261204T030005-00000005": {
            **NIGHT,
            "started": "2026-12-04T03:00:05+00:00",
            "images": 9,
            "exit_code": 7,
            "ended": "max_hours",
            "cost": cost,
        },
    }.items():
        write_run_record(dataset, run, {"run": run, **record})
    broken = Path(dataset.out, "_vitray", "runs", "20261203T040000-cut.json")
    broken.write_text('{"run": "20261')
    return dataset


def test_runs_are_listed_newest_last_in_80_columns(vitray: Call, nights: Dataset) -> None:
    code, out, err = vitray("runs", nights.out)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "started (UTC)        took       images  pruned     cost  exit",
        "2026-11-30 20:26      7 s            6       -        -     0  done",
        "2026-12-01 03:00 62.0 min    1,234,567      12     3.61     0  done",
        "2026-12-02 03:00        -            -       -        -     1  StorageError",
        "2026-12-03 03:00      1 s            0       0        -     0  nothing to do",
        "2026-12-03 12:00        -            -       4        -     0  remove: done",
        "2026-12-04 03:00 62.0 min            9      12     3.61     7  max_hours",
        "not readable: 20261203T040000-cut.json",
    ]
    assert max(map(len, out.splitlines())) <= 80


def test_the_newest_runs_alone_are_listed(vitray: Call, nights: Dataset) -> None:
    lines = vitray("runs", nights.out, "--last", 2)[1].splitlines()
    assert [line[:16] for line in lines[1:]] == ["2026-12-03 12:00", "2026-12-04 03:00"]


def test_a_program_reads_the_whole_of_each_run(vitray: Call, nights: Dataset) -> None:
    code, out, err = vitray("runs", nights.out, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert (found["out"], found["damaged"]) == (nights.out, ["20261203T040000-cut.json"])
    failed = found["runs"][2]
    assert failed["error"] == "StorageError"
    assert failed["message"] == "s3://photos does not answer"
    assert (failed["outcome"], failed["images"]) == ("failed", None)
    assert (failed["limit"], found["runs"][-1]["limit"]) == (None, "max_hours")
    assert (found["runs"][-1]["error"], found["runs"][-1]["message"]) == (None, None)
    assert found["runs"][1]["cost"]["total"] == 3.61
    assert found["runs"][1]["bad_images"] == {"empty": 3}


def test_long_words_do_not_leave_the_line(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    write_run_record(dataset, "r", {**NIGHT, "exit_code": 1, "ended": f"{'Odd' * 30}: x"})
    line = vitray("runs", dataset.out)[1].splitlines()[1]
    assert len(line) == 80
    assert line.endswith("…")


def test_a_dataset_without_a_run_and_a_path_without_a_dataset(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    assert vitray("runs", dataset.out)[1] == f"{dataset.out}: no run is recorded\n"
    refused(vitray, tmp_path, ["runs", tmp_path / "in"], 2, "holds no vitray dataset")


def write_run(dataset: Dataset, name: str, ago: timedelta, **fields: object) -> None:
    finished = (datetime.now(UTC) - ago).isoformat(timespec="seconds")
    write_run_record(dataset, name, {"run": name, **IDLE, "finished": finished, **fields})


@pytest.mark.parametrize(
    ("age", "code"), [("26h", 0), ("24h", 6), ("2d", 0), ("1500m", 6), ("93600s", 0), ("1.5d", 0)]
)
def test_a_dataset_whose_last_complete_run_is_too_old(
    vitray: Call, tmp_path: Path, age: str, code: int
) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    write_run(dataset, "20261201T000000-a", timedelta(hours=50))
    write_run(dataset, "20261202T000000-b", timedelta(hours=25, minutes=30))  # nothing to do
    write_run(dataset, "20261203T000000-c", timedelta(hours=1), exit_code=3)
    write_run(dataset, "20261203T010000-d", timedelta(minutes=1), kind="remove")
    got, out, err = vitray("status", dataset.out, "--max-age", age)
    assert (got, err) == (code, "")
    word = "too old   " if code else "age       "
    ended = f"the last complete run ended 25.5 h ago; --max-age allows {age}"
    assert out.splitlines()[-1] == f"{word} {ended}"
    got, out, err = vitray("status", dataset.out, "--max-age", age, "--json")
    found = json.loads(out)
    assert (got, err, found["stale"]) == (code, "", code == 6)
    assert found["complete_age_s"] == pytest.approx(25.5 * 3600, abs=30)


def test_a_dataset_without_a_complete_run_is_too_old(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    write_run(dataset, "20261201T000000-a", timedelta(minutes=1), exit_code=143)
    code, out, _ = vitray("status", dataset.out, "--max-age", "7d")
    assert code == 6
    line = "too old    no complete run yet; --max-age allows 7d"
    assert out.splitlines()[-1] == line
    assert json.loads(vitray("status", dataset.out, "--json")[1])["complete_age_s"] is None


@pytest.mark.parametrize("age", ["26", "1w", "h", "-1h", "26 hours", ""])
def test_what_is_no_age_is_refused(vitray: Call, tmp_path: Path, age: str) -> None:
    out = hand_made.make_dataset(tmp_path).out
    refused(vitray, tmp_path, ["status", out, f"--max-age={age}"], 2, "3600s, 90m, 26h or 7d")
