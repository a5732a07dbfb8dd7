"""Make tests/data/dataset-v1: four small datasets as vitray wrote them at commit 108fe75.

Run it at that commit only: `python tests/data/make_dataset_v1.py tests/data/dataset-v1`. The
datasets live on a mock S3 server, because URLs and etags there are the same on every machine.

Each dataset is complete but for one shard that arrived later. In `tars`, a run was killed just
before it committed that shard, so its fragments are staged.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from moto.server import ThreadedMotoServer
from PIL import Image

BUCKET = "vitray-v1"
SIDE = 16


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((40, 30)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def image_table(first: int) -> pa.Table:
    images = [{"bytes": jpeg(first + n), "path": f"p{first + n}.jpg"} for n in range(4)]
    images[2] = {"bytes": None, "path": "elsewhere.jpg"}
    return pa.table(
        {
            "image": images,
            "id": pa.array(range(first, first + 4), pa.int32()),
            "caption": pa.array(["one", "two", None, "four"], pa.large_string()),
        }
    )


def make_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        id2label={0: "cat", 1: "dog", 2: "emu"},
        label2id={"cat": 0, "dog": 1, "emu": 2},
    )
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    size = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(directory)


FIRST = {
    "in/tars/s-000.tar": tar(
        {
            "a.jpg": jpeg(0),
            "a.cls": b"cat",
            "a.depth.png": b"not looked at",
            "b.jpg": jpeg(1),
            "c.jpg": b"not an image",
            "d.cls": b"a sample without an image",
        }
    ),
    "in/tars/s-001.tar": tar({"x.left.jpg": jpeg(2), "x.right.jpg": jpeg(3), "y.jpg": jpeg(4)}),
    "in/parquet/part-0.parquet": parquet(image_table(10)),
    "in/files/a.jpg": jpeg(20),
    "in/files/b.jpg": b"",
    "in/files/sub/c.png": jpeg(21),
    "in/files/left-out.jfif": jpeg(22),
    "in/files/notes.txt": b"left out",
    "in/manifest/list.jsonl": "\n".join(
        [
            json.dumps({"path": "images/a.jpg", "key": "first"}),
            "this is not JSON",
            json.dumps({"path": "images/gone.jpg", "key": "third"}),
        ]
    ).encode(),
    "in/manifest/images/a.jpg": jpeg(30),
}
LATER = {
    "in/tars/s-002.tar": tar({"p.jpg": jpeg(5), "p.cls": b"dog", "Mr. T_0.jpg": jpeg(6)}),
    "in/parquet/part-1.parquet": parquet(image_table(14)),
    "in/files/d.jpg": jpeg(23),
    "in/files/left-out-too.jfif": jpeg(24),
    "in/manifest/more.csv": b"path,key\nimages/b.jpg,fourth\n",
    "in/manifest/images/b.jpg": jpeg(31),
}
JOBS = {
    "tars": {"source": "in/tars/*.tar", "keep": "cls"},
    "parquet": {"source": "in/parquet", "keep": "id,caption"},
    "files": {"source": "in/files"},
    "manifest": {"source": "in/manifest", "format": "manifest", "key_column": "key"},
}


def run(name: str, crash_at: str = "") -> int:
    job = JOBS[name]
    fields = {
        "precision": "fp32",
        "engine": "torch",
        "batch_size": "4",
        "fragment_rows": "2",
        "max_error_rate": "1",
        **{field: value for field, value in job.items() if field != "source"},
    }
    sets = [part for field in fields.items() for part in ("--set", "=".join(field))]
    command = [sys.executable, "-m", "vitray", "run", f"s3://{BUCKET}/{job['source']}"]
    command += ["--model", f"s3://{BUCKET}/model", "--out", f"s3://{BUCKET}/out/{name}", *sets]
    return subprocess.run(command, env={**os.environ, "VITRAY_CRASH_AT": crash_at}).returncode


def main(target: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    s3.create_bucket(Bucket=BUCKET)
    make_model(target / "model")
    for path in (target / "model").iterdir():
        s3.put_object(Bucket=BUCKET, Key=f"model/{path.name}", Body=path.read_bytes())
    for key, data in FIRST.items():
        s3.put_object(Bucket=BUCKET, Key=key, Body=data)
    for name in JOBS:
        assert run(name) == 0, name
    for key, data in LATER.items():
        s3.put_object(Bucket=BUCKET, Key=key, Body=data)
    assert run("tars", "commit-written") == -9
    for item in s3.list_objects_v2(Bucket=BUCKET)["Contents"]:
        path = target / item["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read())
    server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
