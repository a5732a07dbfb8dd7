"""The dashboard shows every metric of vitray, by queries that have an answer."""

from __future__ import annotations

import pytest

from support.cluster_files import COUNTERS, HISTOGRAMS, faults_of_query, text_of


def test_the_dashboard_shows_every_metric_of_vitray() -> None:
    text = text_of("grafana.json")
    assert [name for name in COUNTERS if f"ray_{name}_total" not in text] == []
    assert [name for name in HISTOGRAMS if f"ray_{name}_bucket" not in text] == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(ray_vitray_image_total[5m]))",
        "sum(rate(ray_vitray_images_total[5m])",
        "sum by (kind) (ray_vitray_images_total)",
    ],
)
def test_a_query_that_would_show_nothing_is_refused(query: str) -> None:
    assert faults_of_query(query, "")
    assert faults_of_query("sum by (outcome) (ray_vitray_images_total)", "{{outcomes}}")
