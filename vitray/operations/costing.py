"""Time and cost of a job, from rates measured on a sample of its input and the user's prices."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.filesize import decimal

from vitray.budget import PRICES, request_cost
from vitray.errors import JobError, count
from vitray.job import BAD_YAML

if TYPE_CHECKING:
    from vitray.operations.bench import Bench

START_S = 1.0  # Python, and its imports before the first line of a command


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time and cost of the pending images.

    images_per_s: of one machine; more_cpu, more_gpu: with one more core, or one more GPU (None
    without GPUs). money: by purpose, in the currency of the prices; None without prices.
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
            f"time       {span(self.seconds)} on {count(self.machines, 'such machine')} "
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
    rates: Bench,
    machines: int | None = None,
    prices: dict[str, float] | None = None,
) -> Estimate:
    """Time and cost of `images` in `shards`, on machines like the one that was measured.

    rates: of one of `rates.machines` machines. machines: by default as many as were measured.
    """
    machines = machines or rates.machines
    start_up_s = START_S + rates.identify_s + rates.first_rows_s
    seconds = start_up_s + images / rates.line / machines if images else 0.0
    stored_bytes = round(1000 * rates.out_kilobytes * images)
    money = None
    if prices is not None:
        fragments = math.ceil(images / rates.fragment_rows)
        money = {
            "machines": seconds / 3600 * machines * prices.get("machine_hour", 0),
            "requests": request_cost(shards, fragments, prices),
            "gb_month": stored_bytes / 1e9 * prices.get("gb_month", 0),
        }
    return Estimate(
        images=images,
        machines=machines,
        seconds=seconds,
        images_per_s=rates.line,
        limit="what lies between the stages" if rates.limit == "line" else rates.limit,
        out_bytes=stored_bytes,
        more_cpu=_rate_with_one_more_core(rates),
        more_gpu=_rate_with_one_more_gpu(rates),
        money=money,
        measured=rates.measured,
    )


def _rate_with_one_more_core(rates: Bench) -> float:
    if rates.device == "cpu":
        return rates.line * (rates.cores + 1) / rates.cores
    # beside a GPU, the cores only decode
    return min(rates.model, rates.line * (rates.decode + rates.decode_core) / rates.decode)


def _rate_with_one_more_gpu(rates: Bench) -> float | None:
    if rates.device == "cpu":
        return None
    return min(rates.decode, (rates.gpus + 1) / rates.gpus * rates.model)


def read_prices(path: str) -> dict[str, float]:
    """The prices of a YAML file, by the names in PRICES. Raises JobError if it is not valid."""
    names = ", ".join(f"{name} ({meaning})" for name, meaning in PRICES.items())
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, *BAD_YAML) as error:
        raise JobError(
            f"--prices {path} cannot be read: {getattr(error, 'strerror', error)}"
        ) from error
    if not isinstance(table, dict) or not table or set(table) - PRICES.keys():
        raise JobError(f"--prices {path}: give one or more of {names}")
    for name, price in table.items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or price < 0:
            raise JobError(f"--prices {path}: {name} is not a price")
    return {name: float(price) for name, price in table.items()}


def read_plan(path: str) -> dict[str, Any]:
    """The output of `plan --probe --json` in a file. Raises JobError if it is not that."""
    try:
        expected: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(_is_count(expected[name]) for name in ("seconds", "images")):
            raise ValueError("its seconds or images are not numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", error)
        raise JobError(
            f"--planned {path} is not the output of vitray plan --probe --json: {why}"
        ) from error
    return expected


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def span(seconds: float) -> str:
    """A length of time as text, in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h"
