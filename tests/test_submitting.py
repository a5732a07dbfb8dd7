"""`vitray submit` on a real head with its dashboard and a token, on loopback: what travels, how it
is followed, and how it ends.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import free_port
from shards import pictures, put_tars
from test_cluster import Cluster

import vitray
from vitray.errors import ClusterError, JobError
from vitray.operations.submitting import Cluster as Api

VITRAY = [sys.executable, "-m", "vitray"]
IMAGES = 120
METRICS = free_port()


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "CANARY": f"canary-{secrets.token_hex(8)}",
    }
    path = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }  # where the cluster's machines have vitray
    # idle workers beyond a node's CPUs are killed, and started again: minutes on two cores
    often = {"RAY_metrics_report_interval_ms": "500", "RAY_num_workers_soft_limit": "64"}
    cluster = Cluster({**os.environ, **token, **path, **often}, dashboard=free_port())
    try:
        # ports of its own: the agent's default is taken where another Ray runs
        cluster.join(
            f"--metrics-export-port={METRICS}", f"--dashboard-agent-listen-port={free_port()}"
        )
        deadline = time.monotonic() + 60  # the dashboard comes after the head
        while "nobody" not in vitray_on(cluster, "status", "nobody").stderr:
            assert time.monotonic() < deadline
        yield cluster
    finally:
        cluster.end()


def url(head: Cluster) -> str:
    return f"http://127.0.0.1:{head.dashboard}"


def vitray_on(head: Cluster, *argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*VITRAY, *map(str, argv), "--address", url(head)]
    return subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=240, **options
    )


@contextlib.contextmanager
def scraped() -> Iterator[dict[str, float]]:
    """The most that Ray's exporter said of each metric of ours while the block ran, summed over
    tags.
    """
    most: dict[str, float] = {}
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(0.3):
            with contextlib.suppress(OSError):
                page = (
                    urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5)
                    .read()
                    .decode()
                )
                sums: dict[str, float] = {}
                for name, value in re.findall(
                    r"^(ray_vitray_\w+)(?:\{[^}]*\})? (\S+)$", page, re.MULTILINE
                ):
                    sums[name] = sums.get(name, 0) + float(value)
                most.update({name: max(value, most.get(name, 0)) for name, value in sums.items()})

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield most
    finally:
        is_over.set()
        thread.join()


@pytest.fixture
def job_file(shapes_model: str, tmp_path: Path) -> Path:
    put_tars(f"{tmp_path}/in", pictures(IMAGES), 3, tmp_path)
    path = tmp_path / "job.yaml"
    fields = {
        "source": f"{tmp_path}/in/*.tar",
        "model": shapes_model,
        "out": f"{tmp_path}/out",
        "engine": "torch",
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return path


@pytest.mark.ray
def test_a_submitted_job_is_followed_and_ends_as_a_run_does(
    head: Cluster, job_file: Path, tmp_path: Path
) -> None:
    """With a working tree beside it: what its .gitignore names stays here, and so does every
    secret.
    """
    tree = tmp_path / "tree"
    (tree / "data").mkdir(parents=True)
    (tree / ".gitignore").write_text("data/\n")
    (tree / "data" / "large.bin").write_bytes(b"0" * 1000)
    (tree / "labels.csv").write_text("a,b\n")
    with scraped() as metrics:
        done = vitray_on(
            head, "submit", job_file, "--working-dir", tree, "--submission-id", "first"
        )
    assert {name: metrics.get(f"ray_vitray_{name}") for name in ("images_total", "shard_commits_total")} == {
        "images_total": IMAGES, "shard_commits_total": 3,
    }  # fmt: skip
    assert metrics["ray_vitray_bytes_total"] > 0 and metrics["ray_vitray_step_seconds_count"] > 0
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"{IMAGES} rows" in done.stdout
        and "first: SUCCEEDED, exit code 0" in done.stdout
        and done.stderr == ""
    )
    table = vitray.read(str(tmp_path / "out"))
    assert (
        len(set(zip(table["shard"].to_pylist(), table["index"].to_pylist())))
        == len(table)
        == IMAGES
    )
    assert vitray.validate(str(tmp_path / "out")).ok

    assert sorted(path.name for path in tree.iterdir()) == [".gitignore", "data", "labels.csv"]
    (session,) = Path(head.folder).glob("session_2*")
    packed = [path.name for path in session.glob("runtime_resources/working_dir_files/*/*")]
    assert "labels.csv" in packed and "data" not in packed
    everywhere = [
        path.read_bytes()
        for path in [*session.rglob("*"), *(tmp_path / "out").rglob("*")]
        if path.is_file()
    ]
    assert len(everywhere) > 10 and not [
        text for text in everywhere if head.environment["CANARY"].encode() in text
    ]

    found = json.loads(vitray_on(head, "status", "first", "--json").stdout)
    assert (found["status"], found["exit_code"], found["out"]) == (
        "SUCCEEDED",
        0,
        str(tmp_path / "out"),
    )
    for command in ("status", "stop"):
        unknown = vitray_on(head, command, "second")
        assert unknown.returncode == 2 and "knows no submission second" in unknown.stderr, (
            unknown.stderr
        )
    again = vitray_on(head, "status", "first", "--follow")
    assert again.returncode == 0 and f"{IMAGES} rows" in again.stdout
    twice = vitray_on(head, "submit", job_file, "--submission-id", "first")
    assert twice.returncode == 2 and "first was submitted before: SUCCEEDED" in twice.stderr


@pytest.mark.ray
def test_a_job_that_fails_there_fails_here_with_the_same_code(
    head: Cluster, job_file: Path, tmp_path: Path
) -> None:
    bad = vitray_on(head, "submit", job_file, "--set", f"model={tmp_path}/nowhere")
    assert bad.returncode == 2 and "nowhere" in bad.stdout


@pytest.mark.ray
@pytest.mark.nightly
def test_a_shard_set_aside_there_is_3_here(head: Cluster, job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "broken.tar").write_bytes(b"no tar" * 1000)
    assert vitray_on(head, "submit", job_file).returncode == 3


@pytest.mark.ray
def test_ctrl_c_detaches_and_stop_ends_it(head: Cluster, job_file: Path, tmp_path: Path) -> None:
    argv = [*VITRAY, "submit", str(job_file), "--submission-id", "long", "--address", url(head)]
    following = subprocess.Popen(
        argv, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while '"RUNNING"' not in vitray_on(head, "status", "long", "--json").stdout:
        assert time.monotonic() < deadline
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=30)
    assert following.returncode == 130
    assert f"vitray status long --follow --address {url(head)}" in said
    assert '"RUNNING"' in vitray_on(head, "status", "long", "--json").stdout

    stopped = vitray_on(head, "stop", "long")
    assert stopped.returncode == 0 and "long: STOPPED" in stopped.stdout


@pytest.mark.ray
def test_a_wrong_token_and_an_unknown_submission_are_one_line(
    head: Cluster, job_file: Path
) -> None:
    head_with_another = Cluster(
        {**head.environment, "RAY_AUTH_TOKEN": secrets.token_hex(16)}, dashboard=head.dashboard
    )
    refused, unknown = (
        vitray_on(head_with_another, "submit", job_file),
        vitray_on(head, "status", "nobody"),
    )
    for found, rc, kind in ((refused, 1, "ClusterError: "), (unknown, 2, "JobError: ")):
        assert found.returncode == rc and len(found.stderr.strip().splitlines()) == 1
        assert found.stderr.startswith(kind)


@pytest.mark.ray
@pytest.mark.nightly
def test_a_node_that_dies_under_a_submitted_job_costs_no_row(
    head: Cluster, shapes_model: str, tmp_path: Path
) -> None:
    """Three nodes; one is killed when the first shards are committed. The job ends well, and a
    report is made of it.
    """
    for _ in range(2):
        head.join(
            f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"
        )
    images = 2400
    put_tars(f"{tmp_path}/in", pictures(images), 24, tmp_path)
    job = [f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out"]
    given = vitray_on(
        head, "submit", *job, "--submission-id", "three", "--no-wait", "--set", "fragment_rows=32"
    )
    assert given.returncode == 0, given.stderr
    deadline = time.monotonic() + 180
    while len(list((tmp_path / "out" / "data").glob("*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(head.nodes[-1].pid, signal.SIGKILL)
    at = len(list((tmp_path / "out" / "data").glob("*.parquet")))
    done = vitray_on(head, "status", "three", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    table = vitray.read(str(tmp_path / "out"), columns=["shard", "index", "key"])
    assert sorted(table["key"].to_pylist()) == sorted(picture.key for picture in pictures(images))
    assert vitray.validate(str(tmp_path / "out")).ok
    page = tmp_path / "report.html"
    made = subprocess.run(
        [*VITRAY, "report", f"{tmp_path}/out", "--to", str(page)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0 and "2,400" in page.read_text(), made.stderr
    assert at < 24, "the node died too late to matter"


@pytest.mark.ray
@pytest.mark.nightly
def test_a_head_without_a_token_is_refused(job_file: Path) -> None:
    cluster = Cluster({**os.environ, "RAY_AUTH_MODE": "disabled"}, dashboard=free_port())
    try:
        cluster.join()
        deadline = time.monotonic() + 60
        while "answers without a token" not in (
            said := vitray_on(cluster, "submit", job_file).stderr
        ):
            assert time.monotonic() < deadline, said
    finally:
        cluster.end()


def test_what_would_mean_something_else_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match="like http://head:8265"):
        Api("ray://head:10001")
    with pytest.raises(
        ClusterError, match=r"^http://[^ ]*: Connection refused\. Check the address"
    ):
        Api(f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(Api, "__init__", lambda self: None)
    for fields in ({"source": "in/*.tar"}, {"out": "out"}, {"model": "tests"}):
        with pytest.raises(JobError, match="path of this machine"):
            Api().submit(
                vitray.Job(
                    **{"source": "s3://in/*.tar", "model": "a/b", "out": "s3://out", **fields}
                )
            )


class Answering(http.server.BaseHTTPRequestHandler):
    """A job API that answers with `status`, and sends elsewhere."""

    status = 308

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 302, 308, 500, 503])
def test_what_is_or_may_lead_to_an_open_cluster_is_refused(status: int) -> None:
    server = http.server.HTTPServer(
        ("127.0.0.1", 0), type("Said", (Answering,), {"status": status})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    unsure = f"does not say whether it asks for a token .HTTP {status}."
    with pytest.raises(ClusterError, match="answers without a token" if status == 200 else unsure):
        Api(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()


def test_no_secret_is_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError) as malformed:
        Api("http://user:canary@head:8265")
    assert "canary" not in str(malformed.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary\nx")
    with pytest.raises(ClusterError) as told:
        Api("http://head:8265")
    assert "canary" not in str(told.value)


@pytest.mark.parametrize(
    ("code", "printed", "exit_code", "because"),
    [
        (
            4,
            "line one\nline two\ntoo many bad images\n",
            4,
            "Job entrypoint command failed with exit code 4 too many bad images",
        ),
        (
            127,
            "/bin/sh: 1: vitray: not found\n",
            1,
            "the cluster's head has no `vitray` on its PATH: install it there",
        ),
        (None, "", 1, "Job supervisor died"),
    ],
)
def test_a_failure_is_told_by_its_last_line_and_not_by_a_page(
    code: int | None, printed: str, exit_code: int, because: str
) -> None:
    message = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to "
        f"20,000 chars):\n{printed}"
    )
    info = SimpleNamespace(
        status=SimpleNamespace(value="FAILED"),
        driver_exit_code=code,
        message=message if printed else because,
        metadata={"out": "o"},
    )
    api = object.__new__(Api)
    api.address, api._client = "http://head:8265", SimpleNamespace(get_job_info=lambda name: info)
    found = api.find("one")
    assert (found.exit_code, found.message) == (exit_code, because)
    assert str(found).splitlines()[-1] == f"because  {because}"


def test_a_log_that_nobody_can_read_does_not_hide_how_the_job_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy that lets no websocket through."""
    monkeypatch.setattr("vitray.operations.submitting.LOST_S", 1.0)
    states = iter(["RUNNING"] * 4)

    def get_job_info(name: str) -> SimpleNamespace:
        state = next(states, "SUCCEEDED")
        return SimpleNamespace(
            status=SimpleNamespace(value=state),
            driver_exit_code=0,
            message="",
            metadata={"out": "o"},
        )

    def tail_job_logs(name: str) -> None:
        raise OSError("no websocket")

    api = object.__new__(Api)
    api.address, api._client = (
        "http://head:8265",
        SimpleNamespace(get_job_info=get_job_info, tail_job_logs=tail_job_logs),
    )
    assert api.follow("one", print).exit_code == 0


def test_a_head_that_went_is_told_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("WARN_S", 0.1), ("LOST_S", 2.0)):
        monkeypatch.setattr(f"vitray.operations.submitting.{name}", seconds)
    there = iter([True])

    def find(api: Api, name: str) -> None:
        if not next(there, False):
            raise ClusterError("connection refused")

    def tail_job_logs(name: str) -> None:
        raise OSError("no websocket")

    monkeypatch.setattr(Api, "find", find)
    api = object.__new__(Api)
    api.address, api._client = "http://head:8265", SimpleNamespace(tail_job_logs=tail_job_logs)
    with pytest.raises(ClusterError, match="has not answered for 2 s"):
        api.follow("one", print)
    assert (
        caplog.text.count(
            "http://head:8265 does not answer (connection refused); asking again for 1 s"
        )
        == 1
    )


def test_the_address_that_was_said_is_asked_whatever_is_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's client takes RAY_ADDRESS instead."""
    monkeypatch.setattr("vitray.operations.submitting.answers_without_token", lambda address: False)
    asked: list[tuple[str, str | None]] = []

    def client(address: str) -> SimpleNamespace:
        asked.append(
            (address, os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS"))
        )
        return SimpleNamespace()

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", client)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://elsewhere:8265")
    Api("http://head:8265/")
    assert (
        asked == [("http://head:8265", None)]
        and os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"
    )


def test_an_api_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitray.operations.submitting.ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError):
        Api(f"http://127.0.0.1:{silent.getsockname()[1]}")
    asked = object.__new__(Api)
    asked.address = "http://head:8265"
    with pytest.raises(ClusterError, match="has not answered"):
        asked._ask(lambda: time.sleep(30))
