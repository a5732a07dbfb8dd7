"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.paths import ROOT
from vitray.errors import ClusterError, JobError
from vitray.operations.bench import Bench
from vitray.operations.costing import estimate, read_prices
from vitray.pipeline.cluster import typical_machine


def rates(**fields: object) -> Bench:
    """The rates of one machine with two cores, with `fields` changed."""
    values: dict[str, object] = {
        "images": 256,
        "kilobytes": 100.0,
        "cores": 2,
        "device": "cpu",
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 16,
        "decode_mode": "exact",
        "read": 1000.0,
        "decode_core": 150.0,
        "decode": 300.0,
        "model": 120.0,
        "ceiling": 150.0,
        "gflops": 500.0,
        "line": 100.0,
        "first_rows_s": 4.0,
        "identify_s": 5.0,
        "out_kilobytes": 3.0,
        "fragment_rows": 64,
        "limit": "model",
    }
    return Bench(**(values | fields))


def test_time_is_start_up_plus_images_over_the_pipeline_rate() -> None:
    found = estimate(36_000, 36, rates())
    assert (found.seconds, found.out_bytes, found.money) == (1 + 5 + 4 + 360, 108_000_000, None)
    assert estimate(36_000, 36, rates(), machines=4).seconds == 1 + 5 + 4 + 90
    assert estimate(0, 0, rates()).seconds == 0
    assert "6.2 min on 1 such machine (100.0 images/s each)" in str(found)


def test_what_one_core_or_gpu_more_would_bring() -> None:
    on_cpu = estimate(1000, 1, rates())
    assert (on_cpu.more_cpu, on_cpu.more_gpu) == (150.0, None)  # the cores do everything
    starved = rates(device="cuda", line=290.0, model=2000.0, limit="decode")
    fed = replace(starved, line=1900.0, decode=30_000.0, limit="model")
    assert (
        estimate(1000, 1, starved).more_cpu == 435.0
        and estimate(1000, 1, starved).more_gpu == 300.0
    )  # still starved
    assert (
        estimate(1000, 1, fed).more_gpu == 4000.0 and round(estimate(1000, 1, fed).more_cpu) == 1910
    )


def test_money_is_machines_requests_and_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(
        "machine_hour: 0.5\nput_1000: 0.005\nget_1000: 0.0004\ngb_month: 0.023\n"
    )
    found = estimate(
        10_000_000,
        1000,
        rates(fragment_rows=1024),
        machines=10,
        prices=read_prices(str(tmp_path / "prices.yaml")),
    )
    assert found.money is not None
    assert round(found.money["machines"], 3) == round((10 + 10_000) / 3600 * 10 * 0.5, 3)
    assert round(found.money["requests"], 6) == round(
        (6000 + 9766) / 1000 * 0.005 + (13_000 + 2 * 9766) / 1000 * 0.0004, 6
    )
    assert round(found.money["gb_month"], 6) == round(30 * 0.023, 6)
    assert "money      machines 13.90, requests 0.09; then 0.69 a month for what is stored" in str(
        found
    )


def test_the_page_shows_what_is_said(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text()
    table = page.partition("```yaml\n")[2].partition("```")[0]
    shown = "time " + page.partition("```text\ntime ")[2].partition("```")[0]
    (tmp_path / "prices.yaml").write_text(table)
    measured = rates(line=10.6, model=11.4, decode=1060, cores=8, first_rows_s=8, out_kilobytes=3.3)
    assert (
        f"{estimate(1_000_000, 1000, measured, 4, read_prices(str(tmp_path / 'prices.yaml')))}\n"
        == shown
    )


@pytest.mark.parametrize(
    "text",
    ["", "- 1", "machine_hour: yes", "machine_hour: -1", "gpu: 3", "a: [", "put_1000: cheap"],
)
def test_what_is_no_table_of_prices_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match="--prices"):
        read_prices(str(path))


def test_a_table_of_prices_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"--prices .*prices\.yaml cannot be read: No such file or directory$"
    ):
        read_prices(str(tmp_path / "prices.yaml"))


def test_the_machine_to_measure_on_is_of_the_commonest_size_that_computes() -> None:
    def node(name: str, cpus: float, gpus: float = 0) -> dict[str, object]:
        return {
            "NodeID": name,
            "NodeManagerAddress": f"10.0.0.{name}",
            "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        }

    nodes = [
        node("1", 1),
        node("2", 4),
        node("3", 8, 1),
        node("4", 4),
        node("5", 16, 4),
        node("6", 16, 4),
    ]
    on_gpus, on_cpus = typical_machine(nodes, "auto"), typical_machine(nodes[:4], "cpu")
    assert (on_gpus.node, on_gpus.cpus, on_gpus.gpus, on_gpus.same_size, on_gpus.other_sizes) == (
        "5",
        16,
        4,
        2,
        4,
    )
    assert (on_cpus.node, on_cpus.cpus, on_cpus.gpus, on_cpus.same_size, on_cpus.other_sizes) == (
        "2",
        4,
        0,
        2,
        2,
    )
    assert (
        typical_machine([node("1", 4), node("2", 2)], "auto").cpus == 2
    )  # of equally many the smaller: no promise is too large
    with pytest.raises(ClusterError, match="needs 2"):
        typical_machine([node("1", 1)], "auto")


def test_a_cluster_is_the_machines_that_were_measured() -> None:
    cluster = rates(
        device="cuda",
        decode=9000.0,
        model=4000.0,
        gpus=4,
        machines=3,
        measured="on Ray at head:6379",
    )
    found = estimate(36_000, 36, cluster)
    assert (found.machines, found.seconds, found.more_gpu) == (3, 1 + 5 + 4 + 120, 5000.0)
    assert estimate(36_000, 36, cluster, machines=6).seconds == 1 + 5 + 4 + 60
    assert (
        "2.2 min on 3 such machines (100.0 images/s each)\nmeasured   on Ray at head:6379\n"
        in str(found)
    )
