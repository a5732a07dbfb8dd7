"""A worker in this process: what it stages, what it commits, and what it does when a stage fails."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from factories.shards import Picture, pictures, put_tars
from support.local_runs import complete
from vitray.dataset import Dataset, committed_files, open_dataset
from vitray.pipeline import decoders, stages, worker
from vitray.pipeline.decoders import ShardSource, read_blocks
from vitray.pipeline.driver import RunState
from vitray.pipeline.stages import DecodedBlock, FragmentRows
from vitray.schema import Shard
from vitray.sources import list_shards

FRAGMENT = 16
SIZES = (1, 3, 16, 17, 40, 5, 5, 5, 15, 33)  # of shards: less than a fragment, one, and several
BAD = {"00002": b"", "00050": b"no image", "00051": b"\xff\xd8\xff\xd9"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of each size of SIZES."""
    folder = tmp_path_factory.mktemp("mixed")
    items = iter(pictures(sum(SIZES)))
    for number, size in enumerate(SIZES):
        own = [next(items) for _ in range(size)]
        own = [Picture(p.key, BAD.get(p.key, p.data), p.truth, p.suffix) for p in own]
        put_tars(str(folder / "in" / f"{number:02d}"), own, 1, folder)
    return folder / "in"


@pytest.fixture
def dataset(mixed: Path, shapes_model: str, tmp_path: Path) -> Dataset:
    """A dataset without a data file."""
    job = vitray.Job(
        source=[f"{mixed}/**"],
        model=shapes_model,
        out=str(tmp_path / "out"),
        precision="fp32",
        engine="torch",
        batch_size=8,
        fragment_rows=FRAGMENT,
        max_error_rate=1,
        stall_timeout_s=60,
    )
    vitray.run(job.model_copy(update={"limit": 1, "out": str(tmp_path / "one")}))
    opened = open_dataset(str(tmp_path / "one"))
    assert opened is not None
    return replace(opened, out=job.out, job=opened.job.model_copy(update={"limit": None}))


def shards_of(dataset: Dataset) -> list[Shard]:
    return list_shards(dataset.job, []).shards


def sizes_of(dataset: Dataset) -> dict[str, int]:
    return {shard.id: size for shard, size in zip(shards_of(dataset), SIZES, strict=True)}


def staging_of(out: str) -> list[str]:
    return (
        sorted(os.listdir(f"{out}/_vitray/staging"))
        if os.path.isdir(f"{out}/_vitray/staging")
        else []
    )


def require_complete(dataset: Dataset, state: RunState) -> None:
    """Every shard is committed with all its images, and nothing else is left."""
    sizes = sizes_of(dataset)
    assert state.failures == {} and state.counted == {}
    counts = {shard: done.rows + done.errors for shard, done in state.commits.items()}
    assert counts == sizes and committed_files(dataset.out).keys() == sizes.keys()
    assert state.progress.images == sum(SIZES) and state.progress.errors == len(BAD)
    assert staging_of(dataset.out) == []
    rows = table_of(dataset)
    keys = [key for n in range(sum(SIZES)) if (key := f"{n:05d}") not in BAD]
    assert rows["key"].to_pylist() == keys


def table_of(dataset: Dataset) -> pa.Table:
    paths = [dataset.data_url(shard.id) for shard in shards_of(dataset)]
    existing = [pq.read_table(path) for path in paths if os.path.exists(path)]
    return pa.concat_tables(existing).sort_by("key")


def errors_of(dataset: Dataset) -> pa.Table:
    folder = Path(dataset.out, "_errors")
    return pa.concat_tables([pq.read_table(path) for path in folder.iterdir()]).sort_by("key")


def counting(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, key: Callable[..., str]
) -> Counter[str]:
    """Count the calls of a function, by a key of its arguments."""
    calls = Counter[str]()
    real = getattr(module, name)

    def counted(*args: object, **options: object) -> object:
        calls[key(*args)] += 1
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_shards_of_one_fragment_leave_no_staging(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are committed directly; the others are staged first."""
    staged = counting(monkeypatch, stages, "write_fragment", lambda dataset, shard, *_: shard)
    ends = counting(monkeypatch, stages, "write_end", lambda dataset, shard, *_: shard)
    commits = counting(monkeypatch, stages, "commit_shard", lambda dataset, shard: shard.id)
    direct = counting(monkeypatch, stages, "commit_whole", lambda dataset, shard, *_: shard.id)
    state = complete(dataset, shards_of(dataset))
    require_complete(dataset, state)
    sizes = sizes_of(dataset)
    large = {shard for shard, size in sizes.items() if size > FRAGMENT}
    assert direct == dict.fromkeys(sizes.keys() - large, 1)
    assert commits == ends == dict.fromkeys(large, 1)
    assert staged == {shard: -(-sizes[shard] // FRAGMENT) for shard in large}
    assert {commit.adopted for commit in state.commits.values()} == {False}


def test_mixed_sizes_give_the_rows_of_one_shard_at_a_time(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where small shards are decoded and predicted together, as for a GPU."""
    shared = list[int]()
    real = worker.predict_stage

    def predict(dataset: Dataset, model: object, block: DecodedBlock, *more: object) -> object:
        shared.append(len({fragment.info.shard.id for fragment in block.fragments}))
        images = sum(fragment.info.images for fragment in block.fragments)
        assert images <= FRAGMENT
        return real(dataset, model, block, *more)  # type: ignore[arg-type]

    def joined(
        dataset: Dataset, shards: ShardSource, stopping: threading.Event, **_: bool
    ) -> object:
        return read_blocks(dataset, shards, stopping)

    monkeypatch.setattr(worker, "predict_stage", predict)
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "read_blocks", joined)
        require_complete(dataset, complete(dataset, shards_of(dataset)))
    assert max(shared) > 1
    shared.clear()
    alone = replace(dataset, out=f"{dataset.out}-alone")
    for shard in shards_of(alone):
        complete(alone, [shard])
    assert max(shared) == 1
    together, one_by_one = table_of(dataset), table_of(alone)
    floats = ("embedding", "score", "top_scores")
    exact = [name for name in together.column_names if name not in floats]
    assert together.select(exact).equals(one_by_one.select(exact))
    for name in floats:
        np.testing.assert_allclose(
            *(np.stack(table[name].to_numpy()) for table in (together, one_by_one)), atol=1e-5
        )
    assert errors_of(dataset).equals(errors_of(alone))
    assert errors_of(dataset)["key"].to_pylist() == sorted(BAD)


def failing(
    monkeypatch: pytest.MonkeyPatch, stage: str, fails: Callable[[Sequence[str]], bool]
) -> Counter[str]:
    """Let a stage raise where `fails` is True for the shards that it is given; counts these."""
    module = stages if not hasattr(worker, stage) else worker
    real = getattr(module, stage)
    failed = Counter[str]()
    lock = threading.Lock()

    def run(*args: object) -> object:
        ids = [id for arg in args for id in _shards_in(arg)]
        with lock:
            is_failing = fails(ids)
            failed.update(ids if is_failing else [])
        if is_failing:
            raise RuntimeError("text above\nthe stage broke")
        return real(*args)

    monkeypatch.setattr(module, stage, run)
    return failed


def _shards_in(value: object) -> list[str]:
    if isinstance(value, DecodedBlock):
        return [fragment.info.shard.id for fragment in value.fragments]
    if isinstance(value, FragmentRows):
        return [value.info.shard.id]
    return [value.id] if isinstance(value, Shard) else []


@pytest.mark.parametrize("stage", ["predict_stage", "write_stage", "commit_stage"])
def test_a_stage_that_fails_once_is_retried(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    once = iter([False, True])
    failed = failing(monkeypatch, stage, lambda _: next(once, False))
    state = complete(dataset, shards_of(dataset))
    assert failed
    require_complete(dataset, state)
    assert state.progress.set_aside == 0
    # One that was alone with the worker is suspected, once.
    assert state.schedule.policy.attempts in ({}, *({shard: 1} for shard in failed))


@pytest.mark.parametrize("which", [0, 4, len(SIZES) - 1])
def test_a_shard_that_always_breaks_the_worker_is_set_aside_and_the_rest_completes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    deadly = shards_of(dataset)[which].id
    failed = failing(monkeypatch, "predict_stage", lambda ids: deadly in ids)
    state = complete(dataset, shards_of(dataset))
    assert state.failures == {deadly: "its processes died: the stage broke"}
    assert state.progress.set_aside == 1
    expected = {shard: size for shard, size in sizes_of(dataset).items() if shard != deadly}
    counts = {shard: done.rows + done.errors for shard, done in state.commits.items()}
    assert counts == expected and committed_files(dataset.out).keys() == expected.keys()
    assert 3 <= failed[deadly] <= 2 * (2 + 3), "of two predictors each: two deaths, three alone"


def test_a_run_after_a_failure_computes_only_what_is_missing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = shards_of(dataset)[4].id  # of 40 images
    with monkeypatch.context() as patched:
        failing(patched, "predict_stage", lambda ids: deadly in ids)
        complete(dataset, shards_of(dataset))
    pending = [shard for shard in shards_of(dataset) if shard.id == deadly]
    state = complete(dataset, pending)
    assert set(state.commits) == {deadly} and state.progress.images == sizes_of(dataset)[deadly]
    assert committed_files(dataset.out).keys() == sizes_of(dataset).keys()
    assert table_of(dataset).num_rows == sum(SIZES) - len(BAD)
    assert staging_of(dataset.out) == []


@pytest.mark.timeout(60)
def test_a_worker_that_breaks_while_the_run_stops_is_not_replaced(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends at once, and not only after the time that stopping may take."""
    state = RunState()
    state.report = lambda _: state.stop.set() if state.schedule.in_flight else None
    failed = failing(monkeypatch, "predict_stage", lambda ids: state.stop.wait(20))
    complete(dataset, shards_of(dataset), state)
    assert failed and state.commits == {} and state.failures == {}
    assert [thread.name for thread in threading.enumerate() if thread.name == "vitray-stage"] == []


@pytest.mark.timeout(120)
def test_two_runs_at_once_share_the_work(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [RunState(run_id="run-1"), RunState(run_id="run-2")]
    errors = list[BaseException]()
    computed = Counter[tuple[str, int]]()
    lock = threading.Lock()
    real = worker.write_stage

    def write(dataset: Dataset, fragment: FragmentRows) -> object:
        with lock:
            computed[fragment.info.shard.id, fragment.info.start] += fragment.info.images
        return real(dataset, fragment)

    monkeypatch.setattr(worker, "write_stage", write)

    def run(state: RunState) -> None:
        try:
            complete(dataset, shards_of(dataset), state)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [state.failures for state in states] == [{}, {}]
    sizes = sizes_of(dataset)
    assert committed_files(dataset.out).keys() == sizes.keys()
    assert states[0].commits.keys() | states[1].commits.keys() == sizes.keys()
    assert table_of(dataset).num_rows == sum(SIZES) - len(BAD)
    assert sum(computed.values()) <= 1.1 * sum(SIZES), computed
    assert all(state.progress.shards_done == len(SIZES) for state in states)
    assert staging_of(dataset.out) == []
