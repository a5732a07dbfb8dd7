"""Datasets with hostile names, and the tables of a report's page."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factories import hand_made
from vitray.dataset import Dataset, write_run_record

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}}{% raw %}")
HOSTILE_NAMES = (
    *HOSTILE,
    "javascript:alert(1)",
    "\u202egpj,exe\u2066",
    "\x1b[31mred\x07",
    "http://127.0.0.1:9/beacon",
    "' onload='alert(1)",
    "x" * 5000,
)


class Tables(HTMLParser):
    """{caption: rows of cells} of a page, and every attribute that can load or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables, self.links, self.tags = dict[str, list[list[str]]](), list[str](), set[str]()
        self._rows, self._into = list[list[str]](), list[str]()
        self._caption = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            f"{name}={value}" for name, value in attrs if name in LOADING or name.startswith("on")
        ]
        self.links += [
            f"{name}={value}"
            for name, value in attrs
            if name == "style" and value and "url(" in value
        ]
        if tag == "table":
            self._rows = []
        if tag in ("td", "th", "caption"):
            self._into = []
        if tag == "tr":
            self._rows.append([])

    def handle_data(self, data: str) -> None:
        self._into.append(data)

    def handle_endtag(self, tag: str) -> None:
        text = " ".join("".join(self._into).split())
        if tag == "caption":
            self._caption = text
        if tag in ("td", "th"):
            self._rows[-1].append(text)
        if tag == "table":
            self.tables[self._caption] = (
                self._rows[1:] if self._rows and "th" in self.tags else self._rows
            )


LOADING = {
    "src",
    "href",
    "srcset",
    "data",
    "action",
    "formaction",
    "poster",
    "xlink:href",
    "background",
    "ping",
}


def hostile_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> Dataset:
    """Images, one of them twice, in tars with names that would run, load or deceive; labels and
    messages likewise.
    """
    rng = np.random.default_rng(0)
    for n in range(2):
        members = {}
        for i, name in enumerate([*HOSTILE_NAMES, "plain"]):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(
                buffer, "PNG", pnginfo=None
            )
            members[f"{n}-{name}".replace("/", "\u2215") + (".png" if i != 5 else ".jpg")] = (
                buffer.getvalue()
            )
        members[f"{n}-again.png"] = members[f"{n}-plain.png"]
        hand_made.write_tar(folder / "in" / f"s-{n}.tar", members)
    real_error = hand_made.error
    monkeypatch.setattr(
        hand_made,
        "error",
        lambda shard, image: {
            **real_error(shard, image),
            "message": f"{HOSTILE[1]} http://127.0.0.1:9/x\n\u202e",
        },
    )
    spec = replace(hand_made.spec_of(str(folder / "model")), labels=HOSTILE)
    return hand_made.make_dataset(folder, spec=spec, **fields)


MARKS = [
    200,
    400,
    600,
    600,
    600,
    600,
    1200,
    1800,
    2400,
    2600,
    2800,
    3000,
]  # images after 20, 40 ... 240 seconds


def record_run(
    dataset: Dataset, run: str, images: int, timeline: list[tuple[float, int]] | None
) -> None:
    ended = {
        "run": run,
        "finished": f"2026-05-0{run}T03:00:00+00:00",
        "images": images,
        "seconds": 300.0,
        "images_per_s": images / 300,
    }
    write_run_record(
        dataset, run, {**ended, **({} if timeline is None else {"timeline": timeline})}
    )
