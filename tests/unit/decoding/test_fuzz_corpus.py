"""What fuzzing found worth keeping (tests/data/fuzz), and whole and cut files of each kind, through
the same checks.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from fuzz_targets import CORPUS, SLOW_S, TARGETS, check, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_break_a_reader(target: str) -> None:
    kept = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert kept and sum(map(len, kept)) < 300_000
    rng = np.random.default_rng(0)
    spoilt = []
    for data in seeds(target):
        for _ in range(30):
            bytes_ = bytearray(data)
            for at in rng.integers(0, len(bytes_), 3):
                bytes_[at] ^= 1 << int(rng.integers(8))
            spoilt += [bytes(bytes_), data[: rng.integers(len(data))]]
    for data in [*kept, *seeds(target), *spoilt]:
        started = time.process_time()
        check(target, data)
        assert time.process_time() - started < SLOW_S
