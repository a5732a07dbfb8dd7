"""`vitray bench --free-model`: its arithmetic, and which jobs it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from vitray.errors import JobError
from vitray.job import Job
from vitray.operations.bench_free import Moment, Recorder, bench_free, machine_cpu_s
from vitray.operations.bench_free_figures import (
    FreeBench,
    Slope,
    TimedRun,
    Way,
    busy_shares,
    gpu_rate,
    ratios,
    run_sizes,
    slope,
    way_figures,
    workers_by_stage,
)
from vitray.pipeline import Progress

SHARES = {"workers": 2, "readers": 2, "decoders": 8, "writers": 4, "decoder_processes": False}
WORKERS = {"read": 1.0, "decode": 2.0, "stage": 2.0}
SHORT = TimedRun(100, 1.0, 3.0, 2.0, 1000, {"read": 0.1, "decode": 1.0}, SHARES, WORKERS)
LONG = TimedRun(
    300, 2.0, 5.0, 2.5, 5000, {"read": 0.2, "decode": 2.2, "stage": 0.4}, SHARES, WORKERS
)


def measured(shorter: TimedRun, longer: TimedRun) -> Slope:
    result = slope(shorter, longer)
    assert result is not None
    return result


def test_a_slope_leaves_out_what_both_runs_cost() -> None:
    found = measured(SHORT, LONG)
    assert found.images_per_s == pytest.approx(200)
    assert found.cpu_ms == pytest.approx(2.5)
    assert found.copied_bytes == pytest.approx(20)
    assert found.stage_ms == pytest.approx({"read": 0.5, "decode": 6.0, "stage": 2.0})


def test_what_was_not_measured_has_no_slope() -> None:
    assert measured(replace(SHORT, cpu_s=None), replace(LONG, cpu_s=None)).cpu_ms is None


@pytest.mark.parametrize("seconds", [0.9, 1.0])
def test_a_longer_run_that_took_no_longer_gives_no_slope(seconds: float) -> None:
    assert slope(SHORT, replace(LONG, seconds=seconds)) is None


def test_a_slope_has_the_workers_on_which_its_runs_agree() -> None:
    other = replace(LONG, stage_workers={**WORKERS, "read": 8.0})
    assert measured(SHORT, other).stage_workers == {"decode": 2.0, "stage": 2.0}


def test_stages_are_busy_by_their_number_of_workers() -> None:
    stages = {"read": 1.0, "decode": 8.0}
    busy = busy_shares(stages, {"read": 2, "decode": 4}, 400)
    assert busy == pytest.approx({"read": 0.2, "decode": 0.8})
    assert busy_shares({**stages, "new": 3.0}, {"read": 2, "decode": 4}, 400) == {}


@pytest.mark.parametrize(
    ("way", "processes", "shards", "expected"),
    [
        (Way.LOCAL, False, 99, {"read": 4, "decode": 16, "stage": 8, "predict": 4}),
        (Way.LOCAL_RAY, True, 16, {"read": 16, "decode": 16, "stage": 8, "predict": 4}),
        (Way.LOCAL_RAY, True, 15, {"read": 4, "decode": 16, "stage": 8, "predict": 4}),
        (Way.CLUSTER, False, 99, {}),
    ],
    ids=["threads", "processes", "processes with few shards", "cluster"],
)
def test_threads_and_processes_of_all_workers_are_added_up(
    way: Way, processes: bool, shards: int, expected: dict[str, float]
) -> None:
    shares = {**SHARES, "decoder_processes": processes}
    assert workers_by_stage(shares, way, shards) == expected


def test_rounds_are_compared_where_both_ways_have_the_same_workers() -> None:
    local = measured(SHORT, LONG)
    ray = replace(local, images_per_s=100.0)
    other = replace(ray, shares={**SHARES, "decoders": 4})
    assert ratios({0: ray, 1: other, 2: ray}, {0: local, 1: local, 3: local}) == [0.5]


def test_a_run_is_timed_from_its_first_rows_to_its_last() -> None:
    """And the machine's counters are read at these two only."""
    moments = [Moment(1.0, 10.0), Moment(2.0, 20.0), Moment(3.0, 30.0)]
    readings = iter(moments)
    recorder = Recorder(5, lambda: next(readings))
    for good in (0, 0, 2, 2, 3, 4, 5, 5, 5):
        recorder(Progress(good=good))
    assert (recorder.first, recorder.last) == (moments[0], moments[1])
    assert recorder.progress.good == 5 and next(readings) == moments[2]


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
    one = measured(SHORT, LONG)
    three = [replace(one, images_per_s=rate) for rate in (100.0, 300.0, 200.0)]
    local = way_figures(three, [1.0, 3.0], 12_000)
    unmeasured = [replace(each, cpu_ms=None, stage_workers={}) for each in three]
    ray = way_figures(unmeasured, [9.0], 12_000)
    assert (local.images_per_s, local.slowest_images_per_s) == (200, 100)
    assert (local.busiest, local.busy) == ("decode", pytest.approx(0.6))
    assert (ray.busiest, ray.busy, ray.rounds) == ("", 0.0, 3)
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
