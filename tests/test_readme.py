"""The README's code runs, and so do the job files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vitray import demo
from vitray.job import Job, load_job

HOME = Path(__file__).parent.parent
README = (HOME / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_job_files_are_valid_jobs() -> None:
    files = sorted((HOME / "jobs").glob("*.yaml"))
    assert [load_job(f).model for f in files] == ["demo/model", "facebook/dinov2-base", "google/vit-base-patch16-224"]


def test_the_table_of_fields_says_what_the_job_says() -> None:
    said = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", README, re.MULTILINE))
    assert said == {name: field.description for name, field in Job.model_fields.items()}


def test_every_test_that_the_readme_names_exists() -> None:
    table = README.partition("## What it promises")[2].partition("## Memory")[0]
    for line in table.splitlines():
        for file in re.findall(r"`(test_\w+\.py)", line):
            text = "".join((HOME / "tests" / name).read_text() for name in re.findall(r"test_\w+\.py", line))
            assert (HOME / "tests" / file).exists()
        for start, middle in re.findall(r"(?:::|`…)(test_)?(\w+)", line):
            assert re.search(rf"def test_\w*{middle}" if not start else rf"def test_{middle}", text), middle


@pytest.mark.ray
def test_the_python_of_the_readme_runs(ray: None, shapes_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_model, "demo/model")
    demo.build("demo")
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    result, nearest = names["result"], names["nearest"]
    assert (result.rows, result.errors, result.exit_code) == (588, 12, 0)
    assert nearest[0][0] == "000/00000" and nearest[0][2] == pytest.approx(1, abs=1e-5)
    assert demo.accuracy("demo/out") >= 0.97
