"""Where what torch compiles waits for the next start. It is run when it is read, so nobody else may
be able to put anything there; and what a killed process left unfinished is compiled anew.
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

from vitray.models.checkpoint import cache_directory

CACHE = "TORCHINDUCTOR_CACHE_DIR"
_UNFINISHED, _LOCK = "unfinished-", "lock"
_ours: set[str] = set()  # set by an earlier block of this process, not by the user
log = logging.getLogger(__name__)


@contextmanager
def graphs_kept() -> Iterator[str]:
    """The directory of what torch compiles within the block, and of what it compiled there before;
    one that the user chose is left alone.

    Where none can be kept it is a temporary one. A block that raises, or is killed, leaves a mark:
    the next one begins with nothing.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get(CACHE)
    if given is not None and given not in (default_cache_dir(), *_ours):
        yield given
        return
    with ExitStack() as stack:
        try:
            path = _private()
            stack.enter_context(_marked(path))
        except OSError as error:
            log.warning(
                "what torch compiles is not kept for the next start: %s. Set XDG_CACHE_HOME to "
                "another place.",
                error,
            )
            path = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="vitray-compiled-", ignore_cleanup_errors=True)
            )
        _ours.add(path)
        os.environ[CACHE] = path  # for good: torch's default is in /tmp, where others may write
        yield path


def _private() -> str:
    """Raises OSError where there can be none that nobody else reaches."""
    path = os.path.realpath(cache_directory("compiled"))
    there, user = os.stat(path), os.getuid()
    for above in map(os.stat, Path(path).parents):
        is_shared = above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX
        if there.st_uid != user or above.st_uid not in (0, user) or is_shared:
            raise PermissionError(
                f"others could put code into {path}, by its owner or by what it lies in"
            )
    if there.st_mode & 0o077:  # others may have put something there
        _empty(path)
        os.chmod(path, 0o700)
    return path


@contextmanager
def _marked(path: str) -> Iterator[None]:
    with open(os.path.join(path, _LOCK), "a") as lock:
        with suppress(BlockingIOError):  # another process compiles there now
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
