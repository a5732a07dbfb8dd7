"""Known-bad inputs that a person accepted: one small file for each shard, created once.

A shard id names one version of an input, so a new version of it is not accepted.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache

from vitray.dataset.files import under
from vitray.dataset.layout import accepted_url
from vitray.errors import ObjectChanged, ObjectMissing, StorageError
from vitray.storage import read, store_for

log = logging.getLogger(__name__)

_SUFFIX = ".json"


class Problem(StrEnum):
    """What is wrong with a shard, as it is stored and as `--reason` spells it."""

    TRUNCATED = "truncated"
    SET_ASIDE = "set-aside"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Who accepted a shard, why and when.

    detail: the problem as the run reported it. at: in ISO format. note: free text, or "".
    """

    shard: str
    problem: Problem
    detail: str
    by: str
    at: str
    note: str = ""

    def __str__(self) -> str:
        note = f": {self.note}" if self.note else ""
        return f"{self.detail.rstrip('.')}, by {self.by} on {self.at[:10]}{note}"


def cut_text(byte: int) -> str:
    """The problem of a shard that is cut short, as text."""
    return f"truncated at byte {byte:,}"


def accept_shard(out: str, acceptance: Acceptance) -> bool:
    """Store the acceptance of a shard. False: it was accepted before, and that stays.

    Raises StorageError where a damaged file stands in its place.
    """
    body = json.dumps(asdict(acceptance), indent=1).encode()
    url = accepted_url(out, acceptance.shard + _SUFFIX)
    if store_for(out).create(url, body):
        return True
    if acceptance.shard not in read_acceptances(out, {acceptance.shard}):
        raise StorageError(f"{url} is damaged: delete it, then run the same command again.")
    return False


def withdraw_acceptance(out: str, shards: Iterable[str]) -> None:
    """Delete the acceptance of these shards, where there is one."""
    store_for(out).delete(accepted_url(out, shard + _SUFFIX) for shard in shards)


def accepted_ids(out: str) -> set[str]:
    """The ids of all accepted shards. A damaged file accepts none."""
    return set(read_acceptances(out))


def read_acceptances(out: str, shards: Collection[str] | None = None) -> dict[str, Acceptance]:
    """Acceptances by shard id, of these shards or of all. A damaged file is left out."""
    acceptances = {}
    for info in under(accepted_url(out)):
        name = info.url.rsplit("/", 1)[-1]
        shard = name.removesuffix(_SUFFIX)
        if not name.endswith(_SUFFIX) or (shards is not None and shard not in shards):
            continue
        with contextlib.suppress(ObjectMissing, ObjectChanged):  # withdrawn meanwhile
            acceptance = _read(info.url, info.version)
            if acceptance is not None and acceptance.shard == shard:
                acceptances[shard] = acceptance
    return acceptances


@lru_cache(maxsize=1024)  # a run reads them at each step, and a version of one never changes
def _read(url: str, version: str) -> Acceptance | None:
    """The acceptance in a file; None for a damaged one."""
    try:
        return _parse(json.loads(read(url, version)))
    except (ValueError, KeyError, TypeError):
        log.warning(
            "%s is damaged, so its shard is not accepted: delete it, and accept the shard again",
            url,
        )
        return None


def _parse(fields: Mapping[str, object]) -> Acceptance:
    return Acceptance(
        shard=str(fields["shard"]),
        problem=Problem(str(fields["problem"])),
        detail=str(fields["detail"]),
        by=str(fields["by"]),
        at=str(fields["at"]),
        note=str(fields.get("note", "")),
    )
