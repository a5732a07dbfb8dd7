"""A run against a store that fails all the time: it completes, with the rows of a run that nothing
befell.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import new_bucket
from s3_proxy import CUT, FLIP, FORWARD, LOSE, SLOW, Call, proxied
from shards import pictures, put_tars
from test_crash import rows_of
from test_kill import command

import vitray
from vitray.storage import join

IMAGES, SHARDS = 240, 6
Rule = Callable[[Call], int]


def a_fifth_503(rng: random.Random) -> Rule:
    return lambda call: 503 if rng.random() < 0.2 else FORWARD


def answers_of_puts_lost(rng: random.Random) -> Rule:
    return lambda call: LOSE if call.method == "PUT" and rng.random() < 0.05 else FORWARD


def every_body_cut_once(rng: random.Random) -> Rule:
    seen = set[tuple[str, str]]()

    def rule(call: Call) -> int:
        what = (call.path, call.headers.get("range", ""))
        if call.method != "GET" or what in seen:
            return FORWARD
        seen.add(what)
        return CUT

    return rule


def bits_flipped_once(rng: random.Random) -> Rule:
    """In what vitray staged itself; nothing but TLS can tell of a bit in an image that came
    wrong.
    """
    seen = set[str]()

    def rule(call: Call) -> int:
        if call.method != "GET" or "/_vitray/staging/" not in call.path or call.path in seen:
            return FORWARD
        seen.add(call.path)
        return FLIP

    return rule


def slow_bodies(rng: random.Random) -> Rule:
    return lambda call: SLOW if call.method == "GET" and rng.random() < 0.1 else FORWARD


def all_of_it(rng: random.Random) -> Rule:
    rules = [make(rng) for make in STORMS[:-1]]
    return lambda call: next(
        (verdict for rule in rules if (verdict := rule(call)) != FORWARD), FORWARD
    )


STORMS = [
    a_fifth_503,
    answers_of_puts_lost,
    every_body_cut_once,
    bits_flipped_once,
    slow_bodies,
    all_of_it,
]


@pytest.mark.s3
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
