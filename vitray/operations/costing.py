"""What a job will take and cost, from rates measured on a sample of its input and a table of the
user's prices. Pure numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.filesize import decimal

from vitray.errors import JobError, count
from vitray.job import BAD_YAML

PRICES = {
    "machine_hour": "one machine like the one measured, an hour",
    "put_1000": "a thousand PUT, LIST and COPY requests",
    "get_1000": "a thousand GET and HEAD requests",
    "gb_month": "a gigabyte stored for a month",
}
# of S3, measured: see BENCHMARKS.md
START_S = 1.0  # Python, and what it imports before the first line of a command
WRITES_A_SHARD, READS_A_SHARD = (
    6,
    13,
)  # besides its fragments: each is written once, and takes a HEAD and a GET


class Rates(Protocol):
    """What `bench` measured, of one of `machines`. Images/s; identify_s, first_rows_s: seconds
    until the model is known, and from there to the first rows; kilobytes, of an image, in and
    out.
    """

    @property
    def line(self) -> float: ...
    @property
    def decode_core(self) -> float: ...
    @property
    def decode(self) -> float: ...
    @property
    def model(self) -> float: ...
    @property
    def cores(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def limit(self) -> str: ...
    @property
    def first_rows_s(self) -> float: ...
    @property
    def identify_s(self) -> float: ...
    @property
    def out_kilobytes(self) -> float: ...
    @property
    def gpus(self) -> int: ...
    @property
    def machines(self) -> int: ...
    @property
    def fragment_rows(self) -> int: ...
    @property
    def measured(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of what is to do. images_per_s, more_cpu, more_gpu: of one machine; as it is, and with one
    core or GPU more (None: no GPU).

    money: in the currency of the prices, by what it is for; None without prices.
    """

    images: int
    machines: int
    seconds: float
    images_per_s: float
    limit: str
    out_bytes: int
    more_cpu: float
    more_gpu: float | None
    money: dict[str, float] | None
    measured: str

    def __str__(self) -> str:
        gpu = "" if self.more_gpu is None else f", one more GPU {self.more_gpu:,.1f}"
        lines = [
            f"time       {_span(self.seconds)} on {count(self.machines, 'such machine')} "
            f"({self.images_per_s:,.1f} images/s each)",
            f"measured   {self.measured}",
            f"limit      {self.limit}; one more core would give {self.more_cpu:,.1f} images/s{gpu}",
            f"bytes out  {decimal(self.out_bytes)}",
        ]
        if self.money is not None:
            parts = ", ".join(
                f"{name} {value:,.2f}" for name, value in self.money.items() if name != "gb_month"
            )
            lines.append(
                f"money      {parts}; then {self.money['gb_month']:,.2f} a month for what is stored"
            )
        return "\n".join(lines)


def estimate(
    images: int,
    shards: int,
    rates: Rates,
    machines: int | None = None,
    prices: dict[str, float] | None = None,
) -> Estimate:
    """What `images` in `shards` will take on so many machines like the one that was measured; by
    default on all that were.
    """
    machines = machines or rates.machines
    seconds = (
        START_S + rates.identify_s + rates.first_rows_s + images / rates.line / machines
        if images
        else 0.0
    )
    on_cpu = rates.device == "cpu"
    more_core = rates.line * (rates.cores + 1) / rates.cores
    if not on_cpu:  # decoding is all that the cores do
        more_core = min(rates.model, rates.line * (rates.decode + rates.decode_core) / rates.decode)
    stored = round(1000 * rates.out_kilobytes * images)
    money = None
    if prices is not None:
        hours = seconds / 3600 * machines
        fragments = math.ceil(images / rates.fragment_rows)
        writes, reads = shards * WRITES_A_SHARD + fragments, shards * READS_A_SHARD + 2 * fragments
        money = {
            "machines": hours * prices.get("machine_hour", 0),
            "requests": writes / 1000 * prices.get("put_1000", 0)
            + reads / 1000 * prices.get("get_1000", 0),
            "gb_month": stored / 1e9 * prices.get("gb_month", 0),
        }
    more_gpu = None if on_cpu else min(rates.decode, (rates.gpus + 1) / rates.gpus * rates.model)
    limit = {"line": "what lies between the steps"}.get(rates.limit, rates.limit)
    return Estimate(
        images,
        machines,
        seconds,
        rates.line,
        limit,
        stored,
        more_core,
        more_gpu,
        money,
        rates.measured,
    )


def read_prices(path: str) -> dict[str, float]:
    """A YAML file of PRICES. Raises JobError for what is not one."""
    known = ", ".join(f"{name} ({what})" for name, what in PRICES.items())
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, *BAD_YAML) as error:
        raise JobError(
            f"--prices {path} cannot be read: {getattr(error, 'strerror', error)}"
        ) from error
    if not isinstance(table, dict) or not table or set(table) - PRICES.keys():
        raise JobError(f"--prices {path}: give one or more of {known}")
    if odd := [
        name
        for name, value in table.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0
    ]:
        raise JobError(f"--prices {path}: {odd[0]} is no price")
    return {name: float(value) for name, value in table.items()}


def read_plan(path: str) -> dict[str, Any]:
    """What `plan --probe --json` printed. Raises JobError for what is not that."""
    try:
        expected: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(
            type(expected[name]) in (int, float) and 0 <= expected[name] < math.inf
            for name in ("seconds", "images")
        ):
            raise ValueError("its seconds or images are no numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", error)
        raise JobError(
            f"--planned {path} is not what vitray plan --probe --json prints: {why}"
        ) from error
    return expected


def _span(seconds: float) -> str:
    return (
        f"{seconds:,.0f} s"
        if seconds < 120
        else f"{seconds / 60:,.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
