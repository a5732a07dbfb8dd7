"""A new local folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from vitray.errors import JobError, StorageError, one_line
from vitray.storage.local import fsync
from vitray.storage.objects import absolute, is_local

# bytes: a disk with less free space counts as full, since libraries report it by various errors
FULL = 1 << 20


@contextlib.contextmanager
def new_folder(into: str, option: str) -> Iterator[Path]:
    """A temporary folder beside `into`, which is renamed to `into` when the block ends.

    An exception leaves nothing. What a killed process leaves is deleted by the next call for the
    same name.

    option: the command-line option of `into`, for messages. Raises JobError when `into` is not a
    local path or exists already, StorageError when the disk is full or fails.
    """
    if not is_local(into):
        raise JobError(
            f"{option} {into}: an export is a local folder. Write it there, then copy it."
        )
    target = Path(absolute(into))
    if os.path.lexists(target):
        raise JobError(f"{option} {target} exists already: choose a new folder.")
    prefix = f".tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    folder = target.with_name(f"{prefix}{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        with _locked(folder):
            _delete_abandoned(target.parent, prefix)
            yield folder
            for path in [*folder.rglob("*"), folder]:  # everything is on the disk before the rename
                fsync(str(path))
            folder.rename(target)
    except Exception as error:
        if not isinstance(error, OSError) and shutil.disk_usage(folder).free >= FULL:
            raise
        reason = one_line(error).rstrip(".")
        raise StorageError(
            f"{target}: {reason}. Check the path, and that the disk has room."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_abandoned(parent: Path, prefix: str) -> None:
    """Delete temporary folders whose process was killed: nobody has a lock on them."""
    for folder in parent.glob(f"{prefix}*"):
        with _locked(folder) as is_free:
            if is_free:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the only lock on the folder during the block.

    A killed process loses its lock. False, too, on a disk without locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
