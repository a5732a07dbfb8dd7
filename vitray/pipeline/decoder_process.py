"""One of the processes of ProcessDecoders: reads and decodes the shards that its parent gives it.

Pixels are written to pages that the parent maps, too; all else travels over a socket. Torch is not
imported here for `decode: exact`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np

from vitray.dataset import Dataset
from vitray.decoding.decode import load_decoders, use_pages
from vitray.decoding.isolation import Pages
from vitray.errors import VitrayError, one_line
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.cluster import root_error
from vitray.pipeline.decoders import Unread, read_blocks
from vitray.pipeline.events import ShardOutcome
from vitray.pipeline.stages import EncodedFragment, FragmentRows, decode_stage
from vitray.schema import Shard
from vitray.totals import copied_bytes

END_S = 2.0  # for the end of a process, before it is forced
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a process. page_shape: of each page, [N, H, W, 3]."""

    dataset: Dataset
    page_shape: tuple[int, ...]
    pages: int


class NoShard(Enum):
    """What a process gets instead of a shard."""

    NONE_WAITS = "no shard waits"
    NO_MORE = "no more shards come"
    STOP = "read nothing more"  # comes without a request


ToProcess = Setup | Shard | NoShard


class Ask(Enum):
    """What a process that can read another shard sends.

    NOW: it holds images that are not decoded yet, and goes on with those if no shard waits.
    """

    NOW = "a shard that waits"
    NEXT = "the next shard, whenever it comes"


@dataclass(frozen=True, slots=True)
class DecodedPage:
    """A block whose pixels are the first `images` of a page.

    copied_bytes: of pixels, since the block before.
    """

    page: int
    images: int
    fragments: list[FragmentRows]
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a process that an exception ended."""

    error: Exception


class Finished(Enum):
    """The last message of a process that has done everything."""

    FINISHED = "finished"


FromProcess = Ask | DecodedPage | Unread | ShardOutcome | Failed | Finished


def page_bytes(shape: tuple[int, ...]) -> int:
    """The size of one page in the file of pages: a multiple of what can be mapped by itself."""
    size_bytes = int(np.prod(shape))
    return -(-size_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def main(connection: int, pages: int, free: int) -> None:
    """The process. All three are file descriptors.

    pages: the file of pages. free: a pipe with the number of each page that may be written.
    """
    _end_with_parent()
    parent = _Parent(Connection(connection))
    try:
        setup = parent.setup()
        load_decoders(setup.dataset.job.decode)
        written = Pages(_map(pages, setup), lambda: _next_free(free))
        use_pages(written)
        _work(setup.dataset, parent, written)
        parent.send(Finished.FINISHED)
    except Exception as error:
        parent.send(Failed(portable_error(error)))
    _keep_ending()


def _end_with_parent() -> None:
    """Signals for the process group are the parent's business: this process ends when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The end of the socket would do, but for code that holds Python's lock.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGUSR1, _end_main_thread)


def _end_main_thread(*_: object) -> None:
    _keep_ending()
    sys.exit(1)


def _keep_ending() -> None:
    """Let nothing interrupt the end of this process from now on."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _map(descriptor: int, setup: Setup) -> list[np.ndarray[Any, Any]]:
    size = page_bytes(setup.page_shape)
    maps = [mmap.mmap(descriptor, size, offset=n * size) for n in range(setup.pages)]
    return [np.ndarray(setup.page_shape, np.uint8, memory) for memory in maps]


def _next_free(free: int) -> int:
    number = os.read(free, 1)
    if not number:
        _end()
    return number[0]


def _work(dataset: Dataset, parent: _Parent, pages: Pages) -> None:
    """Decode each block while the next one is read: two are in memory, however large they are."""
    encoded: BoundedQueue[list[EncodedFragment]] = BoundedQueue(1)
    taken = threading.Semaphore(0)  # released for each block that is taken to be decoded
    failures = list[Exception]()

    def read_all() -> None:
        try:
            for item in read_blocks(dataset, parent, parent.stopping):
                if isinstance(item, list):
                    encoded.put(item)
                    taken.acquire()
                else:
                    parent.send(item)
        except Exception as error:
            failures.append(error)
        encoded.finish()

    threading.Thread(target=read_all, name="vitray-read", daemon=True).start()
    copied = copied_bytes.value
    for block in encoded:
        taken.release()
        decoded = decode_stage(dataset, block)
        fragments = [_without_members(fragment) for fragment in decoded.fragments]
        newly_copied = copied_bytes.value - copied
        copied += newly_copied
        parent.send(DecodedPage(pages.number, len(decoded.pixels), fragments, newly_copied))
    if failures:
        raise failures[0]


def _without_members(fragment: FragmentRows) -> FragmentRows:
    """The fragment without the list of the shard's files, which the parent has."""
    info = fragment.info
    return replace(fragment, info=replace(info, shard=replace(info.shard, members=())))


class _Parent:
    """The parent as this process sees it: where shards come from, and where results go."""

    def __init__(self, connection: Connection[FromProcess, ToProcess]) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[Shard | NoShard] = queue.SimpleQueue()
        self.stopping = threading.Event()

    def setup(self) -> Setup:
        """The first message; later ones are taken by a thread from now on."""
        setup = self._connection.recv()
        assert isinstance(setup, Setup)
        threading.Thread(target=self._receive, name="vitray-parent", daemon=True).start()
        return setup

    def get_now(self) -> Shard | None:
        """The next shard if one waits, else None."""
        return self._request(Ask.NOW)

    def get(self) -> Shard | None:
        """The next shard; None once no more come."""
        return self._request(Ask.NEXT)

    def send(self, message: FromProcess) -> None:
        """Wait until the parent takes it; ends this process if there is none."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            _end()

    def _request(self, ask: Ask) -> Shard | None:
        self.send(ask)
        answer = self._answers.get()
        return None if isinstance(answer, NoShard) else answer

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if message is NoShard.STOP:
                    self.stopping.set()
                elif not isinstance(message, Setup):
                    self._answers.put(message)
        except (EOFError, OSError):
            _end()


def _end() -> NoReturn:
    """End this process. The main thread does it, and so reaps the child that decodes."""
    if threading.current_thread() is threading.main_thread():
        sys.exit(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    threading.Event().wait(END_S)
    os._exit(1)


def portable_error(error: Exception) -> Exception:
    """An exception with the same text that every process can read. VitrayErrors keep their type."""
    root = root_error(error)
    if root is None:
        return RuntimeError(f"a decoder process: {type(error).__name__}: {one_line(error)}")
    try:
        return type(root)(str(root))
    except TypeError:
        return VitrayError(str(root))
