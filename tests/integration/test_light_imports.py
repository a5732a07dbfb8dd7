"""`import vitray`, help and light commands load neither torch nor Ray."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import vitray
from factories import hand_made
from support.command_line import write_job

PACKAGE = Path(vitray.__file__).parent

HELP_S = 1.0
HEAVY = (
    "{'torch', 'ray', 'transformers', 'openvino', 'onnxruntime', 'numba', 'faiss', 'lancedb', "
    "'peft'}"
)


def test_public_functions_stay_functions_after_every_module_was_imported() -> None:
    code = (
        "import vitray, vitray.operations.planning, vitray.operations.validation, vitray.dataset, "
        "vitray.pipeline, vitray.operations.demo, vitray.cli\n"
        "names = [vitray.plan, vitray.validate, vitray.read, vitray.run]\n"
        "assert [f.__module__ + '.' + f.__name__ for f in names] == ["
        "'vitray.operations.planning.plan', 'vitray.operations.validation.validate', "
        "'vitray.dataset.reading.read', 'vitray.pipeline.runner.run']\n"
        "from vitray import *\n"
        "assert callable(plan) and callable(validate)"
    )
    python("-c", code)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def run_light(*argv: str) -> str:
    """vitray.cli.main in a fresh interpreter, which must not have imported anything heavy nor left
    a thread; returns what it printed.
    """
    code = (
        "import pathlib, sys, time, numpy, pyarrow.parquet\nfrom vitray.cli import main\n"
        # jemalloc starts a thread of its own when it likes
        "def threads():\n    names = [path.read_text() for path in "
        "pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('jemalloc' not in name for name in names)\n"
        "started = threads()\n"
        f"sys.argv = ['vitray', *{argv!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy\n"
        # a thread of pyarrow's pool that holds a Python buffer at exit aborts the process
        "for _ in range(50):  # a joined thread is gone a moment later\n    time.sleep(0.02 * "
        "(threads() > started))\n"
        "left = threads() - started\nassert left <= 0, f'{left} threads left'"
    )
    return python("-c", code).stdout


def test_import_vitray_is_light() -> None:
    python(
        "-c",
        f"import sys, vitray\nassert not ({HEAVY} | {{'pyarrow.parquet', 's3fs'}}) & "
        f"set(sys.modules)",
    )


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    traced = python("-X", "importtime", "-m", "vitray", "--help")
    modules = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in traced.stderr.splitlines()
        if "|" in line
    }
    assert "typer" in modules
    assert not modules & {"torch", "ray", "transformers"}
    took = []
    for _ in range(3):  # CPU seconds: what else the machine does is not vitray's
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-m", "vitray", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"--help: {statistics.median(took):.2f} s")
    assert statistics.median(took) < HELP_S


def test_plan_status_validate_and_report_import_nothing_heavy(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, spec=hand_made.checkpoint_spec(tmp_path))
    file = write_job(tmp_path / "job.yaml", top_k=2, embeddings=[{"normalize": True}])
    assert "committed  3 shards" in run_light("plan", str(file))
    assert "chosen by the first run" in run_light("plan", str(file), "--out", str(tmp_path / "new"))
    assert "The job would start." in run_light("check", str(file))
    assert ": complete" in run_light("status", dataset.out)
    assert ": valid; 3 files, 27 rows, 3 errors" in run_light("validate", dataset.out, "--content")
    # pictures need Numba; test_report.py holds that they need neither torch nor Ray
    assert "30 images, 0 pictures" in run_light(
        "report", dataset.out, "--no-pictures", "--to", f"{tmp_path}/page.html"
    )


def test_no_command_but_run_and_demo_needs_torch_or_ray(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    assert "3 data files would be deleted" in run_light(
        "redo", dataset.out, "--reason", "not_an_image"
    )
    assert "nothing to delete" in run_light("clean", dataset.out)
    assert not os.path.exists(tmp_path / "model")
