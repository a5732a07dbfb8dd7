"""The metrics that a run exports without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from factories import hand_made
from vitray.dataset import Commit, committed_files, find_commit
from vitray.pipeline.events import FragmentWritten
from vitray.pipeline.metrics import COUNTERS, GAUGES, Meter, Meters, PrometheusMeter
from vitray.pipeline.progress import Progress

FRAGMENT = FragmentWritten(
    "s3://secret/shard", 0, 10, {"empty": 2, "missing": 1}, {"read": 0.5, "predict": 2.0}, 4096
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(meter: PrometheusMeter) -> Samples:
    text = generate_latest(meter.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def commit(tmp_path: Path) -> Commit:
    dataset = hand_made.make_dataset(tmp_path)
    found = find_commit(dataset, sorted(committed_files(dataset.out))[0])
    assert found is not None
    return found


def test_a_run_counts_images_bytes_reasons_shards_and_seconds(commit: Commit) -> None:
    meter = PrometheusMeter()
    meter.fragment(FRAGMENT)
    meter.fragment(FRAGMENT)
    meter.commit(commit)
    meter.progress(Progress(shards=5, shards_done=1, set_aside=2))
    values = samples_of(meter)
    assert values["vitray_images_total", (("outcome", "good"),)] == 14
    assert values["vitray_images_total", (("outcome", "bad"),)] == 6
    assert values["vitray_failures_total", (("reason", "empty"),)] == 4
    assert values["vitray_bytes_total", ()] == 8192
    assert values["vitray_shard_commits_total", ()] == 1
    assert values["vitray_step_seconds_sum", (("step", "predict"),)] == 4.0
    assert values["vitray_step_seconds_count", (("step", "commit"),)] == 1
    shards = [values[f"vitray_shards_{name}", ()] for name in ("expected", "done", "set_aside")]
    assert shards == [5, 1, 2]


def test_the_exit_code_is_there_when_the_run_has_ended() -> None:
    meter = PrometheusMeter(last_complete=1000.0)
    at_work = samples_of(meter)
    absent = ("vitray_run_exit_code", "vitray_run_end_timestamp_seconds")
    assert not [name for name, _ in at_work if name in absent]
    assert at_work["vitray_images_total", (("outcome", "good"),)] == 0
    meter.record({"set_aside": {"s": "cut"}})
    meter.ended(3)
    values = samples_of(meter)
    assert values["vitray_run_exit_code", ()] == 3
    assert values["vitray_shards_set_aside", ()] == 1
    assert values["vitray_run_last_complete_timestamp_seconds", ()] == 1000.0
    duration = values["vitray_run_duration_seconds", ()]
    start = values["vitray_run_start_timestamp_seconds", ()]
    assert values["vitray_run_end_timestamp_seconds", ()] == pytest.approx(start + duration)
    meter.ended(0)
    values = samples_of(meter)
    complete = values["vitray_run_last_complete_timestamp_seconds", ()]
    assert complete == values["vitray_run_end_timestamp_seconds", ()]


def test_only_the_name_that_was_given_and_closed_lists_become_labels(commit: Commit) -> None:
    meter = PrometheusMeter('pets "2"')
    meter.fragment(FRAGMENT)
    meter.commit(commit)
    meter.ended(0)
    found = samples_of(meter)
    assert all(dict(labels)["dataset"] == 'pets "2"' for _, labels in found)
    names = {name for _, labels in found for name, _ in labels}
    assert names == {"dataset", "outcome", "reason", "step", "le"}
    assert "secret" not in generate_latest(meter.registry).decode()


def test_names_are_those_that_ray_exports_and_the_documented_gauges(commit: Commit) -> None:
    meter = PrometheusMeter()
    meter.fragment(FRAGMENT)
    meter.commit(commit)
    meter.ended(0)
    names = {name for name, _ in samples_of(meter) if not name.startswith("vitray_step_seconds")}
    assert names == {f"{name}_total" for name in COUNTERS} | GAUGES.keys()


def test_several_meters_get_the_same(commit: Commit) -> None:
    first, second = PrometheusMeter(), PrometheusMeter()
    both = Meters([first, Meter(), second])
    both.fragment(FRAGMENT)
    both.commit(commit)
    both.progress(Progress(shards=3))
    both.record({"set_aside": {}})
    for meter in (first, second):
        values = samples_of(meter)
        assert values["vitray_images_total", (("outcome", "good"),)] == 7
        assert values["vitray_shard_commits_total", ()] == 1
        assert values["vitray_shards_expected", ()] == 3
