"""Peak memory when the input grows a hundredfold, and of a tar of 20 GB, on threads and on Ray:
`python benchmarks/bench_memory.py MODEL`; `python benchmarks/bench_memory.py MODEL 1000 ray`
goes on to a thousandfold, on Ray alone.

MODEL is a checkpoint directory (make demo leaves one in demo/model). Images are JPEGs of 500x375
cut from the photographs that scikit-image ships. PSS is what counts: pages shared by processes are
shared out between them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

import vitray
from vitray.operations.demo import write_tar

IMAGES = 400


def photographs() -> list[Image.Image]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = [
        Image.open(p).convert("RGB")
        for p in sorted(folder.iterdir())
        if p.suffix in (".jpg", ".png", ".jpeg")
    ]
    return [p for p in found if min(p.size) >= 256]


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Random crops at 500x375, quality 90."""
    rng, photos, made = np.random.default_rng(seed), photographs(), []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        width = int(rng.integers(200, min(photo.size) + 1))
        left, top = (int(rng.integers(0, side - width + 1)) for side in photo.size)
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + width)).resize((500, 375)).save(
            buffer, "JPEG", quality=90
        )
        made.append(buffer.getvalue())
    return made


def peak_mb(argv: list[str]) -> dict[str, float]:
    """Peak PSS in MB of the driver, of its busiest worker and of all processes together, over one
    run.
    """
    peak = {"driver": 0.0, "worker": 0.0, "all": 0.0}
    process = psutil.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        sizes = {}
        for one in [process, *process.children(recursive=True)]:
            try:
                sizes[one.pid] = one.memory_full_info().pss / 1e6
            except psutil.Error:
                continue
        driver = sizes.pop(process.pid, 0.0)
        now = {
            "driver": driver,
            "worker": max(sizes.values(), default=0.0),
            "all": driver + sum(sizes.values()),
        }
        peak = {name: max(mb, now[name]) for name, mb in peak.items()}
        time.sleep(0.1)
    assert process.returncode == 0
    return peak


def fifty_megapixels() -> bytes:
    buffer = io.BytesIO()
    photographs()[0].resize((8160, 6120)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_growing(folder: str, times: int) -> int:
    """Shards of 100 photographs. The first four, and one in forty of the rest, have four of 50 MP
    each, so that whatever can meet meets
    in the smallest input, too: what a larger one holds beyond it is what grows.
    """
    pool, large = jpegs(IMAGES), fifty_megapixels()
    made: dict[tuple[int, bool], str] = {}
    for shard in range(4 * times):
        kind = shard % 4, shard < 4 or shard % 40 == 0
        file = f"{folder}/in-{shard:04d}.tar"
        if kind in made:
            os.link(made[kind], file)
            continue
        made[kind], part = file, pool[kind[0] * (IMAGES // 4) : (kind[0] + 1) * (IMAGES // 4)]
        if kind[1]:
            part[::25] = [large] * 4
        write_tar(file, [(f"{n:05d}.jpg", data) for n, data in enumerate(part)])
    return IMAGES * times


def write_20_gb(folder: str, times: int) -> int:
    """One tar of 400 photographs with a member of 20 GB in their middle, which is a hole of the
    file.
    """
    del times
    with open(f"{folder}/in-0000.tar", "wb") as stream:
        for n, data in enumerate(jpegs(IMAGES)):
            if n == IMAGES // 2:
                member = tarfile.TarInfo("film.mov")
                member.size = 20 << 30
                stream.write(member.tobuf(tarfile.GNU_FORMAT))
                stream.seek(member.size, os.SEEK_CUR)
            member = tarfile.TarInfo(f"{n:05d}.jpg")
            member.size = len(data)
            stream.write(member.tobuf() + data + bytes(-len(data) % 512))
        stream.write(bytes(1024))
    return IMAGES


def main(model: str, largest: str = "100", where_alone: str = "") -> None:
    """largest: leave out inputs that are more than so many times the first. where_alone: "ray"
    leaves out threads.
    """
    inputs = [
        *((write_growing, times) for times in (1, 10, 100, 1000) if times <= int(largest)),
        (write_20_gb, 1),
    ]
    places: list[list[str]] = (
        [["--address", "local"]] if where_alone else [[], ["--address", "local"]]
    )
    for where, (write, times) in itertools.product(places, inputs):
        with tempfile.TemporaryDirectory() as folder:
            images = write(folder, times)
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
            ]
            started = time.monotonic()
            found = {name: round(mb) for name, mb in peak_mb([*argv, *where]).items()}
            seconds = round(time.monotonic() - started, 1)
            rows = vitray.read(f"{folder}/out", columns=["key"]).num_rows
        what = {
            "where": "Ray" if where else "threads",
            "input": write.__name__,
            "images": images,
            "rows": rows,
        }
        print(json.dumps(what | {"peak_mb": found, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
