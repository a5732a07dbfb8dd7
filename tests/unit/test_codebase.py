"""Rules of the code base: dangerous arguments, public names, quick imports, locked versions. Import
rules: pyproject.toml.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import vitray
from vitray.job import Embedding, Job
from vitray.schema import REASONS, Reason

PACKAGE = Path(vitray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}


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


def test_the_public_names_are_these_and_each_is_documented() -> None:
    assert vitray.__all__ == [
        "Embedding",
        "Job",
        "Plan",
        "Progress",
        "Result",
        "Validation",
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


def test_dir_lists_the_public_names() -> None:
    assert dir(vitray) == sorted(vitray.__all__)
    assert {"run", "plan", "read", "validate", "Job"} <= set(dir(vitray))


def test_example_of_the_package_is_python_and_uses_existing_names() -> None:
    example = inspect.cleandoc(vitray.__doc__ or "").split("\n\n", 1)[1]
    tree = ast.parse(textwrap.dedent(example))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vitray"
    }
    assert attributes == {"Job", "run", "read"}
    values = {
        "vitray": SimpleNamespace(Job=Job, run=lambda job: job, read=lambda out, columns: out)
    }
    code = "\n".join(line for line in ast.unparse(tree).splitlines() if line != "import vitray")
    exec(compile(code, "vitray.__doc__", "exec"), values)
    assert values["table"] == "s3://photos-vit"


def test_every_package_exports_what_exists() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        package = __import__(f"vitray.{path.parent.name}", fromlist=["*"])
        for name in getattr(package, "__all__", ()):
            assert hasattr(package, name), f"{path.parent.name}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vitray.nothing  # noqa: B018


def test_every_job_field_has_a_description() -> None:
    for model in (Job, Embedding):
        assert [
            name
            for name, field in model.model_fields.items()
            if not (field.description or "").strip()
        ] == []


def test_every_reason_is_given_somewhere() -> None:
    used = {
        f"{node.value.id}.{node.attr}"
        for path in FILES
        if name_of(path) != "schema.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert [reason.name for reason in Reason if f"Reason.{reason.name}" not in used] == []
    assert list(REASONS) == list(Reason)


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
