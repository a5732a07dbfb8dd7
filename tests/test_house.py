"""Rules of the code: who imports whom, what is never called, what stays light, which names are public."""

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

HOUSE = Path(vitray.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
LEVELS = {
    **dict.fromkeys(("errors", "left_out", "schema", "version", "crash"), 0),
    "job": 1,
    **dict.fromkeys(("storage", "isolation", "resize", "pages"), 2),
    **dict.fromkeys(("sources", "decode", "models", "dataset"), 3),
    "pipeline": 4,
    **dict.fromkeys(
        (
            *("planning", "validation", "bench", "demo", "watching", "comparing", "compacting", "backfilling", "submitting"),
            *("searching", "exporting", "report", "costing", "relabelling", "adapt"),
        ),
        5,
    ),
    **dict.fromkeys(("cli", "__main__", "__init__"), 6),
}
ONLY_IN = {  # a module, and the beginnings of the paths that may import it
    "torch": ("models/", "adapt/", "decode.py", "resize.py"),  # decode.py: not where it is exact, see test_decode.py
    "torchvision": ("models/gpu_decode.py",),
    "transformers": ("models/",),
    **dict.fromkeys(("openvino", "onnxscript"), ("models/",)),
    **dict.fromkeys(("onnxruntime", "onnx"), ("models/", "adapt/graphs.py")),
    **dict.fromkeys(("nncf", "coremltools"), ("adapt/graphs.py",)),
    "simplejpeg": ("decode.py", "report/pictures.py", "adapt/page.py"),  # the latter two write JPEGs, and read none
    "peft": ("adapt/trainee.py",),
    "numba": ("resize.py",),
    "ray": ("pipeline/", "submitting.py", "adapt/team.py", "adapt/fitting.py"),
    "ray.train": ("adapt/",),
    "ray.data": ("pipeline/line.py", "pipeline/queues.py"),
    "fsspec": ("storage/",),
    "s3fs": ("storage/",),
    "PIL": ("decode.py", "resize.py", "models/shapes.py"),
    "faiss": ("searching.py", "exporting.py"),
    "lancedb": ("exporting.py",),
    **dict.fromkeys(("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"), ()),
}
NEVER_CALLED = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.export.load",
}
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}
HELP_S = 1.0
HEAVY = "{'torch', 'ray', 'transformers', 'openvino', 'onnxruntime', 'numba', 'faiss', 'lancedb', 'peft'}"


def name_of(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def room_of(path: Path) -> str:
    return name_of(path).split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Every module that the code names, wherever it stands: `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node).rpartition(".")[2] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def called(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""


def broken_laws(path: str, tree: ast.AST) -> list[str]:
    room = path.split("/")[0].removesuffix(".py")
    broken = []
    for module in sorted(imports(tree)):
        target = module.split(".")[1] if module.startswith("vitray.") else ""
        if target in LEVELS and target != room and LEVELS[target] >= LEVELS[room] and LEVELS[room] != 6:
            broken.append(f"{path} (level {LEVELS[room]}) imports vitray.{target} (level {LEVELS[target]})")
        for owned, homes in ONLY_IN.items():
            if f"{module}.".startswith(f"{owned}.") and not path.startswith(homes):
                broken.append(f"{path} imports {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            broken += [f"{path} calls {called(node)}"] if called(node) in NEVER_CALLED else []
            true = [k.arg for k in node.keywords if k.arg in NEVER_TRUE and ast.unparse(k.value) != "False"]
            broken += [f"{path} says {name}=True" for name in true]
    return broken


def test_files_import_lower_levels_only_and_heavy_modules_stay_in_their_room() -> None:
    assert {room_of(path) for path in FILES} == LEVELS.keys()
    assert [law for path in FILES for law in broken_laws(name_of(path), ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("schema.py", "from vitray.job import Job"),
        ("sources/tar.py", "def f():\n    import vitray.dataset.commit"),
        ("planning.py", "from vitray import validation"),
        ("storage/s3.py", "from vitray.isolation import Child"),
        ("dataset/x.py", "from vitray import decode as d"),
        ("cli/making.py", "def f():\n    import torch.nn"),
        ("pipeline/runner.py", "from ray import data"),
        ("pipeline/runner.py", "import ray.data.context"),
        ("planning.py", "from importlib import import_module\nimport_module('ray')"),
        ("models/pixels.py", "from PIL import Image"),
        ("job.py", "import yaml\nyaml.load('x')"),
        ("models/x.py", "f(trust_remote_code=True)"),
        ("models/x.py", "import pickle"),
        ("cli/making.py", "eval('1')"),
        ("isolation.py", "import subprocess\nsubprocess.run('x', shell=True)"),
    ],
)
def test_the_law_sees_a_breach(path: str, code: str) -> None:
    assert broken_laws(path, ast.parse(code))


def test_the_law_lets_through_what_is_allowed() -> None:
    assert broken_laws("models/x.py", ast.parse("import torch\nmodel.eval()\nfrom vitray.storage import read")) == []
    assert broken_laws("pipeline/line.py", ast.parse("import ray.data\nfrom vitray import schema")) == []
    assert broken_laws("cli/making.py", ast.parse("from vitray import demo\nimport rayon, torchless")) == []


# ---------------------------------------------------------------- names


def test_the_public_names_are_these_and_each_is_documented() -> None:
    assert vitray.__all__ == ["Embedding", "Job", "VitrayError", "__version__", "plan", "read", "run", "validate"]
    for name in set(vitray.__all__) - {"__version__"}:
        assert (inspect.getdoc(getattr(vitray, name)) or "").strip(), name
    assert re.fullmatch(r"\d+\.\d+\.\d+", vitray.__version__)


def test_every_room_exports_what_exists() -> None:
    for path in HOUSE.glob("*/__init__.py"):
        room = __import__(f"vitray.{path.parent.name}", fromlist=["*"])
        for name in getattr(room, "__all__", ()):
            assert hasattr(room, name), f"{path.parent.name}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vitray.nothing  # noqa: B018


def test_public_functions_stay_functions_after_every_module_was_imported() -> None:
    code = (
        "import vitray, vitray.planning, vitray.validation, vitray.dataset, vitray.pipeline, vitray.demo, vitray.cli\n"
        "names = [vitray.plan, vitray.validate, vitray.read, vitray.run]\n"
        "assert [f.__module__ + '.' + f.__name__ for f in names] == ["
        "'vitray.planning.plan', 'vitray.validation.validate', 'vitray.dataset.reading.read', 'vitray.pipeline.runner.run']\n"
        "from vitray import *\n"
        "assert callable(plan) and callable(validate)"
    )
    python("-c", code)


# ---------------------------------------------------------------- the job's fields


def test_every_job_field_says_what_it_means_and_they_stay_few() -> None:
    for model in (Job, Embedding):
        assert [name for name, field in model.model_fields.items() if not (field.description or "").strip()] == []
    assert len(Job.model_fields) <= 33


def test_the_readme_lists_every_job_field() -> None:
    """The rows of the table whose first heading is `field`."""
    readme = HOUSE.parent / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    tables = re.split(r"\n\s*\n", readme.read_text(encoding="utf-8"))
    rows = [[line.split("|")[1].strip(" `") for line in t.strip().splitlines() if line.startswith("|")] for t in tables]
    fields = next((names[2:] for names in rows if names and names[0].lower() == "field"), [])
    assert sorted(fields) == sorted(Job.model_fields)


def test_every_reason_is_given_somewhere() -> None:
    said: set[object] = set()
    for path in FILES:
        if name_of(path) != "schema.py":
            said |= {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert sorted(REASONS.keys() - said) == []


# ---------------------------------------------------------------- what stays light


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=HOUSE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def run_light(*argv: str) -> str:
    """vitray.cli.main in a fresh interpreter, which must not have imported anything heavy nor left a thread; returns what it printed."""
    code = (
        "import pathlib, sys, time, numpy, pyarrow.parquet\nfrom vitray.cli import main\n"
        # jemalloc starts a thread of its own when it likes
        "def threads():\n    names = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('jemalloc' not in name for name in names)\n"
        "started = threads()\n"
        f"sys.argv = ['vitray', *{argv!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy\n"
        # a thread of pyarrow's pool that holds a Python buffer at exit aborts the process
        "for _ in range(50):  # a joined thread is gone a moment later\n    time.sleep(0.02 * (threads() > started))\n"
        "left = threads() - started\nassert left <= 0, f'{left} threads left'"
    )
    return python("-c", code).stdout


def test_import_vitray_is_light() -> None:
    python("-c", f"import sys, vitray\nassert not ({HEAVY} | {{'pyarrow.parquet', 's3fs'}}) & set(sys.modules)")


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    traced = python("-X", "importtime", "-m", "vitray", "--help")
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in traced.stderr.splitlines() if "|" in line}
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
    assert "30 images, 0 pictures" in run_light("report", dataset.out, "--no-pictures", "--to", f"{tmp_path}/page.html")


def test_no_command_but_run_and_demo_needs_torch_or_ray(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    assert "3 data files would be deleted" in run_light("redo", dataset.out, "--reason", "not_an_image")
    assert "removed 0 orphans" in run_light("clean", dataset.out)
    assert not os.path.exists(tmp_path / "model")


# ---------------------------------------------------------------- versions


def test_every_locked_package_has_hashes_and_the_version_that_was_tested() -> None:
    cluster = HOUSE.parent / "cluster"
    lines = [line.split("==") for line in (cluster / "constraints.txt").read_text().split() if "==" in line]
    tested = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    lock = (cluster / "requirements.txt").read_text()
    locked = re.findall(r"^([\w.-]+)==([^\s;]+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock, re.M)
    assert len(locked) == len(re.findall(r"^[\w.-]+==", lock, re.M)) > 50
    named = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version, _ in locked}
    assert {name: version for name, version in named.items() if tested.get(name, version) != version} == {}
    elsewhere = {"colorama", "httpx2-jsfetch", "setuptools", "triton", "tzdata"}  # of other platforms, and CUDA's
    assert {n for n in named.keys() - tested.keys() if not n.startswith(("cuda-", "nvidia-"))} <= elsewhere
    assert {"torch", "ray", "transformers", "pyarrow", "pillow", "s3fs"} <= {name for name, *_ in locked}
