"""The pages of the documentation, taken apart: code blocks, commands, links, headings,
sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
RECIPES = ROOT / "docs" / "how-to" / "use-the-vectors.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ALL = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "cluster" / "README.md"]
MODEL = "google/vit-base-patch16-224"  # of most examples


@dataclass(frozen=True)
class Fence:
    """A code block."""

    language: str
    text: str


def place_of(page: Path) -> str:
    """The path of a page in the repository; the id of its tests."""
    return page.relative_to(ROOT).as_posix()


def fences(text: str) -> list[Fence]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Fence(*groups) for groups in found]


def blocks(text: str, language: str) -> list[str]:
    return [fence.text for fence in fences(text) if fence.language == language]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line that is a vitray command, in code blocks and indented code, as one would type
    it.
    """
    lines = [
        line
        for fence in fences(text)
        if fence.language in ("sh", "crontab")
        for line in fence.text.replace("\\\n", " ").splitlines()
    ]
    lines += [line[4:] for line in prose(text).splitlines() if line.startswith("    ")]
    before = re.compile(r"^(?:[\d*/,-]+ ){5}|^(?:until|if|while) |; do$|^\.venv/bin/")
    typed = [before.sub("", before.sub("", line.strip())) for line in lines]
    return [line for line in typed if line.startswith("vitray ")]


def command_spans(text: str) -> list[str]:
    """Every vitray command in backticks within the text."""
    return [" ".join(span.split()) for span in re.findall(r"`(vitray\s[^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Every link that stays in the repository."""
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if "://" not in target]


def sentences(text: str) -> list[str]:
    """Sentences of the text and of its lists and tables, without code."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=[-*|#>]|\d+\. )", prose(text)):
        if block.startswith("    ") or block.lstrip().startswith("#"):
            continue
        cells = block.strip().strip("|").split("|") if block.lstrip().startswith("|") else [block]
        for cell in cells:
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(cell.split()))
            plain = re.sub(r"`[^`]*`", "CODE", plain)
            found += re.split(r"(?<=[.!?])\s+(?=[A-Z*(\[])", plain)
    return [sentence for sentence in found if re.search("[a-z]", sentence)]
