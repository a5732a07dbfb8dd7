"""The documentation site has every page, and searches without a server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.browser import Browser
from support.docpages import PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_leaves_no_link_to_markdown(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        targets = re.findall(r'href="([^"#]*)', page.read_text(encoding="utf-8"))
        assert [target for target in targets if target.endswith(".md")] == []


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^"\s>]+)', html)
        loaded += re.findall(
            r'<link rel="?(?:stylesheet|icon|preconnect|preload)"?[^>]* href="?([^"\s>]+)', html
        )
        assert loaded
        assert [url for url in loaded if "//" in url] == []


def test_the_search_of_the_site_works_from_a_disk(site: Path, tmp_path: Path) -> None:
    """Types a query into the search field of the built page, and waits for results."""
    query = """new Promise(async (resolve) => {
      const field = document.querySelector(".md-search__input");
      field.focus();
      field.value = "stall_timeout_s";
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
      for (let tries = 0; tries < 100; tries++) {
        await new Promise((next) => setTimeout(next, 100));
        const links = [...document.querySelectorAll(".md-search-result__link")];
        if (links.length) return resolve(links.map((link) => link.href.split("/").pop()));
      }
      resolve([]);
    })"""
    browser = Browser(tmp_path / "profile")
    try:
        visit = browser.visit(site / "index.html", 1200, (query,))
    finally:
        browser.close()
    assert any(link.startswith("reference.html") for link in visit.values[0]), visit.said
    assert [url for url in visit.requests if not url.startswith("file:")] == []
