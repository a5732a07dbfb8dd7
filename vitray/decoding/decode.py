"""Bytes -> pixels or a reason; hides every oddity of image formats.

Good pixels equal Hugging Face's own path bit for bit: load_image (EXIF orientation, RGB), then the
checkpoint's PIL processor. That is mode "exact". "fast" resizes with torch, a level off here and
there; "draft" also decodes large JPEGs at a fraction of their size; "gpu" and "hybrid" are "fast"
for all that is not `left_to_device`. Which rows are good, and why others are not, is the same in
all. `decode_one` is the pure part. `decode` runs it in a child (isolation.py), so that a crash, a
bomb or an endless decoder costs one row. Reading bytes and normalising pixels are elsewhere.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vitray.decoding.isolation import Child, Death, Limits, Pages, shared
from vitray.decoding.resize import TORCH_MODES, Pixels, compiled, resize, resize_fast
from vitray.errors import one_line
from vitray.job import FORMATS
from vitray.schema import DecodeSpec, Encoded, PixelSpec

MAX_SIDE = (
    1 << 20
)  # px: the weights of a resize grow with a side; a PNG of 50,000,000x1 in 146 kB took 1.8 GB
# cameras and encoders write about 10; a file of 1,000 scans decodes 100 times slower than it is
# long
MAX_SCANS = 100
PNG_TEXT_BYTES = 64 << 20  # of one chunk, inflated; as much as Pillow allows for all of them
MESSAGE_CHARS = 200
PAGES = 4  # of pixels: what one thread's callers hold at a time in the pipeline
CHILD_RUNS = 64  # calls for which a child is used; a leak or a fragmented heap lives no longer
CPU_S, CPU_S_PIXELS = (
    5.0,
    50_000_000,
)  # the slowest honest image of so many pixels, a progressive JPEG of noise, takes 2.5 s
# a draft is decoded at no less than three times the size that it is resized to: a level or less off
# in the mean
DRAFT_GAP = 3
ON_DEVICE = ("gpu", "hybrid")  # modes in which plain JPEGs are decoded where the model is

# only tells what an unreadable or unwanted file is; Pillow alone decides what is decoded
_SIGNATURES = [
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("jpeg", rb"\xff\xd8\xff"),
        ("png", rb"\x89PNG\r\n\x1a\n"),
        ("webp", rb"RIFF.{4}WEBP"),
        ("bmp", rb"BM.{4}\0{4}"),
        ("gif", rb"GIF8[79]a"),
        ("tiff", rb"II[*+]\0|MM\0[*+]"),
        ("avif", rb".{4}ftypavi[fs]"),
        ("heic", rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)"),
        ("jpeg2000", rb"\0\0\0\x0cjP {2}\r\n|\xff\x4f\xff\x51"),
        ("jpegxl", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("ico", rb"\0\0[\x01\x02]\0[^\0]"),
        ("psd", rb"8BPS\0\x01"),
        ("svg", rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,512}?)?<svg\b"),
    )
]
_TURN = Image.Transpose
_NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION, _PHOTOMETRIC = 254, 330, 50706, 262  # tags of a TIFF
_ODD_MARKERS = frozenset(
    b"\xc3\xc9\xca\xcb"
)  # lossless or arithmetic coding, of which Pillow refuses what exceeds its buffer
_NOT_BASELINE = frozenset(
    b"\xc1\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf"
)  # frames; what only looks like one costs speed
_ORIENTATIONS = {
    **{2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE},
    **{6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90},
}
_ENTRY = np.dtype(  # an Outcome in shared memory
    [
        ("width", "i8"),
        ("height", "i8"),
        ("format", "S8"),
        ("reason", "S24"),
        ("message", f"S{MESSAGE_CHARS}"),
        ("good", "?"),
        ("further_pages", "i4"),
    ]
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image. reason None: good. width, height: of the header, before EXIF
    orientation (0: not known).

    further_pages: of a TIFF, behind the first one, which was decoded.
    """

    width: int
    height: int
    format: str
    reason: str | None
    message: str
    further_pages: int = 0


def decode_one(data: bytes, spec: DecodeSpec, into: Pixels) -> Outcome:
    """The outcome of one image; a good one's pixels are in `into`, uint8 [H, W, 3]. In this
    process: nothing limits it.
    """
    outcome = Outcome(0, 0, "", None, "")
    try:
        image = _open(data, spec.formats)
        # a TIFF's `size` is already turned by its orientation
        width, height = getattr(image, "_tile_size", image.size)
        outcome = Outcome(
            width, height, "jpeg" if image.format == "MPO" else image.format.lower(), None, ""
        )
        markers = _markers(data) if outcome.format == "jpeg" else b""
        _check_header(image, data, markers, spec.max_pixels)
        if outcome.format == "tiff" and spec.rules > 1 and _is_camera_raw(image, data):
            raise _Refused(
                "format_not_allowed",
                "camera raw is not decoded: its first page is a thumbnail. Export it as JPEG or "
                "TIFF",
            )
        plain = markers and image.mode in ("RGB", "L") and _ODD_MARKERS.isdisjoint(markers)
        into[...] = _fit(_rgb(image, data if plain else None, spec), spec)
        return (
            replace(outcome, further_pages=_further_pages(data))
            if outcome.format == "tiff"
            else outcome
        )
    except _Refused as refusal:
        return replace(outcome, reason=refusal.reason, message=_one_line(str(refusal)))
    except (
        Exception
    ) as error:  # the one place where a bad image turns into data: Pillow raises nearly every type
        reason = "truncated" if "truncated" in str(error).lower() else "decode_error"
        return replace(
            outcome, reason=reason, message=_one_line(f"{type(error).__name__}: {error}")
        )


def decode(
    items: Sequence[Encoded],
    spec: DecodeSpec,
    one: Callable[..., Outcome] = decode_one,
    limits: Limits | None = None,
) -> tuple[Pixels, list[Outcome]]:
    """Pixels uint8 [n_good, H, W, 3] of the good ones in order, and one outcome an item. limits:
    None for those of spec.max_pixels.

    The pixels lie where the child wrote them, until the array and all views on it are gone. Raises
    what isolation.Child.run raises.
    """
    images = [item.data for item in items if item.data]
    load_decoders(spec.mode)
    worker = _worker_for(one, spec, limits or limits_of(spec), len(images))
    ledger = worker.ledger

    def charge(at: int, death: Death) -> None:
        reason = "time_limit" if death.timed_out else "decoder_died"
        ledger[at] = _entry(Outcome(0, 0, "", reason, f"the decoder {death.message}"))

    worker.child.run(images, charge)
    decoded = map(_outcome, ledger[: len(images)].tolist())
    outcomes = [next(decoded) if item.data else _without_bytes(item) for item in items]
    good = sum(outcome.reason is None for outcome in outcomes)
    if (
        good < len(images) or worker.child.runs == CHILD_RUNS
    ):  # a bad image may have spoilt more than its own row
        _here.worker = None
    return worker.pages.current[:good], outcomes


def decode_bytes(blobs: list[Any], spec: DecodeSpec) -> tuple[Pixels, list[Outcome]]:
    """`decode`, of images that are nothing but their bytes."""
    return decode([Encoded(n, "", "", bytes(blob)) for n, blob in enumerate(blobs)], spec)


def limits_of(spec: DecodeSpec) -> Limits:
    """CPU seconds grow with the pixel cap."""
    return Limits(cpu_s=CPU_S * max(1.0, spec.max_pixels / CPU_S_PIXELS))


def left_to_device(data: bytes | None, spec: DecodeSpec) -> tuple[Outcome, int] | None:
    """Header and EXIF orientation (1..8) of a JPEG for a hardware decoder: baseline, whole, within
    limits, to be exported.
    """
    resized = spec.pixels.size is not None and spec.pixels.resample in TORCH_MODES
    if (
        spec.mode not in ON_DEVICE
        or not resized
        or not data
        or data[:3] + data[-2:] != b"\xff\xd8\xff\xff\xd9"
    ):
        return None
    with suppress(Exception):  # `decode` says what is wrong with it
        image, markers = _open(data, spec.formats), _markers(data)
        _check_header(image, data, markers, spec.max_pixels)
        turn = _orientation(image)
        width, height = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
        to_width, to_height = fit_size((width, height), spec.pixels)
        rows, columns = spec.pixels.crop or (to_height, to_width)
        baseline = (
            0xC0 in markers
            and _NOT_BASELINE.isdisjoint(markers)
            and image.info.get("adobe_transform", 1) == 1
        )
        plain = (
            baseline and image.format == "JPEG" and [part[0] for part in image.layer] == [1, 2, 3]
        )
        if plain and columns <= to_width <= width and rows <= to_height <= height:
            return Outcome(
                image.width, image.height, "jpeg", None, ""
            ), turn if turn in _ORIENTATIONS else 1
    return None


class _DecoderWorker:
    """A child that decodes, the pages of pixels that it fills, and the ledger of what became of
    each image.
    """

    def __init__(
        self, key: tuple[Callable[..., Outcome], DecodeSpec, Limits, int], rows: int
    ) -> None:
        self.key, (one, spec, limits, _) = key, key
        self.pages = pages = Pages(PAGES, (rows, *spec.pixels.shape, 3), np.uint8)
        self.ledger = ledger = shared((rows,), _ENTRY)

        def work(at: int, data: bytes) -> None:
            _prepare_child(spec.mode)
            good = int(np.count_nonzero(ledger["good"][:at]))
            ledger[at] = _entry(one(data, spec, pages.current[good]))

        self.child = Child(work, rows, limits, [ledger, *pages.memory])


_loading = threading.Lock()
_here = threading.local()  # a child dies with the thread that forked it


def _worker_for(
    one: Callable[..., Outcome], spec: DecodeSpec, limits: Limits, rows: int
) -> _DecoderWorker:
    """That of this thread's last call, where it fits and has a free page."""
    worker, key = getattr(_here, "worker", None), (one, spec, limits, os.getpid())
    if worker is None or worker.key != key or len(worker.ledger) < rows or not worker.pages.turn():
        worker = _here.worker = _DecoderWorker(key, rows)
    return worker


def load_decoders(mode: str) -> None:
    """Every decoder was imported and run once: a child that imports may wait for ever on a lock of
    a thread it does not have.
    """
    with _loading:
        _load_decoders(mode)


@cache
def _load_decoders(mode: str) -> None:
    if mode == "exact":
        compiled()
    Image.init()
    forms = ("jpeg", "png", "webp", "bmp", "gif", "tiff")
    spec = DecodeSpec(
        PixelSpec((4, 4), Image.Resampling.BILINEAR, None, 1, (0, 0, 0), (1, 1, 1)),
        forms,
        64,
        None,
        mode,
    )
    for form in forms:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, form)
        decode_one(buffer.getvalue(), spec, np.empty((4, 4, 3), np.uint8))


@cache
def _prepare_child(mode: str) -> None:
    Image.MAX_IMAGE_PIXELS = None  # our own cap is judged from the header
    PngImagePlugin.MAX_TEXT_CHUNK = (
        PNG_TEXT_BYTES  # else 1 MB of metadata makes a good picture a bad one
    )
    with suppress(
        AttributeError
    ):  # not glibc. M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: a page that was freed serves the next image
        _ = [
            ctypes.CDLL(None).mallopt(option, limit)
            for option, limit in ((-3, 1 << 25), (-1, 1 << 28))
        ]
    if mode != "exact":
        import torch

        torch.set_num_threads(
            1
        )  # OpenMP would wait for ever for the threads that it had before the fork


def _without_bytes(item: Encoded) -> Outcome:
    if item.data is not None:
        return Outcome(0, 0, "", "empty", "no bytes")
    return Outcome(0, 0, "", item.reason or "missing", item.message)


def _entry(outcome: Outcome) -> tuple[object, ...]:
    reason, message = (outcome.reason or "").encode(), outcome.message.encode()[:MESSAGE_CHARS]
    return (
        outcome.width,
        outcome.height,
        outcome.format.encode(),
        reason,
        message,
        not reason,
        outcome.further_pages,
    )


def _outcome(entry: tuple[Any, ...]) -> Outcome:
    width, height, form, reason, message, _, further_pages = entry
    reason, message = reason.decode() or None, message.decode(errors="ignore")
    return Outcome(width, height, form.decode(), reason, message, further_pages)


class _Refused(Exception):
    """This image breaks our policy."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in one_line(text, MESSAGE_CHARS))


def _open(data: bytes, formats: Sequence[str]) -> Any:
    """The image with its header read and no pixel decoded."""
    names = [name.lower() for name in formats]
    try:
        return Image.open(io.BytesIO(data), formats=[name.upper() for name in names])
    except Image.DecompressionBombError as error:
        raise _Refused("too_many_pixels", str(error)) from None
    except (UnidentifiedImageError, OSError) as error:
        name = next((name for name, pattern in _SIGNATURES if pattern.match(data)), None)
        if name is None:
            raise _Refused("not_an_image", "no known image signature") from None
        if name not in names:
            if name in FORMATS:
                raise _Refused(
                    "format_not_allowed", f"{name} is not in formats ({', '.join(names)})"
                ) from None
            raise _Refused(
                "format_not_allowed", f"{name} is not decoded: convert it to JPEG, PNG or WebP"
            ) from None
        if _bytes_needed(name, data) > len(data):
            raise _Refused(
                "truncated", f"the {name} header points beyond the {len(data)} bytes that are there"
            ) from None
        if isinstance(error, UnidentifiedImageError):
            raise _Refused(
                "not_an_image",
                f"starts like a {name}, but its header is cut, broken, or of a kind that Pillow "
                f"does not read",
            ) from None
        raise


def _further_pages(data: bytes) -> int:
    """How many pages a TIFF has behind the first; 0 where their directories cannot be read."""
    with suppress(Exception):
        return int(Image.open(io.BytesIO(data), formats=["TIFF"]).n_frames) - 1
    return 0


def _bytes_needed(name: str, data: bytes) -> int:
    """The least size that the first bytes promise, for the formats whose cut files Pillow does not
    call truncated.
    """
    if name == "webp":
        return 8 + int.from_bytes(data[4:8], "little")
    if name == "tiff" and data[2:4] in (b"*\0", b"\0*"):
        return 2 + int(
            struct.unpack("<I" if data[:2] == b"II" else ">I", data[4:8].ljust(4, b"\0"))[0]
        )
    return 0


def _markers(data: bytes) -> bytes:
    """The byte behind each 0xFF of a JPEG; the codes of its markers are among them. Four times as
    fast as bytes.count.
    """
    values = np.frombuffer(data, np.uint8)
    return bytes(values[1:][values[:-1] == 0xFF])


def _check_header(image: Any, data: bytes, markers: bytes, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _Refused("too_many_pixels", f"{width}x{height} is more than max_pixels {max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise _Refused("too_many_pixels", f"{width}x{height} has a side of more than {MAX_SIDE}")
    if markers.count(0xDA) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise _Refused("too_many_scans", f"a JPEG of more than {scans - 1} scans")
    if image.mode == "F":
        raise _Refused("float_pixels", "32-bit floating-point pixels")


def _is_camera_raw(image: Any, data: bytes) -> bool:
    """Whether a TIFF is one of the cameras' own formats: DNG, CR2, or a thumbnail with the picture
    behind SubIFDs (NEF, ARW).
    """
    tags = image.tag_v2
    is_thumbnail = bool(int(tags.get(_NEW_SUBFILE_TYPE, 0)) & 1)
    return _DNG_VERSION in tags or data[8:10] == b"CR" or (is_thumbnail and _SUB_IFDS in tags)


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end marker, counted to MAX_SCANS + 1. Those of thumbnails and
    trailing videos do not count.
    """
    marker = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
    count = at = 0
    while (
        (found := marker.search(data, at)) and data[found.end() - 1] != 0xD9 and count <= MAX_SCANS
    ):
        count += data[found.end() - 1] == 0xDA
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return count


def _rgb(image: Any, jpeg: bytes | None, spec: DecodeSpec) -> Any:
    """The upright RGB image that Hugging Face's load_image gives, or our policy where that one
    raises or spoils.

    An array [H, W, 3] instead of an image where that saves a copy.
    """
    loaded = _load(image, jpeg, spec)
    if isinstance(loaded, np.ndarray):
        return loaded
    if (turn := _ORIENTATIONS.get(_orientation(image))) is not None:
        loaded = loaded.transpose(turn)
    if loaded.mode.startswith("I"):
        loaded = _to_8bit(loaded, spec.rules)
    if spec.background is not None and loaded.has_transparency_data:
        canvas = Image.new("RGBA", loaded.size, (*spec.background, 255))
        loaded = Image.alpha_composite(canvas, loaded.convert("RGBA"))
    return loaded if loaded.mode == "RGB" else loaded.convert("RGB")


def _load(image: Any, jpeg: bytes | None, spec: DecodeSpec) -> Any:
    """The image with its pixels. libjpeg-turbo by itself gives those of Pillow, which is built on
    it, without Pillow's copies.
    """
    if jpeg is not None:
        packed = _orientation(image) not in _ORIENTATIONS
        width, height = _draft_size(image.size, spec) if spec.mode == "draft" else image.size
        with suppress(
            Exception
        ):  # it raises at every flaw; what is good in spite of one, or why not, only Pillow says
            pixels = simplejpeg.decode_jpeg(
                jpeg, "RGB" if packed else "RGBX", min_height=height, min_width=width
            )
            return pixels if packed else _image(pixels)
    image.load()
    return image


def _draft_size(size: tuple[int, int], spec: DecodeSpec) -> tuple[int, int]:
    """An eighth, a quarter or a half, where that divides the sides: a rounded side would move every
    pixel after the resize.
    """
    least = DRAFT_GAP * max(spec.pixels.size or size)
    part = next(
        (
            part
            for part in (8, 4, 2)
            if all(side % part == 0 and side // part >= least for side in size)
        ),
        1,
    )
    return size[0] // part, size[1] // part


def _image(pixels: Pixels) -> Any:
    """The RGB image whose memory `pixels` is, uint8 [H, W, 4], the last unused: as Pillow keeps
    them, so nothing is copied.
    """
    flat = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
    return Image.fromarrow(flat, "RGB", (pixels.shape[1], pixels.shape[0]))


def _orientation(image: Any) -> Any:
    """The EXIF orientation. An EXIF block that cannot be read has none: load_image raises there,
    though the pixels are good.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error):
        return 1


def _to_8bit(image: Any, rules: int) -> Any:
    """The high byte of 16-bit pixels; Pillow's own conversion turns all above 255 into white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise _Refused(
            "unsupported_pixels", f"integer pixels from {values.min()} to {values.max()}"
        )
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(258) == (12,) else 16  # TIFF BitsPerSample
    if (
        tags.get(_PHOTOMETRIC) == 0 and rules > 1
    ):  # white is zero, which Pillow 13 heeds for 8 bits alone
        values = (1 << bits) - 1 - values
    scaled = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        scaled.info["transparency"] = image.info["transparency"] >> 8
    return scaled


def _fit(image: Any, spec: DecodeSpec) -> Pixels:
    full = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    size = fit_size(full, spec.pixels)
    if math.prod(size) > max(spec.max_pixels, math.prod(full)):
        raise _Refused(
            "too_many_pixels", f"{full[0]}x{full[1]} resized becomes {size[0]}x{size[1]}"
        )
    if spec.pixels.size is not None and spec.mode == "exact":
        image = (partial(resize, image) if isinstance(image, np.ndarray) else image.resize)(
            size, spec.pixels.resample
        )
    elif spec.pixels.size is not None:
        image = resize_fast(np.require(image, np.uint8, "W"), size, spec.pixels.resample)
    pixels = np.asarray(image)
    return pixels if spec.pixels.crop is None else _center_crop(pixels, spec.pixels.crop)


def fit_size(size: tuple[int, int], pixels: PixelSpec) -> tuple[int, int]:
    """(width, height) after the resize. Source:
    transformers.image_transforms.get_resize_output_image_size.
    """
    if pixels.size is None:
        return size
    if len(pixels.size) == 2:
        return pixels.size[1], pixels.size[0]
    width, height = size
    edge = pixels.size[0]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _center_crop(pixels: Pixels, crop: tuple[int, int]) -> Pixels:
    """The middle, on zeros where the image is smaller. Source:
    transformers.image_transforms.center_crop.
    """
    out = np.zeros((*crop, 3), np.uint8)
    top, left = ((have - want) // 2 for have, want in zip(pixels.shape, crop))
    middle = pixels[max(0, top) : max(0, top) + crop[0], max(0, left) : max(0, left) + crop[1]]
    below, right = max(0, -top), max(0, -left)
    out[below : below + middle.shape[0], right : right + middle.shape[1]] = middle
    return out
