"""S3 servers of the tests: credentials, buckets and ports."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKTEST",
    "AWS_SECRET_ACCESS_KEY": "SKTEST",
    "AWS_DEFAULT_REGION": "us-east-1",
}
RGW = Path(__file__).with_name("rgw.sh")


def new_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the environment at an S3 server and make an empty bucket there; returns its s3://
    URL.
    """
    import boto3

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    bucket = f"t-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
