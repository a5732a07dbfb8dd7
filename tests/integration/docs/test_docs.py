"""The pages are true: the reference matches the code, links lead somewhere, commands parse, jobs
are valid.

test_docs_run.py runs what the pages show.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from support.docpages import PAGES, README, ROOT, fences, place_of
from vitray.budget import PRICES
from vitray.job import Job
from vitray.training.config import TrainingConfig

FIRST_WORDS = {
    *("#!/bin/sh", "vitray", "export", "python", "pip", "make", "mkdir", ".", "hf"),
    *("for", "until", "case", "esac", "done", "set", "jq"),
}
LANGUAGES = {"sh", "crontab", "ini", "json", "yaml", "python", "text", "sql"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=place_of)
def test_every_code_block_has_a_known_language_and_valid_content(page: Path) -> None:
    for fence in fences(page.read_text(encoding="utf-8")):
        assert fence.language in LANGUAGES, fence
        if fence.language == "sh":
            check_shell(fence.text)
        elif fence.language == "yaml":
            check_yaml(fence.text)
        elif fence.language == "json":
            json.loads(fence.text)


def check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)
    lines = text.replace("\\\n", " ").splitlines()
    words = {line.split()[0] for line in lines if line.strip()}
    # without the labels of a `case`, and assignments
    assert {word for word in words if not re.match(r"\S+\)|\w+=", word)} <= FIRST_WORDS
    for script in re.findall(r"^python (\S+)", text, re.MULTILINE):
        assert (ROOT / script).is_file(), script


def check_yaml(text: str) -> None:
    """A file of prices, a training or a job."""
    fields = yaml.safe_load(text)
    if "machine_hour" in fields:
        assert fields.keys() == PRICES.keys()
    elif "train" in fields:
        assert TrainingConfig(**fields).out
    else:
        assert Job(**fields).out
