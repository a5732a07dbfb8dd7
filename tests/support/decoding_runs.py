"""Decoders of a worker, run over tars of odd images, and what they put into their outlets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from factories import hand_made
from support.encoded_images import FORMATS, encode, photo
from vitray.dataset import Dataset
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.decoders import Decoders, Outlets
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.stages import DecodedBlock
from vitray.schema import Shard
from vitray.sources import list_shards

WAIT_S = 60
SHARE = WorkerShare(
    cpus=2,
    gpus=0.0,
    threads=2,
    readers=2,
    decoders=2,
    writers=1,
    queue_blocks=2,
    decoder_processes=True,
)


def odd_images() -> list[bytes]:
    """Images of all formats, sizes and turns, and files that are bad for several reasons."""
    good = [encode(photo(60 + n, 40 + 3 * n), form) for n, form in enumerate(FORMATS)]
    exif = type(photo().getexif())()
    exif[0x0112] = 6
    return [
        *good,
        encode(photo(90, 70), "jpeg", exif=exif),
        b"",
        encode(photo(90, 71).convert("CMYK"), "jpeg"),
        b"no image",
        good[0][:-200],
        encode(photo(300, 20).convert("L"), "png"),
        encode(photo(20, 300), "jpeg", progressive=True),
    ]


def dataset_of(folder: Path, tars: Sequence[Sequence[bytes]], **fields: object) -> Dataset:
    """A dataset without rows, and tars of these images in folder/in."""
    for n, images in enumerate(tars):
        members = {f"{n}/{i:04d}.jpg": data for i, data in enumerate(images)}
        hand_made.write_tar(folder / "in" / f"s-{n:03d}.tar", members)
    return hand_made.make_dataset(folder, commit=0, **fields)


def shards_of(dataset: Dataset) -> list[Shard]:
    return list_shards(dataset.job, []).shards


@dataclass
class Collected:
    """What came out. Blocks are kept; a test that takes them away gives their memory back."""

    blocks: list[DecodedBlock] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    finished: threading.Event = field(default_factory=threading.Event)

    def outlets(self) -> Outlets:
        return Outlets(self.blocks.append, self.others.append, self._lose)

    def _lose(self, error: Exception) -> None:
        self.errors.append(error)
        self.finished.set()

    def by_fragment(self) -> dict[tuple[str, int], tuple[Any, Any, Any, np.ndarray]]:
        """(shard, start) -> stop, rows, errors, pixels."""
        found = {}
        for block in self.blocks:
            first = 0
            for part in block.fragments:
                pixels = block.pixels[first : first + part.rows.num_rows]
                first += part.rows.num_rows
                info = part.info
                found[info.shard.id, info.start] = (info.stop, part.rows, part.errors, pixels)
        return found


def opened(
    kind: Callable[..., Decoders],
    dataset: Dataset,
    shards: Sequence[Shard],
    outlets: Outlets,
    share: WorkerShare = SHARE,
) -> tuple[Decoders, BoundedQueue[Shard]]:
    """Decoders that are not started, and their queue, to which more can be put."""
    waiting: BoundedQueue[Shard] = BoundedQueue(1 << 30)
    for shard in shards:
        waiting.put(shard)
    return kind(dataset, waiting, outlets, share), waiting


def run_decoders(
    kind: Callable[..., Decoders],
    dataset: Dataset,
    shards: Sequence[Shard],
    share: WorkerShare = SHARE,
) -> Collected:
    """Decode all, with copies of the pixels, so that pages come back."""
    collected = Collected()

    def keep(block: DecodedBlock) -> None:
        pixels = block.pixels if isinstance(block.pixels, list) else np.array(block.pixels)
        collected.blocks.append(DecodedBlock(block.fragments, pixels))

    outlets = Outlets(keep, collected.others.append, collected.outlets().lost)
    decoders, waiting = opened(kind, dataset, shards, outlets, share)
    with ended(decoders):
        decoders.start(collected.finished.set)
        waiting.finish()
        assert collected.finished.wait(WAIT_S), decoders.describe()
    return collected


class ended(closing[Decoders]):
    """A block after which decoders are closed, and have ended."""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.thing.join(time.monotonic() + WAIT_S)


def processes() -> list[psutil.Process]:
    """The decoder processes of this process; their children decode."""
    return [
        child for child in psutil.Process().children() if "decoder_process" in command_of(child)
    ]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
