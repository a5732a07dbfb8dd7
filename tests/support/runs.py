"""Start `vitray run`, follow its progress, and kill it half-way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars

IMAGES, FRAGMENT = 1536, 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    put_tars(str(folder / "in"), pictures(IMAGES), 6, folder)
    return folder


def command(inputs: Path, model: str, out: Path, *more: str) -> list[str]:
    fields = ["precision=fp32", "engine=torch", "batch_size=8", f"fragment_rows={FRAGMENT}"]
    sets = [part for field in fields for part in ("--set", field)]
    return [
        sys.executable,
        "-m",
        "vitray",
        "run",
        str(inputs / "in"),
        "--model",
        model,
        "--out",
        str(out),
        *sets,
        *more,
    ]


def start(argv: list[str], trace: Path, **more: str) -> subprocess.Popen[str]:
    trace.mkdir(exist_ok=True)
    environment = {**os.environ, "VITRAY_TRACE": str(trace), "RAY_AUTH_MODE": "token", **more}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        argv,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def lines_of(trace: Path) -> list[dict[str, object]]:
    found = []
    for path in trace.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the line a kill cut short
                continue
    return found


def images_by_step(trace: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines_of(trace):
        counts[str(line["step"])] += int(str(line["stop"])) - int(str(line["start"]))
    return counts


def wait_until_staged(process: subprocess.Popen[str], trace: Path, images: float) -> None:
    deadline = time.monotonic() + 200
    while images_by_step(trace)["stage"] < images:
        assert process.poll() is None, f"the run ended too early: {process.communicate()}"
        assert time.monotonic() < deadline, "too little was staged"
        time.sleep(0.05)
