"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from factories.shards import pictures, put_tars
from support.local_runs import IMAGES, complete, write_inputs
from vitray.dataset import Dataset, list_staged, open_dataset, read_run_records
from vitray.errors import ClusterError, Interrupted, ModelError, ShardError
from vitray.operations.planning import status
from vitray.pipeline.driver import RunState
from vitray.pipeline.progress import Progress
from vitray.sources import list_shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("local"))


def stage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "vitray-stage"]


def test_a_run_with_nothing_to_do_needs_no_accelerator(dataset: Dataset) -> None:
    """The head of a cluster has none, and there is nothing to compute."""
    for device in ("cuda", "xpu"):
        result = vitray.run(dataset.job.model_copy(update={"device": device}))
        assert (result.images, result.pending, result.exit_code) == (0, 0, 0)


def test_later_commands_use_the_source_of_the_last_run(
    inputs: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """The images moved, and the limit went."""
    shutil.copytree(inputs, tmp_path / "moved")
    job = dataset.job.model_copy(update={"source": [f"{tmp_path}/moved"], "limit": None})
    vitray.run(job.model_copy(update={"limit": 2}))
    last = open_dataset(dataset.out)
    assert last is not None and last.job == dataset.job.model_copy(
        update={"source": job.source, "limit": 2}
    )
    checked = vitray.validate(dataset.out, inputs=True, content=True)
    assert (checked.files, checked.gone, checked.problems) == (3, 1, ())
    assert checked.compared == 2 and "images read again: those of 2 of 3 files" in str(checked)
    vitray.run(job, prune=True)
    checked = vitray.validate(dataset.out, inputs=True, content=True)
    assert checked.ok and (checked.gone, checked.pending, checked.rows) == (0, 0, IMAGES - 3)
    shutil.rmtree(tmp_path / "out" / "data")
    # A limit of a later run is not stored once a run had no limit.
    vitray.run(job.model_copy(update={"limit": 1, "device": "cpu"}))
    assert vitray.validate(dataset.out, inputs=True).pending == 2
    source = tmp_path / "out" / "_vitray" / "source.json"
    vitray.run(job)
    # source.json is only a hint. The next run restores it, although it has nothing to do.
    for text in ("", "{}", "[1]"):
        source_json = source.read_bytes()
        source.write_text(text)
        reopened = open_dataset(dataset.out)
        assert reopened is not None and reopened.job == dataset.job
        assert vitray.run(job).images == 0 and source.read_bytes() == source_json


def test_a_first_run_of_broken_files_freezes_no_types(shapes_model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.parquet").write_bytes(b"no Parquet")
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        keep="price",
    )
    with pytest.raises(
        ShardError,
        match=rf"^{tmp_path}/in/a\.parquet cannot be read: .*Replace or remove it, then run again",
    ):
        vitray.run(job)
    assert open_dataset(job.out) is None
    images = [picture.data for picture in pictures(12)]
    pq.write_table(
        pa.table({"image": images, "price": list(range(12))}), tmp_path / "in" / "b.parquet"
    )
    result = vitray.run(job)
    assert (result.rows, len(result.set_aside)) == (12, 1) and vitray.read(job.out)[
        "price"
    ].to_pylist() == list(range(12))


def test_a_model_that_cannot_be_opened_ends_the_run_with_its_error(dataset: Dataset) -> None:
    other = replace(dataset, spec=replace(dataset.spec, weights_sha256="0" * 64))
    shards = list_shards(dataset.job, []).shards
    started = time.monotonic()
    with pytest.raises(ModelError, match="the weights changed"):
        complete(other, shards)
    assert time.monotonic() - started < 30 and stage_threads() == []


def test_closing_an_executor_ends_its_threads_while_queues_are_full(dataset: Dataset) -> None:
    shards = list_shards(dataset.job, []).shards

    class Impatient(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.images:
            raise Impatient

    other = replace(dataset, out=f"{dataset.out}-closed")
    with pytest.raises(Impatient):
        complete(other, shards, RunState(report=stop))
    assert stage_threads() == []


def test_a_stalled_executor_ends_and_reports_the_stuck_stage(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = list_shards(dataset.job, []).shards
    is_over = threading.Event()
    stuck = replace(
        dataset,
        job=dataset.job.model_copy(update={"stall_timeout_s": 3}),
        out=f"{dataset.out}-stuck",
    )
    monkeypatch.setattr("vitray.pipeline.worker.predict_stage", lambda *_: is_over.wait(30))
    threading.Timer(6, is_over.set).start()
    with pytest.raises(ClusterError, match=r"no image moved for 3 s \(.*1 fragment to predict"):
        complete(stuck, shards)


def test_a_run_that_is_stopped_stages_the_fragments_in_flight(dataset: Dataset) -> None:
    """All decoded images are staged, every complete shard is committed, nothing more is read."""
    shards = list_shards(dataset.job, []).shards
    state = RunState()
    other = replace(dataset, out=f"{dataset.out}-stopped")

    def stop(progress: Progress) -> None:
        if progress.images >= 16:
            state.stop.set()

    state.report = stop
    complete(other, shards, state)
    assert 16 <= state.progress.images < IMAGES and state.failures == {}
    staged_spans = [
        list_staged(other, shard.id).fragments for shard in shards if shard.id not in state.commits
    ]
    kept = sum(stop - start for spans in staged_spans for start, stop in spans.items())
    assert (
        kept + sum(done.rows + done.errors for done in state.commits.values())
        == state.progress.images
    )
    with pytest.raises(Interrupted):
        vitray.run(other.job.model_copy(update={"out": f"{dataset.out}-none"}), stop=state.stop)


def test_a_run_that_gives_up_leaves_no_row_twice(
    inputs: Path, shapes_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new version of an input is committed, the old one was not removed yet."""
    from vitray.errors import ErrorRateExceeded
    from vitray.pipeline import runner

    put_tars(str(tmp_path / "in"), pictures(40), 2, tmp_path)
    job = vitray.Job(
        source=[f"{tmp_path}/in"], model=shapes_model, out=f"{tmp_path}/out", engine="torch"
    )
    vitray.run(job)
    put_tars(str(tmp_path / "in"), pictures(60), 2, tmp_path)
    real = runner.complete_shards

    def giving_up(*args: object) -> None:
        real(*args)
        raise ErrorRateExceeded("too many")

    monkeypatch.setattr(runner, "complete_shards", giving_up)
    with pytest.raises(ErrorRateExceeded):
        vitray.run(job)
    (record,) = (record for record in read_run_records(job.out) if "ended" in record)
    assert (
        record["ended"] == "ErrorRateExceeded: too many" and record["host"] == socket.gethostname()
    )
    shown = status(job.out)
    assert "ended      ErrorRateExceeded: too many\n" in f"{replace(shown, last_run=record)}\n"
    keys = [
        row["key"]
        for path in (tmp_path / "out" / "data").iterdir()
        for row in pq.read_table(path, columns=["key"]).to_pylist()
    ]
    assert sorted(keys) == [f"{n:05d}" for n in range(60)]
