"""The kind of a file by its suffix, and column values in the names of its folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal
from urllib.parse import unquote

from vitray.schema import ALL_IMAGE_SUFFIXES, IMAGE_SUFFIXES_V1, ShardKind, SourceRules

COMPRESSED_TAR: Final = "compressed tar"  # recognised, so that the error message can name it
NameKind = ShardKind | Literal["compressed tar"]
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_KINDS_V1: dict[str, NameKind] = {
    ".tar": ShardKind.TAR,
    ".parquet": ShardKind.PARQUET,
    ".csv": ShardKind.MANIFEST,
    ".jsonl": ShardKind.MANIFEST,
    ".ndjson": ShardKind.MANIFEST,
    **{f".{suffix}": ShardKind.FILES for suffix in IMAGE_SUFFIXES_V1},
    **dict.fromkeys(_COMPRESSED, COMPRESSED_TAR),
}
_KINDS_V2: dict[str, NameKind] = {
    **_KINDS_V1,
    ".parq": ShardKind.PARQUET,
    ".pq": ShardKind.PARQUET,
    ".tsv": ShardKind.MANIFEST,
    **{f".{suffix}": ShardKind.FILES for suffix in ALL_IMAGE_SUFFIXES},
}
KINDS = {SourceRules.V1: _KINDS_V1, SourceRules.V2: _KINDS_V2}
WITHOUT_SUFFIX = "without suffix"
_SUFFIX_V1 = re.compile(r"\.tar\.(gz|bz2|xz|zst)$|\.[^./]*$")
# A suffix is short and has a letter, unlike the ends of `a._0` and of `Mr. Smith`.
_SUFFIX = re.compile(r"(?<=[^/])(\.tar\.(gz|bz2|xz|zst)|\.(?=[0-9]*[a-z])[a-z0-9]{1,12})$")
_HIVE_PART = re.compile(r"([^=/]+)=([^/]*)")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def suffix_of(url: str, rules: SourceRules) -> str:
    """The lower-case suffix with its dot, or WITHOUT_SUFFIX."""
    match = (_SUFFIX_V1 if rules == SourceRules.V1 else _SUFFIX).search(url.lower())
    return match[0] if match else WITHOUT_SUFFIX


def kind_of(url: str, rules: SourceRules) -> NameKind | None:
    """The kind that the suffix means under these source rules; None for any other suffix."""
    return KINDS[rules].get(suffix_of(url, rules))


def is_folder_column(name: str, url: str) -> bool:
    """Whether the folders of a URL give a value for this column."""
    return name == "folder" or name in hive_columns(url)


def folder_value(name: str, url: str) -> str | None:
    """The value of a folder column: see `is_folder_column`.

    For the name `folder` it is the name of the file's own folder. For any other name it is the
    value of a folder called `name=value`; escapes such as %20 are decoded, as Hive writes them.
    """
    if name != "folder":
        return hive_columns(url).get(name)
    path = url.partition("://")[2] or url
    return path.rpartition("/")[0].rpartition("/")[2]


def hive_columns(url: str) -> dict[str, str | None]:
    """The columns of folders called `name=value`, as Hive partitions a table."""
    columns = dict[str, str | None]()
    for folder in _folders(url):
        if match := _HIVE_PART.fullmatch(folder):
            columns[unquote(match[1])] = None if match[2] == _HIVE_NULL else unquote(match[2])
    return columns


def _folders(url: str) -> Sequence[str]:
    return url.split("/")[:-1]
