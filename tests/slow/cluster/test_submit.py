"""`vitray submit` on a real head with its dashboard and a token, on loopback."""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import vitray
from support.clusters import Cluster
from support.schemas import checked
from support.submissions import IMAGES, METRICS, VITRAY, url, vitray_on


def test_a_job_that_fails_there_fails_here_with_the_same_code(
    head: Cluster, job_file: Path, tmp_path: Path
) -> None:
    bad = vitray_on(head, "submit", job_file, "--set", f"model={tmp_path}/nowhere")
    assert bad.returncode == 2 and "nowhere" in bad.stdout


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

    found = checked(vitray_on(head, "status", "first", "--json").stdout)
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
