"""Take rows out of a dataset for good, by their keys, as takedown requests ask for.

The keys are blocked first. Then data files are rewritten without them, one after another. A killed
call leaves a dataset in which some rows are gone; the same call does the rest.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from vitray.clock import utc_now
from vitray.crash import crash_point
from vitray.dataset import (
    Dataset,
    Drop,
    Leases,
    RecordKind,
    RemovedKeys,
    block_keys,
    check_replace,
    committed_files,
    drop_removed_fragments,
    drop_rows,
    find_rows,
    hash_of,
    new_run_id,
    refresh_manifest,
    removed_keys,
    require_dataset,
    require_own_data_files,
    write_run_record,
)
from vitray.errors import JobError, count, one_line
from vitray.exit_codes import ExitCode
from vitray.operations.requester import default_requester

log = logging.getLogger(__name__)

MISSING_SHOWN = 3  # keys without a row
QUOTE = '"'  # begins a JSON string
THREADS = 4  # each may hold a whole data file
COPIES = (
    "Copies are not changed: delete or make again what compact, export, relabel, report and "
    "search --index made of this dataset, other datasets of these images, and old versions of "
    "objects in a bucket that keeps them."
)


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal took out, or would take out.

    run: the name of its run record; "" for a preview. by: who asked. keys: how many were given.
    blocked_before: those of them that an earlier call has blocked. keys_without_row: the others
    without a row or an error row; missing: the first of these. rows, errors: taken out now.
    shards: {shard: rows and errors taken out}. staged: fragments of incomplete shards that held a
    key. blocked_keys: of the dataset, with those of earlier removals. is_beside_run: whether a run
    or another removal worked on the dataset meanwhile.
    """

    out: str
    run: str
    by: str
    keys: int
    blocked_before: int
    keys_without_row: int
    missing: tuple[str, ...]
    rows: int
    errors: int
    shards: dict[str, int]
    staged: int
    blocked_keys: int
    is_beside_run: bool = False
    copies: str = field(default=COPIES)

    @property
    def what(self) -> str:
        """The rows, as text."""
        errors = f" and {count(self.errors, 'error row')}" if self.errors else ""
        return f"{count(self.rows, 'row')}{errors} of {count(len(self.shards), 'shard')}"

    @property
    def would_delete(self) -> str:
        """What a preview says of rows and staging, as text; "" where no key has any."""
        if self.shards:
            return self.what
        return count(self.staged, "staged fragment") if self.staged else ""

    @property
    def new_keys(self) -> int:
        """The keys that no earlier call has blocked."""
        return self.keys - self.blocked_before

    def describe_preview(self) -> str:
        """Like describe_shards, with keys without a row, and the keys that would be blocked."""
        lines = [self.describe_shards()]
        if self.keys_without_row:
            lines.append(
                f"without a row: {self._missing_text}. Keys are those of the column `key`."
            )
        if self.new_keys:
            keys = count(self.new_keys, "key")
            lines.append(f"to block: {keys}. Later runs will write no row for them.")
        return "\n".join(filter(None, lines))

    def describe_shards(self) -> str:
        """A line for each shard, and one for keys that were blocked before."""
        lines = [f"{shard}: {count(rows, 'row')}" for shard, rows in sorted(self.shards.items())]
        keys = count(self.keys, "key")
        if self.blocked_before:
            lines.append(f"removed before: {self.blocked_before:,} of {keys}")
        if self.staged:
            lines.append(f"{count(self.staged, 'staged fragment')}: computed again by the next run")
        return "\n".join(lines)

    @property
    def _missing_text(self) -> str:
        shown = ", ".join(map(as_line, self.missing))
        return f"{self.keys_without_row:,} of {count(self.keys, 'key')}, such as {shown}"

    @property
    def missing_warning(self) -> str:
        """What to tell a person about keys that no row had; "" where there are none."""
        if not self.keys_without_row:
            return ""
        return (
            f"keys without a row in {self.out}, and not blocked before: {self._missing_text}. "
            "They are blocked now. Compare them with the column `key`."
        )

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.what} removed; requested by {self.by}",
            self.describe_shards(),
            f"blocked    {count(self.blocked_keys, 'key')}: later runs write no row for them",
        ]
        if self.is_beside_run:
            lines.append(
                "A run or another removal works on this dataset now. A run leaves these keys out "
                "of what it commits. When it has ended, vitray validate proves it."
            )
        return "\n".join([*filter(None, lines), self.copies])


def parse_keys(data: bytes, name: str) -> list[str]:
    """The keys of a file with one key on each line, without duplicates, in order.

    A line that begins with a double quote is a JSON string. Any other line is a key as it is, with
    its spaces. Raises JobError for a file that is not UTF-8 or has no key, and for such a line that
    is no JSON string.
    """
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise JobError(
            f"--keys {name} is not UTF-8 ({error}): write one key on each line."
        ) from error
    keys = [
        _key_of(line.removesuffix("\r"), f"--keys {name}, line {number}")
        for number, line in enumerate(lines, 1)
    ]
    if not any(keys):
        raise JobError(
            f"--keys {name} has no key: write one on each line, as the column `key` has it."
        )
    return list(dict.fromkeys(key for key in keys if key))


def _key_of(line: str, where: str) -> str:
    """The key in a line; "" in an empty one. where: names the line in a message."""
    if not line.startswith(QUOTE):
        return line
    try:
        return str(json.loads(line))
    except ValueError as error:
        raise JobError(
            f"{where} begins with a double quote and is no JSON string: "
            r'write the key as JSON, such as "new\nline.jpg" or "\"quoted\".jpg".'
        ) from error


def as_line(key: str) -> str:
    """A key as a line of a file of keys: as it is if that is one printable line, else as JSON."""
    is_plain = key.isprintable() and key == key.strip() and not key.startswith(QUOTE)
    return key if is_plain else json.dumps(key)


def preview_removal(out: str, keys: Collection[str], by: str | None = None) -> Removal:
    """What `remove` would take out. Reads only."""
    dataset = require_dataset(out, follow=False)
    wanted = RemovedKeys(1, frozenset(map(hash_of, keys)))
    before = removed_keys(dataset.out)
    drops = _each_data_file(dataset, lambda shard: find_rows(dataset, shard, wanted))
    staged = drop_removed_fragments(dataset, wanted, only_look=True)
    return _removal(dataset, "", by, keys, drops, staged, before, wanted)


def remove(out: str, keys: Collection[str], *, by: str | None = None, note: str = "") -> Removal:
    """Take the rows and error rows with these keys out of a dataset, and block the keys for good.

    keys: exactly as in the column `key`. by: who asks; user@host by default. Raises JobError if
    there is no dataset, FingerprintError for data files of another job, UnsafeStore where the store
    ignores conditions. After any other error, or a kill, the same call continues.
    """
    started = time.monotonic()
    started_at = utc_now()
    dataset = require_dataset(out, follow=False)
    require_own_data_files(dataset)
    check_replace(dataset.out)
    run = new_run_id()
    requester = by or default_requester()
    request: dict[str, object] = {
        "by": requester,
        "started": started_at,
        "reason": one_line(note),
        "run": run,
    }
    with Leases(dataset.out, run) as leases:
        before = removed_keys(dataset.out)
        blocked = block_keys(dataset.out, keys, request)
        crash_point("removal-blocked")
        drops = _each_data_file(dataset, lambda shard: drop_rows(dataset, shard, blocked))
        staged = drop_removed_fragments(dataset, blocked)
        refresh_manifest(dataset)
        crash_point("removal-finished")
        beside = leases.has_others
    removal = _removal(dataset, run, requester, keys, drops, staged, before, blocked)
    removal = replace(removal, is_beside_run=beside)
    if removal.missing_warning:
        log.warning("%s", removal.missing_warning)
    record = {
        **request,
        "kind": RecordKind.REMOVE,
        "finished": utc_now(),
        "seconds": time.monotonic() - started,
        "fingerprint": dataset.fingerprint,
        "exit_code": int(ExitCode.DONE),
        "keys": removal.keys,
        "keys_without_row": removal.keys_without_row,
        "removed_rows": removal.rows,
        "removed_errors": removal.errors,
        "removed_from": removal.shards,
    }
    write_run_record(dataset, run, record)
    return removal


def _each_data_file(dataset: Dataset, work: Callable[[str], Drop]) -> dict[str, Drop]:
    """The result of `work` for each data file that exists now."""
    shards = sorted(committed_files(dataset.out))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(shards, pool.map(work, shards)))


def _removal(
    dataset: Dataset,
    run: str,
    by: str | None,
    keys: Collection[str],
    drops: dict[str, Drop],
    staged: int,
    before: RemovedKeys,
    blocked: RemovedKeys,
) -> Removal:
    found = frozenset[bytes]().union(*(drop.hashes for drop in drops.values()))
    missing = [key for key in keys if hash_of(key) not in found | before.hashes]
    return Removal(
        out=dataset.out,
        run=run,
        by=by or default_requester(),
        keys=len(keys),
        blocked_before=sum(hash_of(key) in before.hashes for key in keys),
        keys_without_row=len(missing),
        missing=tuple(missing[:MISSING_SHOWN]),
        rows=sum(drop.rows for drop in drops.values()),
        errors=sum(drop.errors for drop in drops.values()),
        shards={shard: drop.rows + drop.errors for shard, drop in drops.items() if drop.hashes},
        staged=staged,
        blocked_keys=len(blocked.hashes),
    )
