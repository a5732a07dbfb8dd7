"""Images/s of the model alone, uncompiled and compiled, beside plain transformers: `python
benchmarks/bench_model.py --model vit-b`.

Random weights, random pixels, one batch at a time, variants in turn. The ceiling is the fastest
bf16 linear layer of torch here, at any instant of the run, over the FLOP of one image; CLS-only
last blocks do less than that, so it can be passed. `--clock cpu --threads 1` counts the process'
own seconds: for machines that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import transformers

from vitray.job import Embedding, Job
from vitray.models import identify, open_model, vector_columns
from vitray.schema import ModelOutputs

SIZES = {
    "vit-b": (768, 12, 3072),
    "vit-s": (384, 6, 1536),
    "vit-tiny": (192, 3, 768),
}  # width, heads, MLP; 12 blocks
TOKENS, BLOCKS, SIDE = 197, 12, 224


def gflop(width: int) -> float:
    """One image: the blocks' four projections and MLP, attention's two products, the patch
    embedding.
    """
    blocks = BLOCKS * (TOKENS * 12 * width**2 + 2 * TOKENS**2 * width)
    return 2 * (blocks + (TOKENS - 1) * 768 * width) / 1e9


def make_model(directory: str, name: str, blocks: int = BLOCKS) -> None:
    width, heads, mlp = SIZES[name]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, num_labels=1000)
    transformers.ViTForImageClassification(config).save_pretrained(directory)
    transformers.ViTImageProcessorPil().save_pretrained(directory)


def variants(
    directory: str, args: argparse.Namespace, batch: int
) -> dict[str, Callable[[np.ndarray], object]]:
    vectors = [Embedding()] if args.embed else []
    options = {
        "precision": args.precision,
        "batch_size": batch,
        "device": "cpu",
        "engine": "torch",
        "embeddings": vectors,
    }
    job = Job(source=["in"], out="out", model=directory, **options)
    spec = identify(job)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[spec.precision]
    plain = transformers.ViTForImageClassification.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa"
    ).eval()

    def plain_loop(pixels: np.ndarray) -> object:
        x = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
        with torch.inference_mode():
            answer = plain(
                pixel_values=x.permute(0, 3, 1, 2).to(dtype).contiguous(),
                output_hidden_states=bool(vectors),
            )
            return answer.logits.float().softmax(-1).topk(5)

    columns = vector_columns(job, spec)
    chosen = {
        "plain": plain_loop,
        "vitray": open_model(spec, ModelOutputs(tuple(columns), 5), "cpu", args.threads).predict,
    }
    for engine in args.engines:
        chosen[engine] = open_model(
            replace(spec, engine=engine), ModelOutputs(tuple(columns), 5), "cpu", args.threads
        ).predict
    if args.compiled:
        chosen["compiled"] = open_model(
            spec, ModelOutputs(tuple(columns), 5), "cpu", args.threads, compiled=True
        ).predict
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="vit-b")
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[8, 16, 32]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp16"], default="bf16")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument(
        "--embed", action="store_true", help="the CLS embedding too, not the labels alone"
    )
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument(
        "--engines",
        type=lambda text: text.split(","),
        default=[],
        help="openvino,onnx: those beside torch",
    )
    args = parser.parse_args()
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    layer, rows = (
        torch.nn.Linear(768, 3072, dtype=torch.bfloat16),
        torch.randn(4096, 768, dtype=torch.bfloat16),
    )

    def seconds(run: Callable[[], object]) -> float:
        started = now()
        run()
        return now() - started

    image_gflop = gflop(SIZES[args.model][0])
    print(
        f"{args.model}: {image_gflop:.2f} GFLOP an image, {args.precision}, {args.threads} "
        f"threads, {args.clock} clock"
    )
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        make_model(directory, args.model)
        for batch in args.batches:
            pixels = np.random.default_rng(0).integers(
                0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8
            )
            chosen = {
                name: partial(run, pixels) for name, run in variants(directory, args, batch).items()
            }
            took: dict[str, list[float]] = {}
            ceiling = 1e9
            for run in chosen.values():
                run()
            for _ in range(args.rounds):
                ceiling = min(ceiling, *(seconds(partial(layer, rows)) for _ in range(4)))
                for name, run in chosen.items():
                    took.setdefault(name, []).append(seconds(run))
            best = 2 * 4096 * 768 * 3072 / 1e9 / ceiling / image_gflop
            print(f"batch {batch}: ceiling {best:.1f} images/s ({best * image_gflop:.0f} GFLOP/s)")
            for name, times in took.items():
                ratios = sorted(plain / mine for plain, mine in zip(took["plain"], times))
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
                fastest, median = batch / min(times), batch / statistics.median(times)
                share = f"{fastest / best:.2f} of the ceiling"
                print(
                    f"  {name:9s} best {fastest:7.1f}  median {median:7.1f} images/s  {share}  "
                    f"against plain {spread}"
                )


if __name__ == "__main__":
    main()
