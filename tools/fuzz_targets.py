"""What must hold for any bytes that a decoder or a reader of shards is given: for tools/fuzz.py,
and for what it once found.

A reason of the closed list or pixels; rows numbered from 0 whose number the end tells, or one
ShardError; and never another exception, a crash, or more than SLOW_S of CPU.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitray.decoding.decode import decode_one
from vitray.errors import JobError, ShardError
from vitray.job import make_job
from vitray.schema import REASONS, DecodeSpec, Encoded, End, PixelSpec, Shard
from vitray.sources import read_shard

TARGETS = ("decode", "tar", "parquet")
SLOW_S = 5.0
FORMS = ("jpeg", "png", "webp", "gif", "tiff", "bmp")
SPEC = DecodeSpec(
    PixelSpec((16, 16), 2, None, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    FORMS,
    1_000_000,
    None,
    "exact",
)
INTO = np.empty((16, 16, 3), np.uint8)
SCRATCH = Path(tempfile.mkdtemp(prefix="vitray-fuzz-"))
CORPUS = Path(__file__).parent.parent / "tests" / "data" / "fuzz"


def check(target: str, data: bytes) -> None:
    """Raises AssertionError, or what must not be raised."""
    if target == "decode":
        _check_decode(data)
    else:
        _check_read(target, data)


def _check_decode(data: bytes) -> None:
    if not data:
        return
    outcome = decode_one(data, SPEC, INTO)
    assert outcome.reason is None or outcome.reason in REASONS, outcome
    assert "\n" not in outcome.message and len(outcome.message) < 1000


def _check_read(form: str, data: bytes) -> None:
    path = SCRATCH / f"shard.{form}"
    path.write_bytes(data)
    status = path.stat()
    shard = Shard(
        "s-0-0", form, str(path), status.st_size, f"{status.st_size}-{status.st_mtime_ns}"
    )
    job = make_job({"source": [str(path)], "model": "m", "out": "o", "format": form})
    try:
        *rows, end = read_shard(shard, job, lambda index: True)
    except (ShardError, JobError):
        return
    assert isinstance(end, End) and all(isinstance(row, Encoded) for row in rows)
    assert [row.index for row in rows] == list(range(end.total)), (len(rows), end)


def seeds(target: str) -> list[bytes]:
    rng = np.random.default_rng(0)
    images = []
    for mode, form in (
        ("RGB", "jpeg"),
        ("RGBA", "png"),
        ("RGB", "webp"),
        ("L", "gif"),
        ("RGB", "tiff"),
        ("RGB", "bmp"),
        ("CMYK", "jpeg"),
    ):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 20, len(mode)), np.uint8).squeeze(), mode).save(
            buffer, form
        )
        images.append(buffer.getvalue())
    if target == "decode":
        return images
    if target == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table({"image": images, "caption": [str(n) for n in range(len(images))]}), sink
        )
        return [sink.getvalue().to_pybytes()]
    tars = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for n, image in enumerate(images[:3]):
                member = tarfile.TarInfo(
                    f"{'long/' * 30 if form != tarfile.USTAR_FORMAT else ''}{n}.jpg"
                )
                member.size = len(image)
                archive.addfile(member, io.BytesIO(image))
        tars.append(buffer.getvalue())
    return tars
