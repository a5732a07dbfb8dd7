"""Decoders in processes of their own: the worker's process spends microseconds on an image.

Each process reads a shard and decodes it (decoder_process.py), into pages of memory that this
process maps, too. A page is written again once nothing here refers to its pixels.

- Shards are given out one by one. A process alone decodes a shard, so a few shards would leave
  most processes idle: as long as fewer shards wait and are read than there are processes, threads
  of this process decode them, who share the fragments of one shard.
- `decode: gpu` and `decode: hybrid` leave JPEGs encoded, which this process needs as bytes.
  ThreadDecoders serve these modes.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitray.dataset import Dataset
from vitray.models.host_memory import process_memory
from vitray.pipeline.bounded_queue import BoundedQueue, QueueClosed
from vitray.pipeline.decoder_process import (
    END_S,
    Ask,
    DecodedPage,
    Failed,
    Finished,
    FromProcess,
    NoShard,
    Setup,
    ToProcess,
    page_bytes,
)
from vitray.pipeline.decoders import Outlets, ThreadDecoders
from vitray.pipeline.events import FragmentSkipped
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.stage_threads import StageThreads
from vitray.pipeline.stages import DecodedBlock, FragmentRows, ShardEnd
from vitray.schema import Shard
from vitray.totals import copied_bytes

# of each process: one is written while the other one waits or is predicted. See FRAGMENT_BYTES in
# dataset/resolve.py for the size of one.
PAGES = 2
UNBOUNDED = 1 << 30
NAMED_SHARDS = 3  # in the message about a process that died


class DecoderProcessDied(Exception):
    """A process ended without being asked to.

    shards: the ids of those that it had and did not decode completely.
    """

    def __init__(self, message: str, shards: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.shards = shards


class ProcessDecoders:
    """Reads and decodes with share.decoders processes."""

    def __init__(
        self, dataset: Dataset, shards: BoundedQueue[Shard], outlets: Outlets, share: WorkerShare
    ) -> None:
        shape = (dataset.fragment_rows, *dataset.spec.pixels.shape, 3)
        self._setup = Setup(dataset, shape, PAGES)
        self._shards = shards
        self._outlets = outlets
        self._registers = share.gpus > 0
        self._count = share.decoders
        self._processes: list[_DecoderProcess] = []
        self._asking: BoundedQueue[_DecoderProcess] = BoundedQueue(UNBOUNDED)
        self._thread_shards: BoundedQueue[Shard] = BoundedQueue(UNBOUNDED)
        self._threads = ThreadDecoders(dataset, self._thread_shards, outlets, share)
        self._giver = StageThreads(1, self._hand_out_shards, outlets.lost)
        self._receivers = StageThreads(self._count, self._receive_all, outlets.lost)
        self._stopping = threading.Event()
        self._closing = threading.Event()

    def start(self, finished: Callable[[], None]) -> None:
        first_to_end = threading.Semaphore(1)

        def one_ended() -> None:
            if not first_to_end.acquire(blocking=False):
                finished()

        def processes_ended() -> None:
            # After `stop` they may end without asking for another shard.
            self._asking.finish()
            self._thread_shards.finish()
            one_ended()

        self._receivers.start(processes_ended)
        self._threads.start(one_ended)
        self._giver.start(lambda: None)

    def stop(self) -> None:
        self._stopping.set()
        self._threads.stop()
        self._thread_shards.finish()
        for process in list(self._processes):
            process.stop()

    def describe(self) -> str:
        reading = sum(process.is_reading for process in list(self._processes))
        return f"{reading} of {self._count} decoder processes read, {self._threads.describe()}"

    def close(self) -> None:
        self._closing.set()
        self._stopping.set()
        for queue in (self._asking, self._thread_shards):
            queue.close()
        self._threads.close()
        for process in list(self._processes):
            process.hang_up()

    def join(self, deadline: float) -> None:
        for part in (self._giver, self._receivers, self._threads):
            part.join(deadline)

    def _hand_out_shards(self) -> None:
        """Answer the processes that ask, until all processes have ended."""
        # The first shards come together, before the first process asks.
        for process in self._asking:
            shard = self._next_process_shard()
            if shard is None:
                process.give_none(NoShard.NO_MORE)
                continue
            process.give(shard)
            if self._stopping.is_set():
                process.stop()

    def _next_process_shard(self) -> Shard | None:
        """The next shard for a process; those before it go to the threads. None: no more come."""
        while not self._stopping.is_set() and (shard := self._shards.get()) is not None:
            if not self._has_fewer_shards_than_processes():
                return shard
            with suppress(QueueClosed):  # `stop` came; nothing more is read
                self._thread_shards.put(shard)
        self._thread_shards.finish()
        return None

    def _has_fewer_shards_than_processes(self) -> bool:
        """Whether so few shards wait and are read. One shard was just taken."""
        reading = sum(process.is_reading for process in list(self._processes))
        return 1 + len(self._shards) + reading < self._count

    def _receive_all(self) -> None:
        """Start a process, and hand on what it sends until it has done everything."""
        with _DecoderProcess(self._setup) as process:
            self._processes.append(process)
            try:
                self._receive(process)
            finally:
                self._processes.remove(process)  # its memory goes with it

    def _receive(self, process: _DecoderProcess) -> None:
        if self._closing.is_set():
            return
        if self._registers:
            # Torch and its context take seconds. Blocks that come before are copied once more.
            threading.Thread(target=process.pages.register, daemon=True).start()
        for message in iter(process.receive, Finished.FINISHED):
            if message is Ask.NEXT:
                process.is_reading = False
                self._asking.put(process)
            elif message is Ask.NOW:
                shard = None if self._stopping.is_set() else self._shards.get_now()
                process.give(shard) if shard else process.give_none(NoShard.NONE_WAITS)
            else:
                self._hand_on(process, message)

    def _hand_on(self, process: _DecoderProcess, message: FromProcess) -> None:
        if isinstance(message, Failed):
            raise message.error
        if isinstance(message, DecodedPage):
            self._outlets.decoded(process.block(message))
        elif not isinstance(message, (Ask, Finished)):
            self._outlets.hand_on(process.restored(message))


class _DecoderProcess:
    """A running process, and the shards that it was given and has not read to the end."""

    def __init__(self, setup: Setup) -> None:
        self.is_reading = False
        self.pages = _PixelPages(setup.pages, setup.page_shape)
        self._shards: dict[str, Shard] = {}
        self._sending = threading.Lock()
        self._is_closing = False
        with ExitStack() as theirs:
            own_end, their_end = socket.socketpair()
            theirs.enter_context(their_end)
            theirs.callback(self.pages.close_descriptors)
            descriptors = [their_end.fileno(), self.pages.descriptor, self.pages.free]
            self._process = _start(descriptors)
        self._socket = own_end  # for hang_up
        self._connection: Connection[ToProcess, FromProcess] = Connection(os.dup(own_end.fileno()))
        with suppress(OSError):  # `receive` says how it ended
            self._connection.send(setup)

    def __enter__(self) -> _DecoderProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process if it runs still, and reap it."""
        self.hang_up()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._sending:
            self._connection.close()
            self._socket.close()

    def give(self, shard: Shard) -> None:
        self.is_reading = True
        self._shards[shard.id] = shard
        self._send(shard)

    def give_none(self, why: NoShard) -> None:
        self._send(why)

    def stop(self) -> None:
        """Let it read nothing more."""
        if self.is_reading:
            self._send(NoShard.STOP)

    def hang_up(self) -> None:
        """Let the process end, and `receive` with it."""
        self._is_closing = True
        with suppress(OSError):  # it is closed, or the process is gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> FromProcess:
        """The next message. Raises DecoderProcessDied."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            if self._is_closing:
                return Finished.FINISHED
            raise DecoderProcessDied(self._how_it_ended(), tuple(self._shards)) from None

    def block(self, message: DecodedPage) -> DecodedBlock:
        """The block, with pixels where the process wrote them."""
        if message.copied_bytes:
            copied_bytes.add(message.copied_bytes)
        pixels = self.pages.array(message.page, message.images)
        return DecodedBlock([self._with_shard(fragment) for fragment in message.fragments], pixels)

    def restored(self, item: Any) -> Any:
        """An item that is handed on, with the shard that the process was given."""
        if isinstance(item, ShardEnd):
            return replace(item, shard=self._shards.pop(item.shard.id))
        if not isinstance(item, FragmentSkipped):
            self._shards.pop(item.shard, None)
        return item

    def _with_shard(self, fragment: FragmentRows) -> FragmentRows:
        info = fragment.info
        shard = self._shards[info.shard.id]
        if info.end is not None:
            del self._shards[shard.id]
        return replace(fragment, info=replace(info, shard=shard))

    def _send(self, message: ToProcess) -> None:
        with self._sending, suppress(OSError):  # `receive` says how it ended
            if not self._is_closing:
                self._connection.send(message)

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        names = list(self._shards)
        which = ", ".join(names[:NAMED_SHARDS]) or "no shard"
        if len(names) > NAMED_SHARDS:
            which += f" and {len(names) - NAMED_SHARDS} more"
        hint = " Is memory short?" if status == -signal.SIGKILL else ""
        return f"decoder process {self._process.pid} {how} while it read {which}.{hint}"


def _start(descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """A fresh interpreter: a fork of a process with a CUDA context could not even end cleanly."""
    code = f"from vitray.pipeline.decoder_process import main; main{tuple(descriptors)}"
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        # `decode: fast` imports torch, which must not take memory of the GPU
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        process_group=0,  # Ctrl-C is for the parent
    )


class _PixelPages:
    """Pages that a decoder process writes and this process reads, in one file without a name.

    A pipe has the numbers of the free pages; reading one takes the page. The memory is freed with
    this object and the last array.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._page_bytes = page_bytes(shape)
        self.descriptor = os.memfd_create("vitray-pixels")
        os.truncate(self.descriptor, count * self._page_bytes)
        self._memory = mmap.mmap(self.descriptor, count * self._page_bytes)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self.free, self._give_back = os.pipe()
        weakref.finalize(self, os.close, self._give_back)
        os.write(self._give_back, bytes(range(count)))

    def close_descriptors(self) -> None:
        """Close those that are the other process's."""
        os.close(self.descriptor)
        os.close(self.free)

    def register(self) -> None:
        """Let the device read the pages by itself, if it can."""
        memory = np.frombuffer(self._memory, np.uint8)
        if process_memory.register(memory):
            address = memory.__array_interface__["data"][0]
            weakref.finalize(self, process_memory.unregister, address).atexit = False

    def array(self, number: int, images: int) -> NDArray[np.uint8]:
        """The first images of a page, which is free once nothing refers to the array."""
        # A view on it refers to it, and not to the mapping: numpy skips only bases of its own type.
        array = np.ndarray(
            (images, *self._shape[1:]), np.uint8, self._memory, number * self._page_bytes
        )
        weakref.finalize(array, self._free, number).atexit = False
        return array

    def _free(self, number: int) -> None:
        # May run in any thread and within any other code, so it takes no lock.
        with suppress(OSError):  # the process is gone
            os.write(self._give_back, bytes([number]))
