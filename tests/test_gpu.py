"""What a GPU does, as far as a CPU can tell: the ring's order and slots, JPEGs split between
decoders, float8, the one command.

A fake device does everything late, as a GPU does: whoever overwrites a buffer too early, or reads a
result too early, is caught.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hand_made
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from small_models import job_for, make_checkpoint, noise, run
from test_decode import encode, items, photo, spec

from vitray.decoding.decode import Outcome, decode, decode_bytes, fit_size, left_to_device
from vitray.decoding.resize import resize_fast
from vitray.errors import ModelError
from vitray.job import Embedding, Job
from vitray.models import (
    blocks,
    checkpoint,
    identify,
    loading,
    model_outputs,
    open_model,
    vector_columns,
)
from vitray.models.gpu_decode import (
    TURNS,
    Coded,
    DeviceDecoder,
    resize_on_device,
    split_for_hardware,
)
from vitray.models.pinned_buffers import SLOTS, PinnedBuffers
from vitray.models.torch_engine import TorchModel
from vitray.models.types import Placement
from vitray.pipeline.stages import FragmentBatch, decode_stage, encoded_table, predict_stage
from vitray.schema import DecodeSpec, ModelOutputs, ShardEvent

HOME = Path(__file__).parent.parent


# ---------------------------------------------------------------- the ring


class LateDevice:
    """Streams in which nothing happens before somebody waits, or a later thing needs it. Memory for
    `room` images at once.
    """

    def __init__(self, room: int = 1000) -> None:
        self.room, self.lock = room, threading.RLock()
        self.todo: list = []  # (lane, what), in the order in which it was asked for
        self.launched: list[int] = []

    def buffers(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)

    def upload(self, host: torch.Tensor, there: torch.Tensor) -> LateEvent:
        return self._ask(lambda: there.copy_(host))

    def compute(
        self, work, pixels: torch.Tensor, after: LateEvent | None
    ) -> tuple[list[torch.Tensor], LateEvent]:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        columns: list[torch.Tensor] = []
        self.launched.append(len(pixels))
        return columns, self._ask(torch.inference_mode()(lambda: columns.extend(work(pixels))))

    def _ask(self, what) -> LateEvent:
        with self.lock:
            self.todo.append(what)
            return LateEvent(self, len(self.todo))


@dataclasses.dataclass
class LateEvent:
    device: LateDevice
    count: int

    def synchronize(self) -> None:
        with self.device.lock:
            for at in range(self.count):
                what, self.device.todo[at] = self.device.todo[at], lambda: None
                what()


def sums(pixels: torch.Tensor) -> list[torch.Tensor]:
    return [pixels.double().sum((1, 2, 3))]


def test_answers_come_in_order_and_no_slot_is_overwritten_while_it_is_read() -> None:
    ring, batches = (
        PinnedBuffers(LateDevice(), (4, 2, 2, 3)),
        [noise(n % 4 + 1, 2, n) for n in range(20)],
    )
    started = []
    for batch in batches:
        mine = batch.copy()
        started.append(ring.start(mine, sums))
        mine[:] = 0  # the caller's memory is its own again
        assert sum(not s.columns for s in started) <= SLOTS
    for batch, one in zip(batches, started):
        np.testing.assert_array_equal(one.wait()[0], batch.astype(float).sum((1, 2, 3)))


def test_threads_share_a_ring_and_each_gets_its_own_answers() -> None:
    ring, wrong = PinnedBuffers(LateDevice(), (4, 2, 2, 3)), []

    def call(seed: int) -> None:
        batches = [noise(3, 2, 1000 * seed + n) for n in range(60)]
        started = [ring.start(batch, sums) for batch in batches]
        for batch, one in zip(batches, started):
            if not np.array_equal(one.wait()[0], batch.astype(float).sum((1, 2, 3))):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_after_an_exception_the_ring_goes_on() -> None:
    def fail(_pixels: torch.Tensor) -> list[torch.Tensor]:
        raise ValueError("no such kernel")

    class Eager(LateDevice):
        def compute(self, work, pixels, after):  # a launch that fails does so at once
            after.synchronize()
            columns = work(pixels)
            return columns, self._ask(lambda: None)

    ring, batch = PinnedBuffers(Eager(), (4, 2, 2, 3)), noise(4, 2)
    for _ in range(2 * SLOTS):
        with pytest.raises(ValueError, match="no such kernel"):
            ring.start(batch, fail)
    np.testing.assert_array_equal(
        ring.start(batch, sums).wait()[0], batch.astype(float).sum((1, 2, 3))
    )


def test_a_tensor_that_is_there_already_takes_no_slot() -> None:
    device = LateDevice()
    ring, batch = PinnedBuffers(device, (4, 2, 2, 3)), torch.from_numpy(noise(9, 2))
    np.testing.assert_array_equal(ring.start(batch, sums).wait()[0], sums(batch)[0])
    assert len(device.todo) == 1


def with_ring(directory: str, device: LateDevice, **fields: object) -> TorchModel:
    job = job_for(directory, embeddings=[Embedding()], **fields)
    spec = identify(job)
    model = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 3), "cpu", 1)
    assert isinstance(model, TorchModel)
    model.buffers = PinnedBuffers(device, (spec.batch_size, *spec.pixels.shape, 3))
    return model


@pytest.mark.parametrize("room", [100, 8, 5, 1])
def test_a_model_on_the_ring_says_the_same_also_when_memory_makes_it_halve_its_batch(
    tmp_path: Path, room: int
) -> None:
    directory, pixels = make_checkpoint(tmp_path / "m", "vit", True), noise(43)
    expected = run(job_for(directory, embeddings=[Embedding()], top_k=3, batch_size=16), pixels)
    device = LateDevice(room)
    model = with_ring(directory, device, batch_size=16)
    found: list = []
    threads = [
        threading.Thread(target=lambda: found.append(model.predict(pixels))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    found.append(model.predict(torch.from_numpy(pixels)))
    assert len(found) == 3
    for one in found:
        np.testing.assert_array_equal(one.ids, expected.ids)
        np.testing.assert_allclose(one.scores, expected.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            one.vectors["embedding"], expected.vectors["embedding"], rtol=1e-4, atol=1e-5
        )
    size = {100: 16, 8: 8, 5: 4, 1: 1}[room]  # two threads that fail at once halve it once
    assert model.sizes == (size,) and max(device.launched) == size


def test_one_image_too_many_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    model = with_ring(make_checkpoint(tmp_path / "m", "vit", True), LateDevice(0), batch_size=4)
    with pytest.raises(ModelError, match="one image needs more than its memory"):
        model.predict(noise(2))


# ---------------------------------------------------------------- JPEGs on the device


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


def batch_of(dataset, images: list) -> FragmentBatch:
    return FragmentBatch(
        ShardEvent("fragment", "s", 0, len(images)),
        rows=encoded_table(items(*images), dataset.passthrough),
    )


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
            batch = predict_stage(
                dataset, model, decode_stage(dataset, batch_of(dataset, images)), decoder
            )
            said[name] = batch.rows.to_pylist(), batch.errors.to_pylist(), model.seen[0]
        rows, errors, seen = said[mode]
        assert [row["index"] for row in rows] == sorted(row["index"] for row in rows) and len(
            rows
        ) + len(errors) == len(images)
        assert rows == said["fast"][0] and errors == said["fast"][1]
        np.testing.assert_array_equal(seen, said["fast"][2])


def test_what_is_bad_beyond_its_header_becomes_an_error_row_on_the_device(tmp_path: Path) -> None:
    """Alone, so that no good row is left; and the reason is the CPU's."""
    cut = jpeg(120, 90, quality=95)[:900] + b"\xff\xd9"
    dataset = dataset_for(tmp_path, spec_of("gpu"))

    def on_cpu(blobs: list) -> tuple[np.ndarray, list[Outcome]]:
        return np.empty((0, 48, 40, 3), np.uint8), [
            Outcome(120, 90, "jpeg", "time_limit", "too slow") for _ in blobs
        ]

    decoder = dataclasses.replace(decoder_for(spec_of("gpu"), (cut,)), on_cpu=on_cpu)
    batch = predict_stage(
        dataset,
        Remembers(dataset.vectors),
        decode_stage(dataset, batch_of(dataset, [cut, b""])),
        decoder,
    )
    assert batch.rows.num_rows == 0 and batch.rows.schema.equals(dataset.schema)
    assert [(e["index"], e["reason"], e["size_bytes"]) for e in batch.errors.to_pylist()] == [
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


# ---------------------------------------------------------------- float8


def test_float8_is_the_product_of_what_it_rounds_to() -> None:
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(64, 48).bfloat16(), (10 * torch.randn(5, 7, 64)).bfloat16()
    x[0, 0] = 0  # an empty row has no scale
    (rows, row_scale), (weight, weight_scale) = (
        blocks.scaled(x.reshape(-1, 64)),
        blocks.scaled(plain.weight.detach()),
    )
    assert (
        rows.float() * row_scale - x.reshape(-1, 64).float()
    ).abs().max() <= x.abs().max() / 16  # half of the last of 3 bits
    expected = (rows.float() * row_scale) @ (weight.float() * weight_scale).t() + plain.bias.float()
    found = blocks.Float8Linear(plain)(x)
    assert found.dtype == torch.bfloat16 and found.shape == (5, 7, 48)
    torch.testing.assert_close(
        found.reshape(-1, 48).float(), expected.detach(), rtol=2**-7, atol=2**-7
    )


def test_a_float8_model_says_how_well_it_agrees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    job = job_for(directory, embeddings=[Embedding()], precision="bf16", batch_size=8)
    mixed = dataclasses.replace(identify(job), precision="fp8")
    network = loading.load_network(checkpoint.locate(directory, None), labels=True)
    with caplog.at_level(logging.WARNING):
        model = TorchModel(network, mixed, model_outputs(job, mixed), Placement("cpu"))
    kinds = [type(m).__name__ for block in network.blocks for m in block.modules()]
    assert kinds.count("Float8Linear") == 5 * 3 and not {"Linear", "PackedLinear"} & set(kinds)
    assert model.agreement.cosine is not None and 0.98 < model.agreement.cosine < 1
    assert "fp8 against bf16 on 8 synthetic images" in caplog.text
    pixels = noise(24)
    found, expected = model.predict(pixels), run(job, pixels)
    a, b = found.vectors["embedding"], expected.vectors["embedding"]
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.98


# ---------------------------------------------------------------- the command


def test_the_command_for_a_gpu_machine_runs_here(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tests/gpu_check.py",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    failed = {name: said["error"] for name, said in report["sections"].items() if "error" in said}
    assert failed == {}, failed
    assert report["sections"]["equality"]["bf16"]["cosine"] > 0.99
    assert report["sections"]["ring"]["equal"] is True
    assert report["sections"]["jpeg"]["bad_rows_agree"] is True
