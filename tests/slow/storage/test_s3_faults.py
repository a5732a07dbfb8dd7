"""S3 that fails, refuses or loses answers: retries, and one clear error."""

from __future__ import annotations

import hashlib
import os

from support.stores import MIB, client
from vitray.storage import join, store_for


def test_a_create_of_110_mb_is_one_put_and_conditional(s3: str) -> None:
    data, url = os.urandom(MIB) * 110, join(s3, "big.parquet")
    assert store_for(url).create(url, data, {"vitray-sha256": "ab"}) is True
    head = client().head_object(Bucket=s3.removeprefix("s3://"), Key="big.parquet")
    assert head["ETag"].strip('"') == hashlib.md5(data).hexdigest(), (
        "the etag of a multipart upload would be another"
    )
    assert head["ContentLength"] == len(data) and head["Metadata"] == {"vitray-sha256": "ab"}
    assert store_for(url).create(url, bytes(len(data))) is False
    assert store_for(url).stat(url).version == hashlib.md5(data).hexdigest()
    store_for(url).delete([url])
