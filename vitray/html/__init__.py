"""What our HTML files share: each is one that needs nothing else. A package's own templates extend
base.html and use macros.html.
"""

from __future__ import annotations

import math
import unicodedata
from datetime import UTC, datetime

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitray.version import __version__

CHARS, TAIL = (
    200,
    48,
)  # of a key or a message; of a key under its picture, which ends in what tells it from others
HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}


def rendered(package: str, template: str, **values: object) -> str:
    """HTML of a template of that package: everything is escaped, and `visible`."""

    def finish(value: object) -> object:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    world = Environment(
        loader=ChoiceLoader([PackageLoader("vitray", package), PackageLoader("vitray", "html")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finish,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    world.filters["short"] = lambda text: text if len(text) <= CHARS else text[: CHARS - 1] + "…"
    world.filters["tail"] = lambda text: text if len(text) <= TAIL else "…" + text[1 - TAIL :]
    world.filters["line"] = lambda text: " ".join(str(text).split())
    world.filters["n"] = lambda number: f"{number:,.0f}"
    world.filters["rate"] = lambda number: f"{number:,.1f}"
    world.filters["brief"] = _brief
    return world.get_template(template).render(
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", version=__version__, **values
    )


def visible(text: str) -> str:
    """The text without what could hide or turn other text: control characters and those of
    direction become U+FFFD.
    """
    odd = {"\u200c", "\u200d"}  # joiners, which words and emoji need
    return "".join(
        "\ufffd" if unicodedata.category(c) in HIDDEN and c not in odd else c for c in text
    )


def axis(top: float) -> list[float]:
    """Round values from 0 to `top` or just above, five at most."""
    raw = max(top, 1e-9) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(
        size * n for n in (1, 2, 2.5, 5, 10) if size * n >= raw * 0.999 and (n != 2.5 or size > 1)
    )
    return [step * n for n in range(math.ceil(top / step - 1e-9) + 1)] if top > 0 else [0.0, 1.0]


def _brief(number: float) -> str:
    return (
        f"{number / 1e6:g}M"
        if number >= 1e6
        else f"{number / 1e3:g}k"
        if number >= 1e4
        else f"{number:g}"
    )
