"""Bytes that are no image, or too much of one, become error rows with their reason."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from support.encoded_images import encode, good, items, photo, png, spec
from vitray.decoding.decode import MAX_SCANS, MAX_SIDE, Outcome, decode, decode_one
from vitray.schema import REASONS


def refused(data: bytes, **fields: object) -> Outcome:
    pixels, outcomes = decode(items(data), spec(**fields))
    assert len(pixels) == 0
    assert outcomes[0].reason in REASONS
    assert outcomes[0].message.isprintable() and 0 < len(outcomes[0].message) <= 200
    return outcomes[0]


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
