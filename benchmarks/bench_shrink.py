"""What shrinking costs and brings: `python benchmarks/bench_shrink.py trained`, `... digits`, or
`... line`. Wants the machine for itself.

trained: a ViT (width 384, 4 blocks, 4.8 million weights) trained on drawn shapes, then each format
and quantisation judged by `vitray export` itself, on shapes that it has not seen. digits: the same
of the digits' teacher of test_finetune_bars.py (0.5 MB), trained by `vitray finetune`; calibrated
and judged on images that it has not seen. line: `vitray run` on JPEGs with a ViT-B/16 of random
weights: torch in bf16 against exports, in alternating rounds; images/s are the slope between two
sizes of input, so that start-up is not in them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench_peers import make_input, make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from factories import digits

WIDTH, BLOCKS, STEPS, EXAMPLES = 384, 4, 300, 3000
SMALL, LARGE = 64, 320
HOWS = [
    "onnx",
    "onnx --fp16",
    "onnx --int8",
    "onnx --int8-weights",
    "onnx --int4-weights",
    "openvino",
    "openvino --fp16",
]
HOWS += ["openvino --int8", "openvino --int8-weights", "openvino --int4-weights", "torch-export"]


def train(folder: Path) -> None:
    """Like demo_model.train, but wider: the demo's graph weighs as much as its weights in int8."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from vitray.operations import demo_model

    pixels, kinds = demo_model.draw_examples(np.random.default_rng(0), EXAMPLES)
    torch.manual_seed(0)
    side = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 6,
    }
    model = ViTForImageClassification(
        ViTConfig(**side, intermediate_size=4 * WIDTH, id2label=dict(enumerate(demo_model.NAMES)))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-4, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(kinds), (64,))
        loss = torch.nn.functional.cross_entropy(
            model(pixel_values=pixels[chosen]).logits, kinds[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    unseen, truth = demo_model.draw_examples(np.random.default_rng(1), 600)
    with torch.inference_mode():
        print(
            f"accuracy "
            f"{(model.eval()(pixel_values=unseen).logits.argmax(-1) == truth).float().mean():.4f} "
            f"on unseen shapes"
        )
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def draw(folder: Path, count: int = 800) -> None:
    from vitray.operations import demo_model

    folder.mkdir()
    rng = np.random.default_rng(2)
    for n in range(count):
        demo_model.draw(n % len(demo_model.NAMES), rng).save(folder / f"{n:04d}.png")


def vitray(*argv: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vitray", *map(str, argv)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def export(model: Path, how: str, images: Path, into: Path) -> str:
    shutil.rmtree(into, ignore_errors=True)
    to, *more = how.split()
    return vitray(
        "export",
        model,
        "--to",
        to,
        *more,
        "--calibrate",
        images,
        "--into",
        into,
        "--set",
        "precision=auto",
    )


def trained(scratch: Path, hows: list[str]) -> None:
    if not (scratch / "wide").exists():
        train(scratch / "wide")
    if not (scratch / "shapes").exists():
        draw(scratch / "shapes")
    for how in hows:
        print(export(scratch / "wide", how, scratch / "shapes", scratch / "exported"), flush=True)


def handwritten(scratch: Path, hows: list[str]) -> None:
    model, images = scratch / "digits", scratch / "digits-unseen"
    if not images.exists():
        source = digits.tar(scratch / "digits.tar", digits.few(digits.TRAINED))
        config = {
            **digits.SCRATCH,
            "source": source,
            "model": digits.model(scratch / "digits-config"),
            "out": model,
        }
        (scratch / "digits.yaml").write_text(
            "".join(f"{name}: {value}\n" for name, value in config.items())
        )
        print(vitray("finetune", scratch / "digits.yaml"), flush=True)
        digits.folders(images, digits.few(1000, skip=digits.TRAINED))
    for how in hows:
        print(export(model, how, images, scratch / "exported"), flush=True)


def line(scratch: Path, hows: list[str], rounds: int) -> None:
    model, inputs = (
        make_model(scratch, "vit-b"),
        [make_input(scratch, n) / "loose" for n in (SMALL, LARGE)],
    )
    choices: dict[str, tuple[Path, list[str]]] = {
        "torch bf16": (model, ["--set", "engine=torch", "--set", "precision=bf16"])
    }
    for how in hows:
        into = scratch / how.replace(" ", "")
        if not into.exists():
            print(export(model, how, inputs[0], into), flush=True)
        choices[how] = (into, [])
    rates: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(rounds):
        for name, (path, more) in choices.items():
            took = []
            for images in inputs:
                shutil.rmtree(scratch / "out", ignore_errors=True)
                started = time.perf_counter()
                vitray(
                    "run",
                    images,
                    "--model",
                    path,
                    "--out",
                    scratch / "out",
                    "--set",
                    "device=cpu",
                    *more,
                )
                took.append(time.perf_counter() - started)
            rates[name].append((LARGE - SMALL) / (took[1] - took[0]))
            print(
                f"{name}: {rates[name][-1]:.2f} images/s (commands of {took[0]:.1f} and "
                f"{took[1]:.1f} s)",
                flush=True,
            )
    for name, found in rates.items():
        times = [a / b for a, b in zip(found, rates["torch bf16"])]
        print(
            f"{name}: median {statistics.median(found):.2f} images/s, "
            f"{statistics.median(times):.2f} times torch bf16"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["trained", "digits", "line"])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/vitray-bench-export_model"))
    parser.add_argument("--hows", nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.what == "trained":
        trained(args.scratch, args.hows or HOWS)
    elif args.what == "digits":
        handwritten(args.scratch, args.hows or HOWS)
    else:
        line(args.scratch, args.hows or ["openvino --int8"], args.rounds)
