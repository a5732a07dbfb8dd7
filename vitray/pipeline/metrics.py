"""Metrics of a run for Prometheus.

Ray's own exporter publishes the counters of RayMeter as `ray_vitray_…`, on the port of the driver's
node. PrometheusMeter needs no Ray: `vitray run --metrics-file` and `--metrics-port` publish it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitray.dataset import Commit
from vitray.pipeline.events import FragmentWritten, errors_of
from vitray.pipeline.progress import Progress

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Name, then description and tags.
COUNTERS = {
    "vitray_images": ("images, good or bad", ("outcome",)),
    "vitray_bytes": ("bytes of encoded images that were read", ()),
    "vitray_failures": ("bad images by reason", ("reason",)),
    "vitray_shard_commits": ("shards whose data file exists", ()),
}
STEP_SECONDS = (
    "vitray_step_seconds",
    "seconds of a stage for one fragment; of step commit: for one shard",
    ("step",),
)
BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


# Of PrometheusMeter alone: name, then description.
GAUGES = {
    "vitray_shards_expected": "shards of this run",
    "vitray_shards_done": "shards of this run whose data file exists",
    "vitray_shards_set_aside": "shards that could not be read; after a run, those not accepted",
    "vitray_run_start_timestamp_seconds": "when the run began",
    "vitray_run_progress_timestamp_seconds": "when the last fragment or shard was done, else the "
    "start of the run",
    "vitray_run_end_timestamp_seconds": "when the run ended; absent while it works",
    "vitray_run_exit_code": "exit code of the run; absent while it works",
    "vitray_run_duration_seconds": "how long the run took; absent while it works",
    "vitray_run_last_complete_timestamp_seconds": "when a run last ended with exit code 0; absent "
    "before the first",
}


class Meter:
    """Gets what a run does. This one does nothing: there is no exporter."""

    def fragment(self, event: FragmentWritten) -> None:
        """A fragment was computed."""

    def commit(self, commit: Commit) -> None:
        """A shard was committed."""

    def progress(self, progress: Progress) -> None:
        """Called again and again while the run works."""

    def record(self, record: Mapping[str, Any]) -> None:
        """The run record, as the run ends; also where it fails."""


class Meters(Meter):
    """Several meters as one."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters

    def fragment(self, event: FragmentWritten) -> None:
        for meter in self._meters:
            meter.fragment(event)

    def commit(self, commit: Commit) -> None:
        for meter in self._meters:
            meter.commit(commit)

    def progress(self, progress: Progress) -> None:
        for meter in self._meters:
            meter.progress(progress)

    def record(self, record: Mapping[str, Any]) -> None:
        for meter in self._meters:
            meter.record(record)


class RayMeter(Meter):
    """Counts one run, on the machine of its driver. Ray must be running."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._counters = {
            name: Counter(name, description=description, tag_keys=tags)
            for name, (description, tags) in COUNTERS.items()
        }
        name, description, tags = STEP_SECONDS
        self._seconds = Histogram(
            name, description=description, boundaries=BOUNDARIES, tag_keys=tags
        )

    def fragment(self, event: FragmentWritten) -> None:
        bad = errors_of(event)
        images = {"good": event.stop - event.start - bad, "bad": bad}
        for outcome, count in images.items():
            self._add("vitray_images", count, {"outcome": outcome})
        self._add("vitray_bytes", event.size_bytes, {})
        for reason, count in event.reasons.items():
            self._add("vitray_failures", count, {"reason": reason})
        for stage, seconds in event.seconds.items():
            self._seconds.observe(seconds, {"step": stage})

    def commit(self, commit: Commit) -> None:
        self._add("vitray_shard_commits", 1, {})
        self._seconds.observe(commit.seconds, {"step": "commit"})

    def _add(self, name: str, count: int, tags: dict[str, str]) -> None:
        if count:  # Ray refuses zeros
            self._counters[name].inc(count, tags)


class PrometheusMeter(Meter):
    """Counts one run in a registry of prometheus_client, without Ray.

    name: the value of a label `dataset` on every metric; no such label if it is empty. Nothing from
    the data becomes a label. last_complete: when an earlier run ended with exit code 0, in seconds
    since 1970; None if it is not known.
    """

    def __init__(self, name: str = "", last_complete: float | None = None) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            disable_created_metrics,
        )

        # else there is a series for each series, which says when the process began
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry: CollectorRegistry = CollectorRegistry()
        self._labels = {"dataset": name} if name else {}
        labels = tuple(self._labels)
        self._counters = {
            metric: Counter(metric, text, (*labels, *tags), registry=self.registry)
            for metric, (text, tags) in COUNTERS.items()
        }
        metric, text, tags = STEP_SECONDS
        self._seconds = Histogram(
            metric, text, (*labels, *tags), registry=self.registry, buckets=BOUNDARIES
        )
        self._gauge_type = Gauge
        self._gauges: dict[str, Gauge] = {}
        self._started = time.time()
        for outcome in ("good", "bad"):  # a rate needs the zero before the first image
            self._add("vitray_images", 0, outcome=outcome)
        self._add("vitray_bytes", 0)
        self._add("vitray_shard_commits", 0)
        self.progress(Progress())
        self._set("vitray_run_start_timestamp_seconds", self._started)
        self._set("vitray_run_progress_timestamp_seconds", self._started)
        if last_complete is not None:
            self._set("vitray_run_last_complete_timestamp_seconds", last_complete)

    def fragment(self, event: FragmentWritten) -> None:
        bad = errors_of(event)
        self._add("vitray_images", event.stop - event.start - bad, outcome="good")
        self._add("vitray_images", bad, outcome="bad")
        self._add("vitray_bytes", event.size_bytes)
        for reason, count in event.reasons.items():
            self._add("vitray_failures", count, reason=str(reason))
        for stage, seconds in event.seconds.items():
            self._observe(stage, seconds)
        self._set("vitray_run_progress_timestamp_seconds", time.time())

    def commit(self, commit: Commit) -> None:
        self._add("vitray_shard_commits", 1)
        self._observe("commit", commit.seconds)
        self._set("vitray_run_progress_timestamp_seconds", time.time())

    def progress(self, progress: Progress) -> None:
        self._set("vitray_shards_expected", progress.shards)
        self._set("vitray_shards_done", progress.shards_done)
        self._set("vitray_shards_set_aside", progress.set_aside)

    def record(self, record: Mapping[str, Any]) -> None:
        if "set_aside" in record:
            self._set("vitray_shards_set_aside", len(record["set_aside"]))

    def ended(self, exit_code: int) -> None:
        """The run ended now, with this exit code."""
        now = time.time()
        self._set("vitray_run_end_timestamp_seconds", now)
        self._set("vitray_run_exit_code", exit_code)
        self._set("vitray_run_duration_seconds", now - self._started)
        if exit_code == 0:
            self._set("vitray_run_last_complete_timestamp_seconds", now)

    def _add(self, name: str, count: int, **tags: str) -> None:
        counter = self._counters[name]
        labels = {**self._labels, **tags}
        (counter.labels(**labels) if labels else counter).inc(count)

    def _observe(self, step: str, seconds: float) -> None:
        self._seconds.labels(**self._labels, step=step).observe(seconds)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:  # a gauge that is never set would be 0
            self._gauges[name] = self._gauge_type(
                name, GAUGES[name], tuple(self._labels), registry=self.registry
            )
        gauge = self._gauges[name]
        (gauge.labels(**self._labels) if self._labels else gauge).set(value)
