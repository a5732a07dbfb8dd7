"""decode.py and isolation.py: pixels equal Hugging Face's, every oddity has its value or its
reason, and a death costs one row.

Expected values come from Pillow, numpy or Hugging Face, never from the code under test.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import skimage
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

from vitray.decoding.decode import (
    CHILD_RUNS,
    DRAFT_GAP,
    MAX_SCANS,
    MAX_SIDE,
    PAGES,
    Outcome,
    Pixels,
    decode,
    decode_one,
    limits_of,
    load_pixels,
)
from vitray.decoding.isolation import CHUNK_BYTES, Limits
from vitray.schema import REASONS, DecodeSpec, Encoded, PixelSpec

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


def refused(data: bytes, **fields: object) -> Outcome:
    pixels, outcomes = decode(items(data), spec(**fields))
    assert len(pixels) == 0
    assert outcomes[0].reason in REASONS
    assert outcomes[0].message.isprintable() and 0 < len(outcomes[0].message) <= 200
    return outcomes[0]


# --- equal to Hugging Face


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


@pytest.mark.parametrize("case", range(len(processors())))
def test_pixels_equal_hugging_face_bit_for_bit(case: int) -> None:
    from importlib import import_module

    from transformers.image_utils import load_image

    name, options, wanted = processors()[case]
    module = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    processor = next(getattr(module, n) for n in module.__all__)(
        **options, do_rescale=False, do_normalize=False
    )
    files = [(DATA / photo).read_bytes() for photo in PHOTOS]
    files += [encode(photo(*size), "PNG") for size in SIZES]
    files += [encode(photo(640, 423), "JPEG", quality=q, progressive=q > 80) for q in (60, 90)]
    pixels, outcomes = decode(items(*files), wanted)
    assert [outcome.reason for outcome in outcomes] == [None] * len(files)
    for data, ours in zip(files, pixels):
        theirs = processor(load_image(Image.open(io.BytesIO(data)))).pixel_values[0]
        assert np.array_equal(ours, np.moveaxis(theirs, 0, -1))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_the_header_size_reported(
    form: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), form, exif=exif)
    plain = np.asarray(Image.open(io.BytesIO(encode(photo(), form))).convert("RGB"))
    rows, columns = (
        plain[::-1],
        plain[:, ::-1],
    )  # the orientations as EXIF 2.3 words them, by numpy alone
    swapped = plain.transpose(1, 0, 2)
    upright = [
        plain,
        columns,
        rows[:, ::-1],
        rows,
        swapped,
        swapped[:, ::-1],
        swapped[::-1, ::-1],
        swapped[::-1],
    ][orientation - 1]
    pixels, outcomes = decode(items(data), spec(crop=upright.shape[:2]))
    assert outcomes == [Outcome(60, 40, form.lower(), None, "")]
    assert np.array_equal(pixels[0], upright)


def test_broken_exif_costs_the_orientation_and_not_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    pixels = good(data[:at] + b"XXXX" + data[at + 4 :])
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(encode(photo(), "JPEG")))))


# --- JPEGs by libjpeg-turbo itself: Pillow's pixels, Pillow's reasons

SMALL = ((1, 1), (1, 7), (9, 1), (8, 8), (17, 33), (97, 61))
# 48x32, arithmetic coding: no encoder that is installed writes it
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02>k%7Zed27Zw*D92+1gLMtdGB`8rkJupIGRb^yfRb5+Zc$tA}agcLcU4^xVke;Kft*d8%yve$z$C;?Br2okP3"
    "kU!p05Aao5di<p00saM5C#9*00;pA002J#tuj1YVV<XhsM9QIWq%8$DoBVNPdxG6vH^qrCYe*RvgfOtlJ0ZF(KASo32(#J`Mhbgh8M#^iQ13dXFB5e5gNY"
    "GIUBe-$y`C`>2eZg+Qn0frYGx~QQV#sBTa~WwsuuJ_|#XP7rOSir)v#1OPp@c+7IOEyckEv_N)S`eqgVjafaA$P9e{NdzPu<@FtpG>Ls<%{{Vp@hK=#Or"
    "hZR`kEjxKw`{gtMfSKhj(Y{Cn=|~Qux06C|Je"
)


def as_pillow(data: bytes) -> tuple[str | None, Pixels | None]:
    """The reason, or the pixels, that plain Pillow gives."""
    try:
        return None, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except UnidentifiedImageError:
        return "not_an_image", None
    except OSError as error:
        return "truncated" if "truncated" in str(error).lower() else "decode_error", None


def as_decoded(data: bytes, mode: str = "exact") -> tuple[str | None, Pixels | None]:
    """The reason, or the pixels at full size, that decode_one gives."""
    try:
        shape = Image.open(io.BytesIO(data)).size[::-1]
    except OSError:
        shape = (1, 1)
    into = np.zeros((*shape, 3), np.uint8)
    reason = decode_one(data, spec(crop=shape, mode=mode), into).reason
    return reason, into if reason is None else None


def is_by_turbo(data: bytes) -> bool:
    return not isinstance(
        load_pixels(Image.open(io.BytesIO(data)), data, spec()), JpegImagePlugin.JpegImageFile
    )


def same(one: tuple[str | None, Pixels | None], other: tuple[str | None, Pixels | None]) -> bool:
    return one[0] == other[0] and (one[1] is None or np.array_equal(one[1], other[1]))


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
def test_jpegs_of_every_sampling_size_and_quality_equal_pillow_bit_for_bit(sampling: str) -> None:
    form = "GRAY" if sampling == "Gray" else "RGB"
    for size, qualities in [
        ((61, 45), range(1, 101)),
        *((size, (10, 75, 95, 100)) for size in SMALL),
    ]:
        pixels = (
            np.array(photo(*size).convert("L"))[..., None]
            if form == "GRAY"
            else np.array(photo(*size))
        )
        for quality in qualities:
            data = simplejpeg.encode_jpeg(pixels, quality, form, sampling)
            assert is_by_turbo(data)
            assert same(as_decoded(data), as_pillow(data)), (size, quality)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"progressive": True, "quality": 100, "subsampling": 0},
        {"optimize": True, "quality": 1},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 2, "progressive": True},
        {"keep_rgb": True},
        {"keep_rgb": True, "progressive": True},
        {"comment": b"\xff\xd8\xff\xda\xff\xd9", "icc_profile": bytes(70_000)},
    ],
)
def test_jpegs_of_every_kind_equal_pillow_bit_for_bit(options: dict[str, object]) -> None:
    for size in SMALL:
        for mode in ("RGB", "L"):
            data = encode(photo(*size).convert(mode), "JPEG", **options)
            for more in (b"", b"\0" * 99, b"\xff\xd8\xff\xda", data):
                assert is_by_turbo(data + more)
                assert same(as_decoded(data + more), as_pillow(data + more))


def test_photographs_equal_pillow_bit_for_bit() -> None:
    for name in PHOTOS:
        image = Image.open(DATA / name).convert("RGB")
        for number, quality in enumerate((50, 75, 90, 98)):
            data = encode(
                image, "JPEG", quality=quality, subsampling=number % 3, progressive=quality < 80
            )
            assert is_by_turbo(data)
            assert same(as_decoded(data), as_pillow(data)), (name, quality)


def without_scans(progressive: bytes) -> Iterator[bytes]:
    """Files that end properly, but after fewer scans than were written."""
    for found in list(re.finditer(b"\xff\xda", progressive))[1:]:
        yield progressive[: progressive.rindex(b"\xff\xc4", 0, found.start())] + b"\xff\xd9"


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    rng, header = random.Random(seed), data.index(b"\xff\xda")
    yield from (data[:-n] for n in range(1, 12))
    yield from (data[:at] + b"\xff\xd9" for at in range(header, len(data), 97))
    yield from (
        data[:2] + junk + data[2:]
        for junk in (
            b"\0\0\0",
            b"\xff\xff",
            b"\xff\x01",
            b"\xff\xd8",
            b"\xff\xd9",
            b"\xff\xf0\0\4ab",
        )
    )
    yield data[:2] + b"\xff\xee\0\7Adobe" + data[2:]
    for code in range(3):  # the Adobe marker's colour transform, beside JFIF and in its place
        for rest in (data[2:], data[20:]):
            yield data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([code]) + rest
    for at in range(0, len(data), 61):
        yield data[: rng.randrange(len(data))]
        for end in (len(data), header):
            broken = bytearray(data)
            broken[rng.randrange(end)] = rng.choice((0, 255, 0xC0, 0xC2, 0xD9, rng.randrange(256)))
            yield bytes(broken)
        yield data[:at] + rng.randbytes(3) + data[at:]
        yield data[:at] + data[at + rng.randrange(1, 20) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 4},
        {"quality": 100, "subsampling": 0},
        {"mode": "CMYK"},
    ],
)
def test_every_flaw_of_a_jpeg_is_judged_as_pillow_does_in_every_mode(
    options: dict[str, object],
) -> None:
    mode = str(options.get("mode", "RGB"))
    data = encode(
        photo(97, 61).convert(mode), "JPEG", **{k: v for k, v in options.items() if k != "mode"}
    )
    files = [*damaged(data, len(data)), *(without_scans(data) if "progressive" in options else ())]
    reasons = set()
    for broken in files:
        wanted = as_pillow(broken)
        if wanted[1] is not None and wanted[1].size > 1e6:  # a header that became larger
            continue
        reasons.add(wanted[0])
        assert same(as_decoded(broken), wanted), broken
        for mode in ("fast", "draft"):
            assert as_decoded(broken, mode)[0] == wanted[0], broken
    assert reasons == {None, "truncated", "decode_error", "not_an_image"}


def test_arithmetic_coding_is_refused_where_pillow_refuses_it() -> None:
    assert as_pillow(ARITHMETIC)[0] is None
    assert same(as_decoded(ARITHMETIC), as_pillow(ARITHMETIC))
    comment = (
        65536 - 200
    )  # Pillow reads 64 kB at a time, and libjpeg cannot pause in the midst of arithmetic coding
    long = (
        ARITHMETIC[:2]
        + b"\xff\xfe"
        + struct.pack(">H", comment - 2)
        + bytes(comment - 4)
        + ARITHMETIC[2:]
    )
    assert is_by_turbo(long)  # it would not refuse it
    assert as_decoded(long) == as_pillow(long) == ("decode_error", None)


# --- fast and draft


def in_mode(mode: str, files: list[bytes], wanted: DecodeSpec) -> np.ndarray:
    pixels, outcomes = decode(items(*files), replace(wanted, mode=mode))
    assert [outcome.reason for outcome in outcomes] == [None] * len(files)
    return pixels.astype(int)


@pytest.mark.parametrize("case", range(len(processors())))
def test_fast_is_a_level_off_here_and_there(case: int) -> None:
    wanted = processors()[case][2]
    files = [(DATA / photo).read_bytes() for photo in PHOTOS]
    files += [encode(photo(*size), "PNG") for size in SIZES]
    files += [
        encode(photo(*size), "JPEG", quality=q)
        for q in (60, 90)
        for size in ((640, 423), (300, 640), (500, 375))
    ]
    exact = in_mode("exact", files, wanted)
    apart = np.abs(in_mode("fast", files, wanted) - exact)
    assert apart.mean() < 0.01
    # torch's weights have 16 bits, Pillow's 24, which bicubic overshoot may double
    assert apart.max() <= (2 if wanted.pixels.resample == 3 else 1)
    assert (apart > 1).mean() < 1e-5
    if wanted.pixels.resample == 1 or wanted.pixels.size is None:  # what torch does not do
        assert apart.max() == 0


def test_fast_on_noise_is_two_levels_off_in_one_value_of_100_000() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 260, 241, 3), np.uint8) * 255
    files = [encode(Image.fromarray(one), "BMP") for one in noise]
    for resample in (2, 3):
        wanted = spec((224, 224), None, resample)
        apart = np.abs(in_mode("fast", files, wanted) - in_mode("exact", files, wanted))
        assert apart.max() <= 2
        assert (apart > 1).mean() < 1e-5


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


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    "wanted",
    [
        spec((224, 224), None, 2),
        spec((256,), (224, 224), 3),
        spec((300, 200), None, 3),
        spec((96, 96), None, 1),
    ],
)
def test_draft_of_a_large_jpeg_is_near(wanted: DecodeSpec, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = [
        encode(large(*size), "JPEG", quality=90, exif=exif) for size in ((2400, 1800), (1800, 2400))
    ]
    apart = np.abs(in_mode("draft", files, wanted) - in_mode("exact", files, wanted))
    assert 0.05 < apart.mean() < 0.75
    assert apart.max() <= 24


def test_draft_is_fast_where_nothing_can_be_saved() -> None:
    wanted = spec((224, 224), None, 2)
    small = 224 * DRAFT_GAP * 2 - 2  # its half would be too small
    sizes = (
        (small, small),
        (2401, 1800),
        (2400, 1799),
        (10, 10),
    )  # and a rounded half would move every pixel
    files = [*(encode(large(*size), "JPEG") for size in sizes), encode(large(), "BMP")]
    assert np.array_equal(in_mode("draft", files, wanted), in_mode("fast", files, wanted))
    plain = spec(None, (40, 60))
    assert np.array_equal(in_mode("draft", files, plain), in_mode("exact", files, plain))


def test_oddities_and_refusals_are_the_same_in_every_mode() -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((60, 40)))
    files = [
        *(
            encode(photo().convert(mode), form)
            for mode, form in (("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"))
        ),
        *(
            encode(rgba, "PNG"),
            encode(Image.fromarray(sixteen_bit()), "PNG"),
            encode(Image.new("F", (60, 40), 0.5), "TIFF"),
        ),
        *(
            encode(photo(1, 3000), "JPEG"),
            encode(photo(9000, 10), "JPEG"),
            encode(photo(), "ICO"),
            b"text",
            b"",
        ),
    ]
    for wanted in (
        spec((30,), (24, 24), 2, background=(1, 2, 3), max_pixels=60_000),
        spec((24, 24), None, 2),
    ):
        pixels, outcomes = decode(items(*files), wanted)
        for mode in ("fast", "draft"):
            others, found = decode(items(*files), replace(wanted, mode=mode))
            assert found == outcomes
            assert np.abs(others.astype(int) - pixels).max() <= 1


def test_fast_decodes_beside_openmp_threads_of_the_parent() -> None:
    import torch

    def share_out(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        torch.nn.functional.interpolate(
            torch.zeros(1, 8, 999, 999), (500, 500), mode="bilinear", antialias=True
        )
        return decode_one(data, wanted, into)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted, large_one = spec((900, 900), None, 2, mode="fast"), encode(large(), "JPEG")
        share_out(large_one, wanted, np.zeros((900, 900, 3), np.uint8))
        _, outcomes = decode(items(large_one), wanted, share_out, Limits(wall_s=20))
        assert [outcome.reason for outcome in outcomes] == [None]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_only_fast_and_draft_import_torch() -> None:
    code = (
        "import sys, test_decode as t\nfor mode in ('exact', 'fast'):\n"
        "    t.decode(t.items(t.encode(t.photo(), 'JPEG')), t.spec((24, 24), None, mode=mode))\n  "
        "  print('torch' in sys.modules)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


# --- oddities with a value


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    form = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    data = encode(photo().convert(mode), form)
    assert np.array_equal(good(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def sixteen_bit() -> np.ndarray:
    return (np.arange(2400, dtype=np.uint32).reshape(40, 60) * 27).astype(np.uint16)


def test_16_bit_gray_is_scaled_and_not_saturated() -> None:
    wanted = np.repeat((sixteen_bit() >> 8).astype(np.uint8)[..., None], 3, axis=2)
    little = Image.fromarray(sixteen_bit())
    big = Image.frombytes("I;16B", (60, 40), sixteen_bit().astype(">u2").tobytes())
    wide = Image.fromarray(sixteen_bit().astype(np.int32))
    assert (little.mode, wide.mode) == ("I;16", "I")
    for data in (
        encode(little, "PNG"),
        encode(little, "TIFF"),
        encode(big, "TIFF"),
        encode(wide, "TIFF"),
    ):
        assert np.array_equal(good(data), wanted)


def png(
    width: int, height: int, depth: int, color: int, raw: bytes, *more: tuple[bytes, bytes]
) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    chunks = [header, *more, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_rgb_keeps_its_high_bytes() -> None:
    values = (np.arange(12).reshape(4, 3) * 5461).astype(">u2")
    data = png(4, 1, 16, 2, b"\0" + values.tobytes())
    assert np.array_equal(good(data, shape=(1, 4))[0], (values >> 8).astype(np.uint8))


def test_12_bit_tiff_is_scaled_from_12_bit() -> None:
    entries = [
        (256, 4),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 6),
    ]
    strip = bytes.fromhex("000 800 fff 0f0".replace(" ", ""))
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries
    )
    data = b"II*\0" + struct.pack("<I", 14) + strip + table + b"\0\0\0\0"
    assert good(data, shape=(1, 4))[0].tolist() == [[0] * 3, [0x80] * 3, [0xFF] * 3, [0x0F] * 3]


def test_alpha_is_dropped_or_composited_over_the_background() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 100, 50, 255), (200, 100, 50, 0), (200, 100, 50, 51)]  # 51 / 255 = 0.2
    dropped, over_white = [[200, 100, 50]] * 3, [[200, 100, 50], [255, 255, 255], [244, 224, 214]]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encode(Image.fromarray(rgba), form, **options)
        assert good(data, shape=(1, 3))[0].tolist() == dropped
        assert good(data, (255, 255, 255), shape=(1, 3))[0].tolist() == over_white


def test_transparency_of_palettes_gray_and_color_keys_is_composited() -> None:
    palette = (b"PLTE", bytes([200, 100, 50, 10, 20, 30]))
    indexed = png(2, 1, 8, 3, b"\0\0\1", palette, (b"tRNS", b"\0\xff"))
    assert good(indexed, shape=(1, 2))[0].tolist() == [[200, 100, 50], [10, 20, 30]]
    assert good(indexed, (1, 2, 3), shape=(1, 2))[0].tolist() == [[1, 2, 3], [10, 20, 30]]
    gray_alpha = png(2, 1, 8, 4, bytes([0, 80, 0, 90, 255]))
    assert good(gray_alpha, (1, 2, 3), shape=(1, 2))[0].tolist() == [[1, 2, 3], [90] * 3]
    gray = png(2, 1, 8, 0, bytes([0, 80, 90]), (b"tRNS", b"\0\x50"))
    assert good(gray, (1, 2, 3), shape=(1, 2))[0].tolist() == [[1, 2, 3], [90] * 3]
    deep = png(2, 1, 16, 0, bytes([0, 80, 7, 90, 7]), (b"tRNS", b"\x50\x07"))
    assert good(deep, shape=(1, 2))[0].tolist() == [[80] * 3, [90] * 3]
    assert good(deep, (1, 2, 3), shape=(1, 2))[0].tolist() == [[1, 2, 3], [90] * 3]
    color = png(2, 1, 8, 2, bytes([0, 1, 1, 1, 9, 9, 9]), (b"tRNS", bytes([0, 9, 0, 9, 0, 9])))
    assert good(color, (5, 6, 7), shape=(1, 2))[0].tolist() == [[1, 1, 1], [5, 6, 7]]


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {})],
)
def test_the_first_frame_of_many_is_decoded(form: str, options: dict[str, object]) -> None:
    first, second = Image.new("RGB", (60, 40), (255, 0, 0)), Image.new("RGB", (60, 40), (0, 0, 255))
    data = encode(first, form, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    pixels, outcomes = decode(items(data), spec())
    further_pages = int(form == "TIFF")  # the frames of an animation are one image
    assert outcomes == [
        Outcome(60, 40, {"MPO": "jpeg"}.get(form, form.lower()), None, "", further_pages)
    ]
    assert np.abs(pixels[0].astype(int) - [255, 0, 0]).max() <= 1  # an MPO is lossy


def test_icc_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(
        good(encode(photo(), "JPEG", icc_profile=profile)), good(encode(photo(), "JPEG"))
    )


def test_scans_outside_the_image_do_not_count() -> None:
    plain = encode(photo(), "JPEG", progressive=True)
    filler = b"\xff\xda\0\0" * 300
    segment = b"\xff\xe2" + struct.pack(">H", 2 + len(filler)) + filler
    wanted = np.asarray(Image.open(io.BytesIO(plain)))
    assert np.array_equal(good(plain[:2] + segment + plain[2:] + filler), wanted)


# --- oddities with a reason


def test_float_and_wide_integer_pixels_are_refused() -> None:
    assert refused(encode(Image.new("F", (60, 40), 0.5), "TIFF")).reason == "float_pixels"
    outcome = refused(encode(Image.new("I", (60, 40), 65536), "TIFF"))
    assert outcome == Outcome(
        60, 40, "tiff", "unsupported_pixels", "integer pixels from 65536 to 65536"
    )
    assert refused(encode(Image.new("I", (60, 40), -1), "TIFF")).reason == "unsupported_pixels"


@pytest.mark.parametrize(
    "edge", [8_000, 20_000]
)  # below and far above Pillow's own cap, which warns and then raises
def test_a_bomb_is_judged_from_its_header(edge: int) -> None:
    outcome = refused(png(edge, edge, 8, 2, b""))
    assert outcome == Outcome(
        edge, edge, "png", "too_many_pixels", f"{edge}x{edge} is more than max_pixels 50000000"
    )
    assert (
        decode_one(png(edge, edge, 8, 2, b""), spec(), np.zeros((40, 60, 3), np.uint8)).reason
        == "too_many_pixels"
    )


def test_the_pixel_cap_also_holds_for_what_a_resize_makes() -> None:
    assert (
        refused(encode(photo(1, 3000), "PNG"), size=(256,), crop=(224, 224)).message
        == "1x3000 resized becomes 256x768000"
    )
    assert refused(encode(photo(), "PNG"), max_pixels=2399).reason == "too_many_pixels"
    line = refused(png(MAX_SIDE + 1, 1, 8, 2, b""))
    assert (line.reason, line.message) == (
        "too_many_pixels",
        "1048577x1 has a side of more than 1048576",
    )
    assert decode(items(encode(photo(), "PNG")), spec(max_pixels=2400))[1][0].reason is None


def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    few, many = (
        data[:-2] + last * n + data[-2:] for n in (MAX_SCANS - data.count(b"\xff\xda"), 400)
    )
    assert np.array_equal(good(few), np.asarray(Image.open(io.BytesIO(few))))
    assert refused(many) == Outcome(
        60, 40, "jpeg", "too_many_scans", "a JPEG of more than 100 scans"
    )


def test_formats_are_sniffed_and_only_those_allowed_are_decoded() -> None:
    outcome = refused(encode(photo(), "PNG"), formats=("jpeg",))
    assert outcome == Outcome(0, 0, "", "format_not_allowed", "png is not in formats (jpeg)")
    for data, name in (
        (encode(photo(), "ICO"), "ico"),
        (encode(photo(), "AVIF"), "avif"),
        (encode(photo(), "JPEG2000"), "jpeg2000"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "heic"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "svg"),
    ):
        outcome = refused(data)
        assert (outcome.reason, outcome.message.split()[0]) == ("format_not_allowed", name)


def test_other_bytes_are_no_image() -> None:
    for data in (
        b"<html>404 Not Found</html>",
        b"BMW is no bitmap",
        b"\0" * 4096,
        b"x",
        os.urandom(8) + b"noise",
    ):
        assert refused(data).reason == "not_an_image"
    assert refused(b"").reason == "empty"
    assert refused(encode(photo(), "JPEG")[:20]).reason == "not_an_image"


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_cut_file_is_truncated(form: str, options: dict[str, object]) -> None:
    data = encode(photo(300, 200), form, **options)
    cuts = [data[: len(data) * percent // 100] for percent in (10, 30, 50, 70, 90)]
    pixels, outcomes = decode(items(*cuts, data), spec(crop=(200, 300)))
    assert [outcome.reason for outcome in outcomes] == ["truncated"] * 5 + [None]
    assert np.array_equal(pixels[0], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_broken_data_is_a_decode_error_with_one_short_line() -> None:
    data = bytearray(encode(photo(), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    outcome = refused(bytes(data))
    assert (outcome.reason, outcome.width, outcome.format) == ("decode_error", 60, "png")
    assert outcome.message.startswith("OSError: ")


# --- rows


def test_every_item_has_its_outcome_and_the_good_ones_their_pixels_in_order() -> None:
    colors = [Image.new("RGB", (60, 40), (n, 2 * n, 3 * n)) for n in range(5)]
    files = [encode(color, "PNG") for color in colors]
    batch = items(files[0], b"", files[1], b"text", None, files[2], files[3][:60], files[4])
    batch[4] = Encoded(4, "4", "file:4", None, "missing", "no object s3://b/4")
    pixels, outcomes = decode(batch, spec())
    assert [outcome.reason for outcome in outcomes] == [
        None,
        "empty",
        None,
        "not_an_image",
        "missing",
        None,
        "truncated",
        None,
    ]
    assert outcomes[4].message == "no object s3://b/4"
    assert pixels.shape == (4, 40, 60, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0].tolist() == [[n, 2 * n, 3 * n] for n in (0, 1, 2, 4)]
    assert (pixels == pixels[:, :1, :1]).all()


def test_a_batch_without_bytes_starts_no_child() -> None:
    pixels, outcomes = decode([Encoded(0, "a", "u", None, "too_large", "9 GB")], spec(), one=poison)
    assert pixels.shape == (0, 40, 60, 3)
    assert outcomes == [Outcome(0, 0, "", "too_large", "9 GB")]
    assert decode([], spec())[1] == []


# --- isolation


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


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"exit", "decoder_died", "the decoder ended with exit status 3"),
        (b"raise", "decoder_died", "the decoder ended with exit status 70"),
        (b"SIGSEGV", "decoder_died", "the decoder was killed by SIGSEGV"),
        (b"SIGKILL", "decoder_died", "the decoder was killed by SIGKILL"),
        (b"SIGTERM", "decoder_died", "the decoder was killed by SIGTERM"),
        (b"memory", "decode_error", "MemoryError"),
        (b"loop", "time_limit", "the decoder took more than 0.3 s of CPU"),
        (b"sleep", "time_limit", "the decoder made no progress for 0.3 s"),
        (b"SIGSTOP", "time_limit", "the decoder made no progress for 0.3 s"),
    ],
)
def test_a_death_costs_its_row_alone(data: bytes, reason: str, message: str) -> None:
    wall_s = (
        0.3 if data in (b"sleep", b"SIGSTOP") else 60
    )  # a busy machine must not stop the others by the clock
    limits = Limits(cpu_s=0.3, wall_s=wall_s, memory_bytes=1 << 30)
    pixels, outcomes = decode(items(b"a", data, b"b", b"c", data, b"d"), spec(), poison, limits)
    assert [outcome.reason for outcome in outcomes] == [None, reason, None, None, reason, None]
    assert outcomes[1].message == outcomes[4].message == message
    assert pixels[:, 39, 59, 2].tolist() == list(b"abcd")


def test_a_death_that_does_not_repeat_is_not_charged(tmp_path: Path) -> None:
    once = str(tmp_path / "was-here").encode()
    pixels, outcomes = decode(items(b"a", once, b"b"), spec(), poison)
    assert [outcome.reason for outcome in outcomes] == [None, None, None]
    assert pixels[:, 0, 0, 0].tolist() == list(b"azb")


def test_an_image_that_uses_up_its_cpu_seconds_is_tried_once(tmp_path: Path) -> None:
    """Thirty of them in one fragment would hold it for ten minutes, were each tried twice."""
    tries = tmp_path / "tries"

    def slow(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        if data == b"loop":
            with open(tries, "ab") as stream:
                stream.write(b".")
        return poison(data, wanted, into)

    _, outcomes = decode(items(b"a", b"loop", b"b"), spec(), slow, Limits(cpu_s=0.3))
    assert [outcome.reason for outcome in outcomes] == [
        None,
        "time_limit",
        None,
    ] and tries.read_bytes() == b"."


def test_inputs_larger_and_smaller_than_what_lies_there_at_a_time_arrive_whole() -> None:
    def last(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        into[...] = np.frombuffer(data[-3:], np.uint8)
        return Outcome(len(data), 1, "png", None, "")

    sizes = [3, CHUNK_BYTES + 7, 3, CHUNK_BYTES - 3, 3, 4, 3 * CHUNK_BYTES, 5]
    for seed in (1, 2):  # the second time the child and its file have been used
        blobs = [np.random.default_rng([seed, size, n]).bytes(size) for n, size in enumerate(sizes)]
        pixels, outcomes = decode(items(*blobs), spec(), last)
        assert [outcome.width for outcome in outcomes] == sizes
        assert [bytes(p[7, 5]) for p in pixels] == [blob[-3:] for blob in blobs]


def test_an_image_has_five_cpu_seconds_and_more_only_under_a_higher_pixel_cap() -> None:
    _, outcomes = decode(items(b"a", b"loop"), spec(max_pixels=1000), poison)
    assert (outcomes[1].reason, outcomes[1].message) == (
        "time_limit",
        "the decoder took more than 5 s of CPU",
    )
    assert (
        limits_of(spec(max_pixels=50_000_000)).cpu_s == 5
        and limits_of(spec(max_pixels=200_000_000)).cpu_s == 20
    )


def test_the_real_decoder_keeps_within_its_memory() -> None:
    big = encode(Image.new("RGB", (6000, 8000)), "PNG")  # 192 MB in Pillow
    _, outcomes = decode(
        items(big, encode(photo(), "PNG")), spec(), limits=Limits(memory_bytes=50 << 20)
    )
    assert [(outcome.reason, outcome.width) for outcome in outcomes] == [
        ("decode_error", 6000),
        (None, 60),
    ]
    assert outcomes[0].message.startswith("MemoryError")


def test_cpu_seconds_are_counted_for_each_image() -> None:
    def slow(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return Outcome(1, 1, "png", None, "")

    _, outcomes = decode(items(*[b"x"] * 6), spec(), slow, Limits(cpu_s=0.6))
    assert [outcome.reason for outcome in outcomes] == [None] * 6


def test_threads_decode_side_by_side_and_their_signal_masks_do_not_matter() -> None:
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGTERM})
        pixels, outcomes = decode(
            items(b"a", b"loop", bytes([number])), spec(), poison, Limits(cpu_s=0.2)
        )
        assert outcomes[1].reason == "time_limit"
        results[number] = pixels[:, 0, 0, 0].tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [ord("a"), number] for number in (1, 2, 3)}


def which(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
    """Its process as the width; bytes that are no number are a bad image."""
    try:
        into[...] = int(data)
    except ValueError:
        return Outcome(os.getpid(), 0, "png", "decode_error", "no number")
    return Outcome(os.getpid(), 0, "png", None, "")


def child_of(*data: bytes) -> int:
    (child,) = {outcome.width for outcome in decode(items(*data), spec(), which)[1]}
    return child


def test_a_child_serves_calls_until_a_bad_image_and_no_more_than_its_number() -> None:
    first = child_of(b"1", b"2")
    assert child_of(b"3") == first
    second = child_of(b"1", b"2", b"3")  # more than the memory they share holds
    assert second != first
    assert child_of(b"x", b"2") == second
    third = child_of(b"1", b"2")
    assert third != second
    assert [child_of(b"1") for _ in range(CHILD_RUNS - 1)] == [third] * (CHILD_RUNS - 1)
    assert child_of(b"1") != third
    gone = {first, second, third}
    assert not gone & set(map(int, children(os.getpid())))


def test_pixels_of_one_call_outlive_the_next() -> None:
    first, _ = decode(items(b"1", b"2"), spec(), which)
    decode(items(b"7", b"8"), spec(), which)
    assert first[:, 0, 0, 0].tolist() == [1, 2]


def test_a_caller_may_keep_the_pixels_of_many_calls() -> None:
    """More than a worker has pages: then there is a new worker."""
    kept = [decode(items(b"%d" % n), spec(), which)[0][..., :1] for n in range(3 * PAGES)]
    assert [int(pixels[0, 0, 0, 0]) for pixels in kept] == list(range(3 * PAGES))
    del kept
    assert len({child_of(b"1") for _ in range(PAGES)}) == 1


def test_a_child_that_dies_while_idle_costs_nothing() -> None:
    os.kill(child_of(b"1"), signal.SIGKILL)
    pixels, outcomes = decode(items(b"4"), spec(), which)
    assert (outcomes[0].reason, pixels[0, 0, 0, 0]) == (None, 4)


def test_large_inputs_and_many_reach_the_child_whole() -> None:
    def length(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        return Outcome(len(data), zlib.crc32(data), "png", None, "")

    data = [os.urandom(n) for n in (3_000_000, 1, 65_536, 212_992, 1_000_001, *range(2, 300))]
    _, outcomes = decode(items(*data), spec(), length)
    assert [(o.width, o.height) for o in outcomes] == [(len(one), zlib.crc32(one)) for one in data]


def test_a_child_ends_with_its_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(child_of(b"1")))
    thread.start()
    thread.join()
    for _ in range(100):
        if str(found[0]) not in children(os.getpid()):
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its thread")


def test_what_only_a_signal_handler_holds_does_not_end_in_a_child(tmp_path: Path) -> None:
    """Ray Train leaves one that holds an actor; its end in a child left Ray's client in the parent
    without answers for ever.
    """
    ended = tmp_path / "ended"

    class Held:
        def __del__(self) -> None:
            ended.write_text(str(os.getpid()))

    def handler_of(held: Held) -> Callable[..., None]:
        return lambda *_: print(held)

    before = signal.signal(signal.SIGINT, handler_of(Held()))
    try:
        thread = threading.Thread(target=lambda: child_of(b"1"))
        thread.start()
        thread.join()
        assert not ended.exists()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.read_text() == str(os.getpid())


def test_an_interrupt_leaves_no_child() -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            decode(items(b"sleep"), spec(), poison)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert children(os.getpid()) == []


def children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # a thread of an earlier test has just ended
            found += (task / "children").read_text().split()
    return found


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import test_decode as t\nt.decode(t.items(b'sleep'), t.spec(), t.poison)\n")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    worker = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    while not (found := children(worker.pid)):
        assert worker.poll() is None
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    for _ in range(100):
        if not Path(f"/proc/{found[0]}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_threads_that_begin_at_once_leave_no_child_waiting_for_a_lock(tmp_path: Path) -> None:
    """One that forked while another compiled had a child that waited for the compiler's lock until
    it was killed, a minute later.
    """
    code = (
        "import io, threading\nfrom PIL import Image\nfrom vitray.decoding.decode import "
        "decode\nfrom vitray.decoding.isolation import CHUNK_BYTES, Limits\n"
        "from vitray.schema import DecodeSpec, Encoded, PixelSpec\n"
        "buffer = io.BytesIO()\nImage.new('RGB', (64, 48)).save(buffer, 'JPEG')\n"
        "spec = DecodeSpec(PixelSpec((16, 16), 2, None, 1, (0, 0, 0), (1, 1, 1)), ('jpeg',), "
        "10**6, None)\n"
        "reasons, start = [], threading.Barrier(3)\n"
        "def work():\n    start.wait()\n    item = Encoded(0, 'a', 'a', buffer.getvalue())\n"
        "    reasons.extend(o.reason for o in decode([item], spec, limits=Limits(wall_s=200))[1])\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\nassert reasons == [None] * 3, "
        "reasons"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}  # nothing is compiled yet
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stderr
