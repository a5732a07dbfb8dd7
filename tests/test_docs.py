"""The pages say what is so: the reference is the code's, links lead somewhere, commands exist, jobs are valid, and the tutorial is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import make_reference
import pytest
import yaml
from shards import pictures

import vitray
from vitray.dataset.identity import DECIDING_FIELDS
from vitray.errors import JobError
from vitray.job import Job, make_job, parse_set
from vitray.operations.costing import PRICES
from vitray.training.config import TrainingConfig

HOME = Path(__file__).parent.parent
PAGES = sorted((HOME / "docs").rglob("*.md"))
ALL = [*PAGES, *sorted(HOME.glob("*.md")), HOME / "cluster" / "README.md"]
TUTORIAL = HOME / "docs" / "tutorial.md"
MODEL = "google/vit-base-patch16-224"
SHELL = {
    "vitray",
    "export",
    "python",
    "until",
    "case",
    "done",
}  # what a line of a page's `sh` may begin with
PARSED = {"sh", "crontab", "yaml", "python", "text"}  # fences that a test looks into
NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Fence:
    language: str
    text: str


def named(path: Path) -> str:
    return path.relative_to(HOME).as_posix()


def fences(page: str) -> list[Fence]:
    return [
        Fence(*found)
        for found in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Every line that is a vitray command, in fences and in indented code, as one would type it."""
    lines = [
        line
        for fence in fences(page)
        if fence.language in ("sh", "crontab")
        for line in fence.text.splitlines()
    ]
    lines += [line[4:] for line in prose(page).splitlines() if line.startswith("    ")]
    starts = re.compile(r"^(?:[\d*/,-]+ ){5}|^(?:until|if|while) |; do$|^\.venv/bin/")
    typed = [starts.sub("", starts.sub("", line)) for line in lines]
    return [line for line in typed if line.startswith("vitray ")]


def spans(page: str) -> list[str]:
    """What stands in backticks within the text, as far as it is a vitray command."""
    return [" ".join(span.split()) for span in re.findall(r"`(vitray\s[^`]+)`", prose(page))]


def parse(line: str) -> None:
    """Raises what the command line raises for such arguments, JobError for a field or value of --set that no job has."""
    words = list(
        takewhile(lambda word: word not in (";", "|", "&&", ">"), shlex.split(line, comments=True))
    )[1:]
    group = make_reference.group()
    options = list(takewhile(lambda word: word not in group.commands, words))
    group.make_context("vitray", [*options, "run"])
    if len(options) == len(words):
        raise JobError(f"no command among {words}")
    name, *rest = words[len(options) :]
    given = group.commands[name].make_context(name, rest).params
    fields = {"source": "in", "model": "m", "out": "out", **parse_set(given.get("sets") or [])}
    if name == "finetune":
        TrainingConfig(**{**fields, "source": [] if "dataset" in fields else "in"})
    else:
        make_job(fields)


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: str) -> list[str]:
    return [
        link for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)) if "://" not in link
    ]


def broken(page: Path) -> Iterator[str]:
    for link in links(page.read_text()):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield f"{named(page)}: {link}"


# ---------------------------------------------------------------- what needs no run


def test_the_reference_is_what_the_code_says() -> None:
    assert make_reference.PAGE.read_text() == make_reference.page(), "stale: make docs"


def test_the_reference_names_every_field_column_reason_and_command() -> None:
    page = make_reference.page()
    reasons, data = (
        page.partition("## Reasons")[2].partition("\n## ")[0],
        page.partition("## Columns of `data/`")[2],
    )
    assert re.findall(r"^\| `(\w+)` \|", reasons, re.MULTILINE) == list(vitray.schema.REASONS)
    assert set(vitray.schema.RESERVED) <= set(re.findall(r"^\| `(\w+)` \|", data, re.MULTILINE))
    assert set(Job.model_fields) <= set(
        re.findall(r"^\| `(\w+)` \|", page.partition("## Embeddings")[0], re.MULTILINE)
    )
    assert set(TrainingConfig.model_fields) <= set(
        re.findall(r"^\| `(\w+)` \|", page.partition("## Training")[2], re.MULTILINE)
    )
    assert re.findall(r"^### `vitray (\w+)`", page, re.MULTILINE) == list(
        make_reference.group().commands
    )
    codes = [row[0].strip("`") for row in make_reference.exit_codes()]
    assert codes == ["0", "1", "2", "3", "4", "5", "129/130/143"]
    shown = (HOME / "cluster" / "README.md").read_text()
    assert all(row[0] in shown for row in make_reference.metrics())


def test_every_link_leads_to_a_page_and_to_a_heading_in_it() -> None:
    assert [link for page in ALL for link in broken(page)] == []


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set[Path](), [HOME / "docs" / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        near = {
            (page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text())
        }
        waiting += [path for path in near & set(PAGES) if path not in seen]
    assert seen == set(PAGES)
    assert "docs/README.md" in links((HOME / "README.md").read_text())


@pytest.mark.parametrize("page", ALL, ids=named)
def test_every_vitray_command_is_one(page: Path) -> None:
    for line in commands(page.read_text()):
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line}: {error or type(error).__name__}")


@pytest.mark.parametrize("page", ALL, ids=named)
def test_what_is_called_a_command_in_passing_exists_and_has_these_options(page: Path) -> None:
    known = make_reference.group().commands
    for span in spans(page.read_text()):
        name = span.split()[1]
        if name in known:
            options = {
                option
                for parameter in known[name].params
                for option in [*parameter.opts, *parameter.secondary_opts]
            }
            assert set(re.findall(r"(?<=\s)--[a-z0-9-]+", span)) <= options | {
                "--debug",
                "--log-format",
            }, span
        else:
            assert span in ("vitray COMMAND --help",), span


@pytest.mark.parametrize(
    "line",
    [
        "vitray rum photos --model m --out o",
        "vitray run photos --modle m",
        "vitray run",
        "vitray run a b",
        "vitray --quiet run job.yaml",
        "vitray run job.yaml --set precison=bf16",
        "vitray run job.yaml --set precision=bf17",
        "vitray redo",
        "vitray bench job.yaml --images 1",
        "vitray submit job.yaml",
        "vitray finetune pets.yaml --set epohcs=3",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises(Exception) as caught:
        parse(line)
    assert isinstance(caught.value, JobError) or hasattr(caught.value, "format_message"), repr(
        caught.value
    )


def test_commands_are_found_wherever_they_stand() -> None:
    page = "```sh\nuntil vitray run a.yaml; do\n```\n```crontab\n0 3 * * * vitray plan a.yaml\n```\n    vitray status out\n\nand `vitray\nclean out`\n"
    assert [line.split()[1] for line in commands(page)] == ["run", "plan", "status"]
    assert spans(page) == ["vitray clean out"]


def test_a_broken_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HOME", tmp_path)
    page = tmp_path / "a.md"
    page.write_text(
        "# One `two`, three\n[a](b.md) [b](#one-two-three) [c](#four) [d](a.md#one-two-three) [e](https://x/)\n"
    )
    assert list(broken(page)) == ["a.md: b.md", "a.md: #four"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_fence_is_one_that_a_test_looks_into_and_the_shell_takes_it(page: Path) -> None:
    for fence in fences(page.read_text()):
        assert fence.language in PARSED, fence
        if fence.language == "sh":
            subprocess.run(["bash", "-n"], input=fence.text, text=True, check=True, timeout=10)
            assert {line.split()[0] for line in fence.text.splitlines() if line.strip()} <= SHELL
            scripts = re.findall(r"^python (\S+)", fence.text, re.MULTILINE)
            assert all((HOME / script).is_file() for script in scripts)
        elif fence.language == "yaml":
            fields = yaml.safe_load(fence.text)
            if page.name == "plan.md":
                assert fields.keys() == PRICES.keys()
                continue
            assert (TrainingConfig if "train" in fields else Job)(**fields).out


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:tests|cluster|jobs|kuberay|vitray)/[\w./-]+\.\w+|\w+\.sbatch|aws\.yaml)`",
        prose(page.read_text()),
    ):
        assert (HOME / name).exists() or (HOME / "cluster" / name).exists(), name


def test_what_may_not_change_is_what_the_fingerprint_holds() -> None:
    page = (
        (HOME / "docs/how-to/scheduled.md")
        .read_text()
        .partition("## What may change")[2]
        .partition("`auto` takes")[0]
    )
    own = {
        "labels",
        "prompts",
        "head",
        "embeddings",
        "top_k",
        "keep",
        "precision",
        "engine",
        "model",
        "revision",
    }
    assert set(re.findall(r"`(\w+)`", page)) == own | set(DECIDING_FIELDS)


def test_the_message_of_a_store_that_ignores_the_condition_is_shown_as_it_is() -> None:
    (shown,) = (
        f.text.strip()
        for f in fences((HOME / "docs/how-to/other-s3.md").read_text())
        if f.language == "text"
    )
    code = re.sub(r'"\s+f?"', "", (HOME / "vitray/storage/__init__.py").read_text())
    assert shown in code


# ---------------------------------------------------------------- the tutorial, run


@dataclass(frozen=True)
class Done:
    command: str
    code: int
    said: str


@pytest.fixture(scope="module")
def tutorial(
    shapes_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Done]]:
    """The folder in which the tutorial's commands were run, on 40 drawn pictures and a file that is none, and what each did.

    The one change: the model is the tiny one of the tests, and its engine is torch, so that nothing is fetched and no engine timed.
    """
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "photos").mkdir()
    for picture in pictures(40):
        (folder / "photos" / f"{picture.key}.jpg").write_bytes(picture.data)
    (folder / "photos" / "notes.jpg").write_bytes(b"no picture at all")
    done = []
    for line in commands(TUTORIAL.read_text()):
        words = shlex.split(line.replace(MODEL, f"{shapes_model} --set engine=torch"))
        ended = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=120
        )
        done.append(Done(line, ended.returncode, ended.stdout + ended.stderr))
    return folder, done


def run_python(page: Path, folder: Path, model: str) -> dict[str, Any]:
    """The names that a page's Python leaves."""
    names: dict[str, Any] = {}
    with chdir(folder):
        for fence in fences(page.read_text()):
            if fence.language == "python":
                exec(compile(fence.text.replace(MODEL, model), named(page), "exec"), names)
    return names


def test_the_tutorial_labels_a_folder_in_three_commands(
    tutorial: tuple[Path, list[Done]], shapes_model: str
) -> None:
    folder, done = tutorial
    assert [d.code for d in done] == [0] * 4, done
    assert [d.command.split()[1] for d in done] == ["run", "validate", "report", "search"]
    rows = vitray.read(f"{folder}/photos-vit", columns=["uri", "label"]).to_pylist()
    truth = {f"{folder}/photos/{p.key}.jpg": p.truth for p in pictures(40)}
    assert [row["uri"] for row in rows] == sorted(truth)
    assert sum(truth[row["uri"]] == row["label"] for row in rows) >= 38
    page = (folder / "photos-vit-report.html").read_text()
    assert all(label in page for label in {row["label"] for row in rows}) and "not_an_image" in page
    assert (
        "00000.jpg" in done[3].said.splitlines()[1] + done[3].said.splitlines()[0]
    )  # itself is the nearest


def test_the_tutorial_shows_what_its_commands_say(tutorial: tuple[Path, list[Done]]) -> None:
    """But for numbers, and where the folder is."""
    folder, done = tutorial
    shown = [
        fence.text.replace("/home/you", str(folder))
        for fence in fences(TUTORIAL.read_text())
        if fence.language == "text"
    ]
    assert len(shown) == 3
    for text, command in zip(shown, done):
        said = {NUMBER.sub("#", line) for line in command.said.splitlines()}
        assert [line for line in text.splitlines() if NUMBER.sub("#", line) not in said] == [], (
            command.said
        )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=named
)
def test_the_python_of_a_page_runs_on_the_tutorials_dataset(
    page: Path,
    tutorial: tuple[Path, list[Done]],
    shapes_model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = run_python(page, tutorial[0], shapes_model)
    said = capsys.readouterr().out
    if page == TUTORIAL:
        assert said.splitlines()[-1].split()[1] == "not_an_image" and len(said.splitlines()) == 4
    elif page.name == "exactness.md":
        assert names["agree"] == 16 and names["cosines"].min() >= 0.999
    elif page.name == "scheduled.md":
        assert said.split()[:3] == ["1", "40", "1"]
    elif page.name == "commit.md":
        assert names["told"]["rows"] == "40" and names["told"]["errors"] == "1"
    else:
        pytest.fail(f"{named(page)}: say here what its Python leaves")
