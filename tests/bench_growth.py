"""What more images cost: images/s of 1x, 4x and 16x, the ledger's share, S3 requests a shard: `python tests/bench_growth.py MODEL [images]`.

Images are JPEGs of 500x375 in tars of 500 (the same ones again in every tar: only the model and the pipeline are measured). Images/s
are those of the steady state, from when a tenth is staged to when all is, in whole commands. Requests are counted at the client,
against a mock S3 in this process, of 2 shards and of 8: the difference is what one shard costs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_decode import cpu_s
from bench_memory import jpegs

from vitray.demo import write_tar

SHARD = 500


def steady(folder: Path, model: str, shards: int, ready: Path) -> tuple[float, float]:
    """(images/s, seconds from the command to its first staged fragment) of one run."""
    source, out, trace = (folder / f"{name}-{shards}" for name in ("in", "out", "trace"))
    source.mkdir(parents=True)
    trace.mkdir()
    for n in range(shards):
        os.link(ready, source / f"{n:05d}.tar")
    argv = [sys.executable, "-m", "vitray", "run", f"{source}/*.tar", "--model", model, "--out", str(out)]
    sets = ["--set", "device=cpu", "--set", "engine=torch"]
    subprocess.run([*argv, *sets], check=True, capture_output=True, env={**os.environ, "VITRAY_TRACE": str(trace)})
    lines = [json.loads(line) for path in trace.glob("*.jsonl") for line in path.read_text().splitlines()]
    staged = sorted((line["at"], line["stop"] - line["start"]) for line in lines if line["step"] == "stage")
    done, total, begin = 0, shards * SHARD, (0.0, 0)
    for at, images in staged:
        done += images
        if begin[1] == 0 and done >= total / 10:
            begin = (at, done)
    record = json.loads(next((out / "_vitray" / "runs").iterdir()).read_text())
    return (total - begin[1]) / (staged[-1][0] - begin[0]), record["seconds"] - (staged[-1][0] - staged[0][0])


def ledger_share(folder: Path, model: str, ready: Path) -> dict[str, float]:
    """CPU seconds of each step for one shard, all in one thread: what staging, commits and hashes take of the whole."""
    from vitray.dataset import open_dataset
    from vitray.models import open_model
    from vitray.pipeline.steps import commit_step, decode_step, predict_step, read_step, stage_step
    from vitray.schema import content_hash
    from vitray.sources import list_shards

    steady(folder, model, 1, ready)
    dataset = open_dataset(str(folder / "out-1"))
    assert dataset is not None
    (shard,) = list_shards(dataset.job, []).shards
    network = open_model(dataset.facts, list(dataset.vectors), 5, True, "cpu", 1)
    dataset = dataclasses.replace(dataset, out=str(folder / "ledger"))
    took: Counter[str] = collections.Counter()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = cpu_s()
        try:
            return work()
        finally:
            took[name] += cpu_s() - before

    parcels = timed("read", lambda: list(read_step(dataset, shard)))
    images = [image for parcel in parcels if parcel.rows for image in parcel.rows["data"].to_pylist()]
    timed("hash", lambda: [content_hash(image) for image in images])
    decoded = [timed("decode", partial(decode_step, dataset, parcel)) for parcel in parcels]
    predicted = [timed("predict", partial(predict_step, dataset, network, parcel)) for parcel in decoded]
    for parcel in predicted:
        timed("stage", partial(stage_step, dataset, parcel))
    timed("commit", lambda: commit_step(dataset, shard))
    return dict(took)


def requests(model: str, shards: int, ready: bytes) -> Counter[str]:
    """How often each S3 operation is called by a run of so many shards."""
    import uuid

    import boto3
    from aiobotocore.client import AioBaseClient
    from moto.server import ThreadedMotoServer

    import vitray

    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    bucket = f"b-{uuid.uuid4().hex[:8]}"
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=bucket)
    for n in range(shards):
        client.put_object(Bucket=bucket, Key=f"in/{n:05d}.tar", Body=ready)
    counted: Counter[str] = collections.Counter()
    call = AioBaseClient._make_api_call

    async def counting(self: AioBaseClient, operation: str, arguments: object) -> object:
        counted[operation] += 1
        return await call(self, operation, arguments)

    AioBaseClient._make_api_call = counting
    try:
        job = vitray.Job(source=f"s3://{bucket}/in/*.tar", model=model, out=f"s3://{bucket}/out", device="cpu", engine="torch")
        vitray.run(job)
    finally:
        AioBaseClient._make_api_call = call
        server.stop()
    return counted


def main(model: str, images: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        members = [(f"{n:05d}.jpg", data) for n, data in enumerate(jpegs(SHARD))]
        write_tar(str(folder / "ready.tar"), members)
        write_tar(str(folder / "small.tar"), members[:128])
        took = ledger_share(folder / "ledger-share", model, folder / "ready.tar")
        print(", ".join(f"{name} {seconds * 1000 / SHARD:.3f} ms" for name, seconds in took.items()), "of CPU an image")
        whole = sum(took.values()) - took["hash"]  # decode hashes too
        print(f"stage, commit and hashes are {sum(took[n] for n in ('stage', 'commit', 'hash')) / whole:.1%} of it", flush=True)
        first = 0.0
        for times in (1, 4, 16):
            rate, start = steady(folder, model, times * images // SHARD, folder / "ready.tar")
            first = first or rate
            print(
                f"{times:3d}x  {times * images:7,} images  {rate:8.1f} images/s  {rate / first:.3f} of 1x  start {start:.1f} s",
                flush=True,
            )
        few, many = (requests(model, shards, (folder / "small.tar").read_bytes()) for shards in (2, 8))
        print("S3 requests a shard of 128 images in 2 fragments, and of a run besides:")
        for name in sorted(many):
            each = (many[name] - few[name]) / 6
            print(f"  {name:16} {each:5.1f}  {few[name] - 2 * each:5.1f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
