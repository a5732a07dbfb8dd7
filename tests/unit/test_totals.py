"""The counter of copied bytes: no copy is lost when many threads count at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from vitray.totals import copied_bytes


def test_copies_of_all_threads_are_counted() -> None:
    before = copied_bytes.value
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(copied_bytes.add, [3] * 4000))
    assert copied_bytes.value - before == 12_000
