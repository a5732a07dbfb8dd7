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

from support.resizing import FILTERS, by_pillow
from vitray.decoding.resize import resize


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
