"""Tell a URL how a run ended, by a JSON object. A failure here never fails the run."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from vitray.errors import JobError, count, one_line
from vitray.operations.costing import span
from vitray.operations.runs import RunSummary
from vitray.version import __version__

VERSION = 1  # of the JSON; a field that is added does not change it
TRIES = 3
TIMEOUT_S = 10.0
WAITS_S = (1.0, 4.0)  # before the second and the third try
# What a message may have of a run. The text of an error is left out: it can have keys and paths.
FIELDS = tuple(f.name for f in dataclasses.fields(RunSummary) if f.name != "message")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where messages go. shown: the URL for logs, without anything that could be a secret.

    Webhooks have their secret in the path, the query or the user's name: `shown` has none of them.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    shown: str


def parse_target(url: str) -> Target:
    """The target of an http or https URL. Raises JobError for anything else."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobError("--notify: give a URL that begins with http:// or https://.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port is None else f"{host}:{port}"
    headers = {"Content-Type": "application/json", "User-Agent": f"vitray/{__version__}"}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    bare = parts._replace(netloc=place, fragment="").geturl()
    return Target(bare, headers, f"{parts.scheme}://{place}")


def message_of(summary: RunSummary, out: str) -> dict[str, Any]:
    """The JSON object about a run: counts and times, no keys of images and no error text."""
    fields = {name: getattr(summary, name) for name in FIELDS}
    return {"version": VERSION, "text": _text(summary, out), "out": out, **fields}


def _text(summary: RunSummary, out: str) -> str:
    """One line for people; chat systems such as Slack show this field."""
    parts = [f"vitray: {out}: {summary.outcome}"]
    if summary.error:
        parts[0] += f" ({summary.error})"
    if summary.images is not None:
        parts.append(count(summary.images, "image"))
    if summary.seconds is not None:
        parts.append(span(summary.seconds))
    return ", ".join([*parts, f"exit code {summary.exit_code}"])


def post(
    target: Target, message: Mapping[str, Any], tries: int = TRIES, timeout_s: float = TIMEOUT_S
) -> bool:
    """Whether the target took the message. Logs a warning if it did not; raises nothing.

    timeout_s: of each try. A redirect is not followed: it could lead to another scheme or host.
    """
    body = json.dumps(message).encode()
    problem: list[str] = ["no answer in time"]
    is_taken = threading.Event()

    def attempt_all() -> None:
        for attempt in range(tries):
            if attempt:
                time.sleep(WAITS_S[attempt - 1])
            why, may_help = _attempt(target, body, timeout_s)
            if not why:
                is_taken.set()
                return
            problem[0] = why
            if not may_help:
                return

    # A server that sends a byte now and then would never reach the time-out of a socket.
    thread = threading.Thread(target=attempt_all, daemon=True)
    thread.start()
    thread.join(tries * timeout_s + sum(WAITS_S[: tries - 1]))
    if not is_taken.is_set():
        log.warning("--notify: %s was not told how the run ended: %s", target.shown, problem[0])
    return is_taken.is_set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _attempt(target: Target, body: bytes, timeout_s: float) -> tuple[str, bool]:
    """(why it failed, whether another try may help); ("", False) when it was taken."""
    request = urllib.request.Request(target.url, body, dict(target.headers), method="POST")
    try:
        urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        error.close()
        is_passing = error.code >= 500 or error.code in (
            HTTPStatus.REQUEST_TIMEOUT,
            HTTPStatus.TOO_MANY_REQUESTS,
        )
        return f"it answered {error.code}", is_passing
    except urllib.error.URLError as error:
        reason = error.reason
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else None
        return text or one_line(reason if isinstance(reason, OSError) else "no connection"), True
    except Exception as error:  # of http.client, whose messages may have the URL
        return type(error).__name__, True
    return "", False
