"""`vitray submit` on a real head with its dashboard and a token, on loopback."""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from pathlib import Path

from support.clusters import Cluster
from support.submissions import VITRAY, url, vitray_on


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
