"""`vitray status`, `redo` and `clean`, and paths that are no dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path

from factories import hand_made
from support.command_line import Call
from vitray.dataset import committed_files
from vitray.sources import list_shards


def test_clean_removes_orphans_and_keeps_what_a_run_needs(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    done, _, waiting = (s.id for s in list_shards(dataset.job, []).shards)
    for shard in (done, "gone-0000000000-00000000", waiting):
        folder = tmp_path / "out" / "_vitray" / "staging" / shard
        folder.mkdir(parents=True)
        (folder / "0000000000-0000000004.arrow").write_bytes(b"x")
    code, out, _ = vitray("clean", dataset.out)
    assert (code, out) == (0, f"gone-0000000000-00000000\n{done}\ndeleted 2 items\n")
    code, out, _ = vitray("clean", dataset.out, "--json")
    assert code == 0
    assert json.loads(out) == {"schema": "vitray/clean/v1", "out": dataset.out, "removed": []}
    assert os.listdir(tmp_path / "out" / "_vitray" / "staging") == [waiting]
    assert len(committed_files(dataset.out)) == 2
