"""`vitray bench --free-model`: its arithmetic, and which jobs it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from vitray.errors import JobError
from vitray.job import Job
from vitray.operations.bench_free import bench_free, machine_cpu_s
from vitray.operations.bench_free_figures import (
    FreeBench,
    TimedRun,
    busy_shares,
    gpu_rate,
    run_sizes,
    slope,
    way_figures,
    workers_by_stage,
)

SHORT = TimedRun(100, 1.0, 3.0, 2.0, 1000, {"read": 0.1, "decode": 1.0})
LONG = TimedRun(300, 2.0, 5.0, 2.5, 5000, {"read": 0.2, "decode": 2.2, "stage": 0.4})


def test_a_slope_leaves_out_what_both_runs_cost() -> None:
    found = slope(SHORT, LONG)
    assert found.images_per_s == pytest.approx(200)
    assert found.cpu_ms == pytest.approx(2.5)
    assert found.copied_bytes == pytest.approx(20)
    assert found.stage_ms == pytest.approx({"read": 0.5, "decode": 6.0, "stage": 2.0})


def test_what_was_not_measured_has_no_slope() -> None:
    assert slope(replace(SHORT, cpu_s=None), replace(LONG, cpu_s=None)).cpu_ms is None


def test_stages_are_busy_by_their_number_of_workers() -> None:
    busy = busy_shares({"read": 1.0, "decode": 8.0, "new": 3.0}, {"read": 2, "decode": 4}, 400)
    assert busy == pytest.approx({"read": 0.2, "decode": 0.8, "new": 1.2})


def test_threads_of_all_workers_are_added_up() -> None:
    shares = {"workers": 2, "readers": 2, "decoders": 8, "writers": 4, "cpus": 7}
    assert workers_by_stage(shares) == {"read": 4, "decode": 16, "stage": 8, "predict": 4}


@pytest.mark.parametrize(
    ("microseconds", "images_per_s"), [(0, 12_000), (80, 12_500), (1000, 1000)]
)
def test_a_gpu_computes_as_fast_as_its_wait_allows(microseconds: int, images_per_s: float) -> None:
    assert gpu_rate(microseconds) == images_per_s


@pytest.mark.parametrize(
    ("rate", "least", "most", "sizes"),
    [
        (900, 256, 40_000, (1800, 7200)),
        (10, 256, 40_000, (256, 1024)),
        (9_000, 256, 40_000, (10_000, 40_000)),
    ],
)
def test_runs_differ_by_six_seconds_within_the_bounds(
    rate: float, least: int, most: float, sizes: tuple[int, int]
) -> None:
    assert run_sizes(rate, least, most, 6.0) == sizes


def test_the_table_shows_each_way_and_the_ratio() -> None:
    one = slope(SHORT, LONG)
    three = [replace(one, images_per_s=rate) for rate in (100.0, 300.0, 200.0)]
    workers = {"read": 1.0, "decode": 2.0, "stage": 2.0}
    local = way_figures(three, [1.0, 3.0], workers, 12_000)
    unmeasured = [replace(each, cpu_ms=None) for each in three]
    ray = way_figures(unmeasured, [9.0], {}, 12_000)
    assert (local.images_per_s, local.slowest_images_per_s) == (200, 100)
    assert (local.busiest, local.busy) == ("decode", pytest.approx(0.6))
    result = FreeBench(
        microseconds=0,
        images=256,
        kilobytes=107.2,
        images_per_tar=512,
        sizes=(1800, 7200),
        rounds=3,
        cores=2,
        gpu_images_per_s=12_000,
        ways={"local": local, "local_ray": ray},
        ratios=[0.5, 0.4, 0.6],
    )
    assert str(result).splitlines()[-1] == "Ray / local executor: 0.50 (0.40 to 0.60)"
    rows = [line.split() for line in str(result).splitlines()[3:5]]
    assert rows[0][:6] == ["local", "executor", "200.0", "2.50", "20", "0.02"]
    assert rows[1][:7] == ["Ray,", "started", "here", "200.0", "-", "20", "0.02"]
    assert asdict(result)["ways"]["local"]["stages"] == pytest.approx(one.stage_ms)


def test_the_cpu_time_of_the_machine_grows_by_what_is_computed() -> None:
    before = machine_cpu_s()
    sum(number * number for number in range(5_000_000))
    assert machine_cpu_s() - before > 0.1


def test_decoding_on_a_gpu_is_refused() -> None:
    job = Job(source="in", model="m", out="out", decode="hybrid")
    with pytest.raises(JobError, match="--set decode=exact"):
        bench_free(job)
