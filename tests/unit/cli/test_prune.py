"""`vitray run --prune` deletes only after a yes, and counts what it deleted."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from factories import hand_made
from factories.small_models import make_checkpoint
from support.command_line import Call, snapshot, write_job
from vitray.cli.consent import require_consent
from vitray.job import load_job
from vitray.models import identify
from vitray.pipeline import Gone, find_gone, run
from vitray.schema import ModelSpec


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Of a checkpoint that exists. It is not opened: nothing is computed here."""
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "vit", True)
    return identify(hand_made.job_of(Path("/nowhere"), model=str(model)))


@pytest.fixture
def gone(tmp_path: Path, spec: ModelSpec) -> list[object]:
    """The arguments of a run whose dataset has a tar of 10 images that is gone from the source."""
    dataset = hand_made.make_dataset(tmp_path, spec=spec, model=spec.model)
    (tmp_path / "in" / "s-000.tar").unlink()
    fields = dataset.job.model_dump(mode="json", exclude_unset=True)
    return ["run", write_job(tmp_path / "job.yaml", **{**fields, "max_error_rate": 0.2})]


def test_without_a_terminal_prune_needs_yes_and_does_nothing_before(
    vitray: Call, gone: list[object], tmp_path: Path
) -> None:
    before = snapshot(tmp_path / "out")
    assert vitray(*gone, "--prune") == (
        2,
        "",
        "JobError: --prune asks before it deletes rows, and here is nobody to ask. Add --yes.\n",
    )
    assert snapshot(tmp_path / "out") == before


def test_prune_counts_what_it_deleted_in_the_output_and_the_record(
    vitray: Call, gone: list[object], tmp_path: Path
) -> None:
    code, out, err = vitray(*gone, "--prune", "--yes")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        f"{tmp_path}/out: 2 shards, 18 rows, 2 errors",
        "pruned     10 images that left the source",
    ]
    record = json.loads(sorted(Path(tmp_path, "out/_vitray/runs").glob("*.json"))[-1].read_text())
    assert (record["pruned"], record["exit_code"]) == (10, 0)
    # nothing is left to prune: no question
    code, out, err = vitray(*gone, "--prune", "--yes")
    assert (code, out.splitlines()[0]) == (0, "nothing to do: every selected shard is committed")


@pytest.mark.parametrize(
    ("answer", "code", "rows"), [("n", 130, 27), ("\x04", 130, 27), ("y", 0, 18)]
)
def test_at_a_terminal_prune_shows_and_asks(
    gone: list[object], tmp_path: Path, answer: str, code: int, rows: int
) -> None:
    master, terminal = pty.openpty()
    argv = [sys.executable, "-m", "vitray", *map(str, gone), "--prune", "--json"]
    with subprocess.Popen(
        argv, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, text=True
    ) as run:
        os.close(terminal)
        os.write(master, f"{answer}\n".encode())
        shown = b""
        while chunk := _read(master):
            shown += chunk
        out = run.communicate(timeout=60)[0]
    assert run.returncode == code, shown
    assert "Delete the rows of 10 images? [y/N]" in shown.decode()
    assert (b"nothing was deleted" in shown) == (answer != "y")
    if answer == "y":
        assert json.loads(out)["rows"] == rows


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_only_what_the_user_agreed_to_is_pruned(gone: list[object], tmp_path: Path) -> None:
    job = load_job(str(gone[1]))
    agreed = find_gone(job)
    assert agreed.images == 10
    (tmp_path / "in" / "s-001.tar").unlink()  # after the question
    result = run(job, prune=agreed)
    assert (result.pruned, result.gone, result.shards) == (10, 1, 2)
    assert run(job, prune=Gone({}, [])).pruned == 0
    assert run(job, prune=True).pruned == 10


def test_consent_is_not_asked_twice() -> None:
    require_consent("3 data files", yes=True)


def test_another_source_in_the_same_out_is_announced(
    vitray: Call, gone: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = f"source=[{tmp_path}/in/s-001.tar, {tmp_path}/in/s-002.tar]"
    assert vitray(*gone, "--set", moved)[0] == 0
    assert (
        f"{tmp_path}/out has images of {tmp_path}/in/*.tar; this run adds those of" in caplog.text
    )
