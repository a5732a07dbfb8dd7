"""`vitray promote`, `rollback` and `clean --keep-versions`: what a user sees."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer

import vitray as library
from factories import hand_made
from support.command_line import Call
from support.schemas import checked
from vitray.dataset import Dataset, leases, ledger, unmark_success
from vitray.operations.promoting import delete_old_versions
from vitray.storage import ObjectInfo

Versions = list[Dataset]
ROWS = 3 * (hand_made.IMAGES - 1)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    """Four datasets of the same images; the last two are of one job."""
    spec = hand_made.spec_of(str(tmp_path / "model"))
    weights = ["1" * 64, "2" * 64, "3" * 64, "3" * 64]
    return [
        hand_made.make_dataset(
            tmp_path, spec=replace(spec, weights_sha256=sha), out=str(tmp_path / f"v{number}")
        )
        for number, sha in enumerate(weights, 1)
    ]


@pytest.fixture
def pointer(tmp_path: Path) -> Path:
    return tmp_path / "current"


@pytest.fixture
def promote(vitray: Call, versions: Versions, pointer: Path) -> Callable[[int], None]:
    """promote(n): versions 1 to n."""

    def first(count: int) -> None:
        for dataset in versions[:count]:
            code, _, err = vitray("promote", dataset.out, "--as", pointer, "--by", "ann")
            assert code == 0, err

    return first


def current(pointer: Path) -> str:
    return str(json.loads(pointer.read_text())["dataset"])


def states(pointer: Path) -> list[str]:
    return [version["state"] for version in json.loads(pointer.read_text())["versions"]]


def test_a_promotion_shows_what_is_current_and_what_was(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    code, out, err = vitray("promote", versions[0].out, "--as", pointer)
    assert (code, err) == (0, "")
    assert out == f"{pointer} is at version 1: {versions[0].out}, {ROWS} rows\n"
    promote(3)
    _, out, _ = vitray("promote", versions[3].out, "--as", pointer)
    assert out.splitlines()[:2] == [
        f"{pointer} is at version 4: {versions[3].out}, {ROWS} rows",
        f"before     version 3: {versions[2].out}, {ROWS} rows",
    ]
    assert "same job" in out
    _, out, _ = vitray("promote", versions[3].out, "--as", pointer)
    assert out.endswith("already; nothing changed\n")
    assert len(states(pointer)) == 4


def test_a_promotion_as_json_fits_its_schema(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(1)
    _, out, _ = vitray("promote", versions[1].out, "--as", pointer, "--by", "bob", "--json")
    change = checked(out)
    assert change["schema"] == "vitray/pointer/v1"
    assert (change["version"], change["previous"], change["by"]) == (2, 1, "bob")
    _, out, _ = vitray("rollback", pointer, "--json")
    assert (checked(out)["version"], checked(out)["previous"]) == (1, 2)


def test_an_incomplete_dataset_is_promoted_only_on_demand(
    vitray: Call, versions: Versions, pointer: Path
) -> None:
    unmark_success(versions[0].out)
    code, _, err = vitray("promote", versions[0].out, "--as", pointer)
    assert code == 2 and "is not complete" in err and not pointer.exists()
    code, out, _ = vitray("promote", versions[0].out, "--as", pointer, "--partial")
    assert code == 0 and "NOT complete" in out


def test_refused_promotions_write_nothing(
    vitray: Call, versions: Versions, pointer: Path, tmp_path: Path
) -> None:
    out = versions[0].out
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    (tmp_path / "folder").mkdir()
    for place, message in [
        (out, "holds a dataset"),
        (f"{out}/current", "lies inside the dataset"),
        (versions[1].out, "holds a dataset"),
        (str(tmp_path), "around the dataset"),
        (str(other), "no pointer of vitray"),
        (str(tmp_path / "folder"), "no pointer of vitray"),
        ("s3://bucket/current", "other machines cannot read"),
    ]:
        code, _, err = vitray("promote", out, "--as", place)
        assert (code, message in err) == (2, True), (place, err)
    code, _, err = vitray("promote", tmp_path / "folder", "--as", pointer)
    assert code == 2 and "holds no vitray dataset" in err
    assert other.read_text() == "mine" and not pointer.exists()


def test_reading_commands_follow_a_pointer(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None], tmp_path: Path
) -> None:
    promote(2)
    out = versions[1].out
    assert library.read(str(pointer)).equals(library.read(out))
    for argv in (
        ["status"],
        ["runs"],
        ["validate"],
        ["accept", "--list"],
        ["search", "--key", "0/00"],
        ["export", "--to", "csv", "--into", tmp_path / "csv"],
        ["compact", "--into", tmp_path / "large"],
        ["report", "--no-pictures", "--to", tmp_path / "page.html"],
        ["compare", versions[0].out],
    ):
        code, printed, err = vitray(argv[0], pointer, *argv[1:], "--json")
        assert code == 0, (argv, err)
        assert str(pointer) not in printed, argv
    assert json.loads((tmp_path / "csv" / "_EXPORT.json").read_text())["source"] == out
    code, printed, _ = vitray("promote", pointer, "--as", tmp_path / "stable")
    assert code == 0 and f"version 1: {out}," in printed


def test_commands_that_change_rows_refuse_a_pointer(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None], tmp_path: Path
) -> None:
    promote(1)
    keys = tmp_path / "keys.txt"
    keys.write_text("0/00\n")
    before = pointer.read_bytes()
    job = [f"{tmp_path}/in/*.tar", "--model", tmp_path / "model", "--out", pointer]
    for argv in (
        ["redo", pointer, "--reason", "not_an_image"],
        ["remove", pointer, "--keys", keys],
        ["remove", pointer, "--keys", keys, "--yes"],
        ["accept", pointer, "--reason", "truncated"],
        ["accept", pointer, "--undo", "--shard", "x"],
        ["clean", pointer],
        ["run", *job],
        ["plan", *job],
    ):
        code, _, err = vitray(*argv)
        assert (code, f"is a pointer to {versions[0].out} (version 1)" in err) == (2, True), err
    assert pointer.read_bytes() == before
    assert library.read(versions[0].out).num_rows == ROWS
    _, _, err = vitray("clean", pointer)
    assert "name that directory to clean it, or add --keep-versions N" in err
    assert vitray("accept", pointer, "--list")[0] == 0


def test_a_pointer_to_a_missing_dataset_is_a_clear_error(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    shutil.rmtree(versions[1].out)
    code, _, err = vitray("status", pointer)
    assert code == 2
    assert f"{pointer} points to {versions[1].out} (version 2), which is gone" in err
    assert f"vitray rollback {pointer}" in err
    with pytest.raises(library.VitrayError, match="which is gone"):
        library.read(str(pointer))
    code, out, _ = vitray("rollback", pointer)
    assert code == 0 and "before     version 2:" in out and "gone" in out


def test_a_pointer_to_another_dataset_than_the_promoted_one_is_an_error(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    shutil.rmtree(versions[1].out)
    shutil.copytree(versions[0].out, versions[1].out)
    code, _, err = vitray("status", pointer)
    assert code == 2 and "holds another dataset now" in err


def test_a_rollback_shows_what_changed(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(3)
    code, out, err = vitray("rollback", pointer)
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        f"{pointer} is at version 2: {versions[1].out}, {ROWS} rows",
        f"before     version 3: {versions[2].out}, {ROWS} rows",
    ]
    assert "other job" in out
    assert current(pointer) == versions[1].out
    assert vitray("rollback", pointer, "--to", "3")[0] == 0
    assert current(pointer) == versions[2].out


def test_a_rollback_to_a_missing_dataset_is_refused(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    shutil.rmtree(versions[0].out)
    before = pointer.read_bytes()
    code, _, err = vitray("rollback", pointer)
    assert code == 2 and f"version 1 is gone: {versions[0].out}" in err
    code, _, err = vitray("rollback", pointer, "--to", "8")
    assert code == 2 and "there is no version 8" in err
    code, _, err = vitray("rollback", versions[1].out)
    assert code == 2 and "is no pointer" in err
    assert pointer.read_bytes() == before


def test_old_versions_are_listed_without_yes(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(4)
    before = pointer.read_bytes()
    code, out, err = vitray("clean", pointer, "--keep-versions", "3")
    assert (code, out) == (2, "")
    assert f"version 1: {versions[0].out}, " in err and " files, " in err and " kB\n" in err
    assert "kept       versions 2, 3, 4; 4 is current" in err
    assert "1 dataset would be deleted. Add --yes" in err
    assert pointer.read_bytes() == before
    assert library.read(versions[0].out).num_rows == ROWS


def test_old_versions_are_deleted_with_yes(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(4)
    code, out, err = vitray("clean", pointer, "--keep-versions", "2", "--yes")
    assert (code, err) == (0, "")
    assert "kept       versions 3, 4; 4 is current" in out
    assert out.endswith(f"{pointer}: deleted 2 datasets\n")
    assert [Path(dataset.out).exists() for dataset in versions] == [False, False, True, True]
    assert states(pointer) == ["deleted", "deleted", "kept", "kept"]
    assert library.read(str(pointer)).num_rows == ROWS
    code, out, _ = vitray("clean", pointer, "--keep-versions", "2")
    assert code == 0 and out.endswith("no older version; nothing to delete\n")
    code, _, err = vitray("rollback", pointer, "--to", "1")
    assert code == 2 and "version 1 was deleted" in err


def test_the_deletion_as_json_fits_its_schema(
    vitray: Call, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    _, out, _ = vitray("clean", pointer, "--keep-versions", "1", "--yes", "--json")
    result = checked(out)
    assert result["schema"] == "vitray/clean-versions/v1"
    assert (result["current"], result["kept"], result["deleted"]) == (2, [2], True)
    assert [old["version"] for old in result["old"]] == [1]


@pytest.mark.parametrize("agrees", [True, False])
def test_a_person_at_a_terminal_is_asked(
    vitray: Call,
    versions: Versions,
    pointer: Path,
    promote: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    agrees: bool,
) -> None:
    promote(2)
    questions = list[str]()

    def confirm(text: str, **_: object) -> bool:
        questions.append(text)
        return agrees

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, err = vitray("clean", pointer, "--keep-versions", "1")
    assert questions == ["Delete 1 dataset?"] and f"version 1: {versions[0].out}" in err
    assert (code, Path(versions[0].out).exists()) == ((0, False) if agrees else (130, True))


def test_files_of_others_stay(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    notes = Path(versions[0].out) / "notes.md"
    table = Path(versions[0].out) / "data" / "more.csv"
    notes.write_text("mine")
    table.write_text("mine")
    code, out, _ = vitray("clean", pointer, "--keep-versions", "1", "--yes")
    assert code == 0 and f"2 files of others stay, such as {table}" in out
    left = {path for path in Path(versions[0].out).rglob("*") if path.is_file()}
    assert left == {notes, table}


def test_a_dataset_with_data_files_of_another_job_stays(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    shutil.rmtree(Path(versions[0].out) / "data")
    shutil.copytree(Path(versions[1].out) / "data", Path(versions[0].out) / "data")
    code, _, err = vitray("clean", pointer, "--keep-versions", "1", "--yes")
    assert code == 2 and "of another job" in err
    assert Path(versions[0].out, "_SUCCESS.json").exists()
    assert states(pointer) == ["kept", "kept"]


def test_a_dataset_in_which_a_run_works_stays(
    vitray: Call,
    versions: Versions,
    pointer: Path,
    promote: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote(3)
    monkeypatch.setattr(leases, "EXPIRE_S", 0.5)
    monkeypatch.setattr(leases, "LOOK_S", 0.0)
    clean = ["clean", pointer, "--keep-versions", "1", "--yes"]
    with leases.Leases(versions[1].out, "a-run", renew_s=0.1):
        code, _, err = vitray(*clean)
    assert code == 2 and f"a run works in {versions[1].out} (version 2) now" in err
    assert states(pointer) == ["kept", "kept", "kept"]
    left = Path(versions[1].out, "_vitray", "leases", "killed.json")
    left.parent.mkdir(exist_ok=True)
    left.write_text(json.dumps({"counter": 7, "holder": None, "shards": []}))
    assert vitray(*clean)[0] == 0
    assert states(pointer) == ["deleted", "deleted", "kept"]


@pytest.mark.parametrize("listing", [1, 2, 3])
def test_two_deletions_at_once_both_end_well(
    vitray: Call,
    versions: Versions,
    pointer: Path,
    promote: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    listing: int,
) -> None:
    """listing: after which listing of the old dataset another command deletes all of it."""
    promote(2)
    listings = list[str]()
    list_files = ledger.committed_files

    def list_slowly(out: str) -> dict[str, ObjectInfo]:
        infos = list_files(out)
        listings.append(out)
        if len(listings) == listing:
            delete_old_versions(str(pointer), 1)
        return infos

    monkeypatch.setattr(ledger, "committed_files", list_slowly)
    code, out, err = vitray("clean", pointer, "--keep-versions", "1", "--yes")
    assert (code, err) == (0, "")
    assert "kept       version 2; 2 is current" in out
    assert len(listings) > listing
    assert not Path(versions[0].out).exists() and states(pointer) == ["deleted", "kept"]


def test_a_dataset_that_another_pointer_names_stays(
    vitray: Call,
    versions: Versions,
    pointer: Path,
    promote: Callable[[int], None],
) -> None:
    promote(3)
    live = pointer.with_name("live")
    assert vitray("promote", versions[1].out, "--as", live)[0] == 0
    clean = ["clean", pointer, "--keep-versions", "1"]
    for argv in (clean, [*clean, "--yes"]):
        code, _, err = vitray(*argv)
        assert code == 2
        assert f"{versions[1].out} (version 2) stays: {live} names it as version 1" in err
    assert states(pointer) == ["kept"] * 3
    assert all(library.read(dataset.out).num_rows == ROWS for dataset in versions)
    live.unlink()
    code, _, err = vitray(*clean, "--yes")
    assert (code, err) == (0, "")
    assert states(pointer) == ["deleted", "deleted", "kept"]


def test_a_deletion_ignores_pointers_that_do_not_name_the_dataset(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None], tmp_path: Path
) -> None:
    promote(2)
    notes = Path(versions[0].out, "_vitray", "pointers")
    (note,) = notes.iterdir()
    assert json.loads(note.read_text())["pointer"] == str(pointer)
    live = tmp_path / "live"
    vitray("promote", versions[0].out, "--as", live)
    live.write_bytes(live.read_bytes().replace(b"/v1", b"/v4"))
    for number, damaged in enumerate((b"", b"{}", b"[1]", b'{"pointer": "/etc/passwd"}')):
        (notes / f"{number}.json").write_bytes(damaged)
    (tmp_path / "link").symlink_to(tmp_path)  # the same pointer by another path
    argv = ["clean", tmp_path / "link" / "current", "--keep-versions", "1", "--yes"]
    code, _, err = vitray(*argv)
    assert (code, err) == (0, "")
    assert not Path(versions[0].out).exists()


def test_a_promotion_without_the_right_to_leave_a_note_warns(
    vitray: Call, versions: Versions, pointer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(versions[0].out, "_vitray", "pointers").write_text("no folder")
    code, out, _ = vitray("promote", versions[0].out, "--as", pointer)
    assert code == 0 and "is at version 1" in out
    assert f"will not know that {pointer} names this dataset" in caplog.text


def test_a_dataset_that_stands_in_the_place_of_an_old_version_stays(
    vitray: Call, versions: Versions, pointer: Path, promote: Callable[[int], None]
) -> None:
    promote(2)
    shutil.rmtree(versions[0].out)
    shutil.copytree(versions[2].out, versions[0].out)
    code, out, _ = vitray("clean", pointer, "--keep-versions", "1", "--yes")
    assert code == 0 and "gone already" in out and "deleted 0 datasets" in out
    assert library.read(versions[0].out).num_rows == ROWS


def test_keep_versions_wants_a_pointer_and_yes_wants_keep_versions(
    vitray: Call, versions: Versions
) -> None:
    code, _, err = vitray("clean", versions[0].out, "--keep-versions", "1", "--yes")
    assert code == 2 and f"vitray promote {versions[0].out} --as POINTER" in err
    code, _, err = vitray("clean", versions[0].out, "--yes")
    assert code == 2 and "--keep-versions" in err
    assert vitray("clean", versions[0].out, "--keep-versions", "0")[0] == 2
