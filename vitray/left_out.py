"""Why something in a source has no row: the closed list of reasons, and how a person reads their counts."""

from __future__ import annotations

from collections.abc import Mapping

LEFT_OUT = {
    "hidden": "the name, or a folder on the way, begins with a dot or an underscore, or is a NAS's own (@eaDir, #recycle)",
    "linked_folder": "a folder behind a symbolic link, which is not entered",
    "no_suffix": "no suffix; an explicit `format` reads such files",
    "other_suffix": "not the suffix of an image",
    "other_kind": "a file of another kind than the rest of the source",
    "link": "a link inside a tar, which is not followed",
    "special_file": "a device or a pipe inside a tar",
    "further_image": "a further image of the same sample or row; `image_member` and `image_column` choose",
    "further_page": "a further page of a TIFF: the first one is read",
}
SUFFIXES_SHOWN = 4


def describe(counts: Mapping[str, int], suffixes: Mapping[str, int] | None = None) -> str:
    """`5: 2 hidden, 3 other_suffix (2 .txt, 1 .json)`. suffixes: of the files without a row, how many have which."""
    parts = [f"{number:,} {reason}" for reason, number in sorted(counts.items()) if number]
    most = sorted((suffixes or {}).items(), key=lambda item: (-item[1], item[0]))[:SUFFIXES_SHOWN]
    shown = f" ({', '.join(f'{number:,} {suffix}' for suffix, number in most)})" if most else ""
    return f"{sum(counts.values()):,}: {', '.join(parts)}{shown}"
