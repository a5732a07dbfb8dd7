"""The pipeline alone, beside other programs: every model here costs nothing.

`python benchmarks/bench_free.py` runs whole programs in alternating rounds, on tars of 100 and of
1,000 JPEGs and on the same images as files. A program's rate is the slope of its wall time between
two sizes of input, so start-up cancels out; CPU is that of the whole machine, which must be idle
otherwise. The result is a Markdown table with medians, ranges, and the ratios within each round.

Every program resizes to 224x224 and gives each image a label and 768 floats, except for the loop,
which only decodes. Each run is a line in --out at once, and `--table FILE` prints the table again.

`--other PATH` adds vitray as it is in another checkout. Where that has no free model yet, the
stand-in of this file replaces its model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZE = 224
DIMENSION = 768
LABELS = [f"class {number:03d}" for number in range(1000)]
PHOTOS = 1000  # different images; a larger input repeats them
JPEG_PIXELS = (550, 412)
JPEG_QUALITY = 98  # so that they have about 107 kB, as in ImageNet
TARS = {"tars-100": 100, "tars-1000": 1000}
BATCH = 256
WARM_UP = 256
CASES = (
    "loop:tars-100",
    "loop:tars-1000",
    "vitray:tars-100",
    "vitray:tars-1000",
    "vitray:files",
    "vitray-ray:tars-100",
    "vitray-ray:tars-1000",
    "vitray-ray:files",
    "ray-data:files",
    "daft:files",
    "other:tars-100",
    "other:tars-1000",
)
TITLES = {
    "loop": "hand-written decode loop, a process per core",
    "vitray": "vitray, local executor",
    "vitray-ray": "vitray on Ray",
    "ray-data": "plain Ray Data",
    "daft": "Daft",
    "other": "vitray at the other commit, local executor",
}
RATIOS = (
    ("vitray-ray:tars-1000", "vitray:tars-1000"),
    ("vitray-ray:tars-100", "vitray:tars-100"),
    ("vitray-ray:tars-1000", "ray-data:files"),
    ("vitray-ray:files", "ray-data:files"),
    ("vitray-ray:files", "daft:files"),
    ("vitray:tars-1000", "other:tars-1000"),
    ("vitray:tars-100", "other:tars-100"),
    ("vitray:tars-1000", "loop:tars-1000"),
    ("vitray:tars-100", "loop:tars-100"),
)
QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One whole program. cpu_s: of the machine, while it ran."""

    round: int
    case: str
    images: int
    seconds: float
    cpu_s: float


# ---------------------------------------------------------------- the figures


@dataclass(frozen=True, slots=True)
class Slope:
    """What a further image costs."""

    images_per_s: float
    cpu_ms: float


def slopes(runs: Sequence[Run], case: str) -> dict[int, Slope]:
    """By round, from its smallest to its largest input; none where the larger was not slower."""
    slopes_by_round = dict[int, Slope]()
    for number in sorted({run.round for run in runs}):
        own = [run for run in runs if run.round == number and run.case == case]
        own.sort(key=lambda run: run.images)
        if len(own) < 2:
            continue
        images = own[-1].images - own[0].images
        seconds = own[-1].seconds - own[0].seconds
        if seconds > 0:
            cpu_s = own[-1].cpu_s - own[0].cpu_s
            slopes_by_round[number] = Slope(images / seconds, 1000 * cpu_s / images)
    return slopes_by_round


def ratios(runs: Sequence[Run], case: str, base: str) -> list[float]:
    """images/s of a case / of another one, in each round that has both."""
    own, others = slopes(runs, case), slopes(runs, base)
    return [own[n].images_per_s / others[n].images_per_s for n in own if n in others]


def further_cpu(runs: Sequence[Run], case: str, base: str) -> list[float]:
    """CPU ms per image of a case beyond those of another one, in each round that has both."""
    own, others = slopes(runs, case), slopes(runs, base)
    return [own[n].cpu_ms - others[n].cpu_ms for n in own if n in others]


def spread(values: Sequence[float], digits: int) -> str:
    """The median and the range."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def markdown(runs: Sequence[Run]) -> str:
    """A table of the programs, and one of the ratios."""
    cases = list(dict.fromkeys(run.case for run in runs))
    lines = ["| program | input | images/s | CPU ms per image | rounds |", "| --- " * 5 + "|"]
    for case in cases:
        program, kind = case.split(":")
        measured = list(slopes(runs, case).values())
        rates = spread([each.images_per_s for each in measured], 0)
        cpu = spread([each.cpu_ms for each in measured], 2)
        lines.append(f"| {TITLES[program]} | {kind} | {rates} | {cpu} | {len(measured)} |")
    lines += ["", "| of | / | images/s, ratio | CPU ms per image beyond |", "| --- " * 4 + "|"]
    for case, base in RATIOS:
        if case in cases and base in cases:
            ratio = spread(ratios(runs, case, base), 2)
            beyond = spread(further_cpu(runs, case, base), 2)
            lines.append(f"| {_title(case)} | {_title(base)} | {ratio} | {beyond} |")
    return "\n".join(lines)


def _title(case: str) -> str:
    program, kind = case.split(":")
    return f"{TITLES[program]}, {kind}"


# ---------------------------------------------------------------- the inputs


def make_jpegs(scratch: Path) -> list[Path]:
    """The PHOTOS different images, made from those of bench_peers.py."""
    from PIL import Image

    from bench_peers import make_photos

    folder = scratch / "jpegs"
    paths = [folder / f"{number:05d}.jpg" for number in range(PHOTOS)]
    if paths[-1].exists():
        return paths
    make_photos(scratch / "photos", PHOTOS)
    folder.mkdir(exist_ok=True)
    for path in paths:
        with Image.open(scratch / "photos" / path.name) as photo:
            photo.resize(JPEG_PIXELS).save(path, "JPEG", quality=JPEG_QUALITY)
    return paths


def make_inputs(scratch: Path, jpegs: Sequence[Path], images: int) -> Path:
    """A folder with so many images, as tars of two sizes and as files (hard links)."""
    folder = scratch / f"free-{images}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    members = [(f"{n:07d}.jpg", jpegs[n % len(jpegs)]) for n in range(images)]
    (part / "files").mkdir(parents=True)
    for name, jpeg in members:
        os.link(jpeg, part / "files" / name)
    for kind, size in TARS.items():
        (part / kind).mkdir()
        for start in range(0, images, size):
            with tarfile.open(part / kind / f"{start:07d}.tar", "w") as archive:
                for name, jpeg in members[start : start + size]:
                    archive.add(jpeg, name)
    part.rename(folder)
    return folder


# ---------------------------------------------------------------- the programs


def run_loop(source: Path, out: Path) -> None:
    """What an expert writes by hand, decoding alone: tars are shared out between processes."""
    out.mkdir()
    processes = len(os.sched_getaffinity(0))
    tars = sorted(source.glob("*.tar"))
    workers = [
        multiprocessing.Process(target=_decode_tars, args=(tars[number::processes],))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            sys.exit(f"a process of the loop ended with {worker.exitcode}")


def _decode_tars(tars: Sequence[Path]) -> None:
    import numpy as np
    import simplejpeg
    from PIL import Image

    pixels = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
    for number, jpeg in enumerate(image_bytes(tars)):
        image = Image.fromarray(simplejpeg.decode_jpeg(jpeg, fastdct=False, fastupsample=False))
        pixels[number % BATCH] = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def image_bytes(tars: Sequence[Path]) -> Iterator[bytes]:
    """The encoded images of tars, in order."""
    for path in tars:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                yield stream.read()


def run_vitray(source: Path, out: Path, address: str | None = None) -> None:
    """vitray of the checkout on PYTHONPATH, with the free model."""
    from vitray.job import Job

    job = Job(source=str(source), model="free", out=str(out), device="cpu")
    if importlib.util.find_spec("vitray.models.free") is None:
        replace_model()
        from vitray.pipeline import run

        run(job, address=address)
        return
    from vitray.models.free import free_spec
    from vitray.pipeline import run

    run(job, address=address, spec=free_spec(0))


def replace_model() -> None:
    """Put a stand-in in place of the model of a vitray that has no free model.

    Works for the local executor, and only before vitray.pipeline is imported.
    """
    from vitray import models, schema

    spec_type: Any = getattr(schema, "ModelSpec", None) or schema.ModelFacts
    spec = spec_type(
        model="free:0",
        revision=None,
        weights_sha256="0" * 64,
        family="vit",
        labels=tuple(LABELS),
        multi_label=False,
        dimension=DIMENSION,
        layers=12,
        prefix_tokens=1,
        has_cls=True,
        pixels=schema.PixelSpec((SIZE, SIZE), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3),
        precision="bf16",
        engine="torch",
        batch_size=BATCH,
    )
    models.identify = lambda job, runs_here=True: spec
    models.open_model = lambda *arguments, **options: StandIn(models.Predictions)


class StandIn:
    """A model that costs nothing, for jobs with five labels and one float32 vector."""

    def __init__(self, predictions: Any) -> None:
        self._predictions = predictions
        self._vectors = noise(BATCH)

    def predict(self, pixels: Any) -> Any:
        import numpy as np

        images = len(pixels)
        if images > len(self._vectors):
            self._vectors = noise(images)
        ids = np.broadcast_to(np.arange(5, dtype=np.int32), (images, 5))
        scores = np.broadcast_to(np.exp2(-np.arange(1, 6, dtype=np.float32)), (images, 5))
        return self._predictions(ids, scores, {"embedding": self._vectors[:images]})


def noise(images: int) -> Any:
    """float32 [images, DIMENSION], which Parquet cannot compress."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((images, DIMENSION), dtype=np.float32)


class NoModel:
    """A no-op actor of Ray Data."""

    def __init__(self) -> None:
        self._vectors = noise(BATCH)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = len(batch.pop("image"))
        return {**batch, "label": LABELS[:images], "embedding": self._vectors[:images]}


def run_ray_data(source: Path, out: Path) -> None:
    """Plain Ray Data, as in its documentation. The actor needs no CPU, like a GPU's."""
    import ray

    ray.init(include_dashboard=False)
    images = ray.data.read_images(str(source), size=(SIZE, SIZE), mode="RGB", include_paths=True)
    actor = ray.data.ActorPoolStrategy(size=1)
    labelled = images.map_batches(NoModel, compute=actor, num_cpus=0, batch_size=BATCH)
    labelled.write_parquet(str(out))


def run_daft(source: Path, out: Path) -> None:
    """Daft with a no-op function of batches."""
    import daft
    import pyarrow as pa
    from daft import DataType, Series, col
    from daft.functions import decode_image, download, resize

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(noise(BATCH).ravel()), DIMENSION)
    kind = DataType.fixed_size_list(DataType.float32(), DIMENSION)

    @daft.func.batch(return_dtype=kind, batch_size=BATCH)
    def embed(images: Series) -> Any:
        return vectors[: len(images)]

    pixels = resize(decode_image(download(col("path")), mode="RGB"), SIZE, SIZE)
    rows = daft.from_glob_path(f"{source}/*.jpg").select("path", embedding=embed(pixels))
    rows.with_column("label", daft.lit(LABELS[0])).write_parquet(str(out))


PROGRAMS = {
    "loop": run_loop,
    "vitray": run_vitray,
    "vitray-ray": lambda source, out: run_vitray(source, out, "local"),
    "ray-data": run_ray_data,
    "daft": run_daft,
    "other": run_vitray,
}


# ---------------------------------------------------------------- the rounds


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs programs as processes of their own. other: the other checkout, if there is one."""

    scratch: Path
    other: Path | None
    deadline: float

    def measure(self, number: int, case: str, images: int) -> Run:
        """One run, whose output is counted. Raises RuntimeError when it fails or lacks a row."""
        from bench_peers import run_command

        program, kind = case.split(":")
        source = self.scratch / f"free-{images}" / kind
        out = self.scratch / "free-out"
        shutil.rmtree(out, ignore_errors=True)
        time.sleep(1)  # Ray's processes of the program before leave a moment after it
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise RuntimeError("no time is left")
        argv = [sys.executable, str(Path(__file__).resolve()), "--program", program]
        argv += ["--source", str(source), "--into", str(out)]
        log = self.scratch / f"{program}.log"
        cpu_before = machine_cpu_s()
        seconds, _ = run_command(argv, self._environment(program), log, remaining_s)
        cpu_s = machine_cpu_s() - cpu_before
        if program != "loop" and (rows := count_rows(out)) != images:
            raise RuntimeError(f"{case}: {rows} rows for {images} images")
        return Run(number, case, images, seconds, cpu_s)

    def _environment(self, program: str) -> dict[str, str]:
        own = Path(__file__).resolve().parent.parent
        checkout = self.other if program == "other" and self.other is not None else own
        return {
            **os.environ,
            **QUIET,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(checkout),
        }


def machine_cpu_s() -> float:
    """CPU seconds that this machine has spent since it started."""
    import psutil

    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def count_rows(out: Path) -> int:
    """The number of rows in a program's Parquet files."""
    import pyarrow.parquet as pq

    internal = {"_vitray", "_errors", "errors"}
    files = [path for path in out.rglob("*.parquet") if not internal & set(path.parts)]
    return sum(pq.ParquetFile(path).metadata.num_rows for path in files)


def available(cases: Sequence[str], other: Path | None) -> list[str]:
    """The cases that can run here. Prints a line for a program that cannot."""
    absent = dict[str, str]()
    if importlib.util.find_spec("daft") is None:
        absent["daft"] = "it is not installed (pip install 'vitray[bench]')"
    if other is None:
        absent["other"] = "--other names no checkout"
    programs = {case.split(":")[0] for case in cases}
    for program in sorted(programs & absent.keys()):
        print(f"left out: {program}, because {absent[program]}", flush=True)
    return [case for case in cases if case.split(":")[0] not in absent]


def read_lines(file: Path) -> list[Run]:
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="2000,8000", help="two numbers of images")
    parser.add_argument("--cases", default=",".join(CASES), help="PROGRAM:INPUT,…")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", type=Path, help="another checkout of vitray")
    parser.add_argument("--deadline", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--scratch", type=Path, default=Path("bench"))
    parser.add_argument("--out", type=Path, help="JSON lines (default: SCRATCH/free.jsonl)")
    parser.add_argument("--table", type=Path, help="print the table of such a file and leave")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parsed()
    if args.program:
        PROGRAMS[args.program](args.source, args.into)
    elif args.table:
        print(markdown(read_lines(args.table)))
    else:
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """All rounds, then the table of what was finished."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no program outlives us
    scratch = args.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    cases = available(args.cases.split(","), args.other)
    sizes = sorted(int(size) for size in args.sizes.split(","))
    jpegs = make_jpegs(scratch)
    kilobytes = statistics.mean(path.stat().st_size for path in jpegs) / 1000
    print(f"{PHOTOS} different JPEGs of {kilobytes:.0f} kB, inputs of {sizes} images", flush=True)
    for size in [WARM_UP, *sizes]:
        make_inputs(scratch, jpegs, size)
    # An unmeasured round comes first. It fills caches, and stops a broken program early.
    plan = [(0, case, WARM_UP) for case in cases]
    plan += [
        (number, case, size)
        for number in range(1, args.rounds + 1)
        for case in cases
        for size in sizes
    ]
    other = None if args.other is None else args.other.resolve()
    failure = run_plan(Bench(scratch, other, time.monotonic() + args.deadline), plan, args)
    if failure:
        sys.exit(f"bench_free: {failure}")


def run_plan(bench: Bench, plan: Sequence[tuple[int, str, int]], args: argparse.Namespace) -> str:
    """Measure, and print the table. Returns what ended it early."""
    out = args.out or bench.scratch / "free.jsonl"
    out.write_text("")
    failure = ""
    try:
        for number, case, images in plan:
            run = bench.measure(number, case, images)
            line = f"round {number} {case}: {images} images, {run.seconds:.1f} s"
            print(f"{line}, {run.cpu_s:.1f} s of CPU", flush=True)
            if number:
                with out.open("a") as stream:
                    stream.write(json.dumps(asdict(run)) + "\n")
    except RuntimeError as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "stopped"
    print(markdown(read_lines(out)))
    return failure


if __name__ == "__main__":
    main()
