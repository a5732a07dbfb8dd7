"""Storms: rules by which a proxy in front of S3 fails all the time."""

from __future__ import annotations

import random
from collections.abc import Callable

from support.s3_proxy import CUT, FLIP, FORWARD, LOSE, SLOW, Call

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
