"""What all HTML pages share: frame, styles and escaping. Each page is one self-contained file.

Templates of other packages extend base.html and use macros.html.
"""

from __future__ import annotations

import math
import unicodedata
from datetime import UTC, datetime

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitray.version import __version__

TEXT_CHARS = 200  # of a key or a message
TAIL_CHARS = 48  # of a key under its picture: the end of a key distinguishes it
AXIS_STEPS = (1, 2, 2.5, 5, 10)
JOINERS = {"\u200c", "\u200d"}  # format characters that words and emoji need
HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}


def rendered(package: str, template: str, **values: object) -> str:
    """The HTML of a template of that package. All values are escaped and pass `visible`."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("vitray", package), PackageLoader("vitray", "html")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _beginning
    environment.filters["tail"] = _end
    environment.filters["line"] = lambda text: " ".join(str(text).split())
    environment.filters["n"] = lambda number: f"{number:,.0f}"
    environment.filters["rate"] = lambda number: f"{number:,.1f}"
    environment.filters["brief"] = _brief
    return environment.get_template(template).render(
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", version=__version__, **values
    )


def _finalized(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _beginning(text: str) -> str:
    return text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 1] + "…"


def _end(text: str) -> str:
    return text if len(text) <= TAIL_CHARS else "…" + text[1 - TAIL_CHARS :]


def visible(text: str) -> str:
    """The text with U+FFFD for characters that could hide or reorder other text.

    These are control characters and those of direction.
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in text
    )


def axis(top: float) -> list[float]:
    """Round values for an axis from 0 to `top` or just above; five at most."""
    if top <= 0:
        return [0.0, 1.0]
    raw_step = max(top, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(raw_step))
    steps = [power * factor for factor in AXIS_STEPS if factor != 2.5 or power > 1]
    step = next(step for step in steps if step >= raw_step * 0.999)
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def _brief(number: float) -> str:
    """A number in a few characters: 2M, 15k, 900."""
    if number >= 1e6:
        return f"{number / 1e6:g}M"
    if number >= 1e4:
        return f"{number / 1e3:g}k"
    return f"{number:g}"
