"""The pages are true: the reference matches the code, links lead somewhere, commands parse, jobs
are valid.

test_docs_run.py runs what the pages show.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

import make_reference
import vitray
from support.docpages import (
    ALL,
    PAGES,
    README,
    ROOT,
    anchors,
    command_spans,
    commands,
    fences,
    links,
    place_of,
    prose,
)
from vitray.cli import split_options
from vitray.dataset.identity import DECIDING_FIELDS
from vitray.errors import JobError
from vitray.job import Job, make_job, parse_set
from vitray.training.config import TrainingConfig

TABLE_NAMES = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
TEST = re.compile(r"`(test_\w+\.py)(?:::(\w+))?`")


def parse(line: str) -> None:
    """Raises what the command line raises for such arguments, and JobError for a field or value
    that no job has.
    """
    ends = (";", "|", "&&", ">")
    words = list(takewhile(lambda word: word not in ends, shlex.split(line, comments=True)))[1:]
    group = make_reference.group()
    everywhere, words = split_options(words)  # those of all commands
    group.make_context("vitray", [*everywhere, "run"])
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


def broken_links(page: Path) -> Iterator[str]:
    for link in links(page.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            yield f"{page.name}: {link}"


def test_the_reference_is_what_the_code_says() -> None:
    assert make_reference.PAGE.read_text() == make_reference.page(), "stale: make docs"


def test_the_reference_names_every_field_column_reason_and_command() -> None:
    page = make_reference.page()
    job, _, training = page.partition("## Embeddings")
    reasons = page.partition("## Reasons")[2].partition("\n## ")[0]
    columns = page.partition("## Columns of `data/`")[2]
    assert TABLE_NAMES.findall(reasons) == list(vitray.schema.REASONS)
    assert set(vitray.schema.RESERVED) <= set(TABLE_NAMES.findall(columns))
    assert set(Job.model_fields) <= set(TABLE_NAMES.findall(job))
    assert set(TrainingConfig.model_fields) <= set(TABLE_NAMES.findall(training))
    commands = re.findall(r"^### `vitray ([\w-]+)`", page, re.MULTILINE)
    assert commands == list(make_reference.group().commands)


def test_the_reference_has_the_description_of_every_job_field() -> None:
    table = make_reference.page().partition("## Job")[2].partition("\n## ")[0]
    described = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", table, re.MULTILINE))
    expected = {name: field.description for name, field in Job.model_fields.items()}
    assert described == expected


def test_the_reference_and_the_cluster_page_name_every_exit_code_and_metric() -> None:
    codes = [row[0].strip("`") for row in make_reference.exit_codes()]
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "7", "129/130/143"]
    cluster = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    assert all(row[0] in cluster for row in make_reference.metrics())


def test_every_link_leads_to_a_page_and_to_a_heading_in_it() -> None:
    assert [link for page in ALL for link in broken_links(page)] == []


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set[Path](), [ROOT / "docs" / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        text = page.read_text(encoding="utf-8")
        linked = {(page.parent / link.partition("#")[0]).resolve() for link in links(text)}
        waiting += [path for path in linked & set(PAGES) if path not in seen]
    assert seen == set(PAGES)
    assert "docs/README.md" in links(README.read_text(encoding="utf-8"))


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# One `two`, three\n"
        "[a](b.md) [b](#one-two-three) [c](#four) [d](a.md#one-two-three) [e](https://x/)\n"
    )
    assert list(broken_links(page)) == ["a.md: b.md", "a.md: #four"]


@pytest.mark.parametrize("page", PAGES, ids=place_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    name = r"`((?:tests|benchmarks|tools|cluster|jobs|kuberay|vitray)/[\w./-]+\.\w+|\w+\.sbatch|aws\.yaml)`"
    for found in re.findall(name, prose(page.read_text(encoding="utf-8"))):
        assert (ROOT / found).exists() or (ROOT / "cluster" / found).exists(), found


@pytest.mark.parametrize("page", [ROOT / "RELIABILITY.md", ROOT / "SECURITY.md"], ids=place_of)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    files = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    }
    named = TEST.findall(page.read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [file for file, _ in named if file not in files] == []
    assert [name for file, name in named if f"def {name}" not in files[file]] == []


@pytest.mark.parametrize("page", ALL, ids=place_of)
def test_every_vitray_command_parses(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line}: {error or type(error).__name__}")


@pytest.mark.parametrize("page", [p for p in ALL if p.name != "CHANGELOG.md"], ids=place_of)
def test_every_command_within_the_text_exists_and_has_these_options(page: Path) -> None:
    known = make_reference.group().commands
    for span in command_spans(page.read_text(encoding="utf-8")):
        name = span.split()[1]
        if name not in known:
            assert span == "vitray COMMAND --help", span
            continue
        parameters = known[name].params
        options = {option for p in parameters for option in [*p.opts, *p.secondary_opts]}
        used = set(re.findall(r"(?<=\s)--[a-z0-9-]+", span))
        assert used <= options | {"--debug", "--help", "--log-format"}, span


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
def test_a_wrong_command_is_refused(line: str) -> None:
    with pytest.raises(Exception) as caught:
        parse(line)
    assert isinstance(caught.value, JobError) or hasattr(caught.value, "format_message"), repr(
        caught.value
    )


def test_commands_are_found_in_code_blocks_indented_code_and_text() -> None:
    page = (
        "```sh\nuntil vitray run a.yaml; do\n  vitray search o \\\n  --k 3\n```\n"
        "```crontab\n0 3 * * * vitray plan a.yaml\n```\n"
        "    vitray status out\n\nand `vitray\nclean out`\n"
    )
    assert [line.split()[1] for line in commands(page)] == ["run", "search", "plan", "status"]
    assert commands(page)[1].split()[-2:] == ["--k", "3"]
    assert command_spans(page) == ["vitray clean out"]


def test_the_fields_that_may_not_change_are_those_of_the_fingerprint() -> None:
    page = (ROOT / "docs/how-to/scheduled.md").read_text(encoding="utf-8")
    named = page.partition("## What may change")[2].partition("`auto` takes")[0]
    other = {
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
    assert set(re.findall(r"`(\w+)`", named)) == other | set(DECIDING_FIELDS)


def test_the_message_of_a_store_that_ignores_the_condition_is_shown_as_it_is() -> None:
    page = (ROOT / "docs/how-to/other-s3.md").read_text(encoding="utf-8")
    (shown,) = (fence.text.strip() for fence in fences(page) if fence.language == "text")
    files = (ROOT / "vitray").rglob("*.py")
    code = "".join(re.sub(r'"\s+f?"', "", file.read_text(encoding="utf-8")) for file in files)
    assert shown in code
