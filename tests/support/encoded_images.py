"""Images in every encoding, and a decoder that fails as a test tells it."""

from __future__ import annotations

import io
import os
import signal
import struct
import time
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from vitray.decoding.decode import (
    Outcome,
    Pixels,
    decode,  # for child processes
)
from vitray.schema import DecodeSpec, Encoded, PixelSpec

DATA = Path(skimage.__file__).parent / "data"
FORMATS = ("jpeg", "png", "webp", "bmp", "gif", "tiff")
PHOTOS = ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "logo.png", "page.png")
SIZES = (
    (1, 1),
    (1, 7),
    (9, 1),
    (3, 500),
    (500, 3),
    (224, 224),
    (223, 225),
    (256, 256),
    (113, 225),
    (301, 1021),
    (97, 61),
)


@cache
def photo(width: int = 60, height: int = 40) -> Image.Image:
    return (
        Image.open(DATA / "chelsea.png")
        .convert("RGB")
        .resize((width, height), Image.Resampling.BICUBIC)
    )


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def spec(
    size: tuple[int, ...] | None = None,
    crop: tuple[int, int] | None = (40, 60),
    resample: int = 2,
    **fields: object,
) -> DecodeSpec:
    pixels = PixelSpec(size, resample, crop, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return DecodeSpec(
        **{
            "pixels": pixels,
            "formats": FORMATS,
            "max_pixels": 50_000_000,
            "background": None,
            **fields,
        }
    )


def items(*data: bytes | None) -> list[Encoded]:
    return [Encoded(i, str(i), f"file:{i}", one) for i, one in enumerate(data)]


def good(
    data: bytes, background: tuple[int, int, int] | None = None, shape: tuple[int, int] = (40, 60)
) -> Pixels:
    """The pixels of one image as they are: neither resized nor cropped."""
    pixels, outcomes = decode(items(data), spec(crop=shape, background=background))
    assert outcomes[0].reason is None, outcomes
    return pixels[0]


def processors() -> list[tuple[str, dict[str, object], DecodeSpec]]:
    square, edge = {"height": 224, "width": 224}, {"shortest_edge": 256}
    return [
        ("vit", {}, spec((224, 224), None, 2)),
        ("deit", {}, spec((256, 256), (224, 224), 3)),
        (
            "bit",
            {"size": edge, "crop_size": square},
            spec((256,), (224, 224), 3),
        ),  # as DINOv2's checkpoints have it
        (
            "bit",
            {"size": {"shortest_edge": 97}, "crop_size": {"height": 131, "width": 80}},
            spec((97,), (131, 80), 3),
        ),
        ("beit", {}, spec((224, 224), None, 3)),
        (
            "beit",
            {"size": {"height": 256, "width": 256}, "do_center_crop": True},
            spec((256, 256), (224, 224), 3),
        ),
        ("clip", {}, spec((224,), (224, 224), 3)),
        ("clip", {"do_resize": False}, spec(None, (224, 224), 3)),
        ("siglip", {}, spec((224, 224), None, 3)),
        (
            "siglip",
            {"size": {"height": 200, "width": 301}, "resample": 1},
            spec((200, 301), None, 1),
        ),
    ]


def in_mode(mode: str, files: list[bytes], wanted: DecodeSpec) -> np.ndarray:
    pixels, outcomes = decode(items(*files), replace(wanted, mode=mode))
    assert [outcome.reason for outcome in outcomes] == [None] * len(files)
    return pixels.astype(int)


def large(width: int = 2400, height: int = 1800) -> Image.Image:
    """A photograph again and again, so that it is as rich in detail as a camera's."""
    canvas, tile = (
        Image.new("RGB", (width, height)),
        Image.open(DATA / "motorcycle_left.png").convert("RGB"),
    )
    for left in range(0, width, tile.width):
        for top in range(0, height, tile.height):
            canvas.paste(tile, (left, top))
    return canvas


def sixteen_bit() -> np.ndarray:
    return (np.arange(2400, dtype=np.uint32).reshape(40, 60) * 27).astype(np.uint16)


def png(
    width: int, height: int, depth: int, color: int, raw: bytes, *more: tuple[bytes, bytes]
) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    chunks = [header, *more, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def poison(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
    """A decoder that dies as its bytes say; of others the first byte is the gray."""
    if data == b"exit":
        os._exit(3)
    if data == b"raise":
        raise RuntimeError("a bug of ours")
    if data.startswith(b"SIG"):
        os.kill(os.getpid(), signal.Signals[data.decode()])
    if data == b"memory":
        try:
            into[...] = np.ones(8 << 30, np.uint8)[0]
        except MemoryError:
            return Outcome(1, 1, "png", "decode_error", "MemoryError")
    if data == b"loop":
        sum(iter(int, 1))  # one C call without end: a Python signal handler would never run
    if data == b"sleep":
        time.sleep(60)
    if data.startswith(b"/"):  # dies when it comes first
        try:
            os.close(os.open(data, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            data = b"z"
    into[...] = data[0]
    return Outcome(7, 5, "png", None, "")
