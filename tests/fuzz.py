"""Coverage-guided fuzzing (atheris) of what reads hostile bytes: `python tests/fuzz.py decode|tar|parquet SECONDS [KEEP]`.

Begins with tests/data/fuzz and small files of each kind. What new bytes reached is copied into KEEP, when it is given.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vitray", "PIL"]):
    from fuzz_targets import CORPUS, SCRATCH, SLOW_S, check, seeds


def main(target: str, seconds: str, keep: str = "") -> None:
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for n, data in enumerate(seeds(target)):
        (corpus / f"seed-{n}").write_bytes(data)
    for path in (CORPUS / target).glob("*"):
        shutil.copy(path, corpus)
    slowest = 0.0

    def once(data: bytes) -> None:
        nonlocal slowest
        started = time.process_time()
        check(target, data)
        slowest = max(slowest, time.process_time() - started)
        assert slowest < SLOW_S, f"{slowest:.1f} s for one input"

    def end() -> None:
        print(f"{target}: the slowest input took {slowest:.2f} s", flush=True)
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            for path in corpus.glob("*"):
                shutil.copy(path, keep)

    options = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={os.getcwd()}/", str(corpus)], once)
    atexit.register(end)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
