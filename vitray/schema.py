"""The words that travel: columns, Arrow schemas, the closed list of reasons, shards, blocks and receipts.

Pure data, no input or output. What a model or a source does is in their rooms.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pyarrow as pa

SCHEMA_VERSION = 1

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"))
REASONS = {
    "empty": "no bytes",
    "not_an_image": "the bytes begin like no image format known here",
    "format_not_allowed": "an image, but of a format outside `formats`",
    "truncated": "the image ends before its pixels do",
    "too_many_pixels": "more pixels than `max_pixels`, or a side of more than 1,048,576",
    "too_many_scans": "a progressive JPEG with more scans than any camera writes",
    "float_pixels": "floating-point pixels have no defined range",
    "unsupported_pixels": "integer pixels beyond 16 bit",
    "too_large": "more encoded bytes than the cap of one image",
    "time_limit": "decoding took more CPU seconds than one image may",
    "decoder_died": "the decoder crashed on these bytes",
    "decode_error": "the decoder refused the bytes",
    "missing": "the listed object does not exist (any more) or cannot be read, or the row names or holds no image",
    "path_not_allowed": "a manifest path outside the allowed prefixes",
}

# which image a row is about, good or bad
_IMAGE = list(pa.schema([("key", pa.string()), ("shard", pa.string()), ("index", pa.int32()), ("uri", pa.string())]))
ERROR_SCHEMA = pa.schema(
    [*_IMAGE, ("reason", pa.string()), ("message", pa.string()), ("content_hash", pa.binary(16)), ("size_bytes", pa.int64())]
)

_SIZE = [("width", pa.int32()), ("height", pa.int32()), ("format", pa.dictionary(pa.int8(), pa.string()))]
IMAGE_FIELDS = [*_IMAGE, *pa.schema([*_SIZE, ("content_hash", pa.binary(16))])]
_BEST = [("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())]
_TOP = [("top_labels", pa.string()), ("top_ids", pa.int32()), ("top_scores", pa.float32())]
LABEL_FIELDS = list(pa.schema([*_BEST, *((name, pa.list_(kind)) for name, kind in _TOP)]))


RESERVED = tuple(f.name for f in IMAGE_FIELDS + LABEL_FIELDS)


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """One embedding column: its name, its length D, and how it is made (see job.Embedding)."""

    column: str
    dimension: int
    layer: int | None  # None: after the final LayerNorm
    pool: str
    normalize: bool
    dtype: str


def row_schema(labels: bool, vectors: list[VectorColumn], kept: pa.Schema) -> pa.Schema:
    """The one Arrow schema of every data file of a dataset; scalars stand before vectors."""
    fields = IMAGE_FIELDS + list(kept) + (LABEL_FIELDS if labels else [])
    for v in vectors:
        value = pa.float16() if v.dtype == "float16" else pa.float32()
        fields.append(pa.field(v.column, pa.list_(pa.field("element", value, nullable=False), v.dimension)))
    return pa.schema(fields)


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """What an image processor does to pixels before the device: resize, then crop.

    size: (height, width), or (shortest_edge,) which keeps the aspect ratio. crop: (height, width) or None.
    resample: a PIL resampling number. rescale, mean, std are applied on the device: (x * rescale - mean) / std.
    """

    size: tuple[int, ...] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every image that comes out."""
        if self.crop is not None:
            return self.crop
        assert self.size is not None and len(self.size) == 2
        return (self.size[0], self.size[1])


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """All that decides a row's pixels, or its reason. mode: exact | fast | draft, see decode.py."""

    pixels: PixelSpec
    formats: tuple[str, ...]
    max_pixels: int
    background: tuple[int, int, int] | None
    mode: str = "exact"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint is, found once and frozen in dataset.json.

    labels: class names by id, empty when there are none. prompts, text_sha256: of labels that a text tower reads, and the hash of what
    its tokenizer makes of them. head, head_sha256: a linear head of its own, where it is and its hash; head_column: the stored
    embedding that it read instead of images. precision, engine, batch_size: resolved.
    engine_why: what each engine did, where `auto` chose between several.
    """

    model: str
    revision: str | None
    weights_sha256: str
    family: str
    labels: tuple[str, ...]
    multi_label: bool
    dimension: int
    layers: int
    prefix_tokens: int
    has_cls: bool
    pixels: PixelSpec
    precision: str
    engine: str
    batch_size: int
    engine_why: str = ""
    prompts: tuple[str, ...] = ()
    text_sha256: str = ""
    head: str = ""
    head_sha256: str = ""
    head_column: str = ""

    def labels_sha256(self) -> str:
        return hashlib.sha256("\0".join(self.labels).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Member:
    """One object of a group of small objects."""

    url: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of commit. `start`, `stop`: row groups of a Parquet file or rows of a manifest; (0, 0) for all.

    rows: how many images, when listing already tells. members: only for kind "files".
    """

    id: str
    kind: str  # tar | parquet | files | manifest
    url: str
    size: int
    version: str
    start: int = 0
    stop: int = 0
    rows: int | None = None
    members: tuple[Member, ...] = ()
    modified: float | None = field(default=None, compare=False)  # the object, or the newest member; seconds since 1970


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as it came: bytes, or the reason why there are none."""

    index: int
    key: str
    uri: str
    data: bytes | None
    reason: str | None = None
    message: str = ""
    kept: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The last thing a source yields: how many images the shard holds, and the byte at which it was cut, if it was."""

    total: int
    truncated_at: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What reaches the driver: never rows, only what became of them.

    kind: "fragment" (staged now), "staged" (was there before), "end" (total is known),
    "failed" (could not be read), "broken" (its bytes are no such shard), "changed" (not the planned version).
    """

    kind: str
    shard: str
    start: int = 0
    stop: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    total: int = 0
    message: str = ""
    size_bytes: int = 0  # of the encoded images, where they were read now

    @property
    def errors(self) -> int:
        return sum(self.reasons.values())


def content_hash(data: bytes) -> bytes:
    """16 bytes of BLAKE2b over the encoded image."""
    return hashlib.blake2b(data, digest_size=16).digest()


def short_hash(text: str, digits: int = 10) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def ipc_bytes(table: pa.Table, compression: str | None = None) -> bytes:
    """One table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def ipc_table(data: bytes | pa.Buffer) -> pa.Table:
    with pa.ipc.open_stream(data, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
        return reader.read_all()
