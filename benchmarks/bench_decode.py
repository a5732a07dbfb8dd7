"""Images a second of CPU, and how far from exact: `python benchmarks/bench_decode.py [images
[rounds]]`.

JPEGs at quality 90 of the photographs that scikit-image ships: cut and exported to 500x375; and
side by side on 4000x3000, so that they are as rich in detail as a camera's. Resized to 224x224,
bilinear, as for google/vit-base-patch16-224.

Each contender has a process of its own, pinned to one core, and they take turns. What counts is CPU
time, the decoding child's and a new child's fork included: a neighbour on the machine disturbs it
less than the clock. vitray's figures are of decode().
"""

from __future__ import annotations

import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bench_memory import photographs
from vitray.decoding.decode import PAGES, Pixels, decode, decode_one
from vitray.schema import DecodeSpec, Encoded, PixelSpec

CONTENDERS = ("pillow", "hugging face", "in process", "exact", "fast", "draft")
MODES = ("exact", "fast", "draft")
FRAGMENT = 64
ROUND_S = 1.0  # psutil counts in hundredths of a second


def jpegs(size: tuple[int, int], count: int, seed: int = 0) -> list[bytes]:
    rng, photos, made = np.random.default_rng(seed), photographs(), []
    for n in range(count):
        large = size[0] > max(photo.width for photo in photos)
        picture = _collage(photos, size, rng) if large else _cut(photos[n % len(photos)], size, rng)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def _cut(photo: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """80 to 100% of a photograph, in the proportions of `size`."""
    scale = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.8, 1)
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = (
        int(rng.integers(0, free + 1)) for free in (photo.width - width, photo.height - height)
    )
    return photo.crop((left, top, left + width, top + height)).resize(
        size, Image.Resampling.BICUBIC
    )


def _collage(
    photos: list[Image.Image], size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    canvas, top = Image.new("RGB", size), 0
    while top < size[1]:
        left = 0
        while left < size[0]:
            photo = photos[rng.integers(len(photos))]
            canvas.paste(photo, (left, top))
            left += photo.width
        top += 256  # photographs() are no lower
    return canvas


def spec(mode: str, resample: int = 2) -> DecodeSpec:
    pixels = PixelSpec((224, 224), resample, None, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return DecodeSpec(pixels, ("jpeg",), 50_000_000, None, mode)


def fragments(files: list[bytes]) -> list[list[Encoded]]:
    return [
        [Encoded(n, "", "", data) for n, data in enumerate(files[at : at + FRAGMENT])]
        for at in range(0, len(files), FRAGMENT)
    ]


def decoded(files: list[bytes], wanted: DecodeSpec) -> Pixels:
    return np.concatenate([decode(items, wanted)[0] for items in fragments(files)])


def in_process(wanted: DecodeSpec) -> Callable[[list[bytes]], object]:
    """Without the child that a deadly image would take down; pixels land in pages of fragments in
    turn, as the child's do.
    """
    pages = itertools.cycle(
        [np.empty((FRAGMENT, *wanted.pixels.size, 3), np.uint8) for _ in range(PAGES)]
    )
    return lambda files: [
        [decode_one(item.data, wanted, into) for item, into in zip(items, page)]
        for items, page in zip(fragments(files), pages)
    ]


def contender(name: str) -> Callable[[list[bytes]], object]:
    if name == "pillow":  # what vitray adds (checks, EXIF, isolation, reasons) is not in here
        return lambda files: [
            np.asarray(Image.open(io.BytesIO(f)).convert("RGB").resize((224, 224), 2))
            for f in files
        ]
    if name == "hugging face":  # as its users call it: rescaled and normalised to float32 as well
        from transformers.image_utils import load_image
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        processor = ViTImageProcessorPil()
        return lambda files: [
            processor(load_image(Image.open(io.BytesIO(f)))).pixel_values[0] for f in files
        ]
    if name == "in process":
        return in_process(spec("exact"))
    wanted = spec(name)
    return lambda files: [decode(items, wanted)[1] for items in fragments(files)]


def cpu_s() -> float:
    """CPU seconds of this process and of its children, those that ended and those that live."""
    own = psutil.Process()
    return sum(sum(p.cpu_times()[:4]) for p in [own, *own.children()])


def serve(name: str, folder: str) -> None:
    """CPU seconds an image, for each line that comes in."""
    files = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    work = contender(name)
    work(files)  # the first imports and compiles
    started = cpu_s()
    work(files)
    times = max(1, round(ROUND_S / max(0.01, cpu_s() - started)))
    for _ in sys.stdin:
        before = cpu_s()
        for _ in range(times):
            work(files)
        print((cpu_s() - before) / times / len(files), flush=True)


def race(
    files: list[bytes], rounds: int, contenders: Sequence[str] = CONTENDERS
) -> dict[str, list[float]]:
    """CPU seconds an image of every contender in every round."""
    with tempfile.TemporaryDirectory() as folder:
        for n, data in enumerate(files):
            Path(folder, f"{n:05d}.jpg").write_bytes(data)
        argv = [sys.executable, __file__, "serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        racers = {name: subprocess.Popen([*argv, name, folder], **pipes) for name in contenders}
        took: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, racer in racers.items():
                racer.stdin.write("\n")
                seconds = float(racer.stdout.readline())
                took[name] += [seconds] if turn else []  # the first warms up
        for racer in racers.values():
            racer.stdin.close()
            racer.wait()
    return took


def table(took: dict[str, list[float]]) -> None:
    print("                images/s   x pillow (least .. most)      x hugging face")
    for name, seconds in took.items():
        over = {
            base: [b / s for b, s in zip(took[base], seconds)]
            for base in ("pillow", "hugging face")
        }
        low, high = min(over["pillow"]), max(over["pillow"])
        rate = (
            f"{1 / statistics.median(seconds):10.0f}   {statistics.median(over['pillow']):5.2f} "
            f"({low:.2f} .. {high:.2f})"
        )
        print(f"{name:14s}{rate}   {statistics.median(over['hugging face']):16.2f}")
    print(
        f"draft over exact: "
        f"{statistics.median(e / d for e, d in zip(took['exact'], took['draft'])):.2f}"
    )


def isolation(files: list[bytes], rounds: int) -> None:
    """What the child costs. By themselves and oftener: it is less than what a neighbour does to one
    round.
    """
    took = race(files, rounds, ("in process", "exact"))
    low, middle, high = statistics.quantiles(
        [e / p - 1 for e, p in zip(took["exact"], took["in process"])]
    )
    print(f"isolation: {middle:.1%} of an exact decode (middle half {low:.1%} .. {high:.1%})")


def differences(files: list[bytes]) -> None:
    """Levels of 255 between a mode's pixels and those of exact."""
    for resample, kind in ((2, "bilinear"), (3, "bicubic")):
        exact = decoded(files, spec("exact", resample)).astype(int)
        for mode in MODES[1:]:
            apart = np.abs(decoded(files, spec(mode, resample)) - exact)
            psnr = 10 * np.log10(255**2 / max(1e-12, float((apart**2).mean())))
            more = float((apart > 1).mean())
            print(
                f"{mode}, {kind}: mean {apart.mean():.4f}, most {apart.max()}, more than one "
                f"{more:.1e}, PSNR {psnr:.1f} dB"
            )


def main(images: int = 2 * FRAGMENT, rounds: int = 7) -> None:
    for size, count in (((500, 375), images), ((4000, 3000), max(8, images // 8))):
        files = jpegs(size, count)
        print(
            f"{size[0]}x{size[1]}, {len(files)} JPEGs of "
            f"{statistics.mean(map(len, files)) / 1000:.0f} kB, {rounds} rounds"
        )
        table(race(files, rounds))
        isolation(files, 5 * rounds)
        differences(files)
        print(flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        serve(*sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
