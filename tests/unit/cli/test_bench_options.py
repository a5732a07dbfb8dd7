"""Options of `vitray bench`: which measurement they choose, and what it is given."""

from __future__ import annotations

import os
from typing import Any

import pytest

from support.command_line import Call
from vitray.operations import bench, bench_free

Recorded = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The calls of the three measurements, which return at once."""
    calls: Recorded = []

    def stand_in(name: str) -> Any:
        def record(job: Any, *arguments: Any, **named: Any) -> str:
            calls.append((name, (job.source, *arguments), named))
            return name

        return record

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for module, name in ((bench, "bench"), (bench, "bench_cluster"), (bench_free, "bench_free")):
        monkeypatch.setattr(module, name, stand_in(name))
    return calls


@pytest.mark.parametrize(
    ("arguments", "microseconds"),
    [
        (["images", "--free-model", "80"], 80),
        (["--free-model", "80", "images"], 80),
        (["--free-model=80", "images"], 80),
        (["images", "--free-model"], 0),
        (["--free-model", "images"], 0),
        (["--free-model", "--images", "256", "images"], 0),
    ],
)
def test_free_model_takes_microseconds(
    vitray: Call, called: Recorded, arguments: list[str], microseconds: int
) -> None:
    code, out, err = vitray("bench", *arguments)
    assert (code, out, err) == (0, "bench_free\n", "")
    ((name, positional, keywords),) = called
    assert (name, positional) == ("bench_free", (["images"], microseconds, 256, None, False))
    assert keywords["seconds"] == 6.0 and not os.path.exists(keywords["folder"])


@pytest.mark.parametrize("arguments", [["--free-model=-1"], ["--free-model", "-1"]])
def test_a_negative_wait_is_refused(vitray: Call, called: Recorded, arguments: list[str]) -> None:
    code, _, err = vitray("bench", "images", *arguments)
    assert code == 2 and "--free-model" in err
    assert called == []


def test_a_wait_that_is_no_number_is_named(vitray: Call, called: Recorded) -> None:
    code, _, err = vitray("bench", "images", "--free-model", "abc")
    assert (code, err) == (
        2,
        "vitray: --free-model abc: not a whole number. Write a number, or nothing, after it "
        "(vitray --help)\n",
    )
    code, _, err = vitray("bench", "images", "--free-model=abc")
    assert code == 2 and "--free-model" in err and "valid integer" in err
    assert called == []


@pytest.mark.parametrize(
    ("arguments", "environment", "name", "address"),
    [
        (["--free-model", "0", "--address", "head:6379"], {}, "bench_free", "head:6379"),
        (["--free-model", "0"], {"RAY_ADDRESS": "head:1"}, "bench_free", "head:1"),
        (["--model", "m", "--address", "head:6379"], {}, "bench_cluster", "head:6379"),
    ],
)
def test_an_address_is_measured(
    vitray: Call,
    called: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    name: str,
    address: str,
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    code, _, err = vitray("bench", "images", *arguments, "--allow-open-cluster")
    assert (code, err) == (0, "")
    assert called[0][0] == name
    assert {address, True} <= set(called[0][1][1:])


def test_without_an_address_this_machine_is_measured(vitray: Call, called: Recorded) -> None:
    code, _, err = vitray("bench", "images", "--model", "m", "--images", "64")
    assert (code, err) == (0, "")
    assert called == [("bench", (["images"], 64, 6.0), {})]
