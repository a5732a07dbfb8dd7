"""Loose files that cannot be read, are no files or have odd names cost their own row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.s3 import new_bucket
from support.s3_proxy import FORWARD, Proxy, proxied
from support.source_files import job_for, only_shard, read_all
from vitray import storage
from vitray.errors import ObjectRefused
from vitray.job import Job
from vitray.schema import Encoded
from vitray.sources import read_shard


@pytest.fixture
def behind(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Job]]:
    """A proxy before an S3 server, and a job on the 40 images there."""
    with proxied(mock_s3) as proxy:
        bucket = new_bucket(proxy.url, monkeypatch)
        for n in range(40):
            storage.store_for(bucket).create(f"{bucket}/in/{n:02d}.png", b"%d" % n)
        yield proxy, job_for(f"{bucket}/in")


@pytest.mark.parametrize("method", ["HEAD", "GET"])  # no right to it; in an archive
def test_an_object_that_s3_refuses_costs_its_own_row(
    behind: tuple[Proxy, Job], method: str
) -> None:
    proxy, job = behind
    shard = only_shard(job)
    proxy.rule = lambda call: (
        403 if call.method == method and "/in/00.png" in call.path else FORWARD
    )
    rows, _ = read_all(shard, job)
    assert [(row.data, row.reason) for row in rows[:2]] == [
        (None, "missing"),
        (b"1", None),
    ] and "access refused" in rows[0].message
    assert [row.data for row in rows[2:]] == [b"%d" % n for n in range(2, 40)]


@pytest.mark.parametrize("good_reads", [0, 25, 61])
def test_rights_that_are_lost_during_a_read_make_no_bad_image(
    behind: tuple[Proxy, Job], good_reads: int
) -> None:
    """Keys that expire refuse every object from then on: no row may say that its image was bad."""
    proxy, job = behind
    shard = only_shard(job)
    proxy.calls.clear()
    proxy.rule = lambda call: 403 if len(proxy.calls) > good_reads else FORWARD
    rows = []
    with pytest.raises(ObjectRefused):
        for row in read_shard(shard, job, lambda index: True):
            rows.append(row)
    assert all(isinstance(row, Encoded) and row.reason is None for row in rows)
