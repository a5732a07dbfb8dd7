"""`vitray remove`: what a user sees, and what `validate` proves."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import typer

import vitray as library
from factories.hand_made import BAD, IMAGES
from support.command_line import Call, files, problems_of, refused, snapshot
from vitray.consume.comparing import compare
from vitray.dataset import (
    Dataset,
    Leases,
    block_keys,
    hash_of,
    is_marked_complete,
    read_footer,
    removed_keys,
)
from vitray.operations.removing import parse_keys, remove

KEYS = ["0/00", f"0/{BAD:02d}", "2/09"]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text("\n".join([*KEYS, ""]))
    return path


def all_keys(dataset: Dataset) -> list[str]:
    good = [key for file in files(dataset) for key in pq.read_table(file)["key"].to_pylist()]
    bad = [key for file in files(dataset) for key in error_keys(str(file))]
    return sorted(good + bad)


def error_keys(url: str) -> list[str]:
    return list(read_footer(url).error_rows["key"].to_pylist())


def test_rows_are_removed_and_counted(vitray: Call, dataset: Dataset, keys_file: Path) -> None:
    before = all_keys(dataset)
    code, out, err = vitray("remove", dataset.out, "--keys", keys_file, "--yes", "--by", "ann")
    assert (code, err) == (0, "")
    assert f"{dataset.out}: 2 rows and 1 error row of 2 shards removed; requested by ann\n" in out
    assert "blocked    3 keys: later runs write no row for them" in out
    assert "Copies are not changed" in out
    assert all_keys(dataset) == sorted(set(before) - set(KEYS))
    assert library.read(dataset.out).num_rows == 3 * IMAGES - 3 - 2
    assert is_marked_complete(dataset.out)
    marker = json.loads(Path(dataset.out, "_SUCCESS.json").read_text())
    assert (marker["rows"], marker["errors"], marker["left_out"]) == (25, 2, {"removed": 3})


def test_validate_proves_a_removal(vitray: Call, dataset: Dataset, keys_file: Path) -> None:
    vitray("remove", dataset.out, "--keys", keys_file, "--yes")
    assert problems_of(vitray, dataset) == []
    _, out, _ = vitray("validate", dataset.out, "--content")
    assert "removed    3 keys blocked; no row, error row or staged fragment holds one" in out
    assert "source: 30 images in the committed shards" in out


def test_validate_finds_a_key_that_is_left(vitray: Call, dataset: Dataset) -> None:
    block_keys(dataset.out, KEYS, {})
    problems = problems_of(vitray, dataset)
    again = "; run vitray remove again with the same keys"
    first, last = files(dataset)[0].name, files(dataset)[2].name
    assert problems == [
        f"data/{first}: 1 row with a removed key{again}",
        f"data/{first}: 1 error row with a removed key{again}",
        f"data/{last}: 1 row with a removed key{again}",
        f"_errors/{first}: 1 error row with a removed key{again}",
    ]
    _, out, _ = vitray("validate", dataset.out)
    assert "removed    3 keys blocked; 4 rows or staged fragments hold one" in out


def test_a_problem_that_is_called_like_a_removed_key_is_none(
    vitray: Call, dataset: Dataset, keys_file: Path
) -> None:
    vitray("remove", dataset.out, "--keys", keys_file, "--yes")
    files(dataset)[1].with_name("a removed key.parquet").write_bytes(b"")
    code, out, _ = vitray("validate", dataset.out)
    assert code == 1
    assert "no row, error row or staged fragment holds one" in out


def test_without_a_terminal_it_asks_for_yes_before_any_work(
    vitray: Call, dataset: Dataset, keys_file: Path
) -> None:
    before = snapshot(Path(dataset.out))
    code, out, err = vitray("remove", dataset.out, "--keys", keys_file)
    assert (code, out) == (2, "")
    assert "to block: 3 keys. Later runs will write no row for them.\n" in err
    assert "2 rows and 1 error row of 2 shards would be deleted. Add --yes" in err
    assert snapshot(Path(dataset.out)) == before


def test_keys_that_no_row_has_are_blocked_only_after_a_yes(
    vitray: Call, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "k").write_text("0/00.jpg\n0/01.jpg\n")
    argv = ["remove", dataset.out, "--keys", tmp_path / "k"]
    code, out, err = vitray(*argv)
    assert (code, out) == (2, "")
    assert "2 keys that no row has would be blocked. Add --yes to block" in err
    questions = list[str]()
    monkeypatch.setattr(typer, "confirm", lambda text, **_: questions.append(text))  # a no
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, err = vitray(*argv)
    assert (code, questions) == (130, ["Block 2 keys that no row has?"])
    assert "nothing was blocked" in err
    assert not removed_keys(dataset.out).hashes


def test_a_removal_that_is_done_already_asks_nothing(
    vitray: Call, dataset: Dataset, keys_file: Path
) -> None:
    vitray("remove", dataset.out, "--keys", keys_file, "--yes")
    code, out, _ = vitray("remove", dataset.out, "--keys", keys_file)
    assert code == 0 and "removed before: 3 of 3 keys" in out


def test_the_record_says_who_asked_and_what_was_removed(
    vitray: Call, dataset: Dataset, keys_file: Path
) -> None:
    argv = ["--keys", keys_file, "--yes", "--json", "--by", "ann", "--note", "ticket 12"]
    code, out, _ = vitray("remove", dataset.out, *argv)
    result = json.loads(out)
    assert (code, result["rows"], result["errors"], result["keys"]) == (0, 2, 1, 3)
    record = json.loads(Path(dataset.out, "_vitray/runs", f"{result['run']}.json").read_text())
    assert (record["kind"], record["by"], record["reason"]) == ("remove", "ann", "ticket 12")
    assert record["removed_from"] == result["shards"]
    assert {"started", "finished", "seconds"} <= record.keys()
    assert not any(key in json.dumps(record) for key in KEYS)
    code, out, _ = vitray("runs", dataset.out)
    assert "remove: 2 rows, by ann" in out


def test_keys_without_a_row_are_named_and_blocked(
    vitray: Call,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"0/00\r\n0/00.jpg\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, _ = vitray("remove", dataset.out, "--keys", "-", "--yes")
    assert code == 0 and "blocked    2 keys" in out
    warning = (
        f"keys without a row in {dataset.out}, and not blocked before: 1 of 2 keys, such as "
        "0/00.jpg. They are blocked now. Compare them with the column `key`."
    )
    assert [(one.levelname, one.message) for one in caplog.records] == [("WARNING", warning)]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"0/00\n")))
    code, out, _ = vitray("remove", dataset.out, "--keys", "-", "--yes")
    assert len(caplog.records) == 1
    assert "0 rows of 0 shards removed" in out and "removed before: 1 of 1 key" in out


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "has no key"), (b"\n\n", "has no key"), (b"\xff", "is not UTF-8")]
)
def test_a_file_without_keys_is_refused(
    vitray: Call, dataset: Dataset, tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "k").write_bytes(content)
    refused(vitray, tmp_path, ["remove", dataset.out, "--keys", tmp_path / "k", "--yes"], 2, says)


def test_a_missing_file_of_keys_is_a_usage_error(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    argv = ["remove", dataset.out, "--keys", tmp_path / "none", "--yes"]
    refused(vitray, tmp_path, argv, 2, "none does not exist")


def test_keys_keep_their_spaces_and_lose_line_ends() -> None:
    data = "\ufeffa b \r\n\tc\r\n\na b \n".encode()
    assert parse_keys(data, "k") == ["a b ", "\tc"]


def test_a_line_in_double_quotes_is_a_json_string(
    vitray: Call, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "k"
    keys.write_text(r""""\u0030/01"
"weird/new\nline.jpg"
"\"quoted\""
 0/02
""")
    before = all_keys(dataset)
    code, out, _ = vitray("remove", dataset.out, "--keys", keys, "--yes")
    assert code == 0 and "1 row of 1 shard removed" in out
    assert r'3 of 4 keys, such as "weird/new\nline.jpg", "\"quoted\"", " 0/02". They' in caplog.text
    assert all_keys(dataset) == sorted(set(before) - {"0/01"})
    blocked = removed_keys(dataset.out).hashes
    names = ("0/01", "weird/new\nline.jpg", '"quoted"', " 0/02")
    assert blocked == {hash_of(key) for key in names}


@pytest.mark.parametrize("line", ['"0/01', '"0/01" x', '"0/01", "0/02"', '"\\x"'])
def test_a_line_that_begins_with_a_quote_and_is_no_json_is_refused(
    vitray: Call, dataset: Dataset, tmp_path: Path, line: str
) -> None:
    (tmp_path / "k").write_text(f"0/00\n{line}\n")
    argv = ["remove", dataset.out, "--keys", tmp_path / "k", "--yes"]
    refused(vitray, tmp_path, argv, 2, "k, line 2 begins with a double quote", "no JSON string")


def test_a_removal_beside_a_run_or_another_removal_says_so(
    vitray: Call, dataset: Dataset, keys_file: Path
) -> None:
    with Leases(dataset.out, "another"):
        code, out, _ = vitray("remove", dataset.out, "--keys", keys_file, "--yes")
    assert code == 0 and "A run or another removal works on this dataset now." in out


def test_two_removals_at_once_leave_no_key_of_either(dataset: Dataset) -> None:
    before = all_keys(dataset)
    chosen = [[f"{shard}/{n:02d}" for shard in range(3)] for n in range(6)]
    calls = [threading.Thread(target=remove, args=(dataset.out, keys)) for keys in chosen]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert all_keys(dataset) == sorted(set(before) - {key for keys in chosen for key in keys})
    assert library.validate(dataset.out).ok


def test_readers_take_indexes_with_gaps(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.out, tmp_path / "before")
    remove(dataset.out, KEYS)
    assert library.read(dataset.out)["index"].to_pylist()[:3] == [1, 2, 4]
    result = compare(str(tmp_path / "before"), dataset.out)
    assert (result.rows, result.only_old_rows, result.agreement) == (25, 2, 1.0)
