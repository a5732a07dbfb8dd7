"""The selection of shards by `sample` and `since`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import vitray
from support.scheduled_runs import put
from vitray.errors import JobError


def test_a_sample_keeps_its_shards_while_the_source_grows(tmp_path: Path) -> None:
    def chosen() -> set[str]:
        job = vitray.Job(
            source=str(tmp_path / "in"),
            model="a/b",
            out=str(tmp_path / "out"),
            format="tar",
            sample=0.3,
        )
        from vitray.sources import list_shards, select_shards

        return {
            os.path.basename(shard.url) for shard in select_shards(list_shards(job, []).shards, job)
        }

    for n in range(200):
        put(tmp_path / "in", f"{n:03d}", b"\0" * 1024)
    first = chosen()
    assert 35 <= len(first) <= 85
    for n in range(200, 400):
        put(tmp_path / "in", f"{n:03d}", b"\0" * 1024)
    put(tmp_path / "in", min(first).removesuffix(".tar"), b"\0" * 2048)  # changed
    assert {name for name in chosen() if name < "200.tar"} == first


@pytest.mark.parametrize("since", ["yesterday", "2026-13-01", "7 weeks", "-1d", ""])
def test_since_that_is_not_a_time_is_refused(since: str) -> None:
    with pytest.raises(JobError, match="a date like 2026-11-01"):
        vitray.Job(source="in", model="m", out="out", since=since)


def test_a_since_without_a_zone_is_utc() -> None:
    def moment(text: object) -> float | None:
        return vitray.Job(source="in", model="m", out="out", since=text).since_s()

    assert (
        moment("2026-11-01T06:00Z")
        == moment("2026-11-01T07:00+01:00")
        == moment("2026-11-01T06:00")
        == 1793512800.0
    )
    assert abs((moment("36h") or 0) - (time.time() - 36 * 3600)) < 5
