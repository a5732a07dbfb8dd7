"""Persistent cache for torch.compile artifacts.

Cached code is run when it is read, so no other user may be able to write there. What a killed
process left unfinished is compiled again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vitray.storage import cache_directory

CACHE = "TORCHINDUCTOR_CACHE_DIR"
_UNFINISHED, _LOCK = "unfinished-", "lock"
_set_here: set[str] = set()  # by an earlier block of this process, not by the user
log = logging.getLogger(__name__)


@contextmanager
def graph_directory() -> Iterator[str]:
    """The directory of what torch compiles within the block, and of what it compiled there earlier.

    A directory that the user chose is used unchanged. Without a private place it is a temporary
    one. After a block that raised or was killed, the next block starts with an empty cache.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    configured = os.environ.get(CACHE)
    if configured is not None and configured not in (default_cache_dir(), *_set_here):
        yield configured
        return
    with ExitStack() as stack:
        try:
            path = _private_directory()
            stack.enter_context(_marked(path))
        except OSError as error:
            log.warning(
                "compiled code is not kept for the next start: %s. Set XDG_CACHE_HOME to another "
                "directory.",
                error,
            )
            path = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="vitray-compiled-", ignore_cleanup_errors=True)
            )
        _set_here.add(path)
        os.environ[CACHE] = path  # for good: torch's default is in /tmp, where others may write
        yield path


def _private_directory() -> str:
    """A directory that nobody else can write to. Raises OSError where there can be none."""
    path = os.path.realpath(cache_directory("compiled"))
    status = os.stat(path)
    user = os.getuid()
    for parent in map(os.stat, Path(path).parents):
        is_shared = parent.st_mode & 0o022 and not parent.st_mode & stat.S_ISVTX
        if status.st_uid != user or parent.st_uid not in (0, user) or is_shared:
            raise PermissionError(
                f"others could put code into {path}, by its owner or by a directory above it"
            )
    if status.st_mode & 0o077:  # others may have written to it
        _empty(path)
        os.chmod(path, 0o700)
    return path


@contextmanager
def _marked(path: str) -> Iterator[None]:
    """A block in which a mark file shows that compilation is unfinished."""
    with open(os.path.join(path, _LOCK), "a") as lock:
        with suppress(BlockingIOError):  # another process compiles there at this moment
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(name.startswith(_UNFINISHED) for name in os.listdir(path)):
                _empty(path)
        fcntl.flock(lock, fcntl.LOCK_SH)
        number, mark = tempfile.mkstemp(prefix=_UNFINISHED, dir=path)
        os.close(number)
        yield
        os.remove(mark)


def _empty(path: str) -> None:
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _LOCK:
            os.remove(entry.path)
