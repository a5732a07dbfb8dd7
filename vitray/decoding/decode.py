"""Bytes -> pixels or a reason; hides every oddity of image formats.

Good pixels equal those of Hugging Face bit for bit in the mode `exact`: load_image (EXIF
orientation, RGB), then the checkpoint's PIL processor. The other modes:

- `fast` resizes with torch, with some pixels a level off;
- `draft` also decodes large JPEGs at a fraction of their size;
- `gpu` and `hybrid` are `fast` for everything that is not `left_to_device`.

All modes give the same good rows, and the same reasons for the others. `decode_one` is the pure
part. `decode` runs it in a child process (isolation.py), so that a crash, a bomb or an endless
decoder costs one row. Other modules read the bytes and normalise the pixels.
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
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vitray.decoding.isolation import Child, Death, Limits, Pages, shared
from vitray.decoding.resize import Pixels, compiled, resize, resize_fast
from vitray.errors import one_line
from vitray.job import FORMATS
from vitray.schema import TORCH_FILTERS, DecodeSpec, Encoded, PixelSpec, Reason, SourceRules

# px: the weights of a resize grow with a side; a PNG of 50,000,000x1 in 146 kB took 1.8 GB
MAX_SIDE = 1 << 20
# cameras and encoders write about 10; a file of 1,000 scans decodes 100 times slower than its
# length suggests
MAX_SCANS = 100
PNG_TEXT_BYTES = 64 << 20  # of one chunk, inflated; as much as Pillow allows for all of them
MESSAGE_CHARS = 200
PAGES = 4  # of pixels: what one thread's callers hold at a time in the pipeline
CHILD_RUNS = 64  # calls for which a child is used, to end memory leaks and a fragmented heap
# The slowest honest image of so many pixels, a progressive JPEG of noise, takes 2.5 s.
CPU_S = 5.0
CPU_S_PIXELS = 50_000_000
# a draft is decoded at no less than three times the size that it is resized to: a level or less off
# in the mean
DRAFT_GAP = 3
ON_DEVICE = ("gpu", "hybrid")  # modes in which baseline JPEGs are decoded where the model is

# Only to name what a file is that cannot be read or is not allowed. Pillow decides what is decoded.
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
# lossless or arithmetic coding, of which Pillow refuses what exceeds its buffer
_ODD_MARKERS = frozenset(b"\xc3\xc9\xca\xcb")
# frames; a false match costs only speed
_NOT_BASELINE = frozenset(b"\xc1\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf")
_ORIENTATIONS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
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
    """The result of decoding one image.

    reason: None for a good image. width, height: of the header, before EXIF orientation; 0 where
    they are unknown. further_pages: of a TIFF, after the first one, which was decoded.
    """

    width: int
    height: int
    format: str
    reason: str | None
    message: str
    further_pages: int = 0


def decode_one(data: bytes, spec: DecodeSpec, into: Pixels) -> Outcome:
    """The outcome of one image; a good one's pixels are in `into`, uint8 [H, W, 3].

    Runs in this process, without limits.
    """
    outcome = Outcome(0, 0, "", None, "")
    try:
        image = _open(data, spec.formats)
        # a TIFF's `size` is already turned by its orientation
        width, height = getattr(image, "_tile_size", image.size)
        form = "jpeg" if image.format == "MPO" else image.format.lower()
        outcome = Outcome(width, height, form, None, "")
        markers = _markers(data) if form == "jpeg" else b""
        _check_header(image, data, markers, spec.max_pixels)
        if form == "tiff" and spec.rules >= SourceRules.V2 and _is_camera_raw(image, data):
            raise _Refused(
                Reason.FORMAT_NOT_ALLOWED,
                "camera raw is not decoded: its first page is a thumbnail. Export it as JPEG or "
                "TIFF",
            )
        is_simple = image.mode in ("RGB", "L") and _ODD_MARKERS.isdisjoint(markers)
        jpeg = data if markers and is_simple else None
        into[...] = _fit(_rgb(image, jpeg, spec), spec)
        if form == "tiff":
            return replace(outcome, further_pages=_further_pages(data))
        return outcome
    except _Refused as refusal:
        return replace(outcome, reason=refusal.reason, message=_one_line(str(refusal)))
    # The one place where a bad image turns into data: Pillow raises nearly every type.
    except Exception as error:
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.DECODE_ERROR
        message = _one_line(f"{type(error).__name__}: {error}")
        return replace(outcome, reason=reason, message=message)


def decode(
    items: Sequence[Encoded],
    spec: DecodeSpec,
    one: Callable[..., Outcome] = decode_one,
    limits: Limits | None = None,
) -> tuple[Pixels, list[Outcome]]:
    """Pixels uint8 [n_good, H, W, 3] of the good images in order, and one outcome for each item.

    The pixels stay where the child wrote them, until the array and all views on it are gone.
    limits: None for those that follow from spec.max_pixels. Raises what isolation.Child.run raises.
    """
    images = [item.data for item in items if item.data]
    load_decoders(spec.mode)
    worker = _worker_for(one, spec, limits or limits_of(spec), len(images))
    entries = worker.entries

    def charge(at: int, death: Death) -> None:
        reason = Reason.TIME_LIMIT if death.timed_out else Reason.DECODER_DIED
        entries[at] = _entry(Outcome(0, 0, "", reason, f"the decoder {death.message}"))

    worker.child.run(images, charge)
    decoded = map(_outcome, entries[: len(images)].tolist())
    outcomes = [next(decoded) if item.data else _without_bytes(item) for item in items]
    good = sum(outcome.reason is None for outcome in outcomes)
    # a bad image may have damaged more than its own row
    if good < len(images) or worker.child.runs == CHILD_RUNS:
        _per_thread.worker = None
    return worker.pages.current[:good], outcomes


def decode_bytes(blobs: list[Any], spec: DecodeSpec) -> tuple[Pixels, list[Outcome]]:
    """`decode` for images of which only the bytes are known."""
    return decode([Encoded(n, "", "", bytes(blob)) for n, blob in enumerate(blobs)], spec)


def limits_of(spec: DecodeSpec) -> Limits:
    """CPU seconds grow with the pixel cap."""
    return Limits(cpu_s=CPU_S * max(1.0, spec.max_pixels / CPU_S_PIXELS))


def left_to_device(data: bytes | None, spec: DecodeSpec) -> tuple[Outcome, int] | None:
    """Header and EXIF orientation (1..8) of a JPEG that a hardware decoder takes, else None.

    It takes baseline JPEGs that are complete, within the limits, and resized to a smaller size.
    """
    resized = spec.pixels.size is not None and spec.pixels.resample in TORCH_FILTERS
    if spec.mode not in ON_DEVICE or not resized or not data:
        return None
    if data[:3] + data[-2:] != b"\xff\xd8\xff\xff\xd9":
        return None
    with suppress(Exception):  # `decode` reports what is wrong with it
        image, markers = _open(data, spec.formats), _markers(data)
        _check_header(image, data, markers, spec.max_pixels)
        turn = _orientation(image)
        width, height = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
        to_width, to_height = fit_size((width, height), spec.pixels)
        rows, columns = spec.pixels.crop or (to_height, to_width)
        is_smaller = columns <= to_width <= width and rows <= to_height <= height
        if _is_baseline(image, markers) and is_smaller:
            outcome = Outcome(image.width, image.height, "jpeg", None, "")
            return outcome, turn if turn in _ORIENTATIONS else 1
    return None


def _is_baseline(image: Any, markers: bytes) -> bool:
    """Whether a JPEG is baseline, with the usual three components in YCbCr."""
    return (
        0xC0 in markers
        and _NOT_BASELINE.isdisjoint(markers)
        and image.info.get("adobe_transform", 1) == 1
        and image.format == "JPEG"
        and [part[0] for part in image.layer] == [1, 2, 3]
    )


class _DecoderWorker:
    """A child process that decodes, the pages of pixels that it fills, and an entry per image."""

    def __init__(
        self,
        key: tuple[Callable[..., Outcome], DecodeSpec, Limits, int],
        rows: int,
        given: Pages | None,
    ) -> None:
        self.key = key
        one, spec, limits, _ = key
        shape = (rows, *spec.pixels.shape, 3)
        self.pages = pages = given or Pages([shared(shape, np.uint8) for _ in range(PAGES)])
        self.entries = entries = shared((rows,), _ENTRY)

        def work(at: int, data: bytes) -> None:
            _prepare_child(spec.mode)
            good = int(np.count_nonzero(entries["good"][:at]))
            entries[at] = _entry(one(data, spec, pages.current[good]))

        self.child = Child(work, rows, limits, [entries, *pages.memory])


class _PerThread(threading.local):
    """The state of one thread: a child dies with the thread that forked it.

    given: see `use_pages`.
    """

    worker: _DecoderWorker | None = None
    given: Pages | None = None


_loading = threading.Lock()
_per_thread = _PerThread()


def use_pages(pages: Pages) -> None:
    """Let `decode` leave this thread's pixels in these pages, which must be large enough."""
    _per_thread.given = pages
    _per_thread.worker = None


def _worker_for(
    one: Callable[..., Outcome], spec: DecodeSpec, limits: Limits, rows: int
) -> _DecoderWorker:
    """The worker of this thread's last call if it fits and has a free page, else a new one."""
    key = (one, spec, limits, os.getpid())
    given = _per_thread.given
    if given is not None:
        given.turn()
        rows = len(given.current)
    worker = _per_thread.worker
    fits = worker is not None and worker.key == key and len(worker.entries) >= rows
    if worker is None or not fits or not (given is not None or worker.pages.turn()):
        worker = _per_thread.worker = _DecoderWorker(key, rows, given)
    return worker


def load_decoders(mode: str) -> None:
    """Import every decoder and run it once, before a child is forked.

    A child that imports may wait for ever on a lock of a thread that it does not have.
    """
    with _loading:
        _load_decoders(mode)


@cache
def _load_decoders(mode: str) -> None:
    if mode == "exact":
        compiled()
    Image.init()
    forms = ("jpeg", "png", "webp", "bmp", "gif", "tiff")
    pixels = PixelSpec((4, 4), Image.Resampling.BILINEAR, None, 1, (0, 0, 0), (1, 1, 1))
    spec = DecodeSpec(pixels, forms, max_pixels=64, background=None, mode=mode)
    for form in forms:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, form)
        decode_one(buffer.getvalue(), spec, np.empty((4, 4, 3), np.uint8))


@cache
def _prepare_child(mode: str) -> None:
    Image.MAX_IMAGE_PIXELS = None  # vitray's own cap is checked on the header
    # Pillow's default makes a good image with 1 MB of metadata a bad one
    PngImagePlugin.MAX_TEXT_CHUNK = PNG_TEXT_BYTES
    _keep_freed_memory()
    if mode != "exact":
        import torch

        # OpenMP would wait for ever for the threads that it had before the fork
        torch.set_num_threads(1)


def _keep_freed_memory() -> None:
    """Let a freed page serve the next image: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc."""
    with suppress(AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, 1 << 28)


def _without_bytes(item: Encoded) -> Outcome:
    if item.data is not None:
        return Outcome(0, 0, "", Reason.EMPTY, "no bytes")
    return Outcome(0, 0, "", item.reason or Reason.MISSING, item.message)


def _entry(outcome: Outcome) -> tuple[object, ...]:
    reason = (outcome.reason or "").encode()
    message = outcome.message.encode()[:MESSAGE_CHARS]
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
    return Outcome(
        width=width,
        height=height,
        format=form.decode(),
        reason=reason.decode() or None,
        message=message.decode(errors="ignore"),
        further_pages=further_pages,
    )


class _Refused(Exception):
    """This image breaks vitray's rules. reason: of schema.REASONS."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in one_line(text, MESSAGE_CHARS))


def _open(data: bytes, formats: Sequence[str]) -> Any:
    """The image, with its header read and no pixel decoded."""
    names = [name.lower() for name in formats]
    try:
        return Image.open(io.BytesIO(data), formats=[name.upper() for name in names])
    except Image.DecompressionBombError as error:
        raise _Refused(Reason.TOO_MANY_PIXELS, str(error)) from None
    except (UnidentifiedImageError, OSError) as error:
        _refuse_unopened(data, names)
        if isinstance(error, UnidentifiedImageError):
            raise _Refused(
                Reason.NOT_AN_IMAGE,
                f"starts like a {_signature(data)}, but its header is cut, broken, "
                "or of a kind that Pillow does not read",
            ) from None
        raise


def _signature(data: bytes) -> str | None:
    """The format that the first bytes name."""
    return next((name for name, pattern in _SIGNATURES if pattern.match(data)), None)


def _refuse_unopened(data: bytes, names: Sequence[str]) -> None:
    """Raise _Refused if the first bytes say why Pillow could not open the file."""
    name = _signature(data)
    if name is None:
        raise _Refused(Reason.NOT_AN_IMAGE, "no known image signature") from None
    if name not in names:
        message = f"{name} is not decoded: convert it to JPEG, PNG or WebP"
        if name in FORMATS:
            message = f"{name} is not in formats ({', '.join(names)})"
        raise _Refused(Reason.FORMAT_NOT_ALLOWED, message) from None
    if _bytes_needed(name, data) > len(data):
        raise _Refused(
            Reason.TRUNCATED,
            f"the {name} header points beyond the {len(data)} bytes that are there",
        ) from None


def _further_pages(data: bytes) -> int:
    """The number of pages of a TIFF after the first; 0 where they cannot be read."""
    with suppress(Exception):
        return int(Image.open(io.BytesIO(data), formats=["TIFF"]).n_frames) - 1
    return 0


def _bytes_needed(name: str, data: bytes) -> int:
    """The least size of a file, by its first bytes.

    For the formats whose cut files Pillow does not call truncated; 0 for the others.
    """
    if name == "webp":
        return 8 + int.from_bytes(data[4:8], "little")
    if name == "tiff" and data[2:4] in (b"*\0", b"\0*"):
        order = "<I" if data[:2] == b"II" else ">I"
        return 2 + int(struct.unpack(order, data[4:8].ljust(4, b"\0"))[0])
    return 0


def _markers(data: bytes) -> bytes:
    """The byte after each 0xFF of a JPEG, which include the codes of its markers.

    This is four times as fast as bytes.count.
    """
    values = np.frombuffer(data, np.uint8)
    return bytes(values[1:][values[:-1] == 0xFF])


def _check_header(image: Any, data: bytes, markers: bytes, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _Refused(
            Reason.TOO_MANY_PIXELS, f"{width}x{height} is more than max_pixels {max_pixels}"
        )
    if max(width, height) > MAX_SIDE:
        raise _Refused(
            Reason.TOO_MANY_PIXELS, f"{width}x{height} has a side of more than {MAX_SIDE}"
        )
    if markers.count(0xDA) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise _Refused(Reason.TOO_MANY_SCANS, f"a JPEG of more than {scans - 1} scans")
    if image.mode == "F":
        raise _Refused(Reason.FLOAT_PIXELS, "32-bit floating-point pixels")


def _is_camera_raw(image: Any, data: bytes) -> bool:
    """Whether a TIFF is camera raw: DNG, CR2, or a thumbnail with SubIFDs (NEF, ARW)."""
    tags = image.tag_v2
    is_thumbnail = bool(int(tags.get(_NEW_SUBFILE_TYPE, 0)) & 1)
    return _DNG_VERSION in tags or data[8:10] == b"CR" or (is_thumbnail and _SUB_IFDS in tags)


def _scans(data: bytes) -> int:
    """The scans of a JPEG up to its end marker, counted to MAX_SCANS + 1.

    Scans of thumbnails and trailing videos do not count.
    """
    marker = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
    count = at = 0
    while count <= MAX_SCANS and (match := marker.search(data, at)):
        end = match.end()
        code = data[end - 1]
        if code == 0xD9:
            break
        count += code == 0xDA
        at = end + int.from_bytes(data[end : end + 2], "big")
    return count


def _rgb(image: Any, jpeg: bytes | None, spec: DecodeSpec) -> Any:
    """The upright RGB image that Hugging Face's load_image gives, or an array [H, W, 3] of it.

    The array saves a copy. Where load_image raises or damages pixels, vitray's own rules apply.
    """
    loaded = load_pixels(image, jpeg, spec)
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


def load_pixels(image: Any, jpeg: bytes | None, spec: DecodeSpec) -> Any:
    """The image with its pixels, or an array [H, W, 3] of them.

    jpeg: the bytes, for libjpeg-turbo itself. It gives the same pixels as Pillow, which is built on
    it, without Pillow's copies.
    """
    if jpeg is not None:
        packed = _orientation(image) not in _ORIENTATIONS
        width, height = _draft_size(image.size, spec) if spec.mode == "draft" else image.size
        # it raises at every flaw; only Pillow decides whether the image is good in spite of one
        with suppress(Exception):
            pixels = simplejpeg.decode_jpeg(
                jpeg, "RGB" if packed else "RGBX", min_height=height, min_width=width
            )
            return pixels if packed else _image(pixels)
    image.load()
    return image


def _draft_size(size: tuple[int, int], spec: DecodeSpec) -> tuple[int, int]:
    """An eighth, a quarter or a half of the size, if that divides both sides, else the size.

    A rounded side would move every pixel after the resize.
    """
    least = DRAFT_GAP * max(spec.pixels.size or size)
    for divisor in (8, 4, 2):
        if all(side % divisor == 0 and side // divisor >= least for side in size):
            return size[0] // divisor, size[1] // divisor
    return size


def _image(pixels: Pixels) -> Any:
    """An RGB image over the memory of `pixels`, uint8 [H, W, 4], the last unused.

    Pillow keeps pixels so, and therefore copies nothing.
    """
    flat = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
    return Image.fromarrow(flat, "RGB", (pixels.shape[1], pixels.shape[0]))


def _orientation(image: Any) -> Any:
    """The EXIF orientation; 1 for a broken EXIF block, at which load_image raises."""
    try:
        return image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error):
        return 1


def _to_8bit(image: Any, rules: SourceRules) -> Any:
    """The high byte of 16-bit pixels; Pillow's own conversion turns all above 255 into white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise _Refused(
            Reason.UNSUPPORTED_PIXELS, f"integer pixels from {values.min()} to {values.max()}"
        )
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(258) == (12,) else 16  # TIFF BitsPerSample
    # white is zero, which Pillow 13 respects for 8 bits alone
    if tags.get(_PHOTOMETRIC) == 0 and rules >= SourceRules.V2:
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
            Reason.TOO_MANY_PIXELS, f"{full[0]}x{full[1]} resized becomes {size[0]}x{size[1]}"
        )
    if spec.pixels.size is not None and spec.mode == "exact":
        if isinstance(image, np.ndarray):
            image = resize(image, size, spec.pixels.resample)
        else:
            image = image.resize(size, spec.pixels.resample)
    elif spec.pixels.size is not None:
        image = resize_fast(np.require(image, np.uint8, "W"), size, spec.pixels.resample)
    pixels = np.asarray(image)
    return pixels if spec.pixels.crop is None else _center_crop(pixels, spec.pixels.crop)


def fit_size(size: tuple[int, int], pixels: PixelSpec) -> tuple[int, int]:
    """(width, height) after the resize.

    Source: transformers.image_transforms.get_resize_output_image_size.
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
    """The middle of the pixels, on zeros where the image is smaller.

    Source: transformers.image_transforms.center_crop.
    """
    out = np.zeros((*crop, 3), np.uint8)
    top, left_edge = ((side - part) // 2 for side, part in zip(pixels.shape, crop))
    rows = slice(max(0, top), max(0, top) + crop[0])
    columns = slice(max(0, left_edge), max(0, left_edge) + crop[1])
    middle = pixels[rows, columns]
    below, right = max(0, -top), max(0, -left_edge)
    out[below : below + middle.shape[0], right : right + middle.shape[1]] = middle
    return out
