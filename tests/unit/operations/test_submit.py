"""Submissions with a stand-in for Ray's client: refused input, messages and lost connections."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import vitray
from support.s3 import free_port
from vitray.errors import ClusterError, JobError
from vitray.operations.submitting import Cluster as Api
from vitray.operations.submitting import answer_in_time

HEAD = "http://head:8265"


def test_paths_of_this_machine_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(JobError, match="like http://head:8265"):
        Api("ray://head:10001")
    with pytest.raises(
        ClusterError, match=r"^http://[^ ]*: Connection refused\. Check the address"
    ):
        Api(f"http://127.0.0.1:{free_port()}")
    for fields in ({"source": "in/*.tar"}, {"out": "out"}, {"model": "tests"}):
        with pytest.raises(JobError, match="path of this machine"):
            Api(HEAD, client=SimpleNamespace()).submit(
                vitray.Job(
                    **{"source": "s3://in/*.tar", "model": "a/b", "out": "s3://out", **fields}
                )
            )


def test_no_secret_is_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError) as malformed:
        Api("http://user:canary@head:8265")
    assert "canary" not in str(malformed.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary\nx")
    with pytest.raises(ClusterError) as unprintable:
        Api(HEAD)
    assert "canary" not in str(unprintable.value)


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
def test_failed_job_is_reported_with_the_last_line_of_its_log(
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
    submission = Api(HEAD, client=SimpleNamespace(get_job_info=lambda name: info)).find("one")
    assert (submission.exit_code, submission.message) == (exit_code, because)
    assert str(submission).splitlines()[-1] == f"because  {because}"


def test_unreadable_log_does_not_hide_how_the_job_ended(
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

    client = SimpleNamespace(get_job_info=get_job_info, tail_job_logs=tail_job_logs)
    assert Api(HEAD, client=client).follow("one", print).exit_code == 0


def test_lost_head_is_reported_once_before_following_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("WARN_S", 0.1), ("LOST_S", 2.0)):
        monkeypatch.setattr(f"vitray.operations.submitting.{name}", seconds)
    is_reachable = iter([True])

    def find(api: Api, name: str) -> None:
        if not next(is_reachable, False):
            raise ClusterError("connection refused")

    def tail_job_logs(name: str) -> None:
        raise OSError("no websocket")

    monkeypatch.setattr(Api, "find", find)
    api = Api(HEAD, client=SimpleNamespace(tail_job_logs=tail_job_logs))
    with pytest.raises(ClusterError, match="has not answered for 2 s"):
        api.follow("one", print)
    assert (
        caplog.text.count(
            "http://head:8265 does not answer (connection refused); asking again for 1 s"
        )
        == 1
    )


def test_given_address_takes_precedence_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's client takes RAY_ADDRESS instead."""
    monkeypatch.setattr("vitray.operations.submitting.answers_without_token", lambda address: False)
    addresses: list[tuple[str, str | None]] = []

    def client(address: str) -> SimpleNamespace:
        addresses.append(
            (address, os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS"))
        )
        return SimpleNamespace()

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", client)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://elsewhere:8265")
    Api("http://head:8265/")
    assert addresses == [("http://head:8265", None)]
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"


def test_silent_job_api_raises_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitray.operations.submitting.ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError):
        Api(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(ClusterError, match="has not answered"):
        answer_in_time(HEAD, lambda: time.sleep(30))
