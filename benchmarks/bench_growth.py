"""What more images cost: 1x, 4x and 16x, the ledger's share, S3 requests a shard: `bench_growth.py
MODEL [images [rounds]]`.

Images are JPEGs of 500x375 in tars of 500 (the same ones again in every tar: only the model and the
pipeline are measured). Images/s are slopes of the wall time of whole commands, between 1x and 4x
and between 4x and 16x. Requests are counted at the client, against a mock S3 in this process, of 2
shards and of 8: the difference is what one shard costs.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_decode import cpu_s
from bench_memory import jpegs
from vitray.operations.demo import write_tar
from vitray.schema import ModelOutputs

SHARD = 500


def seconds_of(folder: Path, model: str, shards: int, ready: Path) -> float:
    """Wall time of one whole command."""
    source, out = folder / f"in-{shards}", folder / f"out-{shards}"
    source.mkdir(parents=True)
    for n in range(shards):
        os.link(ready, source / f"{n:05d}.tar")
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "run",
        f"{source}/*.tar",
        "--model",
        model,
        "--out",
        str(out),
    ]
    started = time.perf_counter()
    subprocess.run(
        [*argv, "--set", "device=cpu", "--set", "engine=torch"], check=True, capture_output=True
    )
    return time.perf_counter() - started


def ledger_share(folder: Path, model: str, ready: Path) -> dict[str, float]:
    """CPU seconds of each step for one shard, all in one thread: what staging, commits and hashes
    take of the whole.
    """
    from vitray.dataset import open_dataset
    from vitray.models import open_model
    from vitray.pipeline.stages import (
        EncodedFragment,
        commit_stage,
        decode_stage,
        predict_stage,
        read_stage,
        write_stage,
    )
    from vitray.schema import content_hash
    from vitray.sources import list_shards

    seconds_of(folder, model, 1, ready)
    dataset = open_dataset(str(folder / "out-1"))
    assert dataset is not None
    (shard,) = list_shards(dataset.job, []).shards
    network = open_model(dataset.spec, ModelOutputs(dataset.vectors, 5), "cpu", 1)
    dataset = dataclasses.replace(dataset, out=str(folder / "ledger"))
    took: Counter[str] = collections.Counter()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = cpu_s()
        try:
            return work()
        finally:
            took[name] += cpu_s() - before

    items = timed("read", lambda: list(read_stage(dataset, shard)))
    fragments = [item for item in items if isinstance(item, EncodedFragment)]
    images = [image.data for fragment in fragments for image in fragment.images if image.data]
    timed("hash", lambda: [content_hash(image) for image in images])
    blocks = [timed("decode", partial(decode_stage, dataset, [each])) for each in fragments]
    predicted = [
        rows
        for block in blocks
        for rows in timed("predict", partial(predict_stage, dataset, network, block))
    ]
    for rows in predicted:
        timed("stage", partial(write_stage, dataset, rows))
    timed("commit", lambda: commit_stage(dataset, shard))
    return dict(took)


def requests(model: str, shards: int, ready: bytes) -> Counter[str]:
    """How often each S3 operation is called by a run of so many shards."""
    import uuid

    import boto3
    from aiobotocore.client import AioBaseClient
    from moto.server import ThreadedMotoServer

    import vitray

    keys = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
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
        job = vitray.Job(
            source=f"s3://{bucket}/in/*.tar",
            model=model,
            out=f"s3://{bucket}/out",
            device="cpu",
            engine="torch",
        )
        vitray.run(job)
    finally:
        AioBaseClient._make_api_call = call
        server.stop()
    return counted


def main(model: str, images: int = 1000, rounds: int = 2) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        members = [(f"{n:05d}.jpg", data) for n, data in enumerate(jpegs(SHARD))]
        write_tar(str(folder / "ready.tar"), members)
        write_tar(str(folder / "small.tar"), members[:128])
        took = ledger_share(folder / "ledger-share", model, folder / "ready.tar")
        print(
            ", ".join(f"{name} {seconds * 1000 / SHARD:.3f} ms" for name, seconds in took.items()),
            "of CPU an image",
        )
        whole = sum(took.values()) - took["hash"]  # decode hashes too
        print(
            f"stage, commit and hashes are "
            f"{sum(took[n] for n in ('stage', 'commit', 'hash')) / whole:.1%} of it",
            flush=True,
        )
        took: dict[int, list[float]] = {times: [] for times in (1, 4, 16)}
        for n in range(rounds):
            for times, seconds in took.items():
                seconds.append(
                    seconds_of(
                        folder / f"round-{n}", model, times * images // SHARD, folder / "ready.tar"
                    )
                )
                print(
                    f"round {n + 1}: {times:2d}x, {times * images:6,} images: {seconds[-1]:.1f} s",
                    flush=True,
                )
        slopes = [
            [3 * images / (b - a), 12 * images / (c - b)]
            for a, b, c in zip(*took.values(), strict=True)
        ]
        for n, (near, far) in enumerate(slopes):
            print(
                f"round {n + 1}: 1x to 4x {near:.1f} images/s, 4x to 16x {far:.1f}: "
                f"{far / near:.3f} of it"
            )
        few, many = (
            requests(model, shards, (folder / "small.tar").read_bytes()) for shards in (2, 8)
        )
        print("S3 requests a shard of 128 images in 2 fragments, and of a run besides:")
        for name in sorted(many):
            each = (many[name] - few[name]) / 6
            print(f"  {name:16} {each:5.1f}  {few[name] - 2 * each:5.1f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
