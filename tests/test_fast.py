"""The fast ways of a model: they are taken where they should be, and say what the slow ways say."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import PREFIX, STEM, job_for, make_checkpoint, noise, plain_loop, run
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from vitray.job import Embedding
from vitray.models import compile_cache, identify, open_model, vector_columns
from vitray.models.batching import PADDING, cut, ladder
from vitray.models.blocks import (
    Attention,
    PackedLinear,
    fuse_attention,
    limit_to_first_tokens,
    pack,
)
from vitray.models.machine import compiles
from vitray.models.torch_engine import Network, TorchModel
from vitray.models.types import Placement
from vitray.operations import demo_model
from vitray.schema import ModelOutputs, VectorColumn

# CI installs it: there these tests fail without
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or os.environ.get("CI")), reason="torch.compile needs g++ on a CPU"
)


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()  # its limit of recompilations is one for all models of a process


# ---------------------------------------------------------------- only what is asked for

FIRST_TOKENS = [(name, headed) for name in STEM for headed in (True, False)]
EVERY_TOKEN = {
    ("siglip", True),
    ("siglip", False),
    ("beit", True),
    ("beit", False),
    ("beit_mean", True),
    ("beit_mean", False),
}
EVERY_TOKEN |= {
    (name, True) for name in ("dinov2", "dinov2_with_registers", "clip")
}  # their heads read the patches


def tokens_seen(model: TorchModel) -> dict[int, int]:
    """How many tokens each block's MLP sees, filled by the next forward pass."""
    seen: dict[int, int] = {}
    mlps = [module for name, module in model.forward.named_modules() if name.endswith(".mlp")]
    for n, mlp in enumerate(mlps):
        mlp.register_forward_hook(
            lambda _module, inputs, _output, n=n: seen.update({n: inputs[0].shape[1]})
        )
    return seen


@pytest.mark.parametrize(("name", "headed"), FIRST_TOKENS)
def test_the_last_block_computes_the_first_tokens_alone_where_only_they_are_read(
    tmp_path: Path, name: str, headed: bool
) -> None:
    directory, pixels = make_checkpoint(tmp_path, name, headed), noise(6)
    pool = "mean" if name == "siglip" else "cls"
    lean = [Embedding(pool=pool), Embedding(layer=3, pool=pool)]
    job, whole = (
        job_for(directory, headed, e, top_k=3)
        for e in (lean, [*lean, Embedding(pool="patches_mean")])
    )
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 3 if headed else 0), "cpu", 2
    )
    assert sum(isinstance(module, Attention) for module in model.forward.modules()) == 3
    seen = tokens_seen(model)
    found, expected = model.predict(pixels), run(whole, pixels)
    every = 16 + PREFIX[name]
    last = every if (name, headed) in EVERY_TOKEN else PREFIX[name]
    assert seen == {0: every, 1: every, 2: last}
    for column in found.vectors:
        np.testing.assert_allclose(
            found.vectors[column], expected.vectors[column], rtol=1e-5, atol=1e-5
        )
    if headed:
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "clip", "siglip"])
def test_blocks_above_the_highest_layer_asked_for_are_not_computed(
    tmp_path: Path, name: str
) -> None:
    directory, pixels = make_checkpoint(tmp_path, name, False), noise(4)
    pool = "mean" if name == "siglip" else "cls"
    job = job_for(directory, False, [Embedding(layer=layer, pool=pool) for layer in (1, 2)])
    spec = identify(job)
    model = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 0), "cpu", 2)
    seen = tokens_seen(model)
    found = model.predict(pixels)
    assert sorted(seen) == [0, 1]
    _, tokens = plain_loop(directory, name, False, pixels)
    for layer in (1, 2):
        expected = tokens[layer][:, 0] if pool == "cls" else tokens[layer].mean(1)
        np.testing.assert_allclose(
            found.vectors[f"embedding_{pool}_{layer}"], expected, rtol=1e-4, atol=1e-5
        )


def test_blocks_of_another_make_are_left_as_they_are() -> None:
    block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        before = block(x)
        fuse_attention([block])
        assert not limit_to_first_tokens(block, 1)
        torch.testing.assert_close(block(x), before, rtol=0, atol=0)
    assert not any(isinstance(module, Attention) for module in block.modules())


def test_linear_layers_are_packed_with_their_gelu_on_this_kind_of_cpu(tmp_path: Path) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True))
    model = open_model(identify(job), ModelOutputs((), 1), "cpu", 2)
    kinds = [type(module) for module in model.forward.modules()]
    if not pack([], torch.float32):
        pytest.skip("no oneDNN here")
    assert (
        kinds.count(PackedLinear) == 3 * 5
    )  # query, key and value, out, fc1 and fc2 of three blocks
    assert kinds.count(torch.nn.Linear) == 1 and not any(
        kind.__name__ == "GELUActivation" for kind in kinds
    )


# ---------------------------------------------------------------- cutting


def test_hardly_a_row_is_padded_in_shards_of_any_size() -> None:
    for batch in (8, 16, 48, 64, 100, 256):
        sizes, fragment = ladder(batch), max(64, batch)
        for shard in range(100, 10_001):
            whole, tail = divmod(shard, fragment)
            batches = cut(fragment, sizes, PADDING) * whole + cut(tail, sizes, PADDING)
            assert 0 <= sum(batches) - shard <= 0.02 * shard
            assert sum(size not in sizes for size in batches) <= whole + 1


def test_images_are_cut_into_the_largest_sizes_that_fit() -> None:
    assert (
        ladder(16) == (16, 8)
        and ladder(256) == (256, 128, 64, 32)
        and ladder(100) == (100, 50, 25, 12)
        and ladder(3) == (3,)
    )
    assert cut(64, (16, 8), PADDING) == [16] * 4
    assert (
        cut(63, (16, 8), PADDING) == [16] * 4
    )  # one row of padding; a bad image must not cost three small passes
    assert cut(60, (16, 8), PADDING) == [16, 16, 16, 8, 4]
    assert cut(253, ladder(256), PADDING) == [256] and cut(3, ladder(256), PADDING) == [3]
    assert cut(21, (4,), 0.0) == [4, 4, 4, 4, 4, 1] and cut(0, (4,), 0.0) == []


def test_compiling_pays_for_large_jobs_only() -> None:
    assert compiles("auto", 1_000_000, "cpu") and compiles("auto", 1_000_000, "cuda")
    assert not compiles("auto", 10_000, "cpu") and not compiles("auto", 10_000, "cuda")


# ---------------------------------------------------------------- compiled


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
from small_models import *
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
        KEPT.format(directory=directory, tests=str(Path(__file__).parent)),
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


def test_nothing_compiled_is_read_from_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compile_cache.CACHE, "/chosen")
    with compile_cache.graph_directory() as place:
        assert place == "/chosen"  # the user knows
    monkeypatch.setenv(compile_cache.CACHE, default_cache_dir())
    own = tmp_path / "vitray" / "compiled"

    def leaves(name: str) -> str:
        with compile_cache.graph_directory() as place:
            Path(place, name).touch()
        assert (
            os.environ[compile_cache.CACHE] == place
        )  # were anything compiled later, it would not go to torch's default
        return place

    assert (
        leaves("graph") == str(own)
        and (own / "graph").exists()
        and own.stat().st_mode & 0o777 == 0o700
    )
    own.chmod(0o755)  # somebody else had been there, perhaps
    assert (
        leaves("new") == str(own)
        and not (own / "graph").exists()
        and own.stat().st_mode & 0o777 == 0o700
    )
    assert caplog.text == ""
    for place, mode in ((own.parent, 0o777), (tmp_path, 0o775)):
        before = place.stat().st_mode
        place.chmod(mode)
        elsewhere = leaves("lost")
        place.chmod(before)
        assert not elsewhere.startswith(str(tmp_path)) and not Path(elsewhere).exists()
    if os.getuid() == 0:
        os.chown(own, 12345, 12345)
        assert not leaves("lost").startswith(str(tmp_path))
        os.chown(own, 0, 0)
    assert (
        caplog.text.count("others could put code into") == 2 + (os.getuid() == 0)
        and not (own / "lost").exists()
    )
    shutil.rmtree(own.parent)
    own.parent.touch()  # a file in its way
    assert not leaves("lost").startswith(str(tmp_path)) and "Not a directory" in caplog.text


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


@needs_compiler
@pytest.mark.nightly
def test_compiled_code_that_was_cut_is_compiled_again_at_the_next_start(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    env = {name: value for name, value in os.environ.items() if name != compile_cache.CACHE} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_models import *
model = open_model(identify(job := job_for({directory!r}, batch_size=8)), ModelOutputs((), 5), "cpu", 2, compiled=True)
print(len(model.compiled))
np.testing.assert_array_equal(model.predict(noise(11)).ids, run(job, noise(11)).ids)
"""
    compiled = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        compiled.append(int(done.stdout))
        if len(compiled) == 1:
            for path in (tmp_path / "vitray" / "compiled").rglob("*.so"):
                path.write_bytes(b"")
    assert compiled[0] > 0 and compiled[1:] == [0, compiled[0]], done.stderr


def test_without_a_compiler_one_line_says_so_and_the_model_runs(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    code = f"""
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_models import *
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


@torch.library.custom_op("vitray_tests::fits", mutates_args=())
def fits(pixels: torch.Tensor, room: int) -> torch.Tensor:
    """Its input again, if it holds no more images than there is room for: also inside a compiled
    graph.
    """
    if len(pixels) > room:
        raise torch.OutOfMemoryError("out of memory")
    return pixels.clone()


@fits.register_fake
def _(pixels: torch.Tensor, room: int) -> torch.Tensor:
    return torch.empty_like(pixels)


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
