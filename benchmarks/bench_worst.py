"""What the worst image that is let in costs: seconds and MB of its decoder, by kind: `python
benchmarks/bench_worst.py`.

Every kind at the default pixel cap of 50 MP, noise (which compresses worst), resized to 224x224 as
for ViT. MB are what the child that decodes holds at its peak beyond what it began with.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import numpy as np
from PIL import Image

from bench_decode import spec
from vitray.decoding.decode import decode_one

SIDE = 7071  # 50 MP


def noise(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (SIDE, SIDE), np.uint16))
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, len(mode)), np.uint8).squeeze(), mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg, baseline": lambda: encoded(noise("RGB"), "jpeg", quality=95),
    "jpeg, progressive": lambda: encoded(noise("RGB"), "jpeg", quality=95, progressive=True),
    "jpeg, CMYK": lambda: encoded(noise("CMYK"), "jpeg", quality=95),
    "png, RGBA": lambda: encoded(noise("RGBA"), "png", compress_level=1),
    "png, 16-bit gray": lambda: encoded(noise("I;16"), "png", compress_level=1),
    "png, one colour": lambda: encoded(Image.new("RGBA", (SIDE, SIDE)), "png"),
    "webp, lossless": lambda: encoded(
        Image.new("RGB", (SIDE, SIDE), (1, 2, 3)), "webp", lossless=True, method=0
    ),
    "webp, lossy": lambda: encoded(noise("RGB").reduce(2).resize((SIDE, SIDE)), "webp", method=0),
    "gif": lambda: encoded(noise("L"), "gif"),
    "tiff, LZW": lambda: encoded(noise("RGB"), "tiff", compression="tiff_lzw"),
    "bmp": lambda: encoded(noise("RGB"), "bmp"),
}


def _status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith(name))


def measure(data: bytes, answers: SimpleQueue[tuple[float, float, str]]) -> None:
    Image.MAX_IMAGE_PIXELS = None
    wanted, into = spec("exact"), np.empty((224, 224, 3), np.uint8)
    wanted = wanted.__class__(
        wanted.pixels, ("jpeg", "png", "webp", "gif", "tiff", "bmp"), 50_000_000, None, "exact"
    )
    decode_one(encoded(Image.new("RGB", (8, 8)), "png"), wanted, into)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")  # the peak begins anew
    before, started = _status("VmRSS"), time.process_time()
    outcome = decode_one(data, wanted, into)
    answers.put(
        (time.process_time() - started, _status("VmHWM") - before, outcome.reason or "decoded")
    )


def main() -> None:
    context = get_context("spawn")
    for kind, make in KINDS.items():
        data, answers = make(), context.SimpleQueue()
        process = context.Process(target=measure, args=(data, answers))
        process.start()
        seconds, megabytes, what = answers.get()
        process.join()
        print(
            f"{kind:20} {len(data) / 1e6:7.1f} MB  {seconds:5.2f} s of CPU  {megabytes:6.0f} MB  "
            f"{what}",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
