"""A browser shows the report, loads nothing and runs nothing, with any names in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from factories import hand_made
from support import browser
from support.reports import HOSTILE, MARKS, Tables, hostile_dataset, record_run
from vitray.consume.comparing import compare
from vitray.consume.report import report, report_changes


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
