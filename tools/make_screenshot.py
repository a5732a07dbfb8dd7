"""Makes docs/images/report.png: the report of the demo in headless Chromium, 1,200 px wide.

    .venv/bin/python tools/make_screenshot.py

Run it again when the look or the words of `vitray report` change. It needs Chromium, takes half a
minute, and leaves nothing else behind.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "report.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1200, 1545
COLOURS = 256  # of the palette: text and flat shapes need no more
MOST_BYTES = 300_000


def main() -> None:
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        sys.exit(f"no browser found: install one of {', '.join(CHROMIUM)}")
    with tempfile.TemporaryDirectory() as folder:
        page = make_report(Path(folder))
        picture = to_palette(screenshot(browser, page))
    if len(picture) > MOST_BYTES:
        sys.exit(f"{len(picture):,} bytes are more than {MOST_BYTES:,}: lower HEIGHT or COLOURS")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_bytes(picture)
    print(f"{PICTURE}: {len(picture):,} bytes")


def make_report(folder: Path) -> Path:
    """Runs the demo in a folder and makes its report, without the path of that folder."""
    page = folder / "report.html"
    vitray(folder, "demo", "demo")
    vitray(folder, "report", "demo/out", "--truth", "cls", "--to", str(page))
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace(f"{folder.resolve()}/", ""), encoding="utf-8")
    return page


def vitray(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "vitray", *words], cwd=folder, check=True)


def screenshot(browser: str, page: Path) -> bytes:
    """The upper part of a page, as PNG."""
    picture = page.with_suffix(".png")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={WIDTH},{HEIGHT}",
        f"--screenshot={picture}",
    ]
    subprocess.run([browser, *options, page.as_uri()], check=True, timeout=120, capture_output=True)
    return picture.read_bytes()


def to_palette(png: bytes) -> bytes:
    """The same picture with few colours, which makes the file a fraction as large."""
    smaller = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


if __name__ == "__main__":
    main()
