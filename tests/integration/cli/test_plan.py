"""`vitray plan` counts what a run would do, on every kind of source, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, plan_of
from support.paths import TESTS
from support.s3 import new_bucket

MODEL = TESTS / "data" / "dataset-v1" / "model"


def test_plan_on_s3_counts_the_same(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitray.storage import store_for

    bucket = new_bucket(mock_s3, monkeypatch)
    hand_made.write_tars(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        assert store_for(bucket).create(f"{bucket}/in/{path.name}", path.read_bytes())
    plan = plan_of(
        vitray, f"{bucket}/in/s-{{000..001}}.tar", "--model", MODEL, "--out", f"{bucket}/out"
    )
    size = (tmp_path / "in" / "s-000.tar").stat().st_size
    assert (plan["shards"], plan["images"], plan["size_bytes"], plan["pending"]) == (
        2,
        20,
        2 * size,
        2,
    )
    assert [info.url for info in store_for(bucket).find(f"{bucket}/out")] == []
