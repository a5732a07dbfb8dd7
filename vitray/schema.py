"""The data types that packages exchange: columns, Arrow schemas, reasons, shards and events.

Pure data, without input or output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

import pyarrow as pa

SCHEMA_VERSION = 1

# Suffixes of images that vitray decodes. SourceRules.V1 has only the first eight.
IMAGE_SUFFIXES_V1 = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"))
IMAGE_SUFFIXES = IMAGE_SUFFIXES_V1 | {"jpe", "jfif", "pjpeg", "pjp", "apng", "dib"}
_CAMERA_RAW = (
    "3fr arw cr2 cr3 crw dng erf kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
)
_UNDECODED = (
    "heic heif hif avif avifs jxl jp2 j2k j2c jpc jpf jpx jpm svg svgz ico icns cur psd psb xcf "
    "eps tga dds exr hdr pcx pbm pgm ppm pnm wbmp qoi"
)
CAMERA_RAW_SUFFIXES = frozenset(_CAMERA_RAW.split())
# Suffixes of images that vitray does not decode: such files become error rows with a message.
UNDECODED_SUFFIXES = CAMERA_RAW_SUFFIXES | frozenset(_UNDECODED.split())
ALL_IMAGE_SUFFIXES = IMAGE_SUFFIXES | UNDECODED_SUFFIXES


class SourceRules(IntEnum):
    """The rules by which names in a source become rows. A dataset keeps those of its first run.

    V1: as before December 2026. V2: the newest.
    """

    V1 = 1
    V2 = 2


class Reason(StrEnum):
    """Why an image has no row, as error rows store it."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_SCANS = "too_many_scans"
    FLOAT_PIXELS = "float_pixels"
    UNSUPPORTED_PIXELS = "unsupported_pixels"
    TOO_LARGE = "too_large"
    TIME_LIMIT = "time_limit"
    DECODER_DIED = "decoder_died"
    DECODE_ERROR = "decode_error"
    MISSING = "missing"
    PATH_NOT_ALLOWED = "path_not_allowed"


REASONS: dict[Reason, str] = {
    Reason.EMPTY: "no bytes",
    Reason.NOT_AN_IMAGE: "the bytes begin like no image format known here",
    Reason.FORMAT_NOT_ALLOWED: "an image, but of a format outside `formats`",
    Reason.TRUNCATED: "the image ends before its pixels do",
    Reason.TOO_MANY_PIXELS: "more pixels than `max_pixels`, or a side of more than 1,048,576",
    Reason.TOO_MANY_SCANS: "a progressive JPEG with more scans than any camera writes",
    Reason.FLOAT_PIXELS: "floating-point pixels have no defined range",
    Reason.UNSUPPORTED_PIXELS: "integer pixels beyond 16 bit",
    Reason.TOO_LARGE: "more encoded bytes than the cap of one image",
    Reason.TIME_LIMIT: "decoding took more CPU seconds than one image may",
    Reason.DECODER_DIED: "the decoder crashed on these bytes",
    Reason.DECODE_ERROR: "the decoder refused the bytes",
    Reason.MISSING: "the listed object does not exist (any more) or cannot be read, "
    "or the row names or holds no image",
    Reason.PATH_NOT_ALLOWED: "a manifest path outside the allowed prefixes",
}


def describe_reason(reason: str) -> str:
    """The meaning of a stored reason; empty for one that this version does not know."""
    return REASONS[Reason(reason)] if reason in REASONS else ""


# the columns that identify an image, in good rows and error rows
_IMAGE = list(
    pa.schema(
        [("key", pa.string()), ("shard", pa.string()), ("index", pa.int32()), ("uri", pa.string())]
    )
)
ERROR_SCHEMA = pa.schema(
    [
        *_IMAGE,
        ("reason", pa.string()),
        ("message", pa.string()),
        ("content_hash", pa.binary(16)),
        ("size_bytes", pa.int64()),
    ]
)

_SIZE = [
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("format", pa.dictionary(pa.int8(), pa.string())),
]
IMAGE_FIELDS = [*_IMAGE, *pa.schema([*_SIZE, ("content_hash", pa.binary(16))])]
_BEST = [("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())]
_TOP = [("top_labels", pa.string()), ("top_ids", pa.int32()), ("top_scores", pa.float32())]
LABEL_FIELDS = list(pa.schema([*_BEST, *((name, pa.list_(kind)) for name, kind in _TOP)]))


RESERVED = tuple(f.name for f in IMAGE_FIELDS + LABEL_FIELDS)


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """One embedding column: its name, its length D, and how it is computed (see job.Embedding)."""

    column: str
    dimension: int
    layer: int | None  # None: after the final LayerNorm
    pool: str
    normalize: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What a model computes for each image.

    vectors: the embedding columns. top_k: the number of labels, best first; 0 for no labels.
    """

    vectors: tuple[VectorColumn, ...]
    top_k: int

    def limited_to(self, labels: int) -> ModelOutputs:
        """The same outputs, with at most so many labels as the model has."""
        return replace(self, top_k=min(self.top_k, labels))


def row_schema(labels: bool, vectors: list[VectorColumn], passthrough: pa.Schema) -> pa.Schema:
    """The Arrow schema of every data file of a dataset; scalars come before vectors."""
    fields = IMAGE_FIELDS + list(passthrough) + (LABEL_FIELDS if labels else [])
    for v in vectors:
        value = pa.float16() if v.dtype == "float16" else pa.float32()
        fields.append(
            pa.field(v.column, pa.list_(pa.field("element", value, nullable=False), v.dimension))
        )
    return pa.schema(fields)


# Filters that torch resizes with as Pillow does: PIL's number, torch's name.
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """The work of an image processor: resize and crop on the CPU, then normalise on the device.

    size: (height, width), or (shortest_edge,), which keeps the aspect ratio.
    crop: (height, width) or None. resample: a PIL resampling number.
    rescale, mean, std: the device computes (x * rescale - mean) / std.
    """

    size: tuple[int, ...] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every processed image."""
        if self.crop is not None:
            return self.crop
        assert self.size is not None and len(self.size) == 2
        return (self.size[0], self.size[1])


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """Everything that decides a row's pixels, or its reason.

    mode: exact | fast | draft, see decoding. rules: of the source, see Job.
    """

    pixels: PixelSpec
    formats: tuple[str, ...]
    max_pixels: int
    background: tuple[int, int, int] | None
    mode: str = "exact"
    rules: SourceRules = SourceRules.V2


class ScoreFunction(StrEnum):
    """The function from a head's logits to scores, named as in transformers' pipelines."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"  # the logits are the scores: regression


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The properties of a checkpoint, resolved once and frozen in dataset.json.

    labels: class names by id, empty for none.
    prompts, text_sha256: the texts of labels for a text tower, and the hash of their tokens.
    head, head_sha256: the URL and the hash of a separate linear head.
    head_column: the stored embedding that the head read instead of images.
    precision, engine, batch_size: resolved, never `auto`.
    multi_label: scores are independent and do not add up to 1.
    regression: such scores are not probabilities either.
    engine_why: the result of each engine, where `auto` chose between several.
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
    regression: bool = False

    @property
    def score_function(self) -> ScoreFunction:
        """The function that made the scores of a dataset."""
        if not self.multi_label:
            return ScoreFunction.SOFTMAX
        return ScoreFunction.NONE if self.regression else ScoreFunction.SIGMOID

    def labels_sha256(self) -> str:
        return hashlib.sha256("\0".join(self.labels).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Member:
    """One object of a group of small objects."""

    url: str
    size: int
    version: str


class ShardKind(StrEnum):
    """What a shard is made of."""

    TAR = "tar"
    PARQUET = "parquet"  # the images are in a column
    FILES = "files"  # a group of loose image files
    MANIFEST = "manifest"  # rows that name images elsewhere

    @property
    def noun(self) -> str:
        """What one shard of the kind is called, for errors.count()."""
        return "file shard" if self is ShardKind.FILES else f"{self} shard"


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of commit.

    start, stop: row groups of a Parquet file, or rows of a manifest; (0, 0) for all.
    rows: number of images, where the listing gives it. members: of ShardKind.FILES only.
    """

    id: str
    kind: ShardKind
    url: str
    size: int
    version: str
    start: int = 0
    stop: int = 0
    rows: int | None = None
    members: tuple[Member, ...] = ()
    # of the object, or of the newest member; seconds since 1970
    modified: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class PassthroughRow:
    """The passthrough values of one image: row `row` of a batch that many images share."""

    batch: pa.RecordBatch
    row: int


def passthrough_table(rows: Sequence[PassthroughRow], schema: pa.Schema) -> pa.Table:
    """The rows as one table, in order, with the types of their batches; `schema` for no rows.

    Neighbours in a batch are copied as one slice. Values are never converted to Python objects.
    """
    slices = list[pa.RecordBatch]()
    first = 0
    for stop in range(1, len(rows) + 1):
        last = rows[stop - 1]
        if (
            stop == len(rows)
            or rows[stop].batch is not last.batch
            or rows[stop].row != last.row + 1
        ):
            slices.append(last.batch.slice(rows[first].row, stop - first))
            first = stop
    return pa.Table.from_batches(slices, schema=None if slices else schema)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image of a source: its encoded bytes, or the reason why there are none."""

    index: int
    key: str
    uri: str
    data: bytes | None
    reason: Reason | None = None
    message: str = ""
    passthrough: PassthroughRow | None = None
    further_images: int = 0  # of the same row; they are not read
    spellings: tuple[str, ...] = ()  # other URLs that its path may mean, if `uri` does not exist


@dataclass(frozen=True, slots=True)
class End:
    """The last item of a shard's reader: the number of images in the shard.

    truncated_at: the byte at which the shard was cut. left_out: images without a row, by
    left_out.LEFT_OUT. image_members: images by the extension of their tar member.
    """

    total: int
    truncated_at: int | None = None
    note: str = ""
    left_out: dict[str, int] = field(default_factory=dict, compare=False)
    image_members: dict[str, int] = field(default_factory=dict, compare=False)


def content_hash(data: bytes) -> bytes:
    """16 bytes of BLAKE2b over the encoded image."""
    return hashlib.blake2b(data, digest_size=16).digest()


def short_hash(text: str, digits: int = 10) -> str:
    """The first hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def ipc_bytes(table: pa.Table, compression: str | None = None) -> bytes:
    """One table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def ipc_table(data: bytes | pa.Buffer) -> pa.Table:
    """The table of an Arrow IPC stream."""
    with pa.ipc.open_stream(data, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
        return reader.read_all()
