"""vitray report: the page's numbers are those of the dataset, what comes from data stays text, and
a browser loads nothing else.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import duckdb
import hand_made
import numpy as np
import pytest
import shards
import yaml
from conftest import new_bucket
from PIL import Image

import vitray
from vitray.consume.comparing import compare
from vitray.consume.report import report, report_changes, write_card
from vitray.consume.report.counts import SameBytes, count
from vitray.consume.report.page import STEPS, wilson, within
from vitray.consume.report.space import near_groups, on_a_plane, principal
from vitray.dataset import Dataset, data_files, open_dataset, write_run_record
from vitray.errors import CommitError, JobError
from vitray.html import axis, visible

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


@pytest.fixture(scope="module")
def shapes_dataset(shapes_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 drawn shapes in four tars, some of them twice, some broken, labelled by the trained
    model.
    """
    folder = tmp_path_factory.mktemp("report")
    pictures = shards.pictures(300)
    for n in (7, 150, 299):
        pictures[n] = replace(pictures[n], data=pictures[n].data[: len(pictures[n].data) // 2])
    for n in (20, 21, 200):
        pictures[n] = replace(pictures[10], key=pictures[n].key)
    shards.put_tars(str(folder / "in"), pictures, 4, folder)
    job = vitray.Job(
        source=f"{folder}/in/*.tar",
        model=shapes_model,
        out=str(folder / "out"),
        keep=["cls"],
        engine="torch",
    )
    assert vitray.run(job).exit_code in (0, 4)
    return job.out


def test_its_numbers_are_those_of_duckdb(shapes_dataset: str, tmp_path: Path) -> None:
    result = report(shapes_dataset, str(tmp_path / "page.html"), truth="cls")
    page = Tables((tmp_path / "page.html").read_text())
    data = f"'{shapes_dataset}/data/*.parquet'"

    def ask(query: str) -> list[tuple[object, ...]]:
        return duckdb.sql(query).fetchall()

    assert result.images == 300 and result.notes == ()
    labels = ask(f"select label, count(*) n from {data} group by 1 order by n desc, 1")
    assert sorted((row[0], int(row[2])) for row in page.tables["Images by label"]) == sorted(labels)
    by_score = dict(
        ask(f"select least(floor(score * 20), 19)::int, count(*) from {data} group by 1")
    )
    assert [int(row[1]) for row in page.tables["Images by score"]] == [
        by_score.get(n, 0) for n in range(20)
    ]
    bins = ask(
        f"select avg(score), avg((label = cls)::int), count(*) from {data} group by "
        f"least(floor(score::float * 10), 9) order by 1"
    )
    expected_rows = [(f"{score:.3f}", f"{100 * right:.1f}%", f"{n}") for score, right, n in bins]
    assert [tuple(row) for row in page.tables["Right labels by score"]] == expected_rows
    counts = count(_dataset(shapes_dataset), data_files(shapes_dataset), "cls")
    twins = ask(
        f"select list((shard, index) order by shard, index) from {data} group by content_hash "
        f"having count(*) > 1"
    )
    rows, groups = counts.same_bytes.groups(5)
    assert (rows, [size for size, _ in groups]) == (4, [4]) and len(twins) == 1
    assert [(counts.shards[s], i) for s, i in groups[0][1]] == twins[0][0][:3]
    assert counts.reasons == dict(
        ask(f"select reason, count(*) from '{shapes_dataset}/_errors/*.parquet' group by 1")
    )
    least = ask(f"select score, shard, index from {data} order by 1, 2, 3 limit 18")
    assert [(score, *ref) for score, ref in counts.least_sure] == least
    assert sum(map(len, counts.vectors)) == counts.rows  # a small dataset is its own sample


def test_pictures_are_made_anew_from_the_source(shapes_dataset: str, tmp_path: Path) -> None:
    result = report(shapes_dataset, str(tmp_path / "page.html"))
    html = (tmp_path / "page.html").read_text()
    urls = set(re.findall(r'<img src="([^"]*)"', html))
    assert result.pictures >= len(urls) > 40 and all(
        url.startswith("data:image/jpeg;base64,") for url in urls
    )
    assert html.count("<img ") <= 120 and len(html) < 2_000_000
    assert "no picture" not in html
    assert (
        report(shapes_dataset, str(tmp_path / "page.html"), pictures=False).pictures == 0
    )  # our own page is written anew
    html = (tmp_path / "page.html").read_text()
    assert 'id="least-sure"' in html and "no picture" not in html and "gallery-title" not in html


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


def test_throughput_is_drawn_within_the_last_run_that_computed_images(tmp_path: Path) -> None:
    dataset, page = hand_made.make_dataset(tmp_path), tmp_path / "page.html"
    record_run(dataset, "1", 5, [(1.0, 5)])
    record_run(dataset, "2", 3000, [(20.0 * (n + 1), images) for n, images in enumerate(MARKS)])
    record_run(dataset, "3", 0, [])
    report(dataset.out, str(page))
    html = page.read_text()
    rows = Tables(html).tables["Images/s within the last run"]
    assert rows == [
        ["0.00", "10.0"],
        ["1.00", "0.0"],
        ["2.00", "30.0"],
        ["3.00", "10.0"],
    ]  # minutes
    # 30 images/s, the top of the axis, is at 12; nothing at 220: what lies between is 208 units
    # high
    assert 'd="M48 220V150.7H154.0V220.0H260.0V12.0H366.0V150.7H472.0V220Z"' in html
    assert (
        '<line class="mean" x1="48" x2="472" y1="133.3" y2="133.3"/>' in html
        and "dashed: mean 12.5<" in html
    )
    assert "the run that ended 2026-05-02 03:00: from 0.0 to 30.0, mean 12.5" in html
    assert "Images/s, by minutes" in html and re.findall(
        r'y="238" text-anchor="[a-z]+">([0-9]+)<', html
    )[-5:] == list("01234")
    record_run(dataset, "4", 7, None)
    report(dataset.out, str(page))
    assert "Within the last run" not in page.read_text()


def test_steps_of_a_run_add_up_to_its_images_however_uneven_its_marks() -> None:
    rng = np.random.default_rng(3)
    for marks in (6, 50, 400):
        seconds = np.cumsum(rng.exponential(30.0, marks)).round(2)
        seconds[marks // 2] = seconds[marks // 2 - 1]  # two events at once
        images = np.cumsum(rng.integers(0, 500, marks))
        chart = within({"finished": "", "timeline": list(zip(seconds.tolist(), images.tolist()))})
        assert chart is not None and len(chart["rates"]) == min(STEPS, marks // 3)
        assert sum(rate for _, rate in chart["rates"]) * chart["step_s"] == pytest.approx(
            images[-1]
        )
        assert chart["mean"] == pytest.approx(images[-1] / seconds[-1])
    for short in ([], [(1.0, 4)] * 5, [(0.0, 4)] * 9):
        assert within({"finished": "", "timeline": short}) is None


def test_names_labels_and_messages_stay_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = hostile_dataset(tmp_path, monkeypatch)
    report(dataset.out, str(tmp_path / "page.html"))
    html = (tmp_path / "page.html").read_text()
    page = Tables(html)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert page.tags.isdisjoint(
        {"script", "iframe", "object", "embed", "form", "base", "audio", "video", "image", "use"}
    )
    assert [
        link
        for link in page.links
        if not re.fullmatch(r"href=#[a-z-]+|href=data:,|src=data:image/jpeg;base64,.+", link)
    ] == []
    assert (
        "&lt;script&gt;alert(1)" in html
        and "{{7*7}}" in html
        and "49" not in page.tables["Images by label"][2][0]
    )
    assert sorted(row[0] for row in page.tables["Images by label"]) == sorted(HOSTILE)
    assert (
        not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]", html)
        and "\ufffdgpj,exe\ufffd" in html
    )


def test_text_that_hides_or_turns_other_text_is_shown_as_replaced() -> None:
    assert visible("a\u202eb\x00c\u2029d\u200be\ufeff") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffd"
    assert (
        visible("naïve 猫 👩\u200d🔬 می\u200cخواهم\u3000x")
        == "naïve 猫 👩\u200d🔬 می\u200cخواهم\u3000x"
    )


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_asks_for_nothing_and_runs_nothing(
    chromium: browser.Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    dataset = hostile_dataset(tmp_path, monkeypatch)
    record_run(dataset, "1", 3000, [(20.0 * (n + 1), images) for n, images in enumerate(MARKS)])
    result = report(dataset.out, str(tmp_path / "page.html"))
    for scheme in ("light", "dark"):
        rows = (
            "[...document.images].filter(i => i.complete && i.naturalWidth == 128).length",
            "document.images.length",
            "document.scripts.length",
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right "
            "> innerWidth + 1).length",
            "[...document.querySelectorAll('section')].filter(s => "
            "s.getBoundingClientRect().height < 40).length",
        )
        seen = chromium.visit(tmp_path / "page.html", width, rows, scheme)
        loaded, images, *nothing = seen.values
        assert result.pictures > 15 and loaded == images >= result.pictures
        assert (nothing, seen.requests, seen.said, seen.dialogs) == ([0, 0, 0], [], [], [])
        assert seen.width <= width


def test_a_script_that_came_into_the_page_all_the_same_would_not_run(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    report(hand_made.make_dataset(tmp_path).out, str(page))
    page.write_text(
        page.read_text().replace("<main>", "<main><script>document.title = 'ran'</script>")
    )
    seen = chromium.visit(page, 400, ("document.scripts.length", "document.title"))
    assert seen.values == [1, "out: vitray report"] and "Content Security Policy" in seen.said[0]


def test_the_browser_of_these_tests_sees_requests_errors_and_width(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='http://127.0.0.1:9/x.png'><div "
        "style='width:900px'>x</div><script>console.log('hello'); nothing()</script>"
    )
    seen = chromium.visit(page, 400)
    assert seen.requests == ["http://127.0.0.1:9/x.png"] and seen.width >= 900
    assert any("hello" in text for text in seen.said) and any(
        "ReferenceError" in text for text in seen.said
    )


# ---------------------------------------------------------------- the page of a comparison


def test_pictures_of_a_comparison_are_those_of_the_rows_that_moved(tmp_path: Path) -> None:
    """Every image has a colour of its own, and the file says it in its key."""
    colours = [(60 * (n % 4) + 30, 60 * (n // 4 % 4) + 30, 100 * (n // 16) + 30) for n in range(20)]
    for n in range(2):
        members = {}
        for i in range(10):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 40), colours[10 * n + i]).save(buffer, "PNG")
            members[f"{10 * n + i}.png"] = buffer.getvalue()
        hand_made.write_tar(tmp_path / "in" / f"s-{n}.tar", members)
    old, new, page = *two_datasets(tmp_path, ("dog", "cat", "emu")), tmp_path / "page.html"
    changes = compare(old, new)
    result = report_changes(changes, str(page))
    html = page.read_text()
    shown = re.findall(
        r'<img src="data:image/jpeg;base64,([^"]+)".*?<b><bdi>(\w+)</bdi></b>.*?<b><bdi>(\w+)</bdi></b>.*?"key"><bdi>(\d+)',
        html,
        re.S,
    )
    expected = [(move.old, move.new, key) for move in changes.moves for key in move.examples]
    assert [
        (old_label, new_label, key) for _, old_label, new_label, key in shown
    ] == expected and len(expected) == result.pictures == 12
    for data, _, _, key in shown:
        mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean((0, 1))
        assert np.abs(mean - colours[int(key)]).max() < 4, key
    assert Tables(html).tables["Images by move"] == [
        ["cat", "dog", "6", "33.33%"],
        ["dog", "cat", "6", "33.33%"],
    ]
    shutil.rmtree(tmp_path / "in")
    gone = report_changes(changes, str(page))  # our own page is written anew
    html = page.read_text()
    assert (
        gone.pictures == 0
        and "The source cannot be listed" in gone.notes[0]
        and html.count("no picture of") == 12
    )
    report(new, str(tmp_path / "report.html"))
    with pytest.raises(JobError, match="was not made by vitray compare"):
        report_changes(changes, str(tmp_path / "report.html"))


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_a_comparison_with_hostile_names_and_asks_for_nothing(
    chromium: browser.Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    old, page = hostile_dataset(tmp_path, monkeypatch), tmp_path / "page.html"
    spec = replace(
        hand_made.spec_of(str(tmp_path / "model")), labels=HOSTILE[::-1], weights_sha256="8" * 64
    )
    new = hand_made.make_dataset(tmp_path, spec=spec, out=f"{tmp_path}/new")
    result = report_changes(compare(old.out, new.out), str(page))
    html = page.read_text()
    tables = Tables(html)
    assert [
        link
        for link in tables.links
        if not re.fullmatch(r"href=data:,|src=data:image/jpeg;base64,.+", link)
    ] == [] and "script" not in tables.tags
    assert [row[:2] for row in tables.tables["Images by move"]] == [
        [HOSTILE[0], HOSTILE[2]],
        [HOSTILE[2], HOSTILE[0]],
    ]
    for scheme in ("light", "dark"):
        rows = (
            "[...document.images].filter(i => i.complete && i.naturalWidth == 128).length",
            "document.scripts.length",
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right "
            "> innerWidth + 1).length",
        )
        seen = chromium.visit(page, width, rows, scheme)
        assert seen.values == [result.pictures, 0, 0] and result.pictures > 8
        assert (seen.requests, seen.said, seen.dialogs) == ([], [], []) and seen.width <= width


def two_datasets(folder: Path, labels: tuple[str, ...]) -> tuple[str, str]:
    """Of the same tars; the second by a model that gives these labels for hand_made.CLASSES."""
    spec = replace(hand_made.spec_of(str(folder / "model")), labels=labels, weights_sha256="8" * 64)
    return hand_made.make_dataset(folder).out, hand_made.make_dataset(
        folder, spec=spec, out=f"{folder}/new"
    ).out


# ---------------------------------------------------------------- what may be missing


def test_a_source_that_is_gone_or_changed_is_said_and_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, page = hostile_dataset(tmp_path, monkeypatch), str(tmp_path / "page.html")
    (tmp_path / "in" / "s-1.tar").write_bytes(
        (tmp_path / "in" / "s-0.tar").read_bytes() + b"\0" * 10240
    )
    changed = report(dataset.out, page)
    assert 0 < changed.pictures < 25 and "have changed since" in changed.notes[0]
    for tar in (tmp_path / "in").iterdir():
        tar.unlink()
    gone = report(dataset.out, page)
    assert (
        gone.pictures == 0 and gone.images == 22 and "The source cannot be listed" in gone.notes[0]
    )
    assert "The source cannot be listed" in Path(page).read_text()


def test_an_image_that_is_not_the_one_that_was_labelled_is_not_shown(tmp_path: Path) -> None:
    """A file whose content changed under the same size and time: the same shard to a listing."""
    path, page = tmp_path / "in" / "s-000.tar", str(tmp_path / "page.html")

    def write(colour: str) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "BMP")
        members = {
            f"{i}.bmp": buffer.getvalue() if i == 5 else f"no image {i}".encode() for i in range(10)
        }
        hand_made.write_tar(path, members)
        os.utime(path, ns=(0, 10**18))

    write("red")
    dataset = hand_made.make_dataset(tmp_path)
    assert report(dataset.out, page).pictures == 1
    write("blue")
    result = report(dataset.out, page)
    assert (result.pictures, result.notes) == (
        0,
        ("Some images have changed since they were labelled.",),
    )


def test_an_empty_and_an_unfinished_dataset_say_so(tmp_path: Path) -> None:
    hand_made.make_dataset(tmp_path, commit=0)
    report(str(tmp_path / "out"), str(tmp_path / "page.html"))
    assert "This dataset is empty: nothing is committed yet" in (tmp_path / "page.html").read_text()
    hand_made.make_dataset(tmp_path, commit=2)
    assert report(str(tmp_path / "out"), str(tmp_path / "page.html")).images == 20
    assert "not complete: 1 of 3 shards are still to do" in (tmp_path / "page.html").read_text()


def test_sections_of_what_a_dataset_has_not_are_left_out(shapes_model: str, tmp_path: Path) -> None:
    shards.put_tars(str(tmp_path / "in"), shards.pictures(20), 1, tmp_path)
    base = {"source": f"{tmp_path}/in/*.tar", "model": shapes_model, "engine": "torch"}
    vitray.run(vitray.Job(**base, out=str(tmp_path / "vectors"), labels=False))
    vitray.run(vitray.Job(**base, out=str(tmp_path / "labels"), embeddings=[]))
    sections = {}
    for name in ("vectors", "labels"):
        report(str(tmp_path / name), str(tmp_path / f"{name}.html"))
        sections[name] = set(
            re.findall(r'<section id="([a-z-]+)"', (tmp_path / f"{name}.html").read_text())
        )
    assert sections["vectors"] == {
        "summary",
        "map",
        "duplicates",
        "failures",
        "throughput",
        "provenance",
    }
    assert sections["labels"] == sections["vectors"] - {"map"} | {
        "labels",
        "scores",
        "gallery",
        "least-sure",
    }


def test_what_cannot_be_reported_is_one_error(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    with pytest.raises(JobError, match="holds no vitray dataset"):
        report(str(tmp_path / "nothing"))
    with pytest.raises(JobError, match="no passthrough column"):
        report(dataset.out, truth="cls")
    (tmp_path / "mine.html").write_text("<p>my own</p>")
    with pytest.raises(JobError, match=r"was not made by vitray report"):
        report(dataset.out, str(tmp_path / "mine.html"))
    assert (tmp_path / "mine.html").read_text() == "<p>my own</p>"
    Path(data_files(dataset.out)[0]).write_bytes(b"PAR1")
    with pytest.raises(CommitError):
        report(dataset.out, str(tmp_path / "page.html"))


def test_a_dataset_on_s3_is_shown_from_here(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_bucket(mock_s3, monkeypatch) + "/photos-vit"
    hostile_dataset(tmp_path, monkeypatch, out=out)
    monkeypatch.chdir(tmp_path)
    result = report(out)
    assert (result.page, result.images, result.pictures > 15) == (
        str(tmp_path / "photos-vit-report.html"),
        22,
        True,
    )
    assert write_card(out) == write_card(out) == f"{out}/README.md"


# ---------------------------------------------------------------- the card


def test_the_card_is_what_the_hub_reads_and_only_ours_is_overwritten(shapes_dataset: str) -> None:
    path = Path(write_card(shapes_dataset, "cc-by-4.0"))
    text = path.read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "pretty_name": "out",
        "license": "cc-by-4.0",
        "task_categories": ["image-classification", "image-feature-extraction"],
        "tags": ["vitray", "vit", "embeddings"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            },
            {
                "config_name": "errors",
                "data_files": [{"split": "train", "path": "_errors/*.parquet"}],
            },
        ],
    }
    assert "297 images" in text and "/tmp" not in text and "| `format` | `string` |" in text
    write_card(shapes_dataset)
    assert "license: unknown" in path.read_text()
    path.write_text(path.read_text().replace("297 images", "297 fine images"))
    with pytest.raises(JobError, match="was edited since"):
        write_card(shapes_dataset)
    assert "fine images" in path.read_text()
    path.unlink()
    assert vitray.validate(shapes_dataset).ok


def test_the_command_writes_both_without_torch_or_ray(shapes_dataset: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vitray.cli import main\n"
        f"sys.argv = ['vitray', 'report', {shapes_dataset!r}, '--to', "
        f"{str(tmp_path / 'page.html')!r}, '--truth', 'cls', '--card']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "page.html: 300 images" in done.stdout and "README.md: the dataset card" in done.stdout
    (Path(shapes_dataset) / "README.md").unlink()


# ---------------------------------------------------------------- numbers


def test_the_plane_is_that_of_the_singular_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32) * np.arange(1, 17)
    points, share = principal(vectors)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(
        np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-2
    ) and share == pytest.approx((s**2)[:2].sum() / (s**2).sum())
    assert principal(np.ones((5, 1)))[0].shape == (5, 2)
    (tmp_path / "umap.py").write_text(
        "class UMAP:\n    def __init__(self, **options): pass\n    def fit_transform(self, x): "
        "return x[:, 3:5]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points, how = on_a_plane(vectors)
    assert (
        how.startswith("UMAP") and np.allclose(points.min(0), 0) and np.allclose(points.max(0), 1)
    )
    assert np.corrcoef(points[:, 0], vectors[:, 3])[0, 1] == pytest.approx(1)
    monkeypatch.delitem(sys.modules, "umap")


def test_near_groups_are_around_their_first() -> None:
    angles = np.deg2rad([0, 90, 5, 95, 13, 180, 91])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 8)[:, None]
    assert near_groups(vectors) == [
        [1, 3, 6],
        [0, 2],
    ]  # cos 8.1 degrees is 0.99: 13 is near 5, not 0
    assert near_groups(np.zeros((3, 4))) == []


def test_more_images_than_fit_leave_whole_groups_of_a_share() -> None:
    import pyarrow as pa

    rng, same = np.random.default_rng(2), SameBytes(limit=1000)
    hashes = [rng.bytes(16) for _ in range(5000)]
    for number in range(2):
        same.add(number, pa.chunked_array([pa.array(hashes, pa.binary(16))]), np.arange(5000))
    rows, groups = same.groups(10_000)
    assert same.halvings == 4 and rows == 2 * len(groups) and 400 < len(groups) * 16 / 10 < 600
    assert all(
        size == 2 and [s for s, _ in first] == [0, 1] and first[0][1] == first[1][1]
        for size, first in groups
    )


def test_axes_are_round_and_intervals_are_wilsons() -> None:
    assert [axis(top)[-1] for top in (560, 3, 0, 1000, 7)] == [600, 3, 1, 1000, 8]
    assert all(
        top <= axis(top)[-1] <= 2 * top and len(axis(top)) <= 6
        for top in np.geomspace(0.01, 1e9, 100)
    )
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)


def _dataset(out: str) -> Dataset:
    dataset = open_dataset(out)
    assert dataset is not None
    return dataset
