"""A crash, hang or memory hog in the decoder costs one image."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.encoded_images import items, poison, spec
from vitray.decoding.decode import decode
from vitray.decoding.isolation import Limits


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"exit", "decoder_died", "the decoder ended with exit status 3"),
        (b"raise", "decoder_died", "the decoder ended with exit status 70"),
        (b"SIGSEGV", "decoder_died", "the decoder was killed by SIGSEGV"),
        (b"SIGKILL", "decoder_died", "the decoder was killed by SIGKILL"),
        (b"SIGTERM", "decoder_died", "the decoder was killed by SIGTERM"),
        (b"memory", "decode_error", "MemoryError"),
        (b"loop", "time_limit", "the decoder took more than 0.3 s of CPU"),
        (b"sleep", "time_limit", "the decoder made no progress for 0.3 s"),
        (b"SIGSTOP", "time_limit", "the decoder made no progress for 0.3 s"),
    ],
)
def test_a_death_costs_its_row_alone(data: bytes, reason: str, message: str) -> None:
    wall_s = (
        0.3 if data in (b"sleep", b"SIGSTOP") else 60
    )  # a busy machine must not stop the others by the clock
    limits = Limits(cpu_s=0.3, wall_s=wall_s, memory_bytes=1 << 30)
    pixels, outcomes = decode(items(b"a", data, b"b", b"c", data, b"d"), spec(), poison, limits)
    assert [outcome.reason for outcome in outcomes] == [None, reason, None, None, reason, None]
    assert outcomes[1].message == outcomes[4].message == message
    assert pixels[:, 39, 59, 2].tolist() == list(b"abcd")


def test_threads_that_begin_at_once_leave_no_child_waiting_for_a_lock(tmp_path: Path) -> None:
    """One that forked while another compiled had a child that waited for the compiler's lock until
    it was killed, a minute later.
    """
    code = (
        "import io, threading\nfrom PIL import Image\nfrom vitray.decoding.decode import "
        "decode\nfrom vitray.decoding.isolation import CHUNK_BYTES, Limits\n"
        "from vitray.schema import DecodeSpec, Encoded, PixelSpec\n"
        "buffer = io.BytesIO()\nImage.new('RGB', (64, 48)).save(buffer, 'JPEG')\n"
        "spec = DecodeSpec(PixelSpec((16, 16), 2, None, 1, (0, 0, 0), (1, 1, 1)), ('jpeg',), "
        "10**6, None)\n"
        "reasons, start = [], threading.Barrier(3)\n"
        "def work():\n    start.wait()\n    item = Encoded(0, 'a', 'a', buffer.getvalue())\n"
        "    reasons.extend(o.reason for o in decode([item], spec, limits=Limits(wall_s=200))[1])\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\nassert reasons == [None] * 3, "
        "reasons"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}  # nothing is compiled yet
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stderr
