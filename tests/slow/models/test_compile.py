"""Compiled models give the same results, and their compiled code is kept safely."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from factories.small_models import job_for, make_checkpoint, noise, run
from support.fast_models import fits, needs_compiler
from support.paths import TESTS
from vitray.job import Embedding
from vitray.models import compile_cache, identify, open_model, vector_columns
from vitray.models.blocks import pack
from vitray.models.torch_engine import Network, TorchModel
from vitray.models.types import Placement
from vitray.operations import demo_model
from vitray.schema import ModelOutputs, VectorColumn

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()  # its limit of recompilations is one for all models of a process


def drawn(count: int) -> np.ndarray:
    rng = np.random.default_rng(99)
    return demo_model.pixels_of(
        [demo_model.draw(n % len(demo_model.NAMES), rng) for n in range(count)]
    )


@needs_compiler
def test_compiled_says_the_same_and_never_compiles_again(shapes_model: str) -> None:
    job = job_for(shapes_model, embeddings=[Embedding()], batch_size=16)
    spec = identify(job)
    columns = vector_columns(job, spec)
    plain, compiled = (
        open_model(spec, ModelOutputs(tuple(columns), 3), "cpu", 2, compiled=c)
        for c in (False, True)
    )
    assert sorted(compiled.compiled) == [8, 16]
    before = dict(torch._dynamo.utils.counters["frames"])
    assert before["ok"] == 2
    pixels = drawn(200)
    for count in (1, 7, 8, 15, 16, 23, 63, 200):
        expected, found = plain.predict(pixels[:count]), compiled.predict(pixels[:count])
        np.testing.assert_array_equal(found.ids[:, 0], expected.ids[:, 0])
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found.vectors["embedding"], expected.vectors["embedding"], rtol=1e-4, atol=1e-5
        )
    assert torch._dynamo.utils.counters["frames"] == before


@needs_compiler
def test_compiled_bf16_agrees_with_fp32(shapes_model: str) -> None:
    job, pixels = job_for(shapes_model, embeddings=[Embedding()], batch_size=8), drawn(600)
    spec = identify(job)
    exact = run(job, pixels, spec)
    mixed = open_model(
        dataclasses.replace(spec, precision="bf16"),
        ModelOutputs(tuple(vector_columns(job, spec)), 3),
        "cpu",
        2,
        compiled=True,
    )
    found = mixed.predict(pixels)
    assert (found.ids[:, 0] == exact.ids[:, 0]).mean() >= 0.995
    a, b = exact.vectors["embedding"], found.vectors["embedding"]
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() >= 0.999


KEPT = """
import sys
sys.path.insert(0, {tests!r})
from factories.small_models import *
from torch._dynamo.utils import counters
job = job_for({directory!r}, embeddings=[Embedding()], batch_size=16)
spec = identify(job)
other = open_model(spec, ModelOutputs((), 1), "cpu", 1)  # holds numbers of packed layers, which are free again when it is gone
del other
found = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), "cpu", 2, compiled=True).predict(noise(24))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], found.vectors["embedding"].tobytes().hex())
"""


@needs_compiler
def test_graphs_are_kept_for_the_next_start_and_say_the_same(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True, layers=2)
    if not pack([], torch.float32):
        pytest.skip("no oneDNN here")
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    code, said = (
        KEPT.format(directory=directory, tests=str(TESTS)),
        list[list[str]](),
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout.split())
    assert [line[:2] for line in said] == [["0", "2"], ["2", "0"]]
    assert said[0][2] == said[1][2]


def test_what_a_killed_compilation_left_is_gone_and_what_another_compiles_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compile_cache.CACHE, default_cache_dir())
    code = (
        "import os; from vitray.models.compile_cache import *\nwith graph_directory() as place: "
        "open(place + '/half', 'w'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    own = tmp_path / "vitray" / "compiled"
    assert (own / "half").exists()
    with compile_cache.graph_directory() as place:
        assert place == str(own) and not (own / "half").exists()
        (own / "graph").touch()
    with pytest.raises(ZeroDivisionError), compile_cache.graph_directory():
        assert (own / "graph").exists()
        raise ZeroDivisionError
    with open(own / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # another compiles
        with compile_cache.graph_directory():
            assert (own / "graph").exists()
    with compile_cache.graph_directory():
        assert not (own / "graph").exists()
    assert sorted(path.name for path in own.iterdir()) == ["lock"]


def test_without_a_compiler_one_line_says_so_and_the_model_runs(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    code = f"""
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
sys.path.insert(0, {str(TESTS)!r})
from factories.small_models import *
job = job_for({directory!r}, batch_size=8)
found = open_model(identify(job), ModelOutputs((), 5), "cpu", 2, compiled=True).predict(noise(11))
np.testing.assert_array_equal(found.ids, run(job, noise(11)).ids)
"""
    env = {**os.environ, "CXX": "/nowhere/g++", "XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere"}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("vitray.models")]
    assert (
        len(said) == 1
        and "runs uncompiled, torch.compile failed" in said[0]
        and "It needs g++" in said[0]
    )
    assert (tmp_path / "vitray" / "compiled").is_dir()


class SmallMemory(torch.nn.Module):
    room = 100

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        means = fits(pixel_values, self.room).mean((1, 2, 3))
        return SimpleNamespace(last_hidden_state=means[:, None, None].expand(-1, 4, 32))


@needs_compiler
@pytest.mark.parametrize(("room", "sizes"), [(20, (16, 8)), (9, (8,)), (3, (2,))])
def test_too_little_memory_steps_down_the_ladder_and_below_it(
    tmp_path: Path, room: int, sizes: tuple[int, ...]
) -> None:
    spec = dataclasses.replace(
        identify(job_for(make_checkpoint(tmp_path, "vit", True))), batch_size=32
    )
    tower, pixels = SmallMemory(), noise(43)
    tower.room = room
    column = VectorColumn("embedding", 32, None, "mean", False, "float32")
    model = TorchModel(
        Network(tower, tower, [], None),
        spec,
        ModelOutputs((column,), 0),
        Placement("cpu", compiled=True),
    )
    vectors = model.predict(pixels).vectors["embedding"]
    np.testing.assert_allclose(vectors[:, 0], (pixels / 255 - 0.5).mean((1, 2, 3)) / 0.5, atol=1e-5)
    assert model.sizes == sizes
