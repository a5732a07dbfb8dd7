"""The executor of one process: the same rows as on Ray, and an end when something breaks."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import Picture, pictures, put_files, put_tars

import vitray
from vitray.dataset import Dataset, load_group_log, open_dataset, read_run_records, staged
from vitray.errors import ClusterError, Interrupted, ModelError, ShardError
from vitray.operations.planning import status
from vitray.pipeline import cluster
from vitray.pipeline.cluster import share_out
from vitray.pipeline.local_executor import LocalExecutor
from vitray.pipeline.progress import Progress
from vitray.pipeline.ray_executor import RayExecutor
from vitray.pipeline.rounds import EventQueue, RunState, run_round
from vitray.schema import ShardEvent
from vitray.sources import list_shards

IMAGES = 320
SHARES = replace(share_out([{"CPU": 2}], "cpu"), queue_blocks=1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    items = pictures(IMAGES)
    broken = {7: b"", 50: b"no image", 90: items[90].data[:200]}
    items = [Picture(p.key, broken.get(n, p.data), p.truth, p.suffix) for n, p in enumerate(items)]
    put_tars(str(folder / "in"), items, 3, folder)
    return folder / "in"


def run(inputs: Path, model: str, out: Path, *more: str) -> str:
    fields = [
        "precision=fp32",
        "engine=torch",
        "batch_size=8",
        "fragment_rows=16",
        "max_error_rate=1",
    ]
    sets = [part for field in fields for part in ("--set", field)]
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "run",
        str(inputs),
        "--model",
        model,
        "--out",
        str(out),
        *sets,
        *more,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ray
def test_threads_and_ray_write_the_same_rows(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    run(inputs, shapes_model, tmp_path / "threads")
    run(inputs, shapes_model, tmp_path / "ray", "--address", "local")
    by_threads, by_ray = (
        vitray.read(str(tmp_path / name)).sort_by("key") for name in ("threads", "ray")
    )
    assert by_threads.num_rows == IMAGES - 3
    exact_columns = [
        name for name in by_threads.column_names if name not in ("embedding", "score", "top_scores")
    ]
    assert by_threads.select(exact_columns).equals(by_ray.select(exact_columns))
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (by_threads, by_ray)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    errors = [
        [pq.read_table(path) for path in sorted((tmp_path / name / "_errors").iterdir())]
        for name in ("threads", "ray")
    ]
    assert errors[0] == errors[1] and sum(table.num_rows for table in errors[0]) == 3


@pytest.mark.ray
@pytest.mark.nightly
def test_a_dataset_begun_on_ray_is_finished_by_threads(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    run(inputs, shapes_model, tmp_path / "out", "--address", "local", "--set", "limit=1")
    output = run(inputs, shapes_model, tmp_path / "out")
    assert output.startswith("2 shards committed now"), output
    checked = vitray.validate(str(tmp_path / "out"), content=True)
    assert checked.ok and (checked.rows, checked.errors) == (IMAGES - 3, 3)
    assert run(inputs, shapes_model, tmp_path / "out").startswith("0 shards committed now")


@pytest.fixture
def dataset(inputs: Path, shapes_model: str, tmp_path: Path) -> Dataset:
    fields = {
        "precision": "fp32",
        "engine": "torch",
        "batch_size": 8,
        "fragment_rows": 16,
        "max_error_rate": 1,
        "limit": 1,
    }
    vitray.run(
        vitray.Job(source=[str(inputs)], model=shapes_model, out=str(tmp_path / "out"), **fields)
    )
    opened = open_dataset(str(tmp_path / "out"))
    assert opened is not None
    return opened


def stage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "vitray-stage"]


@pytest.mark.ray
def test_on_a_full_cluster_the_executor_waits_for_a_machine(
    ray: None, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray as rays

    class Takes:
        def answer(self) -> bool:
            return True

    taker = rays.remote(Takes).options(num_cpus=rays.cluster_resources()["CPU"]).remote()
    assert rays.get(taker.answer.remote(), timeout=60)
    monkeypatch.setattr(cluster, "NOTICE_S", 0.5)
    monkeypatch.setattr(cluster, "PLACEMENT_TIMEOUT_S", 1.8)
    with pytest.raises(
        ClusterError,
        match=r"^waited 1\.8 s for a machine that has room for the model, and fetches and reads it",
    ):
        cluster.on_worker(SHARES, str)
    words = [record.message for record in caplog.records if record.name == cluster.__name__]
    assert len(words) in (2, 3)  # beside other state a wait may take longer than it was given
    assert set(words) == {
        "waiting for cluster resources: a machine that has room for the model, and fetches and "
        "reads it"
    }
    executor = RayExecutor(dataset, list_shards(dataset.job, []).shards[1:2], SHARES)
    arrived: EventQueue = queue.Queue()
    executor.start(arrived)
    try:
        deadline = time.monotonic() + 60
        while not executor.is_waiting_for_machine():
            assert time.monotonic() < deadline and arrived.empty()
            time.sleep(0.2)
        time.sleep(3)
        assert executor.is_waiting_for_machine() and arrived.empty()
        rays.kill(taker)
        while (item := arrived.get(timeout=60)) is not None:
            assert isinstance(item, ShardEvent) and not executor.is_waiting_for_machine()
    finally:
        executor.close()


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


def test_a_first_file_of_another_type_is_set_aside_once_the_types_are_frozen(
    shapes_model: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    images = [picture.data for picture in pictures(12)]
    pq.write_table(
        pa.table({"image": images, "price": list(range(12))}), tmp_path / "in" / "b.parquet"
    )
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        keep=["price"],
    )
    vitray.run(job)
    pq.write_table(
        pa.table({"image": images, "price": [["a"]] * 12}), tmp_path / "in" / "a0.parquet"
    )
    pq.write_table(pa.table({"image": images}), tmp_path / "in" / "a1.parquet")
    pq.write_table(
        pa.table({"image": images, "price": list(range(12))}), tmp_path / "in" / "c.parquet"
    )
    result = vitray.run(job)
    assert result.exit_code == 3 and result.images == 12 and len(result.set_aside) == 2
    whys = sorted(result.set_aside.values())
    assert "column `price` is list<element: string>, in this dataset it is int64" in whys[0]
    assert f"{tmp_path}/in/a1.parquet has no column `price`; it has image" in whys[1]


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


def test_passthrough_types_are_those_of_the_first_values_and_take_what_loses_nothing(
    shapes_model: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    images = [picture.data for picture in pictures(12)]

    def add(name: str, note: pa.Array, price: pa.Array) -> None:
        pq.write_table(
            pa.table({"image": images, "note": note, "price": price}),
            tmp_path / "in" / f"{name}.parquet",
        )

    nothing = pa.nulls(12)
    text = pa.array(["a"] * 12, pa.large_string())
    add("a", nothing, pa.array([0.5] * 12))
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        keep="note,price",
    )
    result = vitray.run(job)
    assert result.exit_code == 0 and vitray.read(job.out)["note"].null_count == 12
    add("b", text, pa.array(range(12)))
    add(
        "c", text.cast(pa.string()).dictionary_encode(), pa.array([2**60 + 1] * 12)
    )  # no double has it
    add("d", text.cast(pa.string()), nothing)
    result = vitray.run(job)
    (why,) = result.set_aside.values()
    assert (
        result.rows == 36 and "a value of column `price` does not fit the dataset's double" in why
    )
    rows = vitray.read(job.out, ["note", "price"])
    assert (
        rows["note"].to_pylist() == [None] * 12 + ["a"] * 24
        and rows["price"].to_pylist() == [0.5] * 12 + [*range(12)] + [None] * 12
    )
    assert (
        vitray.read(vitray.run(job.model_copy(update={"out": f"{tmp_path}/new"})).out)
        .schema.field("note")
        .type
        == pa.large_string()
    )


def test_a_model_that_cannot_be_opened_ends_the_round_with_its_error(dataset: Dataset) -> None:
    other = replace(dataset, spec=replace(dataset.spec, weights_sha256="0" * 64))
    shards = list_shards(dataset.job, []).shards
    started = time.monotonic()
    with pytest.raises(ModelError, match="the weights changed"):
        run_round(other, shards, LocalExecutor(other, shards, SHARES), RunState())
    assert time.monotonic() - started < 30 and stage_threads() == []


def test_a_run_from_python_leaves_torch_its_threads(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    code = f"""
import torch, vitray
torch.set_num_threads(2)
job = vitray.Job(source={str(inputs)!r}, model={shapes_model!r}, out={str(tmp_path / "out")!r}, engine="torch", max_error_rate=1)
result = vitray.run(job)
print(result.rows, torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.split() == [str(IMAGES - 3), "2"], done.stderr


def test_closing_an_executor_ends_its_threads_while_queues_are_full(dataset: Dataset) -> None:
    shards = list_shards(dataset.job, []).shards
    executor = LocalExecutor(dataset, shards, SHARES)

    class Impatient(Exception):
        pass

    def stop(progress: object) -> None:
        raise Impatient

    with pytest.raises(Impatient):
        run_round(dataset, shards, executor, RunState(report=stop))
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
    monkeypatch.setattr("vitray.pipeline.local_executor.predict_stage", lambda *_: is_over.wait(30))
    executor = LocalExecutor(stuck, shards, SHARES)
    threading.Timer(6, is_over.set).start()
    with pytest.raises(
        ClusterError, match=r"no image moved for 3 s \(.*1 fragments wait for predict"
    ):
        run_round(stuck, shards, executor, RunState())


def test_a_run_that_is_stopped_stages_the_fragments_in_flight(dataset: Dataset) -> None:
    """All decoded images are staged, every complete shard is committed, nothing more is read."""
    shards = list_shards(dataset.job, []).shards
    state = RunState()
    other = replace(dataset, out=f"{dataset.out}-stopped")

    def stop(progress: Progress) -> None:
        if progress.images >= 16:
            state.stop.set()

    state.report = stop
    run_round(other, shards, LocalExecutor(other, shards, SHARES), state)
    assert 16 <= state.progress.images < IMAGES and state.failures == {}
    staged_spans = [
        staged(other, shard.id).fragments for shard in shards if shard.id not in state.commits
    ]
    kept = sum(stop - start for spans in staged_spans for start, stop in spans.items())
    assert (
        kept + sum(done.rows + done.errors for done in state.commits.values())
        == state.progress.images
    )
    with pytest.raises(Interrupted):
        vitray.run(other.job.model_copy(update={"out": f"{dataset.out}-none"}), stop=state.stop)


def test_more_threads_than_shards_and_a_compiled_model_change_nothing(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Written into a dataset of its own, with four times the threads, and torch.compile."""
    shards = list_shards(dataset.job, []).shards
    shares = replace(share_out([{"CPU": 8}], "cpu"), readers=6, stagers=5, compiled=True)
    other = replace(dataset, out=str(tmp_path / "other"))
    state = RunState()
    run_round(other, shards, LocalExecutor(other, shards, shares), state)
    assert (
        sorted(state.commits) == sorted(shard.id for shard in shards)
        and state.progress.images == IMAGES
    )
    (path,) = (tmp_path / "out" / "data").iterdir()
    own = pq.read_table(tmp_path / "other" / "data" / path.name)
    reference = pq.read_table(path)
    assert own["key"].equals(reference["key"]) and own["label"].equals(reference["label"])
    np.testing.assert_allclose(
        *(np.stack(t["embedding"].to_numpy()) for t in (own, reference)), atol=1e-4
    )


def test_files_that_are_deleted_later_are_missing_and_not_bad(
    shapes_model: str, tmp_path: Path
) -> None:
    put_files(str(tmp_path / "in"), pictures(12))
    job = vitray.Job(
        source=[f"{tmp_path}/in"], model=shapes_model, out=f"{tmp_path}/out", engine="torch"
    )
    assert vitray.run(job).exit_code == 0
    for path in sorted((tmp_path / "in").iterdir())[:5]:
        path.unlink()
    result = vitray.run(job)
    assert (result.rows, result.errors, result.reasons, result.exit_code) == (
        7,
        5,
        {"missing": 5},
        0,
    )
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    again = vitray.run(job)
    assert (again.rows, again.errors, again.exit_code) == (7, 6, 4)  # one of eight is bad


def test_a_file_that_cannot_be_read_costs_its_row_and_a_name_that_is_not_utf8_costs_none(
    shapes_model: str, tmp_path: Path
) -> None:
    items = pictures(12)
    put_files(str(tmp_path / "in"), items)
    (tmp_path / "in" / "00003.png").unlink()
    (tmp_path / "in" / "00003.png").symlink_to(
        "/proc/sys/vm/drop_caches"
    )  # nobody may read it, not even root
    os.rename(tmp_path / "in" / "00004.jpg", os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg")
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        max_error_rate=0.5,
    )
    result = vitray.run(job)
    assert (result.rows, result.errors, result.reasons, result.set_aside) == (
        11,
        1,
        {"missing": 1},
        {},
    )
    names = sorted(
        [f"{p.key}.{p.suffix}" for n, p in enumerate(items) if n not in (3, 4)] + [r"caf\udce9.jpg"]
    )
    table = vitray.read(job.out)
    assert (
        table["key"].to_pylist()
        == table["uri"].to_pylist()
        == [f"{tmp_path}/in/{name}" for name in names]
    )
    (path,) = (tmp_path / "out" / "_errors").iterdir()
    (error,) = pq.read_table(path).to_pylist()
    assert error["key"] == f"{tmp_path}/in/00003.png" and error["message"].startswith(
        f"{error['key']}: Permission denied."
    )
    assert vitray.validate(job.out, content=True).ok and vitray.run(job).committed == 0


@pytest.mark.parametrize("seen_before", [True, False])
def test_pruned_files_leave_their_group_and_come_back_in_another(
    shapes_model: str, tmp_path: Path, seen_before: bool
) -> None:
    """seen_before: a run without --prune has made `missing` rows of them. Every id is compared."""
    items = pictures(12)
    put_files(str(tmp_path / "in"), items)
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        group_size=8,
    )
    vitray.run(job)
    paths = sorted((tmp_path / "in").iterdir())
    for path in [*paths[1:3], *paths[8:]]:  # two of the first group, all of the second
        path.unlink()
    if seen_before:
        assert vitray.run(job).reasons == {"missing": 2}
    result = vitray.run(job, prune=True)
    assert (result.rows, result.errors, result.gone, result.exit_code) == (6, 0, 0, 0)
    kept = [str(path) for path in [paths[0], *paths[3:8]]]
    rows = vitray.read(job.out)
    assert rows["key"].to_pylist() == kept and rows["index"].to_pylist() == list(range(6))
    assert vitray.run(job, prune=True).committed == 0 and vitray.validate(job.out, content=True).ok
    put_files(str(tmp_path / "in"), items)
    assert vitray.run(job).rows == 12 and vitray.validate(job.out).ok
    assert sorted(vitray.read(job.out)["key"].to_pylist()) == sorted(map(str, paths))


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


def test_files_that_arrive_while_a_run_plans_wait_for_the_next_one_and_make_no_groups_of_their_own(
    shapes_model: str, tmp_path: Path
) -> None:
    items = pictures(60)
    ended = threading.Event()
    put_files(str(tmp_path / "in"), items[:10])

    def arrive() -> None:
        for n in range(100_000):
            if ended.wait(0.01):
                return
            put_files(str(tmp_path / "in"), [replace(items[n % 50 + 10], key=f"late-{n:06d}")])

    thread = threading.Thread(target=arrive)
    thread.start()
    try:
        vitray.run(
            vitray.Job(
                source=[str(tmp_path / "in")],
                model=shapes_model,
                out=str(tmp_path / "out"),
                engine="torch",
            )
        )
    finally:
        ended.set()
        thread.join()
    assert len(load_group_log(str(tmp_path / "out"))) >= 10
    assert {number for number, _ in load_group_log(str(tmp_path / "out"))} == {0}
