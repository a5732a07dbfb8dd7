"""vitray compare: what differs between two datasets of the same input, to the row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from factories import hand_made
from support.schemas import checked
from vitray.dataset import open_dataset


def test_the_command_prints_it_and_is_a_gate(two: tuple[str, str]) -> None:
    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vitray", "compare", *two, *more],
            capture_output=True,
            text=True,
            timeout=60,
        )

    partly = call("--min-agreement", "0.37")
    assert (
        partly.returncode == 0
        and partly.stderr.count("is not complete: missing rows are not compared") == 1
    )
    assert partly.stderr.startswith(two[1])
    dataset = open_dataset(two[1])
    assert dataset is not None
    shards = [path.stem for path in Path(two[1], "data").iterdir()]
    hand_made.finish_with(dataset, shards, shards)
    assert [call("--min-agreement", gate).returncode for gate in ("0.37", "0.38")] == [0, 5]
    text = call()
    assert (
        text.returncode == 0
        and "same label         37.5000%" in text.stdout
        and "6  cat -> dog  (0/00, 0/06, 0/09)" in text.stdout
    )
    page = two[1] + "-page.html"
    printed = call("--json", "--page", page, "--min-agreement", "0.38")
    assert (
        checked(printed.stdout)["agreement"] == 0.375
        and checked(printed.stdout)["moves"][1]["examples"][0] == "0/01"
    )
    assert printed.returncode == 5 and printed.stderr.startswith(f"{page}: 16 images, 0 pictures")
    assert "Images by move" in Path(page).read_text()
    Path(page).write_text("mine")
    refused = call("--page", page)
    assert (
        refused.returncode == 2
        and "was not made by vitray compare" in refused.stderr
        and Path(page).read_text() == "mine"
    )
