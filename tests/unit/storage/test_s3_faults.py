"""S3 that fails, refuses or loses answers: retries, and one clear error."""

from __future__ import annotations

import time

import pytest

from support.s3 import KEYS
from support.stores import require_one_line_with_next_step
from vitray.errors import JobError, StorageError
from vitray.storage import expand, read, store_for


def test_another_scheme_is_refused() -> None:
    with pytest.raises(JobError, match=r"not gs://"):
        store_for("gs://bucket/x")


def test_a_store_that_is_down_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }.items():  # the discard port: refused
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    started = time.monotonic()
    for work in (
        lambda: read("s3://b/x"),
        lambda: expand("s3://b/x"),
        lambda: store_for("s3://b").create("s3://b/x", b"x"),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(caught.value, "s3://b/x", "127.0.0.1:9")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "localhost:9000", "minio", "http://", "ftp://h:1", "http://h h"]
)
def test_an_endpoint_without_its_scheme_is_a_bad_job(
    name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        name: endpoint,
    }.items():
        monkeypatch.setenv(variable, value)
    for work in (lambda: read("s3://b/x"), lambda: expand("s3://b/*")):
        with pytest.raises(JobError) as caught:
            work()
        assert (
            str(caught.value) == f"{name} is {endpoint!r}: write http://host:port or https://host."
        )
