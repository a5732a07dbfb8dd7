"""Several processes complete one dataset: they share the work, whatever happens to one of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from factories.shards import Picture, put_tars
from support import runs
from vitray.dataset import read_manifest

IMAGES = 800
TARS = 32
PARTS = 4
SIDES = (800, 600)  # decoding takes most of the time, so all processes have a share of it


def photographs(folder: Path) -> list[Picture]:
    """Images of eight contents, each key once."""
    rng = np.random.default_rng(0)
    contents = list[bytes]()
    for number in range(8):
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        small.resize(SIDES).save(path, "JPEG", quality=90)
        contents.append(path.read_bytes())
    return [Picture(f"{n:05d}", contents[n % 8], "none", "jpg") for n in range(IMAGES)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partitions")
    put_tars(str(folder / "in"), photographs(folder), TARS, folder)
    return folder


class Processes:
    """Processes `vitray run` into one dataset. options: of each of them."""

    def __init__(self, inputs: Path, model: str, folder: Path, options: Sequence[str]) -> None:
        self.out = folder / "out"
        self.trace = folder / "trace"
        self._argv = [
            runs.command(inputs, model, self.out, "--set", "device=cpu", *option.split())
            for option in options
        ]
        self._running = [runs.start(argv, self.trace) for argv in self._argv]

    def kill_one(self, rng: random.Random) -> None:
        """kill -9 of one that still runs, and its start anew."""
        alive = [n for n, process in enumerate(self._running) if process.poll() is None]
        number = rng.choice(alive)
        self._end(self._running[number])
        self._running[number] = runs.start(self._argv[number], self.trace)

    def wait(self) -> None:
        for process in self._running:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                self._end(process)

    def _end(self, process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    @property
    def computed(self) -> int:
        """Images that left the model, also in a process that was killed."""
        return runs.images_by_step(self.trace)["predict"]

    def wait_until_computed(self, images: int) -> None:
        deadline = time.monotonic() + 120
        while self.computed < images:
            assert time.monotonic() < deadline, "too little was computed"
            time.sleep(0.02)


PARTITIONS = [f"--partition {index}/{PARTS}" for index in range(PARTS)]


@pytest.fixture
def processes(
    request: pytest.FixtureRequest, inputs: Path, shapes_model: str, tmp_path: Path
) -> Iterator[Processes]:
    """With the options of the test's parameter."""
    made = Processes(inputs, shapes_model, tmp_path, request.param)
    yield made
    made.close()


def require_complete(out: Path) -> None:
    """Every image has one row, and _SUCCESS.json names a manifest of all shards."""
    keys = Counter[str]()
    for path in (out / "data").iterdir():
        keys.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
    assert keys == Counter(f"{n:05d}" for n in range(IMAGES))
    assert (out / "_SUCCESS.json").exists()
    manifest = read_manifest(str(out))
    assert manifest is not None and manifest.num_rows == TARS
    assert vitray.validate(str(out), inputs=True).ok
    leftovers = list((out / "_vitray").rglob("*.arrow"))
    assert leftovers == [], "staging of committed shards"


@pytest.mark.parametrize("processes", [PARTITIONS], indirect=True, ids=["4 partitions"])
def test_partitions_compute_each_image_once(processes: Processes) -> None:
    processes.wait()
    require_complete(processes.out)
    assert processes.computed <= 1.02 * IMAGES


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("processes", [PARTITIONS], indirect=True, ids=["4 partitions"])
def test_a_partition_killed_at_random_loses_and_doubles_nothing(
    processes: Processes, seed: int
) -> None:
    rng = random.Random(seed)
    processes.wait_until_computed(rng.randrange(IMAGES // 10, IMAGES // 2))
    processes.kill_one(rng)
    processes.wait()
    require_complete(processes.out)
    in_flight = 6  # fragments: in each stage of a process, and between two of them
    assert processes.computed <= 1.02 * IMAGES + in_flight * runs.FRAGMENT


@pytest.mark.parametrize("processes", [["", ""]], indirect=True, ids=["2 plain runs"])
def test_overlapping_runs_share_the_work(processes: Processes) -> None:
    processes.wait()
    require_complete(processes.out)
    assert processes.computed <= 1.1 * IMAGES
