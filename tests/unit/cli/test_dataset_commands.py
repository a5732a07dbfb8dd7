"""`vitray status`, `redo` and `clean`, and paths that are no dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from factories import hand_made
from support.command_line import Call, refused, snapshot
from vitray.dataset import committed_files, write_fragment
from vitray.schema import ERROR_SCHEMA, REASONS
from vitray.sources import list_shards


def test_status_tells_how_far(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    last = list_shards(dataset.job, []).shards[2]
    rows = [hand_made.row(dataset, last, i) for i in ()]
    errors = pa.Table.from_pylist(
        [
            {"key": str(n), "shard": last.id, "index": n, "uri": "u", "reason": "empty"}
            for n in range(4)
        ],
        schema=ERROR_SCHEMA,
    )
    write_fragment(
        dataset, last.id, (0, 4), pa.Table.from_pylist(rows, schema=dataset.schema), errors
    )
    code, out, err = vitray("status", dataset.out, "--json")
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert (
        status["complete"],
        status["shards"],
        status["rows"],
        status["errors"],
        status["truncated"],
    ) == (False, 2, 18, 2, {})
    assert (status["staged"], status["last_run"]) == ({last.id: 4}, None)
    assert vitray("status", dataset.out)[1].splitlines()[:3] == [
        f"{dataset.out}: not complete: run the job again to continue",
        "committed  2 shards, 18 rows, 2 errors, 0 shards cut short",
        "staged     4 images of 1 shard",
    ]


def test_a_dataset_is_not_followed(vitray: Call, tmp_path: Path) -> None:
    out = hand_made.make_dataset(tmp_path).out
    refused(
        vitray, tmp_path, ["status", out, "--follow"], 2, "JobError: --follow is for a submission"
    )


@pytest.mark.parametrize(
    "argv",
    [["status"], ["validate"], ["redo", "--reason", "empty"], ["redo", "--shard", "x"], ["clean"]],
)
def test_a_path_without_dataset_is_refused(vitray: Call, tmp_path: Path, argv: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for out in (tmp_path / "in", tmp_path / "nowhere"):
        refused(
            vitray,
            tmp_path,
            [argv[0], out, *argv[1:]],
            2,
            f"JobError: {out} holds no vitray dataset. Check the path",
        )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"fingerprint": "x", "facts": 5}', "\xff"]
)
@pytest.mark.parametrize("command", ["status", "validate", "clean"])
def test_a_damaged_dataset_json_is_named(
    vitray: Call, tmp_path: Path, command: str, text: str
) -> None:
    (tmp_path / "out" / "_vitray").mkdir(parents=True)
    (tmp_path / "out" / "_vitray" / "dataset.json").write_text(text, encoding="latin-1")
    refused(
        vitray,
        tmp_path,
        [command, tmp_path / "out"],
        1,
        f"{tmp_path}/out/_vitray/dataset.json is not readable",
    )


def test_redo_asks_which(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out],
        2,
        f"give --shard ID (a file in {dataset.out}/data, without .parquet)",
        "or --reason R, one of ",
        ", ".join(REASONS),
    )
    refused(vitray, tmp_path, ["redo", dataset.out, "--yes"], 2, "give --shard ID ")
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--reason", "ugly"],
        2,
        "--reason R, one of empty, not_an_image",
    )
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--shard", "no-such-shard", "--yes"],
        2,
        "holds no shard no-such-shard",
    )
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--shard", "../../in/s-000", "--yes"],
        2,
        "holds no shard ../../in/s-000",
    )


def test_redo_deletes_only_what_was_chosen_and_only_with_yes(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    first, *others = sorted(committed_files(dataset.out))
    before = snapshot(tmp_path)
    code, out, _ = vitray("redo", dataset.out, "--shard", first)
    assert (code, out) == (0, f"{first}\n1 data file would be deleted; add --yes to do it\n")
    assert (
        vitray("redo", dataset.out, "--reason", "empty")[1]
        == f"{dataset.out}: no data file has such an error; nothing to redo\n"
    )
    assert json.loads(vitray("redo", dataset.out, "--shard", first, "--json")[1]) == {
        "schema": "vitray/redo/v1",
        "out": dataset.out,
        "shards": [first],
        "deleted": False,
    }
    assert snapshot(tmp_path) == before
    assert vitray("redo", dataset.out, "--shard", first, "--yes")[0] == 0
    assert sorted(committed_files(dataset.out)) == others
    assert not (tmp_path / "out" / "_errors" / f"{first}.parquet").exists()
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    assert vitray("validate", dataset.out)[0] == 0
    code, out, _ = vitray("redo", dataset.out, "--reason", "not_an_image", "--yes", "--json")
    assert code == 0 and json.loads(out)["shards"] == others and json.loads(out)["deleted"]
    assert committed_files(dataset.out) == {}
