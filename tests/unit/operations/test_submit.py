"""`vitray submit` on a real head with its dashboard and a token, on loopback: what travels, how it
is followed, and how it ends.
"""

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
