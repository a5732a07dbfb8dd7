"""JPEG decoding in the modes `exact`, `fast` and `draft`, compared with Pillow."""

from __future__ import annotations

import base64
import io
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from support.encoded_images import (
    DATA,
    PHOTOS,
    encode,
    in_mode,
    items,
    large,
    photo,
    sixteen_bit,
    spec,
)
from vitray.decoding.decode import DRAFT_GAP, Outcome, Pixels, decode, decode_one, load_pixels
from vitray.decoding.isolation import Limits
from vitray.schema import DecodeSpec

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


def test_fast_on_noise_is_two_levels_off_in_one_value_of_100_000() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 260, 241, 3), np.uint8) * 255
    files = [encode(Image.fromarray(one), "BMP") for one in noise]
    for resample in (2, 3):
        wanted = spec((224, 224), None, resample)
        apart = np.abs(in_mode("fast", files, wanted) - in_mode("exact", files, wanted))
        assert apart.max() <= 2
        assert (apart > 1).mean() < 1e-5


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
