"""The keys whose rows were removed for good, and rows without them.

Each removal stores one list of keys, created once, before it changes anything. Lists are numbered,
so the number of lists says which ones a file was checked against. A list holds SHA-256 hashes: a
request to be forgotten should not leave the name behind in plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pyarrow as pa

from vitray.dataset.layout import removed_url
from vitray.errors import ObjectMissing, StorageError
from vitray.left_out import LeftOut
from vitray.storage import ObjectInfo, read, store_for

RECENT_S = 5.0
_LIST = re.compile(r"/(\d{6,})\.json$")
ATTEMPTS = 20  # at the next number, where others store lists, too


class Fragment(NamedTuple):
    """The good rows and error rows of a fixed range.

    left_out: how many further images its rows had, by left_out.LEFT_OUT.
    """

    rows: pa.Table
    errors: pa.Table
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class RemovedKeys:
    """Blocked keys, as hashes. lists: how many lists of them were ever stored."""

    lists: int = 0
    hashes: frozenset[bytes] = frozenset()

    def blocked(self, keys: pa.ChunkedArray) -> list[int]:
        """The positions of blocked keys."""
        if not self.hashes:
            return []
        return [n for n, key in enumerate(keys.to_pylist()) if hash_of(key) in self.hashes]

    def filter(self, fragment: Fragment) -> Fragment:
        """The fragment without rows and errors of blocked keys, which are counted."""
        rows = _without(fragment.rows, self.blocked(fragment.rows["key"]))
        errors = _without(fragment.errors, self.blocked(fragment.errors["key"]))
        removed = len(fragment.rows) - len(rows) + len(fragment.errors) - len(errors)
        if not removed:
            return fragment
        left_out = dict(fragment.left_out)
        left_out[LeftOut.REMOVED] = left_out.get(LeftOut.REMOVED, 0) + removed
        return Fragment(rows, errors, left_out)


def hash_of(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _without(table: pa.Table, positions: list[int]) -> pa.Table:
    """The table without these rows. Slices fit every type; take() lacks some of them."""
    edges = [-1, *positions, len(table)]
    parts = [table.slice(before + 1, after - before - 1) for before, after in pairwise(edges)]
    return pa.concat_tables(parts) if positions else table


class _Views(threading.local):
    """What this thread last read.

    recent: by directory, the keys and the time of time.monotonic(). contents: of stored lists, by
    URL and version; a list never changes.
    """

    def __init__(self) -> None:
        self.recent: dict[str, tuple[float, RemovedKeys]] = {}
        self.contents: dict[tuple[str, str], frozenset[bytes]] = {}


_views = _Views()


def removed_keys(out: str) -> RemovedKeys:
    """The keys that must have no row in this directory, as of now.

    Raises StorageError for a list that is not readable.
    """
    infos = [info for info in _lists(out) if _LIST.search(info.url)]
    hashes = frozenset[bytes]()
    for info in infos:
        name = (info.url, info.version)
        if name not in _views.contents:
            _views.contents[name] = _read_hashes(info.url)
        hashes |= _views.contents[name]
    numbers = [int(match[1]) for info in infos if (match := _LIST.search(info.url))]
    keys = RemovedKeys(max(numbers, default=-1) + 1, hashes)
    _views.recent[out] = (time.monotonic(), keys)
    return keys


def _lists(out: str) -> list[ObjectInfo]:
    try:
        return store_for(out).find_few(removed_url(out))
    except ObjectMissing:
        return []


def recent_removed_keys(out: str) -> RemovedKeys:
    """Like removed_keys(), at most RECENT_S old."""
    moment, keys = _views.recent.get(out, (float("-inf"), RemovedKeys()))
    return keys if time.monotonic() - moment < RECENT_S else removed_keys(out)


def _read_hashes(url: str) -> frozenset[bytes]:
    try:
        return frozenset(bytes.fromhex(text) for text in json.loads(read(url))["keys_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{url} is damaged ({error}). It holds which rows must never come back: restore a copy."
        ) from error


def block_keys(out: str, keys: Iterable[str], record: dict[str, object]) -> RemovedKeys:
    """Block keys for good, and return all that are blocked now. Writes nothing if all are already.

    record: what the list says besides: who asked, when and why.
    """
    return _block_hashes(out, {hash_of(key) for key in keys}, record)


def _block_hashes(out: str, hashes: Set[bytes], record: Mapping[str, object]) -> RemovedKeys:
    for _ in range(ATTEMPTS):
        existing = removed_keys(out)
        new = hashes - existing.hashes
        if not new:
            return existing
        document = {**record, "keys_sha256": sorted(digest.hex() for digest in new)}
        url = removed_url(out, f"{existing.lists:06d}.json")
        store_for(out).create(url, json.dumps(document, indent=1).encode())
    raise StorageError(f"{out}: other commands keep removing rows. Run the same command again.")


def copy_removed_keys(old: str, new: str) -> None:
    """Block in `new` what is blocked in `old`, for another dataset of the same images."""
    _block_hashes(new, removed_keys(old).hashes, {"copied_from": old})
