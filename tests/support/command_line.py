"""Run vitray's commands in this process, with folders and jobs for them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from factories import hand_made
from support.s3 import KEYS
from vitray.cli import main
from vitray.dataset import Dataset
from vitray.errors import count

Call = Callable[..., tuple[int, str, str]]
PROGRESS = '{"schema": "vitray/progress/'
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def vitray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """vitray(*argv) -> (exit code, stdout, stderr without progress), in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        out, err = capsys.readouterr()
        return stopped.value.code, out, without_progress(err)

    yield call
    signal.signal(signal.SIGTERM, before)


def without_progress(err: str) -> str:
    """The text on stderr without the lines that say how far a run is."""
    return "".join(line for line in err.splitlines(True) if not line.startswith(PROGRESS))


def subprocess_vitray(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitray", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def write_job(path: Path, **fields: object) -> Path:
    """A job file (JSON is YAML) for the tars in `in`, with fields replaced, or left out when
    None.
    """
    base = {
        "source": f"{path.parent}/in/*.tar",
        "model": f"{path.parent}/model",
        "out": f"{path.parent}/out",
        **fields,
    }
    path.write_text(json.dumps({name: value for name, value in base.items() if value is not None}))
    return path


def raw(text: str) -> list[str]:
    """The control characters that would reach a terminal."""
    return [c for c in text if not c.isprintable() and c != "\n"]


def refused(vitray: Call, folder: Path, argv: list[object], code: int, *says: str) -> str:
    """Runs a command that must fail with one line on stderr, nothing on stdout, and nothing
    written.
    """
    before = snapshot(folder)
    got, out, err = vitray(*argv)
    assert got == code, err
    assert out == ""
    assert err.count("\n") == 1 and "Traceback" not in err and raw(err) == []
    assert len(err) < 600
    for text in says:
        assert text in err, err
    assert snapshot(folder) == before
    return err


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole dataset whose checkpoint exists: `run` has nothing to do, so it needs no Ray."""
    from factories.small_models import make_checkpoint
    from vitray.models import identify

    folder = tmp_path_factory.mktemp("labelled")
    make_checkpoint(folder / "model", "vit", True)
    make_checkpoint(folder / "headless", "vit", False)
    job = hand_made.job_of(folder)
    hand_made.make_dataset(folder, spec=identify(job))
    fields = job.model_dump(mode="json", exclude_unset=True)
    write_job(folder / "a job.yaml", **{**fields, "max_error_rate": 0.2})  # one in ten is bad
    return folder


def plan_of(vitray: Call, *argv: object) -> dict[str, object]:
    code, out, err = vitray("plan", *argv, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found: dict[str, object] = json.loads(out)
    return found


@contextlib.contextmanager
def waiting(*argv: object) -> Iterator[subprocess.Popen[str]]:
    """The command, which waits for a store that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connected = threading.Event()
        keep: list[socket.socket] = []
        threading.Thread(
            target=lambda: (keep.append(silent.accept()[0]), connected.set()), daemon=True
        ).start()
        env = {
            **os.environ,
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        command = [sys.executable, "-m", "vitray", *map(str, argv)]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        assert connected.wait(30)
        yield running


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return hand_made.make_dataset(tmp_path)


def files(dataset: Dataset) -> list[Path]:
    return sorted(Path(dataset.out, "data").iterdir())


def problems_of(vitray: Call, dataset: Dataset, *argv: str) -> list[str]:
    """What validate --json finds; its exit code, its text and its object must agree."""
    code, out, err = vitray("validate", dataset.out, *argv)
    assert err == ""
    again, text, _ = vitray("validate", dataset.out, "--json", *argv)
    problems: list[str] = json.loads(text)["problems"]
    good = "valid so far" if json.loads(text)["pending"] else "valid"
    assert code == again == (1 if problems else 0)
    bad = f"NOT valid: {count(len(problems), 'problem')}"
    assert out.splitlines()[0].startswith(f"{dataset.out}: {bad if problems else good};")
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [
        " ".join(p.split()) for p in problems
    ]
    return problems
