"""URLs, globs and ranges, and the objects that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fsspec.utils import glob_translate

from vitray.errors import JobError, ObjectMissing
from vitray.schema import ALL_IMAGE_SUFFIXES, SourceRules
from vitray.storage.objects import ObjectInfo, absolute, is_local
from vitray.storage.stores import store_for

NAS_FOLDERS = ("@eaDir", "#recycle", "#snapshot")  # thumbnails and deleted files of network disks
LONGEST_RANGE = 1_000_000


@dataclass(frozen=True, slots=True)
class PatternObjects:
    """The objects that a pattern names, in order.

    hidden: URLs below it whose names begin with a dot or an underscore that the pattern lacks.
    linked_folders: folders behind symbolic links, which are not entered.
    """

    objects: list[ObjectInfo]
    hidden: list[str]
    linked_folders: list[str]


def search(pattern: str, rules: SourceRules = SourceRules.V1) -> PatternObjects:
    """The objects that a URL, glob, {000..099} range or prefix names.

    rules: of the source, see Job. With rules 2:
    - folders such as `_year=2026` are partitions of a table, and not hidden;
    - the own folders of a NAS are hidden;
    - `**` inside a name is refused.

    Raises ObjectMissing for a URL that names no object.
    """
    result = PatternObjects([], [], [])
    for url in expand_braces(pattern):
        infos, linked_folders = _infos_of(url, rules)
        is_hidden = _hidden_by(absolute(url), rules)
        for info in infos:
            if is_hidden(info.url):
                result.hidden.append(info.url)
            else:
                result.objects.append(info)
        result.linked_folders.extend(linked_folders)
    return result


def _infos_of(url: str, rules: SourceRules) -> tuple[list[ObjectInfo], list[str]]:
    """Every object of one URL or glob, and the linked folders below it."""
    store = store_for(url)
    is_glob = _wild(url) is not None
    if is_glob and rules >= SourceRules.V2:
        _require_whole_globstars(url)
    infos, linked_folders = (store.glob(url), []) if is_glob else store.find_all(url)
    if not infos:
        is_one_level = url.endswith("/*")
        hint = " (* matches within one folder: give the folder, or /**)" if is_one_level else ""
        raise ObjectMissing(f"{url} names no object{hint}")
    return infos, linked_folders


def expand(pattern: str) -> list[ObjectInfo]:
    """The objects of `search`."""
    return search(pattern).objects


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` as three URLs, zeros kept; `{x,y}` works too.

    Raises JobError for a range that is empty or longer than a million.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match or (is_local(pattern) and os.path.lexists(absolute(pattern))):
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    if match[3] is not None:
        middles: Iterable[str] = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + LONGEST_RANGE:
            raise JobError(f"{pattern}: the range {match[0]} is empty or longer than a million")
        middles = (str(n).zfill(len(match[1])) for n in range(first, last + 1))
    return [url for middle in middles for url in expand_braces(head + middle + tail)]


def reads(pattern: str, out: str, name: str = "data/x.parquet") -> bool:
    """Whether a URL, glob or prefix names the file `name` in `out`, also through a link."""
    if is_local(pattern) and is_local(out):
        pattern = os.path.realpath(pattern)
        out = os.path.realpath(out)
    url = f"{out}/{name}"
    if not _wild(pattern):
        return url.startswith(f"{pattern}/")
    _require_whole_globstars(pattern)
    is_match = re.match(glob_translate(pattern), url) is not None
    return is_match or url.startswith(f"{pattern}/")


def _require_whole_globstars(pattern: str) -> None:
    """Raises JobError for `**` inside a name, which fsspec and Python's glob read differently."""
    for part in pattern.split("/"):
        if "**" in part and part != "**":
            raise JobError(
                f"{pattern}: `**` stands for whole folders. Write **/{part.replace('**', '*')} "
                f"instead of {part}."
            )


def _hidden_by(pattern: str, rules: SourceRules) -> Callable[[str], bool]:
    """A function that says whether a URL below the base of the pattern is hidden.

    Names that begin with a dot or an underscore are metadata of other tools. The base is the
    pattern up to its first wild folder. Below it such names are hidden, with two exceptions:
    - the pattern asks for them: `_*.tar` shows underscores;
    - an underscore before the name of an image: cameras write _DSC0001.JPG.
    """
    wild = _wild(pattern)
    base = pattern[: pattern.rfind("/", 0, wild.start()) + 1] if wild else pattern
    first_characters = {part[:1] for part in pattern[len(base) :].split("/")}
    hiding = {".", "_"} - first_characters

    def is_hidden(url: str) -> bool:
        *folders, name = url.removeprefix(base).split("/")
        if rules >= SourceRules.V2:
            if any(folder in NAS_FOLDERS for folder in folders):
                return True
            folders = [part for part in folders if not (part.startswith("_") and "=" in part)]
        if any(folder[:1] in hiding for folder in folders):
            return True
        is_image = name.rpartition(".")[2].lower() in ALL_IMAGE_SUFFIXES
        return name[:1] in (hiding - {"_"} if is_image else hiding)

    return is_hidden


def _wild(pattern: str) -> re.Match[str] | None:
    """The first wildcard of a glob. None for a plain name, and for an existing local path."""
    wild = re.search(r"[*?\[]", pattern)
    return None if wild and is_local(pattern) and os.path.lexists(absolute(pattern)) else wild
