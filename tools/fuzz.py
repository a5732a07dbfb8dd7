"""Coverage-guided fuzzing (atheris) of what reads hostile bytes: `python tools/fuzz.py
decode|tar|parquet SECONDS [KEEP]`.

Begins with tests/data/fuzz and small files of each kind. What reached new code stays in KEEP, when
it is given.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vitray", "PIL"]):
    from fuzz_targets import CORPUS, SCRATCH, SLOW_S, check, seeds


def main(target: str, seconds: str, keep: str = "") -> None:
    corpus = Path(keep) if keep else SCRATCH / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for n, data in enumerate(seeds(target)):
        (corpus / f"seed-{n}").write_bytes(data)
    for path in (CORPUS / target).glob("*"):
        shutil.copy(path, corpus)
    slowest = 0.0

    def once(data: bytes) -> None:
        nonlocal slowest
        started = time.process_time()
        check(target, data)
        took = time.process_time() - started
        if took > 2 * slowest:
            slowest = took
            print(f"{target}: the slowest input so far took {took:.3f} s", flush=True)
        assert took < SLOW_S, f"{took:.1f} s for one input"

    options = [
        f"-max_total_time={seconds}",
        "-max_len=20000",
        "-timeout=60",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={os.getcwd()}/", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
