"""CPU stand-ins for a GPU's tensors, events and decoder, and JPEGs for them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import simplejpeg
import torch
from PIL import Image

from factories import hand_made
from support.encoded_images import encode, items, photo, spec
from vitray.decoding.decode import decode_bytes, fit_size
from vitray.decoding.resize import resize_fast
from vitray.job import Job
from vitray.models.gpu_decode import DeviceDecoder
from vitray.pipeline.stages import EncodedFragment, FragmentInfo, encoded_fragment
from vitray.schema import DecodeSpec, Shard


def jpeg(width: int = 90, height: int = 70, turn: int = 0, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return encode(photo(width, height), "jpeg", **({"exif": exif} if turn else {}), **options)


def odd_images() -> list[bytes]:
    """Good, bad, and all that a hardware decoder must not see."""
    broken = bytearray(jpeg(120, 90, quality=95))
    broken[700:760] = b"\xff\x00" * 30
    two = jpeg(110, 80)
    return [
        *(jpeg(90, 70, turn) for turn in range(9)),
        *(jpeg(90 + n, 71) for n in range(3)),
        jpeg(91, 300, subsampling=0),
        jpeg(progressive=True),
        encode(photo(90, 70).convert("L"), "jpeg"),
        encode(photo(90, 70).convert("CMYK"), "jpeg"),
        encode(photo(90, 70), "png"),
        jpeg()[:-100],
        jpeg()[:1500] + b"\xff\xd9",
        bytes(broken),
        two + b"trailer",
        jpeg(30, 20),  # would be enlarged
        jpeg(1200, 900),  # too many pixels
        b"no image",
        b"\xff\xd8\xff\xd9",
        jpeg(400, 60),
    ]


def spec_of(mode: str, **fields: object) -> DecodeSpec:
    return spec((48, 40), None, **{"mode": mode, "max_pixels": 1_000_000, **fields})


def software(blobs: list, refuses: tuple[bytes, ...] = ()) -> list[torch.Tensor]:
    """A hardware decoder as torchvision's: all or nothing, and libjpeg-turbo's pixels, so that they
    can be compared.
    """
    if any(bytes(blob) in refuses for blob in blobs):
        raise RuntimeError("nvJPEG error 2")
    try:
        decoded = [simplejpeg.decode_jpeg(bytes(blob), "RGB") for blob in blobs]
    except ValueError as error:
        raise RuntimeError("nvJPEG error 1") from error
    return [torch.from_numpy(image).permute(2, 0, 1) for image in decoded]


def as_fast(batch: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    fitted = [
        resize_fast(image.permute(1, 2, 0).contiguous().numpy(), size[::-1], resample)
        for image in batch
    ]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)


def decoder_for(
    chosen: DecodeSpec, refuses: tuple[bytes, ...] = (), threads: int = 2
) -> DeviceDecoder:
    return DeviceDecoder(
        chosen.pixels, "cpu", partial(software, refuses=refuses), partial(decode_bytes, spec=chosen),
        partial(fit_size, pixels=chosen.pixels), partial(as_fast, resample=chosen.pixels.resample), threads, chosen.mode == "hybrid",
    )  # fmt: skip


def fragment_of(dataset, images: list) -> EncodedFragment:
    shard = Shard("s", "tar", "s.tar", 1, "v")
    info = FragmentInfo(shard, 0, len(images))
    return encoded_fragment(info, items(*images), dataset.passthrough)


class Remembers:
    """A model that says of an image what its pixels are."""

    def __init__(self, vectors) -> None:
        self.vectors, self.seen = vectors, []

    def predict(self, pixels) -> SimpleNamespace:
        self.seen.append(np.array(pixels))
        means = np.array(pixels, np.float32).mean((1, 2))
        vectors = {v.column: np.resize(means, (len(means), v.dimension)) for v in self.vectors}
        return SimpleNamespace(ids=None, scores=None, vectors=vectors)


def dataset_for(tmp_path: Path, chosen: DecodeSpec):
    made = hand_made.make_dataset(tmp_path, commit=0)
    job = Job(
        **{
            **made.job.model_dump(),
            "decode": chosen.mode,
            "max_pixels": chosen.max_pixels,
            "labels": False,
        }
    )
    return dataclasses.replace(
        made, job=job, spec=dataclasses.replace(made.spec, pixels=chosen.pixels)
    )
