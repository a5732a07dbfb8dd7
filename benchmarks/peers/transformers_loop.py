"""The obvious loop: a transformers pipeline over PIL images. Labels alone, which is less work than
the others do.

`python transformers_loop.py IMAGES OUT MODEL [BATCH]`; with BATCH in bfloat16 and so many images at
once, without it as it comes.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import pipeline

folder, out, model, *batch = sys.argv[1:]
paths = sorted(Path(folder).glob("*.jpg"))
if batch:
    classify = pipeline(
        "image-classification", model=model, dtype=torch.bfloat16, batch_size=int(batch[0])
    )
else:
    classify = pipeline("image-classification", model=model)
answers = list(classify((Image.open(path) for path in paths), top_k=5))
rows = {
    "path": [str(path) for path in paths],
    "label": [top[0]["label"] for top in answers],
    "top_labels": [[one["label"] for one in top] for top in answers],
    "top_scores": [[one["score"] for one in top] for top in answers],
}
Path(out).mkdir(parents=True)
pq.write_table(pa.table(rows), f"{out}/labels.parquet")
