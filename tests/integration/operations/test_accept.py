"""Nights with a known-bad input: accepted once, it is reported and does not fail the job."""

from __future__ import annotations

import json
from pathlib import Path

from factories.shards import pictures, put_tars
from support.runs import command
from support.zygote import Zygote

IMAGES = 24


def test_an_accepted_truncated_tar_ends_with_0_and_another_broken_one_with_3(
    commands: Zygote, shapes_model: str, tmp_path: Path
) -> None:
    put_tars(str(tmp_path / "in"), pictures(IMAGES), 3, tmp_path)
    cut = tmp_path / "in" / "s-001.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    out, told = tmp_path / "out", tmp_path / "told"
    night = command(tmp_path, shapes_model, out)[3:]
    accept = ["accept", str(out), "--reason", "truncated", "--by", "ann", "--note", "lost"]
    assert commands.run(night) == 3
    assert commands.run(accept) == 0
    assert commands.run(night, str(told)) == 0
    assert "accepted   s_001-" in told.read_text() and "by ann on 20" in told.read_text()
    record = json.loads(max((out / "_vitray" / "runs").iterdir()).read_text())
    (text,) = record["accepted"].values()
    assert text.startswith("truncated at byte ") and text.endswith(": lost")
    cut.write_bytes(whole[: len(whole) // 3])
    assert commands.run(night, str(told)) == 3
    assert "cut short  s_001-" in told.read_text()
    assert f"vitray accept {out} --reason truncated" in told.read_text()


def test_an_accepted_shard_that_was_set_aside_is_not_read_again(
    commands: Zygote, shapes_model: str, tmp_path: Path
) -> None:
    put_tars(str(tmp_path / "in"), pictures(IMAGES), 3, tmp_path)
    (tmp_path / "in" / "s-002.tar").write_bytes(b"no tar at all" * 100)
    out, told = tmp_path / "out", tmp_path / "told"
    night = command(tmp_path, shapes_model, out)[3:]
    assert commands.run(night) == 3
    assert not (out / "_SUCCESS.json").exists()
    assert commands.run(["accept", str(out), "--reason", "set-aside"]) == 0
    assert commands.run([*night, "--json"], str(told)) == 0
    result = json.loads(told.read_text())
    assert (len(result["accepted"]), result["set_aside"], result["pending"]) == (1, {}, 0)
    assert (out / "_SUCCESS.json").exists()
    assert commands.run(["validate", str(out)], str(told)) == 0
    assert "accepted   1 shard without rows" in told.read_text()
