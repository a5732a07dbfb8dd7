"""Rules of the code base: dangerous arguments, public names, quick imports, locked versions. Import
rules: pyproject.toml.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import hand_made
import pytest

import vitray
from vitray.job import Embedding, Job
from vitray.schema import REASONS

PACKAGE = Path(vitray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}
HELP_S = 1.0
HEAVY = (
    "{'torch', 'ray', 'transformers', 'openvino', 'onnxruntime', 'numba', 'faiss', 'lancedb', "
    "'peft'}"
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def called(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""


def dangerous_arguments(tree: ast.AST) -> list[str]:
    """Keyword arguments of NEVER_TRUE with any value but a literal False."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(called(call), keyword) for call in calls for keyword in call.keywords]
    return [
        f"{function}({keyword.arg}=…)"
        for function, keyword in named
        if keyword.arg in NEVER_TRUE and ast.unparse(keyword.value) != "False"
    ]


def test_no_call_trusts_remote_code_a_shell_or_a_pickle() -> None:
    assert {
        name_of(path): found
        for path in FILES
        if (found := dangerous_arguments(ast.parse(path.read_text())))
    } == {}


@pytest.mark.parametrize(
    "code", ["f(trust_remote_code=True)", "np.load(x, allow_pickle=flag)", "run('x', shell=1)"]
)
def test_a_dangerous_argument_is_seen(code: str) -> None:
    assert len(dangerous_arguments(ast.parse(code))) == 1


# ---------------------------------------------------------------- names


def test_the_public_names_are_these_and_each_is_documented() -> None:
    assert vitray.__all__ == [
        "Embedding",
        "Job",
        "VitrayError",
        "__version__",
        "plan",
        "read",
        "run",
        "validate",
    ]
    for name in set(vitray.__all__) - {"__version__"}:
        assert (inspect.getdoc(getattr(vitray, name)) or "").strip(), name
    assert re.fullmatch(r"\d+\.\d+\.\d+", vitray.__version__)


def test_every_package_exports_what_exists() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        package = __import__(f"vitray.{path.parent.name}", fromlist=["*"])
        for name in getattr(package, "__all__", ()):
            assert hasattr(package, name), f"{path.parent.name}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vitray.nothing  # noqa: B018


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


# ---------------------------------------------------------------- the job's fields


def test_every_job_field_has_a_description() -> None:
    for model in (Job, Embedding):
        assert [
            name
            for name, field in model.model_fields.items()
            if not (field.description or "").strip()
        ] == []


def test_every_reason_is_given_somewhere() -> None:
    said: set[object] = set()
    for path in FILES:
        if name_of(path) != "schema.py":
            said |= {
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant)
            }
    assert sorted(REASONS.keys() - said) == []


# ---------------------------------------------------------------- what stays light


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
    dataset = hand_made.make_dataset(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(f"source: {tmp_path}/in/*.tar\nmodel: {tmp_path}/model\nout: {tmp_path}/out\n")
    assert "committed  3 shards" in run_light("plan", str(file))
    assert "decided at run" in run_light("plan", str(file), "--out", str(tmp_path / "new"))
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
    assert "removed 0 orphans" in run_light("clean", dataset.out)
    assert not os.path.exists(tmp_path / "model")


# ---------------------------------------------------------------- versions


def test_every_locked_package_has_hashes_and_the_version_that_was_tested() -> None:
    cluster = PACKAGE.parent / "cluster"
    lines = [
        line.split("==")
        for line in (cluster / "constraints.txt").read_text().split()
        if "==" in line
    ]
    tested = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    lock = (cluster / "requirements.txt").read_text()
    locked = re.findall(
        r"^([\w.-]+)==([^\s;]+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
        lock,
        re.M,
    )
    assert len(locked) == len(re.findall(r"^[\w.-]+==", lock, re.M)) > 50
    named = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version, _ in locked}
    assert {
        name: version for name, version in named.items() if tested.get(name, version) != version
    } == {}
    elsewhere = {
        "colorama",
        "httpx2-jsfetch",
        "setuptools",
        "triton",
        "tzdata",
    }  # of other platforms, and CUDA's
    assert {
        n for n in named.keys() - tested.keys() if not n.startswith(("cuda-", "nvidia-"))
    } <= elsewhere
    assert {"torch", "ray", "transformers", "pyarrow", "pillow", "s3fs"} <= {
        name for name, *_ in locked
    }
