"""The bar: what an expert writes by hand for one machine, without resume, bad images, hashes or a
second node.

Tars read in order, decoded by threads (exact: libjpeg-turbo, Pillow's resize), a bounded queue,
bfloat16, top 5 and CLS, a Parquet file every 1,000 images. `python hand.py TARS OUT MODEL BATCH
[compiled]`.
"""

import os
import sys
import tarfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, out, source, batch, *compiled = sys.argv[1:]
BATCH, CORES, AHEAD, ROWS = int(batch), len(os.sched_getaffinity(0)), 4, 1000
torch.set_num_threads(CORES)
processor = AutoImageProcessor.from_pretrained(source)
SIZE, RESAMPLE = (
    (processor.size["width"], processor.size["height"]),
    Image.Resampling(processor.resample),
)


class Labeller(torch.nn.Module):
    """uint8 [N, H, W, 3] -> scores [N, 5], ids [N, 5], CLS float32 [N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForImageClassification.from_pretrained(
            source, dtype=torch.bfloat16
        ).eval()
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.register_buffer("factor", processor.rescale_factor / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = (pixels * self.factor + self.shift).to(torch.bfloat16).permute(0, 3, 1, 2)
        vector = self.model.vit(x).last_hidden_state[:, 0]
        top = self.model.classifier(vector).float().softmax(-1).topk(5)
        return top.values, top.indices, vector.float()


def batches():
    """(names, JPEGs) of BATCH images, the last of fewer; a batch goes on in the next tar."""
    names: list[str] = []
    jpegs: list[bytes] = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                names.append(member.name)
                jpegs.append(archive.extractfile(member).read())
                if len(names) == BATCH:
                    yield names, jpegs
                    names, jpegs = [], []
    if names:
        yield names, jpegs


def decode(jpegs: list[bytes]) -> np.ndarray:
    pixels = np.zeros(
        (BATCH, SIZE[1], SIZE[0], 3), np.uint8
    )  # always a whole batch: one shape to compile
    for n, jpeg in enumerate(jpegs):
        image = Image.fromarray(simplejpeg.decode_jpeg(jpeg, fastdct=False, fastupsample=False))
        pixels[n] = image.resize(SIZE, RESAMPLE)
    return pixels


def decoded(pool: ThreadPoolExecutor):
    """(names, pixels) in order; at most AHEAD batches wait."""
    waiting = deque()
    for names, jpegs in batches():
        waiting.append((names, pool.submit(decode, jpegs)))
        if len(waiting) > AHEAD:
            names, future = waiting.popleft()
            yield names, future.result()
    for names, future in waiting:
        yield names, future.result()


def write(part: int, names: list[str], parts: list[list[torch.Tensor]]) -> None:
    scores, ids, vectors = (torch.cat(column).numpy() for column in zip(*parts))
    labels = [[labeller.model.config.id2label[n] for n in row] for row in ids.tolist()]
    columns = {
        "path": names,
        "label": [row[0] for row in labels],
        "top_labels": labels,
        "top_scores": list(scores),
    }
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    pq.write_table(pa.table(columns), f"{out}/{part:05d}.parquet", compression="zstd")


labeller = Labeller()
run = labeller
if compiled:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    run = torch.compile(labeller, dynamic=False)
Path(out).mkdir(parents=True)
with torch.inference_mode(), ThreadPoolExecutor(CORES) as pool:
    files, names, parts = 0, [], []
    for some, pixels in decoded(pool):
        names += some
        parts.append([column[: len(some)] for column in run(torch.from_numpy(pixels))])
        if len(names) >= ROWS:
            write(files, names, parts)
            files, names, parts = files + 1, [], []
    if names:
        write(files, names, parts)
