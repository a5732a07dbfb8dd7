"""`benchmarks/bench_scale.py`, and what it promises of the driver, with few events."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_scale
from bench_scale import Replay
from vitray.errors import ObjectMissing
from vitray.storage import read, store_for


@pytest.mark.parametrize("shard_fragments", [1, 4])
@pytest.mark.parametrize("workers", [100, 800])
def test_a_fragment_costs_the_driver_little_however_many_workers_there_are(
    tmp_path: Path, workers: int, shard_fragments: int
) -> None:
    """0.01 to 0.04 ms where it was measured. It was 2 ms of 800 workers, before December 2026."""
    replay = Replay(fragments=4000, shard_fragments=shard_fragments, workers=workers)
    assert bench_scale.driver_cost(tmp_path, replay).fragment_ms < 1


def test_slow_requests_count_what_a_store_is_asked(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    with bench_scale.slow_requests(0) as counts:
        store_for(url).replace(url, b"text")
        assert read(url, store_for(url).stat(url).version) == b"text"
        assert len(store_for(url).find(str(tmp_path))) == 1
        store_for(url).delete([url, f"{url}-absent"])
        with pytest.raises(ObjectMissing):
            store_for(url).stat(url)
    assert counts == {"replace": 1, "stat": 2, "open": 2, "find": 1, "delete": 2}
    store_for(url).replace(url, b"text")
    assert counts["replace"] == 1


def test_a_table_has_a_line_for_each_figure() -> None:
    figures = [bench_scale.Figure("idle", "16 workers", "0.1 s", "0.5 s")]
    assert bench_scale.markdown(figures).splitlines() == [
        "| part | figure | measured | aim |",
        "| --- | --- | --- | --- |",
        "| idle | 16 workers | 0.1 s | 0.5 s |",
    ]
