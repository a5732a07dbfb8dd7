"""The counter of copied bytes: no copy is lost when many threads count at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from vitray.copies import copied_bytes, count_copy


def test_copies_of_all_threads_are_counted() -> None:
    before = copied_bytes()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_copy, [3] * 4000))
    assert copied_bytes() - before == 12_000
