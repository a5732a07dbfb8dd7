"""What a name in a source says: its kind by its suffix, and columns that folders spell out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from vitray.schema import ALL_IMAGE_SUFFIXES, IMAGE_SUFFIXES_V1

COMPRESSED_TAR = "compressed tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_KINDS_V1 = {
    ".tar": "tar",
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".jsonl", ".ndjson"), "manifest"),
    **{f".{suffix}": "files" for suffix in IMAGE_SUFFIXES_V1},
    **dict.fromkeys(_COMPRESSED, COMPRESSED_TAR),
}
_KINDS_V2 = {
    **_KINDS_V1,
    **dict.fromkeys((".parq", ".pq"), "parquet"),
    ".tsv": "manifest",
    **{f".{suffix}": "files" for suffix in ALL_IMAGE_SUFFIXES},
}
KINDS = {1: _KINDS_V1, 2: _KINDS_V2}  # by source rules
WITHOUT_SUFFIX = "without suffix"
_SUFFIX_V1 = re.compile(r"\.tar\.(gz|bz2|xz|zst)$|\.[^./]*$")
# what stands behind the last dot is a suffix where it is short and has a letter: not `._0`, not `.
# Smith`
_SUFFIX = re.compile(r"(?<=[^/])(\.tar\.(gz|bz2|xz|zst)|\.(?=[0-9]*[a-z])[a-z0-9]{1,12})$")
_HIVE_PART = re.compile(r"([^=/]+)=([^/]*)")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def suffix_of(url: str, rules: int) -> str:
    """The lower-case suffix with its dot, or WITHOUT_SUFFIX."""
    match = (_SUFFIX_V1 if rules == 1 else _SUFFIX).search(url.lower())
    return match[0] if match else WITHOUT_SUFFIX


def kind_of(url: str, rules: int) -> str | None:
    """tar, parquet, manifest, files or COMPRESSED_TAR; None where the suffix does not tell."""
    return KINDS[rules].get(suffix_of(url, rules))


def is_folder_column(name: str, url: str) -> bool:
    """Whether the folders of a URL spell out a value for this column."""
    return name == "folder" or name in hive_columns(url)


def folder_value(name: str, url: str) -> str | None:
    """`folder`: the name of the folder that holds the file; else the value of a folder called
    `name=value`.

    Escapes such as %20 in the latter are decoded, as Hive writes them.
    """
    if name != "folder":
        return hive_columns(url).get(name)
    path = url.partition("://")[2] or url
    return path.rpartition("/")[0].rpartition("/")[2]


def hive_columns(url: str) -> dict[str, str | None]:
    """The columns of folders called `name=value`, as Hive partitions a table."""
    found = dict[str, str | None]()
    for part in _folders(url):
        if match := _HIVE_PART.fullmatch(part):
            found[unquote(match[1])] = None if match[2] == _HIVE_NULL else unquote(match[2])
    return found


def _folders(url: str) -> Sequence[str]:
    return url.split("/")[:-1]
