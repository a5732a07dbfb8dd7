"""Decoded pixels equal those of Hugging Face and Pillow, also of odd images."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from support.encoded_images import encode, good, items, photo, png, sixteen_bit, spec
from vitray.decoding.decode import Outcome, decode


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    form = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    data = encode(photo().convert(mode), form)
    assert np.array_equal(good(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


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
