"""Why something in a source has no row: a closed list of reasons, and their counts as text."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class LeftOut(StrEnum):
    """A reason, spelled as in JSON, in a data file's footer and in the manifest."""

    HIDDEN = "hidden"
    LINKED_FOLDER = "linked_folder"
    NO_SUFFIX = "no_suffix"
    OTHER_SUFFIX = "other_suffix"
    OTHER_KIND = "other_kind"
    BESIDE_MANIFEST = "beside_manifest"
    LINK = "link"
    SPECIAL_FILE = "special_file"
    FURTHER_IMAGE = "further_image"
    FURTHER_PAGE = "further_page"
    REMOVED = "removed"


LEFT_OUT = {
    LeftOut.HIDDEN: "the name of the file or of a folder above it begins with a dot or an "
    "underscore, or a NAS made it (@eaDir, #recycle). In a tar, only a file name with a dot counts",
    LeftOut.LINKED_FOLDER: "a folder behind a symbolic link, which is not entered",
    LeftOut.NO_SUFFIX: "no suffix; an explicit `format` reads such files",
    LeftOut.OTHER_SUFFIX: "not the suffix of an image",
    LeftOut.OTHER_KIND: "a file of another kind than the rest of the source",
    LeftOut.BESIDE_MANIFEST: "an image file beside a manifest; it has a row only if the manifest "
    "names it",
    LeftOut.LINK: "a link inside a tar, which is not followed",
    LeftOut.SPECIAL_FILE: "a device or a pipe inside a tar",
    LeftOut.FURTHER_IMAGE: "a further image of the same sample or row; `image_member` and "
    "`image_column` choose",
    LeftOut.FURTHER_PAGE: "a further page of a TIFF: the first one is read",
    LeftOut.REMOVED: "its row was taken out by `vitray remove`, which also blocks its key for "
    "later runs",
}
SUFFIXES_SHOWN = 4


def describe(counts: Mapping[str, int], suffixes: Mapping[str, int] | None = None) -> str:
    """`5: 2 hidden, 3 other_suffix; by suffix: 2 .txt, 1 .json`.

    suffixes: number of files without a row, by suffix; hidden files are not among them.
    """
    reasons = ", ".join(
        f"{number:,} {reason}" for reason, number in sorted(counts.items()) if number
    )
    text = f"{sum(counts.values()):,}: {reasons}"
    most = sorted((suffixes or {}).items(), key=lambda item: (-item[1], item[0]))[:SUFFIXES_SHOWN]
    if most:
        text += "; by suffix: " + ", ".join(f"{number:,} {suffix}" for suffix, number in most)
    return text
