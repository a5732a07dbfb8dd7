"""A run that ends at a limit loses nothing, and the same call continues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from vitray.budget import Budget, Limit, Usage
from vitray.dataset import read_run_records
from vitray.errors import AccessError, Interrupted, SourceError, StorageError, VitrayError
from vitray.exit_codes import ExitCode
from vitray.operations.runs import list_runs

IMAGES = 96


@dataclass(frozen=True)
class FirstShard(Budget):
    """A limit that is reached as soon as a shard is committed."""

    def reached(self, usage: Usage) -> Limit | None:
        return Limit.MAX_COST if usage.shards else None


@pytest.fixture
def job(shapes_model: str, tmp_path: Path) -> vitray.Job:
    put_tars(str(tmp_path / "in"), pictures(IMAGES), 6, tmp_path)
    return vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        precision="fp32",
        fragment_rows=4,
        batch_size=4,
        max_error_rate=1,
    )


def test_a_run_ends_at_its_limit_and_the_next_one_does_the_rest(
    job: vitray.Job, tmp_path: Path
) -> None:
    prices = {"machine_hour": 360.0, "put_1000": 1.0}
    first = vitray.run(job, budget=FirstShard(prices=prices))
    assert (first.exit_code, first.ended_by) == (ExitCode.BUDGET_SPENT, "max_cost")
    assert first.pending == 6 - first.committed > 0
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    assert first.cost is not None
    assert first.cost.machines == pytest.approx(first.seconds / 10, rel=0.2)
    second = vitray.run(job)
    assert (second.exit_code, second.ended_by, second.pending) == (0, None, 0)
    assert first.images + second.images == IMAGES, "what was computed was lost"
    keys = vitray.read(job.out, columns=["key"])["key"].to_pylist()
    assert sorted(keys) == [f"{n:05d}" for n in range(IMAGES)]
    record, other = read_run_records(job.out)
    assert (record["ended"], record["exit_code"]) == ("max_cost", 7)
    assert record["cost"]["total"] == pytest.approx(first.cost.total, rel=0.2)
    assert (other.get("ended"), other["exit_code"], other["cost"]) == (None, 0, None)
    assert [run.outcome for run in list_runs(job.out).runs] == ["budget spent", "done"]


def test_a_limit_of_which_nothing_is_left_does_not_end_a_run(job: vitray.Job) -> None:
    vitray.run(job)
    result = vitray.run(job, budget=Budget(max_hours=1e-9))
    assert (result.exit_code, result.ended_by) == (0, None)


def test_a_request_to_stop_is_still_an_interruption(job: vitray.Job) -> None:
    import threading

    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        vitray.run(job, stop=stop, budget=Budget(max_hours=1e-9))
    (run,) = list_runs(job.out).runs
    assert (run.outcome, run.exit_code) == ("interrupted", 143)


def test_a_later_run_that_fails_is_in_the_list(
    job: vitray.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose rights were taken away, too; a job that does not fit is not."""
    from vitray.pipeline import runner

    vitray.run(job)
    errors: list[VitrayError] = [
        StorageError("s3://photos does not answer"),
        AccessError("s3://photos: access refused"),
        SourceError("s3://photos holds nothing"),
    ]
    for error in errors:

        def away(_: vitray.Job, error: VitrayError = error) -> None:
            raise error

        monkeypatch.setattr(runner, "list_source", away)
        with pytest.raises(type(error)):
            vitray.run(job)
    done, *failed = list_runs(job.out).runs
    assert (done.outcome, done.exit_code) == ("done", 0)
    assert sorted((run.outcome, run.exit_code, run.error) for run in failed) == [
        ("failed", 1, "StorageError"),
        ("failed", 2, "AccessError"),
    ]
    assert all(run.started is not None and run.images == 0 for run in failed)
