"""vitray beside what a user could write instead, in one run: `make bench`, or `python
benchmarks/bench_peers.py --model vit-b`.

Each peer is a process of its own (benchmarks/peers), measured from outside, all on the same JPEGs
(photographs' crops at 500x375) and the same random weights, in alternating rounds. Steady state is
the slope of wall time between two sizes of input, so start-up cancels out; the whole command is the
larger size from start to exit. An unmeasured round comes first: it fills caches, and stops a broken
peer within a minute.

The gate: every run must label every image once, and agree with a float32 loop of transformers over
Pillow's pixels on 98% of the *clear* images. Random weights have near ties, which bfloat16 decides
at will: an image is clear when the margin between its first two float32 logits is more than twice
what plain transformers in bfloat16 changes such margins by, in 95% of the images. Where a peer
keeps embeddings, their mean CLS cosine must be 0.999. A pipeline keeps labels alone, less work, in
favour of `loop` and `ray`.

`peak MB` is what wait4 says: the largest single process among the command and its children that it
waited for. Each run is a JSON line in --out at once, so that a run which is stopped keeps its
finished rounds; `--table FILE` prints them again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
AGREEMENT, COSINE = 0.98, 0.999
SHARD = 500  # images in a tar
PHOTOS = ["astronaut", "brick", "chelsea", "coffee", "grass", "gravel"]
PHOTOS += ["hubble_deep_field", "ihc", "motorcycle_left", "motorcycle_right", "retina", "rocket"]
BATCHES = {"vit-b": 16, "vit-s": 16, "vit-tiny": 32}
SIZES = {"vit-b": [64, 192], "vit-s": [256, 768], "vit-tiny": [1000, 3000]}
WARM_UP = 32
PEERS = {  # name -> what it reads, command; {images} {out} {model} {batch} are filled in
    "loop": ("loose", "peers/transformers_loop.py {images} {out} {model}"),
    "loop-bf16": ("loose", "peers/transformers_loop.py {images} {out} {model} 16"),
    "ray": ("loose", "peers/ray_pipeline.py {images} {out} {model} {batch}"),
    "daft": ("loose", "peers/daft_udf.py {images} {out} {model} {batch}"),
    "hand": ("tars", "peers/hand.py {images} {out} {model} {batch}"),
    "hand-compiled": ("tars", "peers/hand.py {images} {out} {model} {batch} compiled"),
    "vitray": (
        "tars",
        "-m vitray run {images}/*.tar --model {model} --out {out} --set device=cpu --set "
        "engine=torch",
    ),
}
QUIET = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
QUIET |= {"DO_NOT_TRACK": "1", "DAFT_ANALYTICS_ENABLED": "0"}


@dataclass(frozen=True, slots=True)
class Run:
    round: int
    peer: str
    images: int
    seconds: float
    peak_mb: int
    agreement: float
    cosine: float | None


# ---------------------------------------------------------------- what is measured


def slopes(runs: Sequence[Run], peer: str, small: int, large: int) -> dict[int, float]:
    """Steady images/s by round; a round in which the larger input was not slower has none."""
    took = {(run.round, run.images): run.seconds for run in runs if run.peer == peer}
    both = [n for n, images in took if images == large and (n, small) in took]
    more = {n: took[n, large] - took[n, small] for n in both}
    return {n: (large - small) / seconds for n, seconds in more.items() if seconds > 0}


def wholes(runs: Sequence[Run], peer: str, large: int) -> dict[int, float]:
    """Images/s of the whole command, start and exit included, by round."""
    return {
        run.round: large / run.seconds for run in runs if run.peer == peer and run.images == large
    }


def ratios(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [mine[n] / theirs[n] for n in mine if n in theirs]


def spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    return (
        f"{statistics.median(values):.{digits}f} "
        f"({min(values):.{digits}f}..{max(values):.{digits}f})"
    )


def table(runs: Sequence[Run], small: int, large: int) -> str:
    """Markdown; a ratio is the median of the rounds' own ratios."""
    lines = [
        f"| peer | images/s, slope {small}..{large} | seconds, {large} images | vitray / peer, "
        f"slope | vitray / peer, whole "
        "| peak MB | labels | CLS cosine | rounds |",
        "| --- " * 9 + "|",
    ]
    mine, my_whole = slopes(runs, "vitray", small, large), wholes(runs, "vitray", large)
    for peer in dict.fromkeys(run.peer for run in runs):
        own = [run for run in runs if run.peer == peer]
        rates, whole = slopes(runs, peer, small, large), wholes(runs, peer, large)
        cosines = [run.cosine for run in own if run.cosine is not None]
        cells = [
            peer,
            spread(list(rates.values())),
            spread([large / rate for rate in whole.values()], 1),
            spread(ratios(mine, rates)),
            spread(ratios(my_whole, whole)),
            str(max(run.peak_mb for run in own)),
            f"{min(run.agreement for run in own):.4f}",
            f"{min(cosines):.5f}" if cosines else "not kept",
            f"{len(rates)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_command(
    argv: list[str], environment: dict[str, str], log: Path, limit_s: float
) -> tuple[float, int]:
    """(wall seconds, peak MB) of one whole process. Raises RuntimeError when it fails or passes the
    limit, with its last lines.
    """
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"exit code {process.returncode} after {seconds:.0f} s (limit {limit_s:.0f} s): "
            f"{' '.join(argv)}\n{last}"
        )
    return seconds, usage.ru_maxrss // 1024


# ---------------------------------------------------------------- the gate


def key_of(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def answers_of(out: Path) -> pa.Table:
    """key, label, and embedding where the peer kept one, of all Parquet files under a peer's
    output.
    """
    files = [path for path in sorted(out.rglob("*.parquet")) if "_vitray" not in path.parts]
    if not files:
        raise ValueError("it wrote no Parquet file")
    tables = [pq.ParquetFile(path).read(use_threads=False) for path in files]
    name = "key" if "key" in tables[0].column_names else "path"
    whole = pa.concat_tables(
        [t.select([c for c in (name, "label", "embedding") if c in t.column_names]) for t in tables]
    )
    return whole.set_column(0, "key", pa.array([key_of(path) for path in whole[name].to_pylist()]))


def judge(reference: pa.Table, answers: pa.Table) -> tuple[float, float | None]:
    """(share of clear images with the reference's label, mean CLS cosine or None). Raises
    ValueError when the gate is not passed.
    """
    if sorted(reference["key"].to_pylist()) != sorted(answers["key"].to_pylist()):
        raise ValueError(
            f"{len(answers)} rows for {len(reference)} images, or other keys: not every image was "
            f"labelled once"
        )
    reference, answers = reference.sort_by("key"), answers.sort_by("key")
    clear = np.array(reference["clear"].to_pylist())
    labels = reference["label"].to_pylist()
    if clear.mean() < 0.5 or len(set(labels)) < 5:
        raise ValueError(
            f"the reference proves nothing: {clear.mean():.0%} of its images are clear, "
            f"{len(set(labels))} labels"
        )
    share = float(np.mean(np.equal(labels, answers["label"].to_pylist())[clear]))
    if share < AGREEMENT:
        raise ValueError(
            f"{share:.1%} of the clear images have the label of the float32 loop, {AGREEMENT:.0%} "
            f"are asked for"
        )
    if "embedding" not in answers.column_names:
        return share, None
    mine, theirs = (np.array(t["embedding"].to_pylist(), np.float64) for t in (answers, reference))
    cosine = float(
        np.mean(
            (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
        )
    )
    if not cosine >= COSINE:  # so that a NaN does not pass
        raise ValueError(
            f"mean CLS cosine {cosine:.5f} with the float32 loop, {COSINE} is asked for"
        )
    return share, cosine


# ---------------------------------------------------------------- what is made once


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Crops of scikit-image's photographs, some mirrored, as JPEGs of 500x375 at quality 90; the
    first n are the same for any count.
    """
    import skimage
    from PIL import Image, ImageOps

    if (folder / f"{count - 1:05d}.jpg").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = {path.stem: path for path in (Path(skimage.__file__).parent / "data").iterdir()}
    photos, rng = (
        [Image.open(data[name]).convert("RGB") for name in PHOTOS],
        np.random.default_rng(seed),
    )
    for n in range(count):
        photo = photos[rng.integers(len(photos))]
        unit = min(photo.width / 4, photo.height / 3) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, photo.width - 4 * unit), rng.uniform(0, photo.height - 3 * unit)
        image = photo.resize(
            (500, 375), Image.Resampling.BICUBIC, box=(left, top, left + 4 * unit, top + 3 * unit)
        )
        buffer = io.BytesIO()
        (ImageOps.mirror(image) if rng.integers(2) else image).save(buffer, "JPEG", quality=90)
        (folder / f"{n:05d}.jpg").write_bytes(buffer.getvalue())


def make_input(scratch: Path, count: int) -> Path:
    """A directory with the first `count` photographs, as loose/*.jpg and as tars/*.tar."""
    from vitray.operations.demo import write_tar

    folder = scratch / f"input-{count}"
    if folder.exists():
        return folder
    make_photos(scratch / "photos", count)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for kind in ("loose", "tars"):
        (part / kind).mkdir(parents=True)
    photos = sorted((scratch / "photos").iterdir())[:count]
    for photo in photos:
        os.link(photo, part / "loose" / photo.name)
    for start in range(0, count, SHARD):
        members = [(photo.name, photo.read_bytes()) for photo in photos[start : start + SHARD]]
        write_tar(f"{part}/tars/{start // SHARD:05d}.tar", members)
    part.rename(folder)
    return folder


def make_model(scratch: Path, name: str) -> Path:
    from bench_model import make_model as save_model

    folder = scratch / name
    if not folder.exists():
        save_model(str(folder) + ".part", name)
        Path(f"{folder}.part").rename(folder)
    return folder


def make_reference(scratch: Path, model: Path, count: int) -> pa.Table:
    """key, label, clear and embedding (CLS) by float32 transformers over Pillow's pixels; kept in
    the scratch directory.
    """
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    file = scratch / f"{model.name}-{count}.parquet"
    if file.exists():
        return pq.ParquetFile(file).read()
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    exact, rough = (
        AutoModelForImageClassification.from_pretrained(model, dtype=t).eval()
        for t in (torch.float32, torch.bfloat16)
    )
    paths = sorted((scratch / f"input-{count}" / "loose").iterdir())
    vectors, labels, margins, changes = [], [], [], []
    with torch.inference_mode():
        for start in range(0, count, 32):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + 32]]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            cls, cls_rough = (
                m.vit(pixels.to(m.dtype)).last_hidden_state[:, 0] for m in (exact, rough)
            )
            top = exact.classifier(cls).topk(2)
            margin = top.values[:, 0] - top.values[:, 1]
            again = rough.classifier(cls_rough).float().gather(1, top.indices)
            vectors += list(cls.numpy())
            labels += [exact.config.id2label[n] for n in top.indices[:, 0].tolist()]
            margins += margin.tolist()
            changes += (again[:, 0] - again[:, 1] - margin).abs().tolist()
    clear = np.array(margins) > 2 * np.quantile(changes, 0.95)
    columns = {
        "key": [path.stem for path in paths],
        "label": labels,
        "clear": clear,
        "embedding": vectors,
    }
    pq.write_table(pa.table(columns), file)
    print(
        f"reference of {count}: {clear.mean():.0%} of the images are clear, {len(set(labels))} "
        f"labels",
        flush=True,
    )
    return pa.table(columns)


# ---------------------------------------------------------------- the rounds


class Bench:
    def __init__(self, scratch: Path, model: str, sizes: Sequence[int], deadline: float) -> None:
        self._scratch, self._batch, self._deadline = scratch, BATCHES[model], deadline
        # in a process of its own: Linux counts what the parent holds at fork into a child's peak
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            self._inputs = {
                size: pool.submit(make_input, scratch, size).result()
                for size in sorted(sizes, reverse=True)
            }
            self._model = pool.submit(make_model, scratch, model).result()
            self._references = {
                size: pool.submit(make_reference, scratch, self._model, size).result()
                for size in sizes
            }
        self._environment = os.environ | QUIET | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment |= {
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "compiled"),
            "PYTHONPATH": str(HERE.parent),
        }

    def measure(self, round_: int, peer: str, images: int) -> Run:
        """One run, judged. Raises RuntimeError, naming the peer, when it fails, is late or does not
        pass the gate.
        """
        out, log = self._scratch / "out", self._scratch / f"{peer}.log"
        shutil.rmtree(out, ignore_errors=True)
        kind, command = PEERS[peer]
        fill = {
            "images": self._inputs[images] / kind,
            "out": out,
            "model": self._model,
            "batch": self._batch,
        }
        argv = [
            str(HERE / word) if word.startswith("peers/") else word.format(**fill)
            for word in command.split()
        ]
        time.sleep(1)  # Ray's processes of the command before leave a moment after it
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise RuntimeError("no time is left")
        seconds, peak_mb = run_command([sys.executable, *argv], self._environment, log, left)
        try:
            agreement, cosine = judge(self._references[images], answers_of(out))
        except ValueError as error:
            raise RuntimeError(f"{peer} with {images} images: {error}") from error
        return Run(round_, peer, images, seconds, peak_mb, agreement, cosine)


def machine() -> dict[str, object]:
    from importlib.metadata import version

    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
        cpu = next(
            (line.partition(":")[2].strip() for line in stream if line.startswith("model name")),
            platform.machine(),
        )
    names = ["vitray", "torch", "transformers", "ray", "daft", "pyarrow", "pillow", "simplejpeg"]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in names},
    }


def read_lines(file: Path) -> tuple[dict[str, object], list[Run]]:
    first, *rest = (json.loads(line) for line in file.read_text().splitlines())
    return first, [Run(**line) for line in rest]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=BATCHES, default="vit-tiny")
    parser.add_argument(
        "--sizes",
        type=lambda text: sorted(map(int, text.split(","))),
        help="two numbers of images (by model)",
    )
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--deadline",
        type=float,
        default=3600,
        help="seconds for everything; what is finished then is kept",
    )
    parser.add_argument("--scratch", type=Path, default=Path("bench"))
    parser.add_argument("--out", type=Path, help="JSON lines (default: SCRATCH/MODEL.jsonl)")
    parser.add_argument("--table", type=Path, help="print the table of such a file and leave")
    args = parser.parse_args()
    if args.table:
        about, runs = read_lines(args.table)
        print(table(runs, *about["sizes"]))
        return
    if set(args.peers) - PEERS.keys():
        parser.error(f"unknown peers: {', '.join(sorted(set(args.peers) - PEERS.keys()))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a peer never outlives us
    (small, large), deadline = args.sizes or SIZES[args.model], time.monotonic() + args.deadline
    scratch = args.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    bench, runs = Bench(scratch, args.model, [WARM_UP, small, large], deadline), []
    out = args.out or scratch / f"{args.model}.jsonl"
    about = {
        "model": args.model,
        "sizes": [small, large],
        "batch": BATCHES[args.model],
        **machine(),
    }
    out.write_text(json.dumps(about) + "\n")
    plan = [(0, peer, WARM_UP) for peer in args.peers]
    plan += [
        (n, peer, size)
        for n in range(1, args.rounds + 1)
        for peer in args.peers
        for size in (small, large)
    ]
    failed = ""
    try:
        for round_, peer, images in plan:
            run = bench.measure(round_, peer, images)
            print(
                f"round {round_} {peer}: {images} images, {run.seconds:.1f} s, labels "
                f"{run.agreement:.4f}",
                flush=True,
            )
            if round_:
                runs.append(run)
                with out.open("a") as stream:
                    stream.write(json.dumps(asdict(run)) + "\n")
    except RuntimeError as error:
        failed = str(error)
    except KeyboardInterrupt:
        failed = "stopped"
    if runs:
        print(table(runs, small, large))
    if failed:
        sys.exit(f"bench_peers: {failed}\n{len(runs)} measured runs are in {out}")


if __name__ == "__main__":
    main()
