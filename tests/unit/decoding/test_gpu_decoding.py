"""JPEGs split between a GPU's decoder and the CPU, as far as a CPU can tell."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

from factories.small_models import job_for, make_checkpoint
from support.encoded_images import items, photo, spec
from support.gpu_stand_ins import (
    Remembers,
    dataset_for,
    decoder_for,
    fragment_of,
    jpeg,
    odd_images,
    spec_of,
)
from vitray.decoding.decode import Outcome, decode, decode_bytes, left_to_device
from vitray.errors import ModelError
from vitray.models import identify
from vitray.models.gpu_decode import TURNS, Coded, resize_on_device, split_for_hardware
from vitray.pipeline.stages import decode_stage, predict_stage


def test_only_plain_jpegs_are_left_to_the_device() -> None:
    images = odd_images()
    left = [at for at, image in enumerate(images) if left_to_device(image, spec_of("gpu"))]
    assert left == [
        *range(13),
        18,
        19,
        len(images) - 1,
    ]  # 18, 19: what is broken in the middle only a decoder can tell
    outcome, turn = left_to_device(images[6], spec_of("gpu")) or (None, 0)
    assert outcome == Outcome(90, 70, "jpeg", None, "") and turn == 6
    assert not any(
        left_to_device(image, spec_of(mode))
        for image in images
        for mode in ("exact", "fast", "draft")
    )
    assert not any(left_to_device(image, spec_of("gpu", formats=("png",))) for image in images)
    assert not any(
        left_to_device(jpeg(), spec((48, 40), None, resample, mode="gpu"))
        for resample in (0, 1, 4, 5)
    )
    assert left_to_device(jpeg(), spec((48,), (40, 40), mode="gpu")) and not left_to_device(
        jpeg(), spec((38,), (40, 40), mode="gpu")
    )


def test_what_is_bad_beyond_its_header_becomes_an_error_row_on_the_device(tmp_path: Path) -> None:
    """Alone, so that no good row is left; and the reason is the CPU's."""
    cut = jpeg(120, 90, quality=95)[:900] + b"\xff\xd9"
    dataset = dataset_for(tmp_path, spec_of("gpu"))

    def on_cpu(blobs: list) -> tuple[np.ndarray, list[Outcome]]:
        return np.empty((0, 48, 40, 3), np.uint8), [
            Outcome(120, 90, "jpeg", "time_limit", "too slow") for _ in blobs
        ]

    decoder = dataclasses.replace(decoder_for(spec_of("gpu"), (cut,)), on_cpu=on_cpu)
    (fragment,) = predict_stage(
        dataset,
        Remembers(dataset.vectors),
        decode_stage(dataset, [fragment_of(dataset, [cut, b""])]),
        decoder,
    )
    assert fragment.rows.num_rows == 0 and fragment.rows.schema.equals(dataset.schema)
    assert [(e["index"], e["reason"], e["size_bytes"]) for e in fragment.errors.to_pylist()] == [
        (0, "time_limit", len(cut)),
        (1, "empty", 0),
    ]


def test_threads_empty_the_queue_beside_a_slow_decoder_and_order_stays() -> None:
    images, chosen = [jpeg(90 + n % 5, 70) for n in range(300)], spec_of("hybrid")
    expected, _ = decode(items(*images), spec_of("fast"))
    by_hand: list[int] = []
    decoder = decoder_for(chosen)
    wait, plain = threading.Event(), decoder.hardware

    def slow(blobs: list) -> list[torch.Tensor]:
        wait.wait(30)
        return plain(blobs)

    def on_cpu(blobs: list) -> tuple[np.ndarray, list[Outcome]]:
        by_hand.append(len(blobs))
        if sum(by_hand) >= 150:
            wait.set()
        return decode_bytes(blobs, chosen)

    coded = [Coded(image, 1, 90 + n % 5, 70) for n, image in enumerate(images)]
    pixels, bad = dataclasses.replace(decoder, hardware=slow, on_cpu=on_cpu).decode(coded)
    np.testing.assert_array_equal(pixels, expected)
    assert not bad and 150 <= sum(by_hand) < 300


def test_a_batch_for_the_hardware_has_a_cap_in_pixels() -> None:
    images = [
        Coded(b"", 1, 8000, 6000),
        Coded(b"", 1, 8000, 6000),
        Coded(b"", 1, 100, 100),
        Coded(b"", 1, 90000, 9000),
        Coded(b"", 1, 9, 9),
    ]
    assert split_for_hardware([0, 1, 2, 3, 4], images) == [[0], [1, 2], [3], [4]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientations_are_those_of_pillow(turn: int) -> None:
    image = photo(31, 22)
    exif = image.getexif()
    exif[0x0112] = turn
    upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(
        TURNS[turn](torch.from_numpy(np.array(photo(31, 22))).permute(2, 0, 1)).permute(1, 2, 0),
        upright,
    )


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_resize_of_the_device_is_a_level_off_at_most(mode: str) -> None:
    image = torch.from_numpy(np.array(photo(301, 203))).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, (48, 40), mode=mode, antialias=True)
    assert (resize_on_device(image, (48, 40), mode).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("fields", [{"decode": "gpu"}, {"decode": "hybrid"}, {"precision": "fp8"}])
def test_without_a_gpu_one_line_says_what_is_missing(tmp_path: Path, fields: dict) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    with pytest.raises(
        ModelError,
        match="vitray\\[gpu\\]"
        if "decode" in fields
        else "compute capability 8.9 or more, and this is cpu",
    ):
        identify(job_for(directory, **fields))
