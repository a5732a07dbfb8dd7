"""What the pages show happens: the README's and the tutorial's commands print it, and all Python runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import vitray
from factories.shards import pictures
from support.docpages import README, blocks, commands
from support.page_runs import Ended, missing_lines, run_command, run_python

TIMES = re.compile(r"\d[\d.]*(?= s\b| images/s| pictures| MB)")


def test_the_readme_tries_and_labels_a_folder(demo_folder: Path) -> None:
    section = (
        README.read_text(encoding="utf-8").partition("## Label a folder")[2].partition("\n## ")[0]
    )
    (unpack,) = re.findall(r"^mkdir photos.*$", section, re.MULTILINE)
    subprocess.run(["bash", "-c", unpack], cwd=demo_folder, check=True, timeout=60)
    ended = []
    for line in commands(section):
        quick = line.replace("demo/model", "demo/model --set engine=torch")  # no engine is timed
        ended.append(run_command(quick, demo_folder))
    assert [done.code for done in ended] == [0, 0, 0, 0], ended
    assert [done.command.split()[1] for done in ended] == ["run", "run", "validate", "report"]
    assert "tried 20 images" in ended[0].output
    (shown,) = blocks(section, "text")
    output = "".join(done.output for done in ended)
    assert missing_lines(shown.replace("/home/you", str(demo_folder)), output, TIMES) == []
    rows = run_python(section, demo_folder, "README.md")["rows"]
    assert len(rows) == 588
    (counted,) = re.findall(r"value_counts\(\)\)  # (.*)$", section, re.MULTILINE)
    named = set(re.findall(r"[a-z]+", counted))
    assert named <= set(rows["label"])


def test_the_tutorial_labels_a_folder(tutorial: tuple[Path, list[Ended]]) -> None:
    folder, ended = tutorial
    assert [done.code for done in ended] == [0] * 4, ended
    assert [done.command.split()[1] for done in ended] == ["run", "validate", "report", "search"]
    rows = vitray.read(f"{folder}/photos-vit", columns=["uri", "label"]).to_pylist()
    truth = {f"{folder}/photos/{picture.key}.jpg": picture.truth for picture in pictures(40)}
    assert [row["uri"] for row in rows] == sorted(truth)
    assert sum(truth[row["uri"]] == row["label"] for row in rows) >= 38
    page = (folder / "photos-vit-report.html").read_text()
    assert all(label in page for label in {row["label"] for row in rows})
    assert "not_an_image" in page
    nearest = "".join(ended[3].output.splitlines()[:2])
    assert "00000.jpg" in nearest
