"""`vitray report`: its numbers are those of the dataset, and text from data stays text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from factories import hand_made
from support.reports import MARKS, Tables, hostile_dataset, record_run
from support.s3 import new_bucket
from vitray.consume.report import report, write_card


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


def test_an_empty_and_an_unfinished_dataset_say_so(tmp_path: Path) -> None:
    hand_made.make_dataset(tmp_path, commit=0)
    report(str(tmp_path / "out"), str(tmp_path / "page.html"))
    assert "This dataset is empty: nothing is committed yet" in (tmp_path / "page.html").read_text()
    hand_made.make_dataset(tmp_path, commit=2)
    assert report(str(tmp_path / "out"), str(tmp_path / "page.html")).images == 20
    assert "not complete: 1 of 3 shards still to do" in (tmp_path / "page.html").read_text()


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
    assert write_card(out) == write_card(out) == f"{out}/_vitray/README.md"
