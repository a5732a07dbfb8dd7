"""Removed rows stay away: kill -9 at every point of a removal."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray as library
from factories.hand_made import make_dataset
from support.command_line import Call
from support.removed_rows import all_keys, copy_of, first, removal_of, require_removed
from support.s3 import new_bucket
from support.s3_proxy import proxied
from support.zygote import Zygote
from vitray.crash import REMOVAL_POINTS
from vitray.dataset import removed_keys

__all__ = ["first"]


@pytest.mark.parametrize("point", REMOVAL_POINTS)
def test_a_killed_removal_is_finished_by_the_same_command(
    commands: Zygote, first: Path, tmp_path: Path, point: str
) -> None:
    folder, expected = copy_of(first, tmp_path)
    before = set(all_keys(str(folder / "out")))
    assert commands.run(removal_of(folder), VITRAY_CRASH_AT=point) == -9
    between = all_keys(str(folder / "out"))
    assert set(expected) <= set(between) <= before and len(set(between)) == len(between)
    assert commands.run(removal_of(folder)) == 0
    require_removed(folder, expected)


def test_a_store_that_ignores_conditions_is_refused_before_a_key_is_blocked(
    vitray: Call, mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("0/00\n")
    with proxied(mock_s3) as proxy:
        dataset = make_dataset(tmp_path, out=f"{new_bucket(proxy.url, monkeypatch)}/out")
        before = library.read(dataset.out)
        proxy.drop_headers = frozenset({"if-match"})
        code, out, err = vitray("remove", dataset.out, "--keys", tmp_path / "keys", "--yes")
        assert (code, out) == (2, "")
        assert f"{dataset.out}: the store ignored the condition of a replace (If-Match)" in err
        assert not removed_keys(dataset.out).hashes
        assert library.read(dataset.out).equals(before)
