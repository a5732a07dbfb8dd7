"""resize equals Pillow in every bit, whatever the sizes; without Numba, or with no folder for what
it compiles, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitray.decoding.resize import Pixels, resize

SIDE = st.one_of(st.integers(1, 40), st.integers(1, 700))
FILTERS = list(Image.Resampling)


def by_pillow(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, resample))


@settings(max_examples=300, deadline=None)
@given(
    SIDE,
    SIDE,
    st.tuples(SIDE, SIDE),
    st.sampled_from(FILTERS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_bit_is_that_of_pillow(
    rows: int, columns: int, size: tuple[int, int], resample: int, extreme: bool, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)
    if extreme:  # what overflows, and what must be clipped, does so here
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    assert np.array_equal(resize(pixels, size, resample), by_pillow(pixels, size, resample))


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(3000, 4000), (4000, 900), (900, 4000), (224, 500), (500, 224), (224, 224)],
)
def test_photographs_of_every_shape(rows: int, columns: int, resample: int) -> None:
    y, x = np.mgrid[:rows, :columns]
    pixels = np.stack([x * y % 251, x % 256, y % 256], axis=-1).astype(np.uint8)
    assert np.array_equal(
        resize(pixels, (224, 224), resample), by_pillow(pixels, (224, 224), resample)
    )


RESIZED = """
import sys
{before}
import numpy as np
from vitray.decoding.resize import compiled, resize
sys.stdout.buffer.write(resize(np.arange(60000, dtype=np.uint16).astype(np.uint8).reshape(100, 200, 3), (64, 32), 2).tobytes())
assert compiled() is not {without}
"""


@pytest.mark.parametrize(
    ("before", "without"),
    [("sys.modules['numba'] = None", True), ("", False)],
    ids=["without numba", "no folder for what it compiles"],
)
def test_what_numba_cannot_do_here_costs_no_bit(before: str, without: bool, tmp_path: Path) -> None:
    package = tmp_path / "site"
    package.mkdir()
    for part in (package / "vitray", package / "vitray" / "__pycache__", package / "nowhere"):
        part.touch() if part.name != "vitray" else part.mkdir()
    for name in (
        "__init__.py",
        "resize.py",
    ):  # the folder that numba would use cannot be made: a file has its name
        source = (
            Path(sys.modules["vitray.decoding.resize"].__file__ or "").read_bytes()
            if name == "resize.py"
            else b""
        )
        (package / "vitray" / name).write_bytes(source)
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "HOME": str(package / "nowhere"),
        "XDG_CACHE_HOME": str(package / "nowhere"),
    }
    script = RESIZED.format(before=before, without=without)
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=package,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    pixels = np.arange(60000, dtype=np.uint16).astype(np.uint8).reshape(100, 200, 3)
    assert run.stdout == by_pillow(pixels, (64, 32), 2).tobytes()


def test_the_first_use_in_many_threads_beside_imports_spoils_no_image(tmp_path: Path) -> None:
    """As a run begins: decoding threads, while another one imports torch. Numba's first use is not
    safe there, so it comes before.
    """
    script = (
        "import io, threading\nimport numpy as np\nfrom PIL import Image\n"
        "from vitray.decoding.decode import decode\nfrom vitray.decoding.resize import "
        "compiled\nfrom vitray.schema import DecodeSpec, Encoded, PixelSpec\n"
        "spec = DecodeSpec(PixelSpec((64, 64), 2, None, 1, (0, 0, 0), (1, 1, 1)), ('jpeg',), "
        "10**6, None, 'exact')\n"
        "buffer = io.BytesIO()\nImage.linear_gradient('L').convert('RGB').save(buffer, 'jpeg')\n"
        "want = np.asarray(Image.open(buffer).resize((64, 64), 2))\nseen = []\n"
        "def work():\n    pixels, outcomes = decode([Encoded(n, '', '', buffer.getvalue()) for n "
        "in range(20)], spec)\n"
        "    seen.append([o.reason for o in outcomes] == [None] * 20 and bool((pixels == "
        "want).all()))\n"
        "def heavy():\n    import transformers.models.vit.modeling_vit\n"
        "threads = [threading.Thread(target=t) for t in (heavy, work, work, work, work)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "assert seen == [True] * 4, seen\nprint(compiled())"
    )
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_cache_that_was_cut_costs_nothing_but_time(suffix: str, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    code = "from vitray.decoding.resize import compiled; assert compiled()"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        cut = list((tmp_path / "cache").rglob(f"*.{suffix}"))
        assert len(cut) == 2
        for path in cut:
            path.write_bytes(path.read_bytes()[:100])


def test_what_one_process_compiled_the_next_one_takes(tmp_path: Path) -> None:
    """Else each start compiles for a second or two, and leaves a file in the installation."""
    kept = []
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONHASHSEED": seed,
        }
        code = "from vitray.decoding.resize import compiled; assert compiled()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nb?")})
    assert len(kept[0]) == 4 and kept[1] == kept[0]  # code and index of two passes
