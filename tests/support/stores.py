"""Objects below a URL, and a proxy that fails between a store and its S3 server."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import boto3

from support.s3_proxy import FORWARD, Call
from vitray.errors import StorageError
from vitray.storage import store_for

MIB = 1 << 20


def put(url: str, data: bytes = b"x") -> None:
    assert store_for(url).create(url, data)


def below(root: str) -> list[str]:
    """Names of all that is stored, temporary files too."""
    if "://" in root:
        return [info.url.removeprefix(root + "/") for info in store_for(root).find(root)]
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


def client() -> object:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def require_one_line_with_next_step(error: StorageError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    assert "Traceback" not in text
    for word in words:
        assert word in text


def first(failures: int, verdict: int, methods: str = "GET PUT HEAD DELETE POST") -> object:
    remaining = Counter({"n": failures})

    def rule(call: Call) -> int:
        if call.method in methods.split() and remaining["n"] > 0:
            remaining["n"] -= 1
            return verdict
        return FORWARD

    return rule
