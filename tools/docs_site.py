"""A hook of MkDocs: pages from outside `docs/`, and links that fit the site.

The pages are those of `docs/`, the Markdown files of the repository's root, and
`cluster/README.md`. On GitHub they link to each other by their place in the repository. On the site
such a link leads to the page, or to the repository if the file is no page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# place in the repository: place on the site
RENAMED = {"README.md": "index.md", "docs/README.md": "all-pages.md"}
OUTSIDE = ["cluster/README.md"]
CODE = re.compile(r"^```.*?^```[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"\0(\d+)\0")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def pages() -> dict[str, str]:
    """{place in the repository: place on the site} of every page that is not already in `docs/`."""
    root = {path.name: path.name for path in sorted(ROOT.glob("*.md"))}
    return root | {name: name for name in OUTSIDE} | RENAMED


def slug(heading: str, separator: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    config["nav"] = _expand(config["nav"], set(_listed(config["nav"])))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for place, uri in pages().items():
        if place.startswith("docs/"):
            files.remove(files.src_uris[place.removeprefix("docs/")])
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links for the site. Code is left as it is."""
    codes: list[str] = []

    def hide(code: re.Match[str]) -> str:
        codes.append(code[0])
        return f"\0{len(codes) - 1}\0"

    def rewrite(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path or path.startswith(("/", "mailto:")):
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page_place), path))
        uri = uris.get(place, place.removeprefix("docs/"))
        if uri in files.src_uris:
            short = posixpath.relpath(uri, posixpath.dirname(page_uri) or ".")
            return f"{mark}[{text}]({short}{hash_sign}{anchor})"
        if not (ROOT / place).exists():
            return link[0]  # MkDocs reports it
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place}{hash_sign}{anchor})"
        return text

    uris = pages()
    page_uri = page.file.src_uri
    page_place = {uri: place for place, uri in uris.items()}.get(page_uri, f"docs/{page_uri}")
    rewritten = LINK.sub(rewrite, CODE.sub(hide, markdown))
    return HIDDEN.sub(lambda found: codes[int(found[1])], rewritten)


def _listed(nav: Any) -> list[str]:
    """The places in a navigation, without patterns."""
    if isinstance(nav, str):
        return [] if "*" in nav else [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [place for value in values for place in _listed(value)]


def _expand(nav: Any, listed: set[str]) -> Any:
    """A navigation with each pattern replaced by its pages, without those listed elsewhere."""
    if isinstance(nav, dict):
        return {title: _expand(value, listed) for title, value in nav.items()}
    if not isinstance(nav, list):
        return nav
    expanded: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            expanded += [uri for uri in _matching(entry) if uri not in listed]
        else:
            expanded.append(_expand(entry, listed))
    return expanded


def _matching(pattern: str) -> list[str]:
    """Pages by a pattern, with a folder's README first."""
    uris = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob(pattern)}
    uris -= {"README.md"}  # all-pages.md
    if "/" not in pattern:
        uris |= set(pages().values())
    return sorted(uris, key=lambda uri: (not uri.endswith("README.md"), uri))
