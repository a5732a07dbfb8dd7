"""JPEGs split between a GPU's decoder and the CPU, as far as a CPU can tell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from support.gpu_stand_ins import (
    Remembers,
    dataset_for,
    decoder_for,
    fragment_of,
    odd_images,
    spec_of,
)
from vitray.pipeline.stages import decode_stage, predict_stage


@pytest.mark.parametrize("mode", ["gpu", "hybrid"])
@pytest.mark.parametrize("resample", [2, 3])
def test_rows_errors_and_pixels_are_those_of_fast(tmp_path: Path, mode: str, resample: int) -> None:
    """Also where the hardware refuses images: one alone, all, or one that is bad after all."""
    images = odd_images()
    pixels = dataclasses.replace(spec_of(mode).pixels, resample=resample)
    for number, refuses in enumerate([(), (images[2],), tuple(images)]):
        said = {}
        for name in ("fast", mode):
            chosen = dataclasses.replace(spec_of(name), pixels=pixels)
            dataset = dataset_for(tmp_path / f"{number}{name}", chosen)
            decoder = decoder_for(chosen, refuses) if name == mode else None
            model = Remembers(dataset.vectors)
            block = decode_stage(dataset, [fragment_of(dataset, images)])
            (fragment,) = predict_stage(dataset, model, block, decoder)
            said[name] = fragment.rows.to_pylist(), fragment.errors.to_pylist(), model.seen[0]
        rows, errors, seen = said[mode]
        assert [row["index"] for row in rows] == sorted(row["index"] for row in rows) and len(
            rows
        ) + len(errors) == len(images)
        assert rows == said["fast"][0] and errors == said["fast"][1]
        np.testing.assert_array_equal(seen, said["fast"][2])
