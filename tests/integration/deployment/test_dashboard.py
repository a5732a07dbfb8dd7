"""The dashboard shows every metric of vitray, by queries that have an answer."""

from __future__ import annotations

import json
import subprocess
import sys

from support.cluster_files import COUNTERS, HISTOGRAMS, exported, exported_without_ray


def test_metrics_come_out_of_ray_under_the_names_that_the_dashboard_asks_for() -> None:
    """Ray's own recorder and exporter, in a process of their own: they are global."""
    code = (
        "import json, sys\nfrom prometheus_client import REGISTRY\n"
        "from ray._private.telemetry.open_telemetry_metric_recorder import "
        "OpenTelemetryMetricRecorder\n"
        "counters, histograms = json.loads(sys.argv[1])\nrecorder = OpenTelemetryMetricRecorder()\n"
        "for name in counters:\n    recorder.register_counter_metric(name, 'd')\n    "
        "recorder.set_metric_value(name, {}, 1.0)\n"
        "for name in histograms:\n    recorder.register_histogram_metric(name, 'd', [1.0])\n    "
        "recorder.set_metric_value(name, {}, 1.0)\n"
        "print(json.dumps([sample.name for metric in REGISTRY.collect() for sample in "
        "metric.samples]))"
    )
    names = json.dumps([list(COUNTERS), list(HISTOGRAMS)])
    done = subprocess.run(
        [sys.executable, "-c", code, names], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    named = {name for name in json.loads(done.stdout) if "vitray" in name}
    assert named == exported().keys() - exported_without_ray().keys()
