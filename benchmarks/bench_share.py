"""The model's share of what its matrix products alone would allow: `python
benchmarks/bench_share.py MODEL ROUNDS [ENGINE [compiled]]`.

Each round times products of one shape for a second, then the model for some, then the products
again; both sides count all that they did in their time, so that a neighbour on the machine takes
from either alike. Prints every round, the median and the spread.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vitray.cpus import cores
from vitray.job import Job
from vitray.models import identify, open_model, torch_threads_kept, vector_columns
from vitray.models.blocks import PackedLinear, can_pack
from vitray.models.machine import CPU_PRODUCT, flop_per_image
from vitray.schema import ModelOutputs

CALLERS = 2
CALLS = 4  # of four batches each
PRODUCTS_S = 1.0


def products(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Products a second, in the mean."""
    torch.set_num_threads(cores())
    done, started = 0, time.perf_counter()
    with torch.inference_mode():
        while (spent := time.perf_counter() - started) < PRODUCTS_S:
            layer(x)
            done += 1
    return done / spent


def main(directory: str, rounds: int, engine: str = "torch", compiled: str = "") -> None:
    job = Job(
        source=["in"], out="out", model=directory, precision="bf16", engine=engine, device="cpu"
    )
    spec = identify(job)
    rows, inputs, outputs = CPU_PRODUCT
    linear = torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    layer = PackedLinear(linear, None) if can_pack(torch.bfloat16) else linear
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    images = (
        2.0 * rows * inputs * outputs / flop_per_image(spec)
    )  # whose products one product equals
    pixels = np.random.default_rng(0).integers(
        0, 256, (4 * spec.batch_size, *spec.pixels.shape, 3), dtype=np.uint8
    )
    shares = []
    with torch_threads_kept(), ThreadPoolExecutor(CALLERS) as pool:
        model = open_model(
            spec,
            ModelOutputs(tuple(vector_columns(job, spec)), job.top_k),
            "cpu",
            cores(),
            bool(compiled),
        )
        model.predict(pixels)
        for turn in range(rounds + 1):
            before = products(layer, x)
            started = time.perf_counter()
            list(pool.map(lambda _: model.predict(pixels), range(CALLS)))
            rate = CALLS * len(pixels) / (time.perf_counter() - started)
            ceiling = images * (before + products(layer, x)) / 2
            if turn:  # the first warms up
                shares.append(rate / ceiling)
                print(
                    f"model {rate:6.1f} images/s, ceiling {ceiling:6.1f}, share "
                    f"{rate / ceiling:.2f}",
                    flush=True,
                )
    print(f"median {statistics.median(shares):.2f} ({min(shares):.2f}..{max(shares):.2f})")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
