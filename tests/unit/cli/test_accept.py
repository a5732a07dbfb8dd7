"""`vitray accept`: known-bad inputs are reported, and no longer make a run incomplete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factories.hand_made import finish_with
from support.command_line import Call, refused
from support.dataset_parts import input_shard, make, stage
from vitray.dataset import (
    Dataset,
    accepted_ids,
    commit_shard,
    read_acceptances,
    write_run_record,
)
from vitray.schema import Shard

WHY = "not a tar. Replace it."


@pytest.fixture
def nightly(tmp_path: Path) -> tuple[Dataset, Shard, Shard]:
    """A dataset with a shard that is cut short, and one that its last run set aside."""
    out = str(tmp_path / "out")
    dataset, cut, broken = make(out), input_shard(out, "cut"), input_shard(out, "broken")
    stage(dataset, cut, 5, truncated_at=1234)
    assert commit_shard(dataset, cut) is not None
    finish_with(dataset, [cut.id, broken.id], [cut.id, broken.id])
    record = {"run": "20260101", "kind": "run", "set_aside": {broken.id: WHY}, "exit_code": 3}
    record["finished"] = "2026-01-01T03:00:00+00:00"
    write_run_record(dataset, "20260101", record)
    return dataset, cut, broken


def test_a_shard_is_accepted_with_who_and_why(
    vitray: Call, nightly: tuple[Dataset, Shard, Shard]
) -> None:
    dataset, cut, _ = nightly
    argv = ["--reason", "truncated", "--by", "ann@host", "--note", "the vendor is gone"]
    code, out, err = vitray("accept", dataset.out, *argv)
    assert (code, err) == (0, "")
    assert f"accepted   {cut.id}: truncated at byte 1,234, by ann@host on 20" in out
    assert ": the vendor is gone\n" in out
    stored = json.loads(Path(dataset.out, "_vitray/accepted", f"{cut.id}.json").read_text())
    assert (stored["by"], stored["problem"]) == ("ann@host", "truncated")
    code, out, _ = vitray("status", dataset.out)
    assert f"accepted   {cut.id}: truncated at byte 1,234, by ann@host" in out
    assert "\ncut short " not in out


def test_the_first_acceptance_stays(vitray: Call, nightly: tuple[Dataset, Shard, Shard]) -> None:
    dataset, cut, _ = nightly
    vitray("accept", dataset.out, "--shard", cut.id, "--by", "ann")
    code, out, _ = vitray("accept", dataset.out, "--shard", cut.id, "--by", "bob", "--json")
    answer = json.loads(out)
    assert (code, answer["added"], answer["shards"][0]["by"]) == (0, [], "ann")


def test_a_shard_set_aside_is_not_pending_once_it_is_accepted(
    vitray: Call, nightly: tuple[Dataset, Shard, Shard]
) -> None:
    dataset, cut, broken = nightly
    code, out, _ = vitray("accept", dataset.out, "--reason", "set-aside", "--by", "ann")
    assert code == 0
    assert f"accepted   {broken.id}: set aside: not a tar. Replace it, by ann on 20" in out
    _, out, _ = vitray("status", dataset.out, "--json")
    status = json.loads(out)
    assert list(status["accepted"]) == [broken.id]
    assert status["truncated"] == {cut.id: 1234}


def test_status_after_an_acceptance_asks_for_one_more_run(
    vitray: Call, nightly: tuple[Dataset, Shard, Shard]
) -> None:
    dataset, _, _ = nightly
    _, out, _ = vitray("status", dataset.out)
    assert f"or accept them (vitray accept {dataset.out} --reason set-aside)" in out
    vitray("accept", dataset.out, "--reason", "set-aside")
    _, out, _ = vitray("status", dataset.out)
    first = out.splitlines()[0]
    assert first == f"{dataset.out}: not complete: run the job again to mark it complete"
    assert "set aside  " not in out


@pytest.mark.parametrize("content", ["", "{}", '["shard"]', '{"shard": "another"}'])
def test_a_damaged_acceptance_accepts_nothing(
    vitray: Call,
    nightly: tuple[Dataset, Shard, Shard],
    caplog: pytest.LogCaptureFixture,
    content: str,
) -> None:
    dataset, _, broken = nightly
    vitray("accept", dataset.out, "--shard", broken.id)
    stored = Path(dataset.out, "_vitray/accepted", f"{broken.id}.json")
    stored.write_text(content)
    assert accepted_ids(dataset.out) == set(read_acceptances(dataset.out)) == set()
    _, out, _ = vitray("status", dataset.out)
    assert f"set aside  {broken.id}: {WHY}" in out
    assert f"{stored} is damaged, so its shard is not accepted" in caplog.text
    code, _, err = vitray("accept", dataset.out, "--shard", broken.id)
    assert code == 1 and f"{stored} is damaged: delete it" in err
    stored.unlink()
    assert vitray("accept", dataset.out, "--shard", broken.id)[0] == 0
    assert accepted_ids(dataset.out) == {broken.id}


def test_an_acceptance_under_the_name_of_another_shard_is_damaged(
    vitray: Call, nightly: tuple[Dataset, Shard, Shard]
) -> None:
    dataset, cut, broken = nightly
    vitray("accept", dataset.out, "--shard", broken.id)
    folder = Path(dataset.out, "_vitray/accepted")
    (folder / f"{broken.id}.json").rename(folder / f"{cut.id}.json")
    _, out, _ = vitray("accept", dataset.out, "--list")
    assert out == f"{dataset.out}: no shard is accepted\n"


def test_acceptances_are_listed_and_withdrawn(
    vitray: Call, nightly: tuple[Dataset, Shard, Shard]
) -> None:
    dataset, cut, broken = nightly
    vitray("accept", dataset.out, "--shard", cut.id, "--shard", broken.id)
    _, out, _ = vitray("accept", dataset.out, "--list", "--json")
    assert [one["shard"] for one in json.loads(out)["shards"]] == sorted([cut.id, broken.id])
    code, out, _ = vitray("accept", dataset.out, "--undo", "--shard", cut.id)
    assert (code, out) == (0, f"withdrawn  {cut.id}: the next run reports it again\n")
    _, out, _ = vitray("accept", dataset.out, "--undo", "--shard", broken.id)
    _, out, _ = vitray("accept", dataset.out, "--list")
    assert out == f"{dataset.out}: no shard is accepted\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "choose --shard ID, or --reason with one of truncated, set-aside."),
        (["--shard", "fine"], "fine is neither cut short nor set aside"),
        (["--reason", "broken"], "--reason broken: choose truncated or set-aside"),
        (["--list", "--shard", "x"], "--list takes no other choice"),
        (["--undo", "--reason", "truncated"], "--undo takes --shard ID"),
        (["--undo", "--shard", "x"], "x is not accepted. Accepted in"),
        (["--undo"], "choose --shard ID"),
    ],
)
def test_wrong_usage_is_refused(
    vitray: Call,
    nightly: tuple[Dataset, Shard, Shard],
    tmp_path: Path,
    argv: list[str],
    says: str,
) -> None:
    dataset, cut, broken = nightly
    err = refused(vitray, tmp_path, ["accept", dataset.out, *argv], 2, says)
    if "--undo" not in argv and "--list" not in argv and "broken" not in argv:
        assert f"{cut.id} (truncated at byte 1,234)" in err and f"{broken.id} (set aside" in err
