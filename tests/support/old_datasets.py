"""The datasets in tests/data, put into a bucket, and jobs that go on with them."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.paths import TESTS
from support.s3 import KEYS
from vitray.job import Job
from vitray.storage import read, store_for

DATA = TESTS / "data" / "dataset-v1"
BUCKET = "vitray-v1"  # the datasets hold its URLs, and etags, which are the same everywhere
FIRST = {
    "tars": (2, 4, 2),
    "parquet": (1, 3, 1),
    "files": (1, 2, 1),
    "manifest": (1, 1, 2),
}  # shards, rows, errors
FIELDS: dict[str, dict[str, object]] = {
    "tars": {"source": "in/tars/*.tar", "keep": "cls"},
    "parquet": {"source": "in/parquet", "keep": "id,caption"},
    "files": {"source": "in/files"},
    "manifest": {"source": "in/manifest", "format": "manifest", "key_column": "key"},
}


@pytest.fixture
def bucket(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": mock_s3}.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3", endpoint_url=mock_s3)
    s3.create_bucket(Bucket=BUCKET)
    keys = [str(path.relative_to(DATA)) for path in sorted(DATA.rglob("*")) if path.is_file()]
    for key in keys:
        s3.put_object(Bucket=BUCKET, Key=key, Body=(DATA / key).read_bytes())
    yield f"s3://{BUCKET}"
    store_for(f"s3://{BUCKET}").delete_tree(f"s3://{BUCKET}")
    s3.delete_bucket(Bucket=BUCKET)


def job_of(bucket: str, name: str, **more: object) -> Job:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 4,
        "fragment_rows": 2,
        "max_error_rate": 1,
        "compile": "off",
    }
    fields = {**base, **FIELDS[name], **more}
    return Job(
        **{
            **fields,
            "source": f"{bucket}/{fields['source']}",
            "model": f"{bucket}/model",
            "out": f"{bucket}/out/{name}",
        }
    )


def objects(bucket: str, name: str) -> dict[str, bytes]:
    """Data files and error files, by their names below the dataset."""
    out = f"{bucket}/out/{name}/"
    urls = [info.url for info in store_for(out).find(out)]
    return {
        url.removeprefix(out): read(url)
        for url in urls
        if url.endswith(".parquet") and "/_vitray/" not in url
    }


def rows(bucket: str, name: str) -> list[dict[str, object]]:
    tables = [
        pq.ParquetFile(pa.BufferReader(data)).read()
        for path, data in sorted(objects(bucket, name).items())
        if path.startswith("data/")
    ]
    return [row for table in tables for row in table.to_pylist()]
