"""Decoder processes: the rows and pixels of threads, bounded memory, and an end in every case."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

import vitray
from factories import hand_made
from support.decoding_runs import (
    SHARE,
    WAIT_S,
    Collected,
    dataset_of,
    ended,
    odd_images,
    opened,
    processes,
    run_decoders,
    shards_of,
    wait_for,
)
from support.encoded_images import encode, photo
from support.paths import TESTS
from vitray.dataset import Dataset
from vitray.errors import Disagreement, ObjectMissing, StorageError, VitrayError
from vitray.job import Embedding
from vitray.models.free import FreeModel, free_spec
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.decoder_process import portable_error
from vitray.pipeline.decoders import Outlets, ThreadDecoders
from vitray.pipeline.events import FragmentSkipped, ShardBroken, ShardEnded
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.process_decoders import PAGES, DecoderProcessDied, ProcessDecoders
from vitray.pipeline.stages import DecodedBlock, ShardEnd, predict_stage
from vitray.schema import End, Shard
from vitray.totals import copied_bytes

GIL_MS = 0.015  # of Python per image in the process that owns the GPU


def odd_tars() -> list[list[bytes]]:
    """Tars of several fragments, of one, of one image, and of none."""
    images = odd_images()
    return [images * 2, images[:3], [images[0]], [], [images[7]], images, images[::-1]]


def read_items(collected: Collected) -> list[tuple[str, ...]]:
    """What was handed on besides blocks, without its order."""
    return sorted(
        (type(item).__name__, item.shard.id if isinstance(item, ShardEnd) else item.shard)
        for item in collected.others
    )


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_errors_and_pixels_are_those_of_threads(tmp_path: Path, mode: str) -> None:
    dataset = dataset_of(tmp_path, odd_tars(), fragment_rows=8, decode=mode)
    (tmp_path / "in" / "zz.tar").write_bytes(b"no tar" * 500)
    shards = shards_of(dataset)
    expected = run_decoders(ThreadDecoders, dataset, shards)
    before = copied_bytes.value
    found = run_decoders(ProcessDecoders, dataset, shards)
    assert copied_bytes.value == before
    assert found.errors == expected.errors == []
    assert read_items(found) == read_items(expected)
    assert {type(item) for item in found.others} == {ShardEnd, ShardBroken}
    ours, theirs = found.by_fragment(), expected.by_fragment()
    assert ours.keys() == theirs.keys() and len(ours) == 11
    for key, (stop, rows, errors, pixels) in theirs.items():
        assert ours[key][0] == stop
        assert ours[key][1].equals(rows) and ours[key][2].equals(errors)
        np.testing.assert_array_equal(ours[key][3], pixels)
    by_id = {shard.id: shard for shard in shards}
    infos = [part.info for block in found.blocks for part in block.fragments]
    assert all(info.shard == by_id[info.shard.id] for info in infos)
    assert {info.shard.id for info in infos if info.end is not None} == {
        info.shard.id for info in infos
    }


def test_staged_fragments_are_skipped(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 10] * 3)
    shards = shards_of(dataset)
    hand_made.stage(dataset, shards[1])
    found = run_decoders(ProcessDecoders, dataset, shards)
    skipped = [item for item in found.others if isinstance(item, FragmentSkipped)]
    assert sorted((item.shard, item.start, item.stop) for item in skipped) == [
        (shards[1].id, 0, 4),
        (shards[1].id, 4, 8),
        (shards[1].id, 8, 10),
    ]
    assert [item for item in found.others if isinstance(item, ShardEnded)] == [
        ShardEnded(shards[1].id, End(10))
    ]
    assert found.by_fragment().keys() == {
        (shard.id, start) for shard in (shards[0], shards[2]) for start in (0, 4, 8)
    }


def decoding_pids(folder: Path) -> set[int]:
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    return {step["pid"] for step in map(json.loads, lines) if step["step"] == "decode"}


@pytest.mark.parametrize("tars", [1, 5])
def test_one_tar_is_decoded_by_threads_and_many_by_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tars: int
) -> None:
    (tmp_path / "trace").mkdir()
    monkeypatch.setenv("VITRAY_TRACE", f"{tmp_path}/trace")
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 40] * tars)
    found = run_decoders(ProcessDecoders, dataset, shards_of(dataset))
    assert len(found.by_fragment()) == 10 * tars
    pids = decoding_pids(tmp_path / "trace")
    if tars == 1:
        assert pids == {os.getpid()}
    else:
        assert os.getpid() not in pids and 1 <= len(pids) <= SHARE.decoders


def test_small_shards_share_a_block(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 2] * 40, fragment_rows=8)
    found = run_decoders(ProcessDecoders, dataset, shards_of(dataset))
    assert sum(len(block.fragments) for block in found.blocks) == 40
    assert max(len(block.fragments) for block in found.blocks) == 4
    assert len(found.blocks) < 20


def test_pages_are_bounded_and_come_back(tmp_path: Path) -> None:
    """Whoever keeps blocks stops the processes, which wait without work; nothing is overwritten."""
    images = [encode(photo(40 + n, 40), "png") for n in range(24)]
    dataset = dataset_of(tmp_path, [images] * 3)
    collected = Collected()
    decoders, waiting = opened(ProcessDecoders, dataset, shards_of(dataset), collected.outlets())
    with ended(decoders):
        decoders.start(collected.finished.set)
        waiting.finish()
        most = PAGES * SHARE.decoders
        wait_for(lambda: len(collected.blocks) == most)
        kept = [block.pixels.copy() for block in collected.blocks]
        time.sleep(0.5)
        before = [process.cpu_times().user for process in processes()]
        time.sleep(0.5)
        assert [process.cpu_times().user for process in processes()] == before
        assert len(collected.blocks) == most
        for block, pixels in zip(collected.blocks, kept):
            np.testing.assert_array_equal(block.pixels, pixels)
        seen = 0
        while not collected.finished.is_set() or collected.blocks:
            assert not collected.errors
            if collected.blocks:
                seen += len(collected.blocks.pop(0).fragments)
            else:
                time.sleep(0.01)
        assert seen == 18


def test_pixels_stay_while_a_view_on_them_is_used(tmp_path: Path) -> None:
    images = [encode(photo(40 + n, 40), "png") for n in range(24)]
    dataset = dataset_of(tmp_path, [images] * 3)
    collected = Collected()
    decoders, waiting = opened(ProcessDecoders, dataset, shards_of(dataset), collected.outlets())
    with ended(decoders):
        decoders.start(collected.finished.set)
        waiting.finish()
        wait_for(lambda: collected.blocks)
        view = collected.blocks[0].pixels[1:3][::-1]
        expected = view.copy()
        while not collected.finished.is_set():
            collected.blocks.clear()
            time.sleep(0.01)
        np.testing.assert_array_equal(view, expected)


def test_a_killed_process_is_an_error_that_names_its_shards(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 40] * 4)
    shards = shards_of(dataset)
    collected = Collected()
    decoders, _ = opened(ProcessDecoders, dataset, shards, collected.outlets())
    with ended(decoders):
        decoders.start(collected.finished.set)
        wait_for(lambda: len(collected.blocks) == PAGES * SHARE.decoders)
        victim = processes()[0]
        victim.kill()
        assert collected.finished.wait(WAIT_S)
        (error,) = collected.errors
        assert isinstance(error, DecoderProcessDied)
        text = str(error)
        assert f"decoder process {victim.pid} was killed by SIGKILL" in text
        assert 1 <= len(error.shards) <= 3
        assert set(error.shards) <= {shard.id for shard in shards}
        assert all(shard_id in text for shard_id in error.shards)


def test_the_shards_of_a_process_that_died_are_kept_by_pickle() -> None:
    error = pickle.loads(pickle.dumps(DecoderProcessDied("it was killed", ("a", "b"))))
    assert (type(error), str(error)) == (DecoderProcessDied, "it was killed")
    assert error.shards == ("a", "b")


def test_a_killed_child_of_a_process_costs_nothing(tmp_path: Path) -> None:
    images = [encode(photo(40 + n, 40), "png") for n in range(24)]
    dataset = dataset_of(tmp_path, [images] * 4)
    shards = shards_of(dataset)
    expected = run_decoders(ThreadDecoders, dataset, shards).by_fragment()
    collected = Collected()
    taken = Collected()
    decoders, waiting = opened(ProcessDecoders, dataset, shards, collected.outlets())
    with ended(decoders):
        decoders.start(collected.finished.set)
        waiting.finish()
        wait_for(lambda: len(collected.blocks) == PAGES * SHARE.decoders)
        for process in processes():
            for child in process.children():
                child.kill()
        while not collected.finished.is_set() or collected.blocks:
            if collected.blocks:
                block = collected.blocks.pop(0)
                taken.blocks.append(DecodedBlock(block.fragments, np.array(block.pixels)))
                del block
            else:
                time.sleep(0.01)
    assert not collected.errors
    found = taken.by_fragment()
    assert found.keys() == expected.keys()
    for key, (_, rows, errors, pixels) in expected.items():
        assert found[key][1].equals(rows) and found[key][2].equals(errors)
        np.testing.assert_array_equal(found[key][3], pixels)


def test_an_error_that_travels_keeps_its_type_and_text() -> None:
    broken = OSError("disk on fire")
    broken.__cause__ = ObjectMissing("s3://bucket/key does not exist")
    for error, kind, text in (
        (StorageError("the store is full"), StorageError, "the store is full"),
        (broken, ObjectMissing, "s3://bucket/key does not exist"),
        (Disagreement("too little", object()), VitrayError, "too little"),
        (OSError("disk on fire"), RuntimeError, "a decoder process: OSError: disk on fire"),
    ):
        found = portable_error(error)
        assert type(found) is kind and str(found) == text


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 10] * 4)
    monkeypatch.setattr("vitray.pipeline.process_decoders.page_bytes", lambda _: 4096)
    found = run_decoders(ProcessDecoders, dataset, shards_of(dataset))
    assert "a decoder process: ValueError: mmap length" in str(found.errors[0])


def test_stop_finishes_what_was_read(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 400] * 6)
    collected = Collected()
    taken: list[tuple[str, int]] = []

    def take(block: DecodedBlock) -> None:
        taken.extend((part.info.shard.id, part.info.start) for part in block.fragments)

    outlets = Outlets(take, collected.others.append, collected.outlets().lost)
    decoders, waiting = opened(ProcessDecoders, dataset, shards_of(dataset), outlets)
    with ended(decoders):
        decoders.start(collected.finished.set)
        wait_for(lambda: len(taken) > 10)
        decoders.stop()
        waiting.finish()
        assert collected.finished.wait(WAIT_S) and not collected.errors
        assert len(set(taken)) == len(taken) < 600


class ShardsWithCall(BoundedQueue[Shard]):
    """Shards, and a call right before the first one is given to a process that has images."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.call: Callable[[], None] | None = None

    def get_now(self) -> Shard | None:
        shard = super().get_now()
        if shard is not None and self.call is not None:
            call, self.call = self.call, None
            call()
        return shard


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_that_arrives_with_a_shard_ends_everything(tmp_path: Path, count: int) -> None:
    """The process does not ask for another shard then."""
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 2] * 40, fragment_rows=8)
    collected = Collected()
    waiting = ShardsWithCall()
    for shard in shards_of(dataset):
        waiting.put(shard)
    share = replace(SHARE, decoders=count)
    decoders = ProcessDecoders(dataset, waiting, collected.outlets(), share)
    waiting.call = decoders.stop
    with ended(decoders):
        decoders.start(collected.finished.set)
        wait_for(lambda: waiting.call is None)
        waiting.finish()
        assert collected.finished.wait(WAIT_S), decoders.describe()
        started = time.monotonic()
        decoders.join(started + WAIT_S)
        assert time.monotonic() - started < WAIT_S / 2
    assert not collected.errors and 1 <= len(collected.by_fragment()) < 40


def family() -> set[int]:
    """The ids of all processes below this one; other tests may have left some."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("when", ["at once", "while it starts", "while pages are full"])
def test_close_ends_everything_within_seconds(tmp_path: Path, when: str) -> None:
    dataset = dataset_of(tmp_path, [[encode(photo(), "png")] * 40] * 4)
    shards = shards_of(dataset)
    earlier = family()
    run_decoders(ThreadDecoders, dataset, shards)  # whatever stays open after a first use
    wait_for(lambda: family() <= earlier)
    before, threads = open_descriptors(), threading.active_count()
    collected = Collected()
    decoders, waiting = opened(ProcessDecoders, dataset, shards, collected.outlets())
    decoders.start(collected.finished.set)
    if when == "while it starts":
        wait_for(processes)
    if when == "while pages are full":
        wait_for(lambda: len(collected.blocks) == PAGES * SHARE.decoders)
        assert all(process.children() for process in processes())
    started = time.monotonic()
    decoders.close()
    waiting.close()
    decoders.join(started + WAIT_S)
    assert time.monotonic() - started < 5
    assert family() <= earlier  # zombies included
    assert threading.active_count() == threads and not collected.errors
    collected.blocks.clear()
    del decoders
    wait_for(lambda: open_descriptors() <= before, 5)


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    dataset_of(tmp_path, [[encode(photo(), "png")] * 40] * 4)
    script = f"""
import sys, time
sys.path[:0] = [{str(TESTS)!r}]
from pathlib import Path
from factories import hand_made
from support.decoding_runs import *
from vitray.pipeline.process_decoders import ProcessDecoders
dataset = hand_made.make_dataset(Path({str(tmp_path)!r}), commit=0)
collected = Collected()
decoders, _ = opened(ProcessDecoders, dataset, shards_of(dataset), collected.outlets())
decoders.start(collected.finished.set)
wait_for(lambda: len(collected.blocks) == 4)
print("ready", flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 4  # two processes, and a child of each
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, 5)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def free_dataset(folder: Path, images: int, tars: int) -> Dataset:
    """Tiny images, and a model that costs nothing: ViT-B/16's outputs of pixels 32 x 32."""
    tiny = encode(photo(8, 8), "bmp")
    spec = replace(free_spec(0), pixels=hand_made.PIXELS)
    for n in range(tars):
        members = {f"{n}/{i:04d}.bmp": tiny for i in range(images)}
        hand_made.write_tar(folder / "in" / f"s-{n:03d}.tar", members)
    return hand_made.make_dataset(folder, commit=0, spec=spec, fragment_rows=1024, top_k=5)


@pytest.mark.timing
def test_the_process_with_the_gpu_spends_microseconds_on_an_image(tmp_path: Path) -> None:
    """CPU seconds of the whole process: receiving, predicting, and all else that it does."""
    blocks = 20
    dataset = free_dataset(tmp_path, 1024, blocks)
    model = FreeModel(dataset.spec, dataset.outputs)
    seen: list[int] = []
    cpu: list[float] = []

    def predict(block: DecodedBlock) -> None:
        fragments = predict_stage(dataset, model, block)
        seen.append(sum(fragment.rows.num_rows for fragment in fragments))
        cpu.append(time.process_time())

    collected = Collected()
    outlets = Outlets(predict, collected.others.append, collected.outlets().lost)
    before = copied_bytes.value
    decoders, waiting = opened(ProcessDecoders, dataset, shards_of(dataset), outlets)
    with ended(decoders):
        decoders.start(collected.finished.set)
        waiting.finish()
        assert collected.finished.wait(WAIT_S), decoders.describe()
    assert not collected.errors and seen == [1024] * blocks and copied_bytes.value == before
    cpu_ms = (cpu[-1] - cpu[0]) * 1000 / sum(seen[1:])
    print(f"{cpu_ms:.4f} ms of CPU per image")
    assert cpu_ms <= GIL_MS


def run_whole(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch, share: WorkerShare
) -> pa.Table:
    """A run with the free model. The rows by shard and index, without what that model draws."""
    monkeypatch.setattr("vitray.pipeline.runner.local_share", lambda *_, **__: share)
    job = vitray.Job(
        source=[f"{folder}/in/*.tar"],
        model="free:0",
        out=f"{folder}/{out}",
        fragment_rows=16,
        embeddings=[Embedding()],
        max_error_rate=1.0,
    )
    result = vitray.run(job, spec=free_spec(0))
    assert result.exit_code == 0, result
    rows = vitray.read(job.out).sort_by([("shard", "ascending"), ("index", "ascending")])
    return rows.drop_columns(["embedding"])


def test_a_run_gives_the_rows_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_of(tmp_path, [*odd_tars(), odd_images() * 4])
    found = run_whole(tmp_path, "processes", monkeypatch, SHARE)
    threads = replace(SHARE, decoder_processes=False)
    expected = run_whole(tmp_path, "threads", monkeypatch, threads)
    assert found.equals(expected) and found.num_rows > 50
    assert not processes()


def test_a_run_goes_on_after_a_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_of(tmp_path, [[encode(photo(), "png")] * 200] * 12)
    killed = threading.Event()

    def kill() -> None:
        wait_for(lambda: any(process.children() for process in processes()))
        victim = next(process for process in processes() if process.children())
        victim.kill()
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    rows = run_whole(tmp_path, "out2", monkeypatch, SHARE)
    thread.join()
    assert killed.is_set() and rows.num_rows == 2400
    assert rows.group_by(["shard", "index"]).aggregate([]).num_rows == 2400
