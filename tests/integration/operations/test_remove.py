"""Removed rows stay away: kill -9 at every point of a removal."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.removed_rows import all_keys, copy_of, first, removal_of, require_removed
from support.zygote import Zygote
from vitray.crash import REMOVAL_POINTS

__all__ = ["first"]


@pytest.mark.parametrize("point", [p for p in REMOVAL_POINTS if p.startswith("removal-")])
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
