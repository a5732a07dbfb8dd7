"""The README's code runs, and so do the job files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vitray import demo
from vitray.job import load_job

HOME = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text(), re.DOTALL)


def test_the_job_files_are_valid_jobs() -> None:
    files = sorted((HOME / "jobs").glob("*.yaml"))
    assert [load_job(f).model for f in files] == ["demo/model", "facebook/dinov2-base", "google/vit-base-patch16-224"]


@pytest.mark.ray
def test_the_python_of_the_readme_runs(ray: None, shapes_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_model, "demo/model")
    demo.build("demo")
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    result, nearest = names["result"], names["nearest"]
    assert (result.rows, result.errors, result.exit_code) == (588, 12, 0)  # type: ignore[attr-defined]
    assert nearest[0][0] == "000/00000" and nearest[0][2] == pytest.approx(1, abs=1e-5)  # type: ignore[index]
    assert demo.accuracy("demo/out") >= 0.97
