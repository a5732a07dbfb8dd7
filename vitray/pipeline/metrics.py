"""Metrics of a run for Prometheus.

Ray's own exporter publishes them as `ray_vitray_…`, on the port of the driver's node.
"""

from __future__ import annotations

from vitray.dataset import Commit
from vitray.pipeline.events import FragmentWritten, errors_of

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


class Meter:
    """Gets each computed fragment and each commit. This one does nothing: there is no exporter."""

    def fragment(self, event: FragmentWritten) -> None: ...

    def commit(self, commit: Commit) -> None: ...


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
