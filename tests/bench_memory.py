"""Peak memory when the input grows tenfold, of threads and of Ray's driver, workers and object store: `python tests/bench_memory.py MODEL`.

MODEL is a checkpoint directory (make demo leaves one in demo/model). Images are JPEGs of 500x375 cut from the photographs
that scikit-image ships. PSS is what counts: pages shared by processes are shared out between them.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from vitray.demo import write_tar

IMAGES = 400


def photographs() -> list[Image.Image]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = [Image.open(p).convert("RGB") for p in sorted(folder.iterdir()) if p.suffix in (".jpg", ".png", ".jpeg")]
    return [p for p in found if min(p.size) >= 256]


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Random crops at 500x375, quality 90."""
    rng, photos, made = np.random.default_rng(seed), photographs(), []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        width = int(rng.integers(200, min(photo.size) + 1))
        left, top = (int(rng.integers(0, side - width + 1)) for side in photo.size)
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + width)).resize((500, 375)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def peak_mb(argv: list[str]) -> dict[str, float]:
    """Peak PSS in MB of the driver, and of its busiest worker, over one run; and images/s."""
    process, peak = (
        psutil.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL),
        {"driver": 0.0, "worker": 0.0, "all": 0.0},
    )
    while process.poll() is None:
        sizes = {}
        for one in [process, *process.children(recursive=True)]:
            try:
                sizes[one.pid] = (one.name(), one.memory_full_info().pss / 1e6)
            except psutil.Error:
                continue
        workers = [mb for name, mb in sizes.values() if name.startswith("ray::")]
        peak["driver"] = max(peak["driver"], sizes.get(process.pid, ("", 0.0))[1])
        peak["worker"] = max([peak["worker"], *workers])
        peak["all"] = max(peak["all"], sum(mb for _, mb in sizes.values()))
        time.sleep(0.5)
    assert process.returncode == 0
    return peak


def main(model: str) -> None:
    pool = jpegs(IMAGES)
    for where, times in itertools.product(([], ["--address", "local"]), (1, 10)):
        with tempfile.TemporaryDirectory() as folder:
            for shard in range(4 * times):
                part = pool[shard % 4 * (IMAGES // 4) : (shard % 4 + 1) * (IMAGES // 4)]
                write_tar(f"{folder}/in-{shard:03d}.tar", [(f"{n:05d}.jpg", data) for n, data in enumerate(part)])
            started = time.monotonic()
            argv = [
                sys.executable,
                "-m",
                "vitray",
                "run",
                f"{folder}/in-*.tar",
                "--model",
                model,
                "--out",
                f"{folder}/out",
                *where,
            ]
            found = {name: round(mb) for name, mb in peak_mb(argv).items()}
            print(
                json.dumps(
                    {"where": where, "images": IMAGES * times, "peak_mb": found, "seconds": round(time.monotonic() - started, 1)}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1])
