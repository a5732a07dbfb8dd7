"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import free_port
from shards import pictures, put_tars
from test_cluster import cluster_of

import vitray
from vitray.errors import ClusterError, JobError
from vitray.operations.costing import estimate, read_prices
from vitray.operations.planning import status
from vitray.pipeline.cluster import typical_machine
from vitray.storage import store_for

VITRAY = [sys.executable, "-m", "vitray"]


@dataclass(frozen=True)
class Measured:
    line: float = 100.0
    decode_core: float = 150.0
    decode: float = 300.0
    model: float = 120.0
    cores: int = 2
    device: str = "cpu"
    limit: str = "model"
    first_rows_s: float = 4.0
    identify_s: float = 5.0
    out_kilobytes: float = 3.0
    gpus: int = 1
    machines: int = 1
    fragment_rows: int = 64
    measured: str = "on this machine"


def test_time_is_start_up_and_images_over_the_rate_of_the_line() -> None:
    found = estimate(36_000, 36, Measured())
    assert (found.seconds, found.out_bytes, found.money) == (1 + 5 + 4 + 360, 108_000_000, None)
    assert estimate(36_000, 36, Measured(), machines=4).seconds == 1 + 5 + 4 + 90
    assert estimate(0, 0, Measured()).seconds == 0
    assert "6.2 min on 1 such machine (100.0 images/s each)" in str(found)


def test_what_one_core_or_gpu_more_would_bring() -> None:
    on_cpu = estimate(1000, 1, Measured())
    assert (on_cpu.more_cpu, on_cpu.more_gpu) == (150.0, None)  # the cores do everything
    starved = Measured(device="cuda", line=290.0, model=2000.0, limit="decode")
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
        Measured(fragment_rows=1024),
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
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "plan.md").read_text()
    table, shown = (
        page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("yaml", "text")
    )
    (tmp_path / "prices.yaml").write_text(table)
    rates = Measured(line=10.6, model=11.4, decode=1060, cores=8, first_rows_s=8, out_kilobytes=3.3)
    assert (
        f"{estimate(1_000_000, 1000, rates, 4, read_prices(str(tmp_path / 'prices.yaml')))}\n"
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


def test_a_plan_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"images": 3}')
    argv = [
        *VITRAY,
        "run",
        "nowhere",
        "--model",
        "m",
        "--out",
        str(tmp_path / "out"),
        "--planned",
        str(tmp_path / "plan.json"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--planned" in done.stderr and not (tmp_path / "out").exists()


def test_a_run_that_was_planned_to_do_nothing_says_what_it_did(
    shapes_model: str, tmp_path: Path
) -> None:
    """Something came after the plan."""
    put_tars(f"{tmp_path}/in", pictures(16), 1, tmp_path)
    (tmp_path / "plan.json").write_text('{"images": 0, "seconds": 0.0}')
    job = [
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--out",
        f"{tmp_path}/out",
        "--set",
        "engine=torch",
    ]
    done = subprocess.run(
        [*VITRAY, "run", *job, "--planned", f"{tmp_path}/plan.json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "out" / "_vitray" / "runs").glob("*.json")
    assert json.loads(record.read_text())["planned"] == {"images": 0, "seconds": 0.0}
    assert "\nplanned " not in str(status(f"{tmp_path}/out"))


@pytest.mark.nightly
def test_the_plan_for_drawn_shapes_comes_true_within_a_quarter(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(600), 6, tmp_path)
    over = []
    for n in range(3):
        job = [f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out-{n}"]
        planned = subprocess.run(
            [*VITRAY, "plan", *job, "--probe", "200", "--json"],
            capture_output=True,
            timeout=240,
            check=True,
        )
        (tmp_path / "plan.json").write_bytes(planned.stdout)
        assert json.loads(planned.stdout)["images"] == pytest.approx(600, rel=0.05)
        subprocess.run(
            [*VITRAY, "run", *job, "--planned", f"{tmp_path}/plan.json"],
            capture_output=True,
            timeout=240,
            check=True,
        )
        (record,) = (tmp_path / f"out-{n}" / "_vitray" / "runs").glob("*.json")
        over.append(json.loads(record.read_text())["seconds_over_planned"])
    print(over)
    real = sum(path.stat().st_size for path in (tmp_path / "out-0" / "data").iterdir())
    assert json.loads(planned.stdout)["out_bytes"] == pytest.approx(
        real, rel=0.4
    )  # a footer a file, whatever is in it
    assert 0.75 <= sorted(over)[1] <= 1.25


# ---------------------------------------------------------------- of a cluster


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
    cluster = Measured(
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


@pytest.mark.parametrize(
    "option", [["--address", "head:6379"], ["--machines", "2"], ["--prices", "prices.yaml"]]
)
def test_what_only_a_probe_takes_is_refused_without_one(option: list[str], tmp_path: Path) -> None:
    argv = [*VITRAY, "plan", f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out", *option]
    alone = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2 and alone.stderr.startswith(
        f"JobError: {option[0]}: only --probe N measures"
    )


def test_a_cluster_that_is_none_is_one_line(tmp_path: Path) -> None:
    put_tars(f"{tmp_path}/in", pictures(4), 1, tmp_path)
    job = [f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out"]
    argv = [*VITRAY, "plan", *job, "--address", f"127.0.0.1:{free_port()}"]
    nobody = subprocess.run(
        [*argv, "--probe", "4", "--json"], capture_output=True, text=True, timeout=120
    )
    assert nobody.returncode == 1 and nobody.stdout == "" and nobody.stderr.count("\n") == 1
    assert (
        nobody.stderr.startswith("ClusterError: Ray at 127.0.0.1:")
        and not (tmp_path / "out").exists()
    )


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_plan_for_a_cluster_comes_true_within_a_quarter(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(2400), 6, tmp_path)
    job = (f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out")
    with cluster_of(1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as cluster:

        def vitray_there(*argv: str) -> bytes:
            argv = (*VITRAY, *argv, "--address", cluster.address, "--json")
            return subprocess.run(
                argv, capture_output=True, timeout=400, check=True, env=cluster.environment
            ).stdout

        planned = vitray_there("plan", *job, "--probe", "200")
        assert not (tmp_path / "out").exists()  # what it wrote there is gone
        said = json.loads(planned)
        assert (
            said["machines"] == 1
            and f"on Ray at {cluster.address}: each step alone on" in said["measured"]
        )
        (tmp_path / "plan.json").write_bytes(planned)
        vitray_there("run", *job, "--planned", f"{tmp_path}/plan.json")
    (record,) = (tmp_path / "out" / "_vitray" / "runs").glob("*.json")
    over = json.loads(record.read_text())["seconds_over_planned"]
    print(said, over)
    assert 0.75 <= over <= 1.25


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_plan_of_a_cluster_that_is_killed_leaves_what_later_ones_remove(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(600), 3, tmp_path)
    job = (f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out")
    left = tmp_path / "out" / "_vitray"
    with cluster_of(1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as cluster:

        def killed(number: int) -> tuple[int, str]:
            argv, begun = (
                [*VITRAY, "plan", *job, "--probe", "200", "--address", cluster.address],
                "probe-*/*/out/_vitray/dataset.json",
            )
            older = set(left.glob(begun))
            running = subprocess.Popen(
                argv, stderr=subprocess.PIPE, text=True, env=cluster.environment
            )
            while not set(left.glob(begun)) - older:
                assert running.poll() is None, running.stderr
                time.sleep(0.1)
            running.send_signal(number)
            return running.wait(30), (running.stderr or sys.stderr).read()

        assert killed(signal.SIGKILL)[0] == -9
        (folder,) = left.glob("probe-*")
        time.sleep(5)  # until the cluster has ended what belonged to it
        for path in folder.rglob("*"):
            os.utime(path, (time.time() - 4000,) * 2)
        code, said = killed(signal.SIGINT)
        assert code == 130 and said.endswith(
            "interrupted; no plan was made. A later plan --probe, run or clean of this dataset "
            "removes _vitray/probe-… from it.\n"
        )
        assert not folder.exists()
        (folder,) = left.glob("probe-*")
        time.sleep(5)
    run = [*VITRAY, "run", *job]
    assert (
        subprocess.run(run, capture_output=True, timeout=120).returncode == 0 and folder.exists()
    )  # its owner may be at work
    assert vitray.read(f"{tmp_path}/out").num_rows == 600
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 4000,) * 2)
    assert (
        subprocess.run(run, capture_output=True, timeout=120).returncode == 0
        and not folder.exists()
    )


@pytest.mark.s3
@pytest.mark.nightly
def test_a_plan_with_everything_on_s3_measures_there_and_leaves_nothing(
    shapes_model: str, s3: str, tmp_path: Path
) -> None:
    put_tars(f"{s3}/in", pictures(96), 3, tmp_path)
    before = [info.url for info in store_for(s3).find(s3)]
    job = [f"{s3}/in/*.tar", "--model", shapes_model, "--out", f"{s3}/out", "--set", "engine=torch"]
    done = subprocess.run(
        [*VITRAY, "plan", *job, "--probe", "32", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (
        said["images"] == pytest.approx(96, rel=0.1)
        and said["seconds"] > 0
        and said["out_bytes"] > 0
    )
    assert [info.url for info in store_for(s3).find(s3)] == before
