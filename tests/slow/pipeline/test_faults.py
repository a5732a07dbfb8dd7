"""A run against a store that fails all the time: it completes, with the rows of a run that nothing
befell."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from support.crashes import rows_of
from support.runs import command
from support.s3 import new_bucket
from support.s3_proxy import FORWARD, Call, proxied
from support.store_faults import STORMS, Rule, answers_of_puts_lost
from vitray.storage import join

IMAGES, SHARDS = 240, 6


@pytest.mark.parametrize(
    "storm",
    [
        pytest.param(
            s, id=s.__name__, marks=[] if s is answers_of_puts_lost else [pytest.mark.nightly]
        )
        for s in STORMS
    ],
)
def test_a_run_completes_in_a_storm(
    storm: Callable[[random.Random], Rule],
    real_s3: str,
    shapes_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = new_bucket(real_s3, monkeypatch)
    put_tars(join(bucket, "in"), pictures(IMAGES), SHARDS, tmp_path)
    argv = command(tmp_path, shapes_model, tmp_path / "out")
    argv[argv.index(str(tmp_path / "in"))] = join(bucket, "in")
    out_at = argv.index(str(tmp_path / "out"))

    def seconds(out: str, endpoint: str) -> float:
        argv[out_at] = out
        started = time.perf_counter()
        done = subprocess.run(
            argv,
            env={**os.environ, "AWS_ENDPOINT_URL": endpoint},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        assert f"{SHARDS} shards committed now" in done.stdout, done.stdout
        return time.perf_counter() - started

    with proxied(real_s3) as proxy:
        calm = seconds(join(bucket, "calm"), proxy.url)
        calm_calls, said = len(proxy.calls), Counter[int]()
        rule = storm(random.Random(7))

        def counting(call: Call) -> int:
            verdict = rule(call)
            said[verdict] += 1
            return verdict

        proxy.rule = counting
        stormy = seconds(join(bucket, "stormy"), proxy.url)
        faults = sum(n for verdict, n in said.items() if verdict != FORWARD)
        more = len(proxy.calls) - 2 * calm_calls
    print(
        f"{storm.__name__}: {stormy / calm:.1f} times the {calm:.1f} s, {faults} faults, {more} "
        f"calls more than {calm_calls}"
    )
    assert faults > 1
    assert rows_of(join(bucket, "stormy")).equals(rows_of(join(bucket, "calm")))
    checked = vitray.validate(join(bucket, "stormy"), content=True)
    assert checked.ok and checked.rows == IMAGES, str(checked)
