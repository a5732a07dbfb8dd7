"""A crash, hang or memory hog in the decoder costs one image."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.encoded_images import encode, items, photo, poison, spec
from support.paths import ROOT, TESTS
from vitray.decoding.decode import CHILD_RUNS, PAGES, Outcome, Pixels, decode
from vitray.decoding.isolation import CHUNK_BYTES, Limits
from vitray.schema import DecodeSpec, Encoded


def test_every_item_has_its_outcome_and_the_good_ones_their_pixels_in_order() -> None:
    colors = [Image.new("RGB", (60, 40), (n, 2 * n, 3 * n)) for n in range(5)]
    files = [encode(color, "PNG") for color in colors]
    batch = items(files[0], b"", files[1], b"text", None, files[2], files[3][:60], files[4])
    batch[4] = Encoded(4, "4", "file:4", None, "missing", "no object s3://b/4")
    pixels, outcomes = decode(batch, spec())
    assert [outcome.reason for outcome in outcomes] == [
        None,
        "empty",
        None,
        "not_an_image",
        "missing",
        None,
        "truncated",
        None,
    ]
    assert outcomes[4].message == "no object s3://b/4"
    assert pixels.shape == (4, 40, 60, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0].tolist() == [[n, 2 * n, 3 * n] for n in (0, 1, 2, 4)]
    assert (pixels == pixels[:, :1, :1]).all()


def test_a_batch_without_bytes_starts_no_child() -> None:
    pixels, outcomes = decode([Encoded(0, "a", "u", None, "too_large", "9 GB")], spec(), one=poison)
    assert pixels.shape == (0, 40, 60, 3)
    assert outcomes == [Outcome(0, 0, "", "too_large", "9 GB")]
    assert decode([], spec())[1] == []


def test_a_death_that_does_not_repeat_is_not_charged(tmp_path: Path) -> None:
    once = str(tmp_path / "was-here").encode()
    pixels, outcomes = decode(items(b"a", once, b"b"), spec(), poison)
    assert [outcome.reason for outcome in outcomes] == [None, None, None]
    assert pixels[:, 0, 0, 0].tolist() == list(b"azb")


def test_an_image_that_uses_up_its_cpu_seconds_is_tried_once(tmp_path: Path) -> None:
    """Thirty of them in one fragment would hold it for ten minutes, were each tried twice."""
    tries = tmp_path / "tries"

    def slow(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        if data == b"loop":
            with open(tries, "ab") as stream:
                stream.write(b".")
        return poison(data, wanted, into)

    _, outcomes = decode(items(b"a", b"loop", b"b"), spec(), slow, Limits(cpu_s=0.3))
    assert [outcome.reason for outcome in outcomes] == [
        None,
        "time_limit",
        None,
    ] and tries.read_bytes() == b"."


def test_inputs_larger_and_smaller_than_what_lies_there_at_a_time_arrive_whole() -> None:
    def last(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        into[...] = np.frombuffer(data[-3:], np.uint8)
        return Outcome(len(data), 1, "png", None, "")

    sizes = [3, CHUNK_BYTES + 7, 3, CHUNK_BYTES - 3, 3, 4, 3 * CHUNK_BYTES, 5]
    for seed in (1, 2):  # the second time the child and its file have been used
        blobs = [np.random.default_rng([seed, size, n]).bytes(size) for n, size in enumerate(sizes)]
        pixels, outcomes = decode(items(*blobs), spec(), last)
        assert [outcome.width for outcome in outcomes] == sizes
        assert [bytes(p[7, 5]) for p in pixels] == [blob[-3:] for blob in blobs]


def test_the_real_decoder_keeps_within_its_memory() -> None:
    big = encode(Image.new("RGB", (6000, 8000)), "PNG")  # 192 MB in Pillow
    _, outcomes = decode(
        items(big, encode(photo(), "PNG")), spec(), limits=Limits(memory_bytes=50 << 20)
    )
    assert [(outcome.reason, outcome.width) for outcome in outcomes] == [
        ("decode_error", 6000),
        (None, 60),
    ]
    assert outcomes[0].message.startswith("MemoryError")


def test_cpu_seconds_are_counted_for_each_image() -> None:
    def slow(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return Outcome(1, 1, "png", None, "")

    _, outcomes = decode(items(*[b"x"] * 6), spec(), slow, Limits(cpu_s=0.6))
    assert [outcome.reason for outcome in outcomes] == [None] * 6


def test_threads_decode_side_by_side_and_their_signal_masks_do_not_matter() -> None:
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGTERM})
        pixels, outcomes = decode(
            items(b"a", b"loop", bytes([number])), spec(), poison, Limits(cpu_s=0.2)
        )
        assert outcomes[1].reason == "time_limit"
        results[number] = pixels[:, 0, 0, 0].tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [ord("a"), number] for number in (1, 2, 3)}


def which(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
    """Its process as the width; bytes that are no number are a bad image."""
    try:
        into[...] = int(data)
    except ValueError:
        return Outcome(os.getpid(), 0, "png", "decode_error", "no number")
    return Outcome(os.getpid(), 0, "png", None, "")


def child_of(*data: bytes) -> int:
    (child,) = {outcome.width for outcome in decode(items(*data), spec(), which)[1]}
    return child


def test_a_child_serves_calls_until_a_bad_image_and_no_more_than_its_number() -> None:
    first = child_of(b"1", b"2")
    assert child_of(b"3") == first
    second = child_of(b"1", b"2", b"3")  # more than the memory they share holds
    assert second != first
    assert child_of(b"x", b"2") == second
    third = child_of(b"1", b"2")
    assert third != second
    assert [child_of(b"1") for _ in range(CHILD_RUNS - 1)] == [third] * (CHILD_RUNS - 1)
    assert child_of(b"1") != third
    gone = {first, second, third}
    assert not gone & set(map(int, children(os.getpid())))


def test_pixels_of_one_call_outlive_the_next() -> None:
    first, _ = decode(items(b"1", b"2"), spec(), which)
    decode(items(b"7", b"8"), spec(), which)
    assert first[:, 0, 0, 0].tolist() == [1, 2]


def test_a_caller_may_keep_the_pixels_of_many_calls() -> None:
    """More than a worker has pages: then there is a new worker."""
    kept = [decode(items(b"%d" % n), spec(), which)[0][..., :1] for n in range(3 * PAGES)]
    assert [int(pixels[0, 0, 0, 0]) for pixels in kept] == list(range(3 * PAGES))
    del kept
    assert len({child_of(b"1") for _ in range(PAGES)}) == 1


def test_a_child_that_dies_while_idle_costs_nothing() -> None:
    os.kill(child_of(b"1"), signal.SIGKILL)
    pixels, outcomes = decode(items(b"4"), spec(), which)
    assert (outcomes[0].reason, pixels[0, 0, 0, 0]) == (None, 4)


def test_large_inputs_and_many_reach_the_child_whole() -> None:
    def length(data: bytes, wanted: DecodeSpec, into: Pixels) -> Outcome:
        return Outcome(len(data), zlib.crc32(data), "png", None, "")

    data = [os.urandom(n) for n in (3_000_000, 1, 65_536, 212_992, 1_000_001, *range(2, 300))]
    _, outcomes = decode(items(*data), spec(), length)
    assert [(o.width, o.height) for o in outcomes] == [(len(one), zlib.crc32(one)) for one in data]


def test_a_child_ends_with_its_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(child_of(b"1")))
    thread.start()
    thread.join()
    for _ in range(100):
        if str(found[0]) not in children(os.getpid()):
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its thread")


def test_what_only_a_signal_handler_holds_does_not_end_in_a_child(tmp_path: Path) -> None:
    """Ray Train leaves one that holds an actor; its end in a child left Ray's client in the parent
    without answers for ever.
    """
    ended = tmp_path / "ended"

    class Held:
        def __del__(self) -> None:
            ended.write_text(str(os.getpid()))

    def handler_of(held: Held) -> Callable[..., None]:
        return lambda *_: print(held)

    before = signal.signal(signal.SIGINT, handler_of(Held()))
    try:
        thread = threading.Thread(target=lambda: child_of(b"1"))
        thread.start()
        thread.join()
        assert not ended.exists()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.read_text() == str(os.getpid())


def test_an_interrupt_leaves_no_child() -> None:
    earlier = set(children(os.getpid()))  # of other tests in this process
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            decode(items(b"sleep"), spec(), poison)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert set(children(os.getpid())) <= earlier


def children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # a thread of an earlier test has just ended
            found += (task / "children").read_text().split()
    return found


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "from support import encoded_images as t\nt.decode(t.items(b'sleep'), t.spec(), t.poison)\n"
    )
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    worker = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    while not (found := children(worker.pid)):
        assert worker.poll() is None
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    for _ in range(100):
        if not Path(f"/proc/{found[0]}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")
