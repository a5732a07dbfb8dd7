"""`vitray report`: its numbers are those of the dataset, and text from data stays text."""

from __future__ import annotations

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from factories import hand_made
from support.reports import HOSTILE, Tables, hostile_dataset
from vitray.consume.comparing import compare
from vitray.consume.report import report, report_changes, write_card
from vitray.consume.report.page import STEPS, within
from vitray.dataset import data_files
from vitray.errors import CommitError, JobError
from vitray.html import visible


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


def test_pandas_reads_a_dataset_that_has_a_card(tmp_path: Path) -> None:
    hand_made.make_dataset(tmp_path)
    write_card(str(tmp_path / "out"))
    assert len(pd.read_parquet(tmp_path / "out")) == 3 * (hand_made.IMAGES - 1)


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


def two_datasets(folder: Path, labels: tuple[str, ...]) -> tuple[str, str]:
    """Of the same tars; the second by a model that gives these labels for hand_made.CLASSES."""
    spec = replace(hand_made.spec_of(str(folder / "model")), labels=labels, weights_sha256="8" * 64)
    return hand_made.make_dataset(folder).out, hand_made.make_dataset(
        folder, spec=spec, out=f"{folder}/new"
    ).out


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
