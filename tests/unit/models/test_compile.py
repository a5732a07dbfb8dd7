"""Compiled models give the same results, and their compiled code is kept safely."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from vitray.models import compile_cache
from vitray.models.batching import PADDING, cut, ladder
from vitray.models.machine import compiles

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()  # its limit of recompilations is one for all models of a process


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
