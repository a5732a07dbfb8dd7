"""A new local folder, which appears whole or not at all: what exports write. Private to this
package.
"""

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

FULL = (
    1 << 20
    # bytes left: libraries that write files, or read what they wrote, tell of a full disk by errors
    # of their own
)


@contextlib.contextmanager
def new_folder(into: str, option: str) -> Iterator[Path]:
    """A folder beside `into`, which gets that name, by a rename, when the block ends; an exception
    leaves nothing, and what a kill leaves is deleted by the next one of that name.

    option: what a person wrote to name it, for messages. Raises JobError when `into` is no local
    path or is there already, StorageError when the disk is full or fails.
    """
    if not is_local(into):
        raise JobError(
            f"{option} {into}: an export is a local folder. Write it there, then copy it."
        )
    target = Path(absolute(into))
    if os.path.lexists(target):
        raise JobError(f"{option} {target} is there already: choose a new folder.")
    ours = f".tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    folder = target.with_name(f"{ours}{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        with _locked(folder):
            for left in target.parent.glob(f"{ours}*"):
                with _locked(left) as is_free:
                    if is_free:  # whoever wrote it was killed
                        shutil.rmtree(left, ignore_errors=True)
            yield folder
            for path in [*folder.rglob("*"), folder]:  # on the disk, before it gets its name
                fsync(str(path))
            folder.rename(target)
    except Exception as error:
        if not isinstance(error, OSError) and shutil.disk_usage(folder).free >= FULL:
            raise
        said = one_line(error).rstrip(".")
        raise StorageError(
            f"{target}: {said}. Check the path, and that the disk has room."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder is ours alone in the block, which ends with the process at the latest;
    False where the disk has no locks.
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
