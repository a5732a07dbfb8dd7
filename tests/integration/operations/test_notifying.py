"""A message that cannot be delivered costs a warning, never the run."""

from __future__ import annotations

import logging
import socket
import time

import pytest

from support.webhooks import webhook
from vitray.operations import notifying
from vitray.operations.notifying import parse_target, post

MESSAGE = '{"exit_code": 0}'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "WAITS_S", (0.01, 0.01))


@pytest.mark.parametrize(
    ("answers", "requests", "is_taken", "says"),
    [
        ([200], 1, True, ""),
        ([500, 429, 204], 3, True, ""),
        ([503], 3, False, "it answered 503"),
        ([404], 1, False, "it answered 404"),
    ],
)
def test_passing_failures_are_tried_three_times(
    answers: list[int],
    requests: int,
    is_taken: bool,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with webhook(answers) as hook, caplog.at_level(logging.WARNING):
        assert post(parse_target(f"{hook.url}/SECRET?key=SECRET"), MESSAGE) == is_taken
    assert hook.messages == [{"exit_code": 0}] * requests
    assert says in caplog.text and bool(caplog.text) == (not is_taken)
    assert "SECRET" not in caplog.text


def test_a_redirect_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    with webhook() as other, webhook([307], f"{other.url}/SECRET") as hook:
        assert not post(parse_target(hook.url), MESSAGE)
    assert (len(hook.requests), other.requests) == (1, [])
    assert "it answered 307" in caplog.text and "SECRET" not in caplog.text


def test_the_name_and_password_of_a_url_are_a_header() -> None:
    with webhook() as hook:
        assert post(parse_target(hook.url.replace("//", "//user:pass@")), MESSAGE)
    ((path, headers, _),) = hook.requests
    assert (path, headers["Authorization"]) == ("/hook", "Basic dXNlcjpwYXNz")
    assert headers["Content-Type"] == "application/json"


def test_a_server_that_never_answers_costs_the_time_out_of_each_try(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert not post(parse_target(url), MESSAGE, tries=2, timeout_s=0.3)
        assert time.monotonic() - started < 3
    assert "could not notify http://127.0.0.1:" in caplog.text
