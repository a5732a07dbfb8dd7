"""Buckets that are public, private, or paid for by who reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from support.s3 import KEYS
from support.s3_proxy import Proxy, proxied
from vitray.job import make_job
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard

UNSIGNED, PAYER = "AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER"
IMAGES = {f"img{n}": bytes([255, 216, n]) * (100 + n) for n in range(3)}


class Bucket:
    """A bucket with a tar of IMAGES under `in/`; url is its address, proxy sees every request of
    vitray's.
    """

    def __init__(self, endpoint: str, proxy: Proxy) -> None:
        self.name = f"t-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.name}"
        self.proxy = proxy
        self.owner: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )
        self.owner.create_bucket(Bucket=self.name)
        self.owner.put_object(Bucket=self.name, Key="in/a.tar", Body=tar_bytes())

    def allow_everybody(self, *, to_list: bool = True) -> None:
        """To list the bucket and to read its objects, by a policy."""
        rights = [("s3:ListBucket", "")] * to_list + [("s3:GetObject", "/*")]
        statements = [
            {
                "Effect": "Allow",
                "Principal": "*",
                "Action": [action],
                "Resource": [f"arn:aws:s3:::{self.name}{below}"],
            }
            for action, below in rights
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self.owner.put_bucket_policy(Bucket=self.name, Policy=policy)

    def show_to_everybody(self) -> None:
        """The same by access control lists."""
        self.owner.put_bucket_acl(Bucket=self.name, ACL="public-read")
        self.owner.put_object_acl(Bucket=self.name, Key="in/a.tar", ACL="public-read")

    def headers(self, name: str) -> list[str | None]:
        """What each request so far had in this header."""
        return [call.headers.get(name) for call in self.proxy.calls]


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in IMAGES.items():
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def new_bucket(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with proxied(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Bucket(endpoint, proxy)


@pytest.fixture
def mock_bucket(mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    yield from new_bucket(mock_s3, tmp_path, monkeypatch)


def sign(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def images_of(source: str, **fields: object) -> dict[str, bytes | None]:
    job = make_job({"source": source, "model": "m", "out": "o", **fields})
    shards = list_shards(job, []).shards
    rows = [
        row
        for shard in shards
        for row in read_shard(shard, job, lambda index: True)
        if isinstance(row, Encoded)
    ]
    return {row.key: row.data for row in rows}
