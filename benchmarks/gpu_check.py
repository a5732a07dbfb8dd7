"""Checks and times all that vitray does on a GPU, in under 8 minutes: `python
benchmarks/gpu_check.py --out DIR`.

Needs this repository, and torch, transformers, pyarrow, pydantic, PyYAML; for JPEGs also
simplejpeg, Pillow and torchvision. No Ray, no network: weights are random, photos are
scikit-image's or drawn. A section that fails says why, and the others go on. Writes gpu_check.json.
`--device cpu --quick` runs the same code on a small model without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from multiprocessing import get_context, shared_memory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vitray.schema import ModelOutputs

sys.path.insert(0, str(Path(__file__).parent.parent))
NEEDED = ("numpy", "torch", "transformers", "pyarrow", "pydantic", "yaml", "PIL", "safetensors")
FOR_JPEG = ("simplejpeg", "torchvision")
GFLOP = 35.13  # of one image, ViT-B/16 at 224
ACTOR_THREADS = 2  # as many call the actor of the pipeline


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


class Check:
    """What the sections share: the model, the images, and what was measured."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        import numpy as np
        import torch

        self.args, self.np, self.torch, self.device = args, np, torch, args.device
        self.cuda, self.quick = args.device == "cuda", args.quick
        self.batch, self.rounds = (8, 2) if args.quick else (256, args.rounds)
        self.side = 32 if args.quick else 224
        self.model_dir = self.make_model(folder)
        self.jpegs = photos(48 if args.quick else 1024)
        self.compiled: Any = None
        self.found: dict[str, Any] = {}

    def make_model(self, folder: str) -> str:
        import transformers

        small = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "patch_size": 8,
        }
        self.torch.manual_seed(0)
        # weights of 0.05 tell images apart; those of 0.02, the default, give nearly all the same
        # label
        config = transformers.ViTConfig(
            image_size=self.side,
            num_labels=1000,
            initializer_range=0.05,
            **(small if self.quick else {}),
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        size = {"height": self.side, "width": self.side}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
        return folder

    def open(self, precision: str, device: str | None = None, batch: int | None = None) -> Any:
        """A TorchModel with labels and the CLS embedding."""
        from vitray.job import Embedding
        from vitray.models import identify, open_model, vector_columns
        from vitray.models.pinned_buffers import PinnedBuffers

        where = device or self.device
        job: Any = SimpleNamespace(
            **{
                "model": self.model_dir,
                "revision": None,
                "labels": True,
                "labelled": True,
                "top_k": 5,
                "head": None,
            },
            **{"device": where, "precision": precision},
            **{
                "batch_size": batch or self.batch,
                "decode": "exact",
                "engine": "torch",
                "embeddings": [Embedding()],
                "column": lambda _: "embedding",
            },
        )
        spec = identify(job)
        model: Any = open_model(
            spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), where, os.cpu_count() or 1
        )
        if where == "cpu":
            model.buffers = PinnedBuffers(CpuStreams(), (spec.batch_size, self.side, self.side, 3))
        return model

    def compile(self, model: Any, size: int, **options: Any) -> Any:
        """Its forward pass for one batch size: open_model(compiled=True) would compile the ladder
        of four.
        """
        forward = self.torch.compile(model.forward, dynamic=False, **options)
        with self.torch.inference_mode():
            forward(self.noise(size))
        self.sync()
        return forward

    def noise(self, count: int) -> Any:
        pixels = self.np.random.default_rng(0).integers(
            0, 256, (count, self.side, self.side, 3), dtype="uint8"
        )
        return self.torch.from_numpy(pixels).to(self.device)

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def rates(
        self, variants: dict[str, tuple[int, Callable[[], object]]]
    ) -> dict[str, dict[str, float]]:
        """Images/s of each variant (how many images a call is, the call), in turn, by the wall
        clock up to the device's end.
        """
        took: dict[str, list[float]] = {}
        for number in range(self.rounds + 1):  # the first round warms up
            for name, (images, call) in variants.items():
                self.sync()
                started = time.perf_counter()
                call()
                self.sync()
                if number:
                    took.setdefault(name, []).append(images / (time.perf_counter() - started))
        return {
            name: {"median": statistics.median(r), "least": min(r), "most": max(r)}
            for name, r in took.items()
        }

    def passes(self, forward: Any, size: int) -> tuple[int, Callable[[], object]]:
        """Enough passes over a batch on the device that one call takes a third of a second on a
        fast GPU.
        """
        pixels, count = self.noise(size), 1 if self.quick else max(1, 5120 // size)

        def call() -> None:
            with self.torch.inference_mode():
                for _ in range(count):
                    forward(pixels)

        return size * count, call


def photos(count: int) -> list[bytes]:
    """JPEGs of 500x375, quality 90: crops of scikit-image's photos where it is installed, else
    coloured blotches with grain.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    found = importlib.util.find_spec("skimage")
    folder = Path(found.origin).parent / "data" if found and found.origin else Path("/nowhere")
    whole = [
        Image.open(p).convert("RGB")
        for p in (folder / n for n in ("chelsea.png", "coffee.png", "rocket.jpg"))
        if p.exists()
    ]
    made = []
    for n in range(count):
        if whole:
            source = whole[n % len(whole)]
            width = int(rng.integers(200, source.width * 3 // 4))
            height = min(source.height, width * 3 // 4)
            left, top = (
                rng.integers(0, source.width - width),
                rng.integers(0, source.height - height + 1),
            )
            image = source.crop((left, top, left + width, top + height)).resize(
                (500, 375), Image.Resampling.BICUBIC
            )
        else:
            blotches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC
            )
            image = Image.fromarray(
                (np.asarray(blotches) * 0.9 + rng.integers(0, 25, (375, 500, 1))).astype(np.uint8)
            )
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=90)
        made.append(buffer.getvalue())
    return made


def agreement(found: Any, expected: Any) -> dict[str, float]:
    """Of two Predictions: share of equal labels, the least and the mean cosine of the CLS vectors,
    how many labels there are.
    """
    import numpy as np

    a, b = (x.vectors["embedding"].astype(np.float64) for x in (found, expected))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    same = float((found.ids[:, 0] == expected.ids[:, 0]).mean())
    return {
        "labels": same,
        "cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "kinds": len(set(expected.ids[:, 0])),
    }


# ---------------------------------------------------------------- sections


def matmul(check: Check) -> dict[str, Any]:
    """The best rate of a bf16 matrix product on random data: the ceiling of all that follows."""
    torch, best = check.torch, {}
    shapes = (
        [(64, 64, 64)]
        if check.quick
        else [(8192, 8192, 8192), (50432, 768, 3072), (50432, 3072, 768), (16384, 4096, 8192)]
    )
    for m, k, n in shapes:
        a, b = (
            torch.randn(m, k, device=check.device).bfloat16(),
            torch.randn(k, n, device=check.device).bfloat16(),
        )
        times = (
            1 if check.quick else max(1, int(2e14 / (2 * m * k * n)))
        )  # a third of a second on a fast GPU
        rate = check.rates(
            {"x": (times, lambda a=a, b=b, times=times: [a @ b for _ in range(times)])}
        )["x"]
        best[f"{m}x{k}x{n}"] = rate["median"] * 2 * m * k * n / 1e12
    top = max(best.values())
    check.found["ceiling"] = top * 1e3 / GFLOP
    return {"tflops": best, "best_tflops": top, "ceiling_images_s": check.found["ceiling"]}


def equality(check: Check) -> dict[str, Any]:
    """Each precision on the device against float32 on the CPU, on photos; float8 also says what it
    finds when it is opened.
    """
    pixels = decoded(check, "exact", check.jpegs[: 16 if check.quick else 128])
    expected = check.open("fp32", "cpu", 16).predict(pixels)
    said: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16", "fp8") if check.cuda else ("fp32", "bf16"):
        try:
            model = check.open(precision)
            said[precision] = agreement(model.predict(pixels), expected)
            if precision == "fp8":
                said["fp8_at_open"] = dataclasses.asdict(model.agreement)
        except Exception as error:
            said[precision] = {"error": repr(error)[:300]}
    return said


class CpuStreams:
    """The ring without a device: everything is over at once."""

    def buffers(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        import torch

        return torch.empty(shape, dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8)

    def upload(self, host: Any, there: Any) -> Any:
        there.copy_(host)
        return SimpleNamespace(synchronize=lambda: None)

    def compute(self, work: Any, pixels: Any, after: Any) -> tuple[list[Any], Any]:
        return work(pixels), SimpleNamespace(synchronize=lambda: None)


def ring(check: Check) -> dict[str, Any]:
    """The ring against one batch after the other, from one thread and from several: the same
    numbers, bit for bit.
    """
    np, model = check.np, check.open("bf16")
    through = model.buffers
    pixels = check.noise(check.batch * 5 + check.batch // 3).cpu().numpy()
    model.buffers = None
    expected = model.predict(pixels)
    model.buffers = through
    found = [model.predict(pixels), model.predict(check.torch.from_numpy(pixels).to(check.device))]
    with ThreadPoolExecutor(4) as pool:
        found += pool.map(model.predict, [pixels] * 8)
    same = [
        bool(
            np.array_equal(f.ids, expected.ids)
            and np.array_equal(f.vectors["embedding"], expected.vectors["embedding"])
        )
        for f in found
    ]
    return {
        "equal": all(same),
        "least_agreement": min(agreement(f, expected)["cosine"] for f in found),
    }


def pixels_to_rows(check: Check) -> dict[str, Any]:
    """From pixels on the host to results on the host, by one call and by two threads, against the
    model alone; compiled, bf16.
    """
    model = check.open("bf16")
    if check.cuda:
        model.compiled = {check.batch: check.compile(model, check.batch)}
        model.predict(check.noise(check.batch).cpu().numpy())
    check.compiled = model
    counters = check.torch._dynamo.utils.counters["frames"]
    frames = dict(counters)
    pixels = check.noise(check.batch * (2 if check.quick else 20)).cpu().numpy()
    chunks = [pixels[at : at + check.batch] for at in range(0, len(pixels), check.batch)]
    pool = ThreadPoolExecutor(ACTOR_THREADS)
    forward = model.compiled.get(check.batch, model.forward)
    rates = check.rates(
        {
            "model": check.passes(forward, check.batch),
            "one call": (len(pixels), lambda: model.predict(pixels)),
            "actor": (len(pixels), lambda: list(pool.map(model.predict, chunks))),
        }
    )
    check.found["model"] = rates["model"]["median"]
    shares = {
        f"{name} / model": rates[name]["median"] / rates["model"]["median"]
        for name in ("one call", "actor")
    }
    return {
        "images_s": rates,
        **shares,
        **of_ceiling(check, rates["model"]),
        "recompiled": dict(counters) != frames,
    }


def of_ceiling(check: Check, rate: dict[str, float]) -> dict[str, float]:
    return (
        {"model / ceiling": rate["median"] / check.found["ceiling"]}
        if "ceiling" in check.found
        else {}
    )


def model_only(check: Check) -> dict[str, Any]:
    """The forward pass alone on pixels that are there: eager and compiled by batch, CUDA graphs,
    float8; as far as time allows.
    """
    variants, notes = {}, {}
    plain = check.compiled or check.open("bf16")
    for size in (8,) if check.quick else (64, 128, 256, 512):
        variants[f"eager {size}"] = check.passes(plain.forward, size)
    wanted: list[tuple[str, Callable[[], Any], int]] = []
    if check.cuda:
        wanted = [(f"compiled {check.batch}", lambda: plain.compiled[check.batch], check.batch)]
        mixed = check.open("fp8") if check.torch.cuda.get_device_capability() >= (8, 9) else None
        if mixed is not None:
            variants[f"fp8 eager {check.batch}"] = check.passes(mixed.forward, check.batch)
            wanted.append(
                (
                    f"fp8 compiled {check.batch}",
                    lambda: check.compile(mixed, check.batch),
                    check.batch,
                )
            )
        graphs = {"mode": "reduce-overhead"}
        wanted += [
            (f"compiled {size}", partial(check.compile, plain, size), size)
            for size in (512, 128, 64)
        ]
        wanted += [
            (f"graphs {size}", partial(check.compile, plain, size, **graphs), size)
            for size in (64, check.batch)
        ]
    for name, make, size in wanted:
        if check.args.deadline - time.monotonic() < 90:
            notes[name] = "no time left to compile it"
            continue
        started = time.perf_counter()
        try:
            variants[name] = check.passes(make(), size)
            notes[name] = f"compiled in {time.perf_counter() - started:.0f} s"
        except Exception as error:
            notes[name] = repr(error)[:300]
    rates = check.rates(variants)
    shares = {
        name: of_ceiling(check, rate).get("model / ceiling", 0) for name, rate in rates.items()
    }
    return {"images_s": rates, "of_ceiling": shares, "notes": notes}


def spec_of(check_side: int, mode: str) -> Any:
    from vitray.schema import DecodeSpec, PixelSpec

    pixels = PixelSpec((check_side, check_side), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    return DecodeSpec(pixels, ("bmp", "gif", "jpeg", "png", "tiff", "webp"), 50_000_000, None, mode)


def decoded(check: Check, mode: str, jpegs: list[bytes]) -> Any:
    from vitray.decoding.decode import decode
    from vitray.schema import Encoded

    return decode(
        [Encoded(n, "", "", data) for n, data in enumerate(jpegs)], spec_of(check.side, mode)
    )[0]


def device_decoder(check: Check, mode: str, threads: int) -> Any:
    from vitray.decoding.decode import decode_bytes, fit_size
    from vitray.models import gpu_decode

    spec = spec_of(check.side, mode)
    fit, on_cpu = partial(fit_size, pixels=spec.pixels), partial(decode_bytes, spec=spec)
    if check.cuda:
        return gpu_decode.open_decoder(spec.pixels, on_cpu, fit, threads, mode == "hybrid")
    resize = partial(gpu_decode.resize_on_device, mode="bilinear")
    return gpu_decode.DeviceDecoder(
        spec.pixels, "cpu", in_software, on_cpu, fit, resize, threads, mode == "hybrid"
    )


def in_software(blobs: list[Any]) -> list[Any]:
    """The hardware decoder's stand-in on a CPU."""
    import simplejpeg
    import torch

    try:
        return [
            torch.from_numpy(simplejpeg.decode_jpeg(bytes(b), "RGB", strict=True)).permute(2, 0, 1)
            for b in blobs
        ]
    except ValueError as error:
        raise RuntimeError("broken") from error


_worker: dict[str, Any] = {}


def start_worker(jpegs: list[bytes], side: int) -> None:
    from vitray.schema import Encoded

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _worker.update(
        items=[Encoded(n, "", "", data) for n, data in enumerate(jpegs)], spec=spec_of(side, "fast")
    )


def decode_into(name: str, start: int, count: int) -> str:
    """In a process of the pool: images start .. start + count, as vitray's decode step makes them,
    into shared memory.
    """
    import numpy as np

    from vitray.decoding.decode import decode

    items = _worker["items"]
    pixels, _ = decode(
        [items[n % len(items)] for n in range(start, start + count)], _worker["spec"]
    )
    memory = _worker.get(name) or _worker.setdefault(name, shared_memory.SharedMemory(name))
    np.frombuffer(memory.buf, np.uint8, pixels.size)[:] = pixels.reshape(-1)
    return name


def jpeg(check: Check) -> dict[str, Any]:
    """From JPEG bytes to rows: by decoders on all cores, by the GPU's decoder, by both; each
    against what limits it.
    """
    np, model, cores = check.np, check.compiled or check.open("bf16"), os.cpu_count() or 1
    plain = partial(coded, check.jpegs)
    said: dict[str, Any] = {"cores": cores}
    with (
        ThreadPoolExecutor(ACTOR_THREADS) as actor,
        by_processes(check, cores) as (decode_only, to_rows),
    ):
        images = check.batch * (2 if check.quick else 20)
        variants = {
            "decode cpu": (images, partial(decode_only, images)),
            "rows cpu": (images, partial(to_rows, images, model, actor)),
        }
        decoders = {}
        for mode in ("gpu", "hybrid"):
            try:
                decoders[mode] = device_decoder(check, mode, max(1, cores - 4))
            except Exception as error:
                said[mode] = repr(error)[:300]
        for mode, decoder in decoders.items():
            starts = range(0, images, check.batch)

            def only(decoder: Any = decoder, starts: Any = starts) -> None:
                list(actor.map(lambda at: decoder.decode(plain(at, check.batch)), starts))

            def rows(decoder: Any = decoder, starts: Any = starts) -> None:
                list(
                    actor.map(
                        lambda at: model.predict(decoder.decode(plain(at, check.batch))[0]), starts
                    )
                )

            variants |= {f"decode {mode}": (images, only), f"rows {mode}": (images, rows)}
        rates = said["images_s"] = check.rates(variants)
        for kind in ("cpu", *decoders):
            slower = min(rates[f"decode {kind}"]["median"], check.found.get("model", float("inf")))
            said[f"rows {kind} / min(model, decode)"] = rates[f"rows {kind}"]["median"] / slower
    some = check.jpegs[:128]
    exact, fast = (decoded(check, mode, some) for mode in ("exact", "fast"))
    expected = model.predict(exact)
    pixels = {
        "fast": fast,
        **{
            mode: decoder.decode(coded(some, 0, len(some)))[0] for mode, decoder in decoders.items()
        },
    }
    for mode, found in pixels.items():
        there = found if isinstance(found, np.ndarray) else found.cpu().numpy()
        gap = np.abs(there.astype(np.int16) - exact)
        said[f"{mode} against exact"] = {
            "mean": float(gap.mean()),
            "most": int(gap.max()),
            **agreement(model.predict(found), expected),
        }
    said["bad_rows_agree"] = (
        all(bad_rows(check, decoder) for decoder in decoders.values()) if decoders else None
    )
    return said


def coded(jpegs: list[bytes], start: int, count: int) -> list[Any]:
    from vitray.models.gpu_decode import Coded

    return [Coded(jpegs[n % len(jpegs)], 1, 500, 375) for n in range(start, start + count)]


def bad_rows(check: Check, decoder: Any) -> bool:
    """Whether broken JPEGs among good ones are bad on the device exactly where, and why, they are
    bad in mode fast.
    """
    from vitray.decoding.decode import decode
    from vitray.schema import Encoded

    whole, images = check.jpegs[0], list(check.jpegs[:12])
    middle = len(whole) // 2
    images[2] = whole[:middle] + b"\xff\xd9"
    images[5] = whole[:middle] + b"\xff\x00" * 40 + whole[middle + 80 :]
    images[7] = whole[:700] + b"\xff\xd9"
    _, outcomes = decode(
        [Encoded(n, "", "", data) for n, data in enumerate(images)], spec_of(check.side, "fast")
    )
    _, bad = decoder.decode(coded(images, 0, len(images)))
    return {n: o.reason for n, o in enumerate(outcomes) if o.reason} == {
        n: o.reason for n, o in bad.items()
    }


class by_processes:
    """Decoding by one process a core into shared memory, alone and with a model behind it."""

    def __init__(self, check: Check, cores: int) -> None:
        self.check, self.cores = check, cores
        self.shape = (
            check.batch // 4,
            check.side,
            check.side,
            3,
        )  # small, so that a round has no long tail

    def __enter__(self) -> tuple[Callable[..., None], Callable[..., None]]:
        initial = (self.check.jpegs, self.check.side)
        self.pool = ProcessPoolExecutor(self.cores, get_context("spawn"), start_worker, initial)
        self.blocks = [
            shared_memory.SharedMemory(create=True, size=int(self.check.np.prod(self.shape)))
            for _ in range(2 * self.cores)
        ]
        return self.decode_only, self.to_rows

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        for block in self.blocks:
            block.close()
            block.unlink()

    def decode_only(self, images: int) -> None:
        for _ in self._parts(images, lambda _block: None):
            pass

    def to_rows(self, images: int, model: Any, actor: ThreadPoolExecutor) -> None:
        """Four parts make a batch: an actor's fragment."""
        np, parts = (
            self.check.np,
            self._parts(
                images, lambda block: np.frombuffer(block.buf, np.uint8).reshape(self.shape).copy()
            ),
        )
        batches = iter(lambda: list(islice(parts, 4)), [])
        running: list[Any] = []
        for batch in batches:
            running.append(actor.submit(lambda b: model.predict(np.concatenate(b)), batch))
            if len(running) > ACTOR_THREADS:
                running.pop(0).result()
        for one in running:
            one.result()

    def _parts(self, images: int, take: Callable[[Any], Any]) -> Iterator[Any]:
        from concurrent.futures import FIRST_COMPLETED, wait

        starts, names = (
            iter(range(0, images, self.shape[0])),
            {block.name: block for block in self.blocks},
        )
        busy = {
            self.pool.submit(decode_into, name, at, self.shape[0])
            for name, at in zip(names, starts)
        }
        while busy:
            done, busy = wait(busy, return_when=FIRST_COMPLETED)
            for one in done:
                name = one.result()
                part = take(names[name])
                if (at := next(starts, None)) is not None:
                    busy.add(self.pool.submit(decode_into, name, at, self.shape[0]))
                yield part


class GilProbe:
    """How long other threads held Python's lock: a busy thread's time that is neither its CPU time
    nor the wait for a core.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.held_s = 0.0
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> GilProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _count(self) -> None:
        started = self._accounted()
        while not self._ended.is_set():
            for _ in range(20_000):
                pass
            self.held_s = self._accounted() - started

    def _accounted(self) -> float:
        schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
        waited_s = int(schedstat.split()[1]) / 1e9
        return time.perf_counter() - time.thread_time() - waited_s


def dataset_of_tars(check: Check, folder: str, shards: int, images: int) -> tuple[Any, Any]:
    """A dataset without rows, of tars of the photos in turn; and its shards."""
    import tarfile

    from vitray.dataset import resolve_dataset
    from vitray.job import make_job
    from vitray.models import identify, vector_columns
    from vitray.sources import file_passthrough_schema, list_shards

    for shard in range(shards):
        with tarfile.open(f"{folder}/{shard:03d}.tar", "w") as tar:
            for n in range(images):
                data = check.jpegs[(shard + n) % len(check.jpegs)]
                member = tarfile.TarInfo(f"{shard}/{n:04d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    job = make_job(
        {
            "source": f"{folder}/*.tar",
            "model": check.model_dir,
            "out": f"{folder}/out",
            "device": check.device,
            "precision": "bf16",
            "engine": "torch",
            "batch_size": check.batch,
            "fragment_rows": images,
            "embeddings": [{}],
        }
    )
    found = list_shards(job, []).shards
    spec = identify(job)
    passthrough = file_passthrough_schema(found[0], job)
    columns = vector_columns(job, spec)
    return resolve_dataset(job, spec, columns, passthrough, "2026-01-01T00:00:00+00:00"), found


def read_decoded_predicted(
    kind: Any, dataset: Any, shards: Any, model: Any, share: Any
) -> dict[str, float]:
    """Per image, after the first block: what all shards cost on their way through the model."""
    from vitray.pipeline.bounded_queue import BoundedQueue
    from vitray.pipeline.decoders import Outlets
    from vitray.pipeline.stages import predict_stage
    from vitray.totals import copied_bytes

    waiting: Any = BoundedQueue(len(shards))
    blocks: Any = BoundedQueue(share.queue_blocks)
    errors: list[Exception] = []
    marks: list[tuple[int, float, float, int]] = []  # images, wall, CPU, copied bytes

    def lost(error: Exception) -> None:
        errors.append(error)
        blocks.finish()

    def predict() -> None:
        while (block := blocks.get()) is not None:
            fragments = predict_stage(dataset, model, block)
            images = sum(fragment.rows.num_rows for fragment in fragments)
            del block, fragments
            marks.append((images, time.perf_counter(), time.process_time(), copied_bytes.value))

    for shard in shards:
        waiting.put(shard)
    waiting.finish()
    decoders = kind(dataset, waiting, Outlets(blocks.put, lambda _: None, lost), share)
    decoders.start(blocks.finish)
    with ThreadPoolExecutor(ACTOR_THREADS) as actor:
        list(actor.map(lambda _: predict(), range(ACTOR_THREADS)))
    decoders.close()
    decoders.join(time.monotonic() + 30)
    if errors:
        raise errors[0]
    marks.sort(key=lambda mark: mark[1])
    images = sum(mark[0] for mark in marks[1:])
    wall, cpu, copied = (last - first for first, last in zip(marks[0][1:], marks[-1][1:]))
    pixels = dataset.spec.pixels.shape[0] * dataset.spec.pixels.shape[1] * 3
    return {
        "images_s": images / wall,
        "cpu_ms_per_image": cpu * 1000 / images,
        "copies_per_image": copied / images / pixels,
    }


def decoder_processes(check: Check) -> dict[str, Any]:
    """From tars to predictions, decoded by processes and by threads: images/s, this process's CPU
    and lock time, and copies of pixels on the host; `decode: exact`.
    """
    from unittest.mock import patch

    from vitray.models.host_memory import CudaDriver
    from vitray.pipeline.decoders import ThreadDecoders
    from vitray.pipeline.machines import local_share
    from vitray.pipeline.process_decoders import ProcessDecoders

    cores = os.cpu_count() or 1
    share = local_share(cores, has_gpu=True)
    if check.quick:  # of more processes, threads would decode the last shards
        share = dataclasses.replace(share, decoders=1)
    model = check.compiled or check.open("bf16")
    kinds = {"processes": ProcessDecoders, "threads": ThreadDecoders}
    said: dict[str, Any] = {"cores": cores}
    with ExitStack() as stack:
        if not check.cuda:  # a driver's stand-in: all memory can be read by the "device"
            for call in ("pin", "unpin"):
                stack.enter_context(patch.object(CudaDriver, call))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        images = 16 if check.quick else 1024
        dataset, shards = dataset_of_tars(check, folder, 2 * cores, images)
        for name, kind in kinds.items():
            said[name] = read_decoded_predicted(kind, dataset, shards, model, share)
            with GilProbe() as probe:
                read_decoded_predicted(kind, dataset, shards, model, share)
            said[name]["lock_ms_per_image"] = probe.held_s * 1000 / (len(shards) * images)
    return said


SECTIONS = {
    f.__name__: f
    for f in (matmul, equality, ring, pixels_to_rows, decoder_processes, jpeg, model_only)
}


def machine(torch: Any) -> dict[str, Any]:
    import transformers

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "cuda": torch.version.cuda, **versions}


def show(value: Any, indent: str = "  ") -> None:
    for name, inner in value.items():
        if isinstance(inner, dict) and set(inner) == {"median", "least", "most"}:
            print(
                f"{indent}{name:28s} {inner['median']:10.1f} images/s  ({inner['least']:.1f} .. "
                f"{inner['most']:.1f})"
            )
        elif isinstance(inner, dict):
            print(f"{indent}{name}")
            show(inner, indent + "  ")
        else:
            print(
                f"{indent}{name:34s} {inner:.4f}"
                if isinstance(inner, float)
                else f"{indent}{name:34s} {inner}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few images: does it run?"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.5,
        help="no section, and no compilation, begins when it is nearly over",
    )
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    args.deadline = time.monotonic() + 60 * args.minutes
    if absent := missing(NEEDED):
        print(f"not installed here: {', '.join(absent)}. Install them, then run again.")
        return 2
    if absent := missing(FOR_JPEG):
        print(f"not installed here: {', '.join(absent)}; what needs them will say so")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu --quick runs without one")
        return 2
    torch._dynamo.config.recompile_limit = 64  # one code object, many batch sizes and precisions
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": machine(torch),
        "sections": {},
    }
    print(json.dumps(report["machine"]))
    args.out.mkdir(parents=True, exist_ok=True)
    threading.Timer(
        60 * args.minutes + 25, lambda: os._exit(3)
    ).start()  # a section that hangs: what was measured is written
    with tempfile.TemporaryDirectory() as folder:
        check = Check(args, folder)
        for name in args.only:
            started = time.monotonic()
            print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
            try:
                said = (
                    SECTIONS[name](check)
                    if args.deadline - started > 45 or args.quick
                    else {"skipped": "no time left"}
                )
            except Exception as error:
                said = {"error": repr(error)[:500], "where": traceback.format_exc()[-1500:]}
            report["sections"][name] = {**said, "took_s": round(time.monotonic() - started, 1)}
            show(report["sections"][name])
            (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    sys.stdout.flush()
    os._exit(0)  # the timer, and pools of a section that failed


if __name__ == "__main__":
    sys.exit(main())
