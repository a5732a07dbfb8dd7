"""Notify a URL of the end of a run, by a JSON object. A failure here never fails the run."""

from __future__ import annotations

import base64
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

from vitray.budget import Limit
from vitray.errors import JobError, count, one_line
from vitray.operations.costing import span
from vitray.operations.runs import Outcome, RunSummary
from vitray.version import __version__

TRIES = 3
TIMEOUT_S = 10.0
WAITS_S = (1.0, 4.0)  # before the second and the third try

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
        raise JobError(
            "--notify or VITRAY_NOTIFY: give a URL that begins with http:// or https://."
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port is None else f"{host}:{port}"
    headers = {"Content-Type": "application/json", "User-Agent": f"vitray/{__version__}"}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    bare = parts._replace(netloc=place, fragment="").geturl()
    return Target(bare, headers, f"{parts.scheme}://{place}")


@dataclass(frozen=True, slots=True)
class Notification:
    """How a run ended, as `run --notify` posts it: counts and times, no keys and no error text.

    Values are null where they are not known. text: one line for people, which chat systems such as
    Slack show. out: the dataset. run: the id of the run. kind: `run`. started, finished: in ISO
    format, in UTC. bad_images: by reason. committed, set_aside, truncated, pending: shards. pruned:
    removed rows. cost: by purpose, with its `total`; null without prices. error: the type of the
    error that ended the run. limit: of the budget, which ended it.
    """

    text: str
    out: str
    run: str
    kind: str
    outcome: Outcome
    exit_code: int
    started: str | None
    finished: str | None
    seconds: float | None
    images: int | None
    bad_images: dict[str, int]
    committed: int | None
    set_aside: int | None
    truncated: int | None
    pending: int | None
    pruned: int | None
    cost: dict[str, float] | None
    error: str | None
    limit: Limit | None


def notification_of(summary: RunSummary, out: str) -> Notification:
    """The notification about a run. Texts of errors are left out: they can have keys and paths."""
    return Notification(
        text=_text(summary, out),
        out=out,
        run=summary.run,
        kind=summary.kind,
        outcome=summary.outcome,
        exit_code=summary.exit_code,
        started=summary.started,
        finished=summary.finished,
        seconds=summary.seconds,
        images=summary.images,
        bad_images=summary.bad_images,
        committed=summary.committed,
        set_aside=summary.set_aside,
        truncated=summary.truncated,
        pending=summary.pending,
        pruned=summary.pruned,
        cost=summary.cost,
        error=summary.error,
        limit=summary.limit,
    )


def _text(summary: RunSummary, out: str) -> str:
    """One line for people."""
    parts = [f"vitray: {out}: {summary.outcome}"]
    if cause := summary.error or summary.limit:
        parts[0] += f" ({cause})"
    if summary.images is not None:
        parts.append(count(summary.images, "image"))
    if summary.seconds is not None:
        parts.append(span(summary.seconds))
    return ", ".join([*parts, f"exit code {summary.exit_code}"])


def post(target: Target, body: str, tries: int = TRIES, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the target took the JSON in `body`. Logs a warning if it did not; raises nothing.

    timeout_s: of each try. A redirect is not followed: it could lead to another scheme or host.
    """
    content = body.encode()
    problem: list[str] = ["no answer in time"]
    is_taken = threading.Event()

    def attempt_all() -> None:
        for attempt in range(tries):
            if attempt:
                time.sleep(WAITS_S[attempt - 1])
            why, may_help = _attempt(target, content, timeout_s)
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
        log.warning("--notify: could not notify %s: %s", target.shown, problem[0])
    return is_taken.is_set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _attempt(target: Target, content: bytes, timeout_s: float) -> tuple[str, bool]:
    """(why it failed, whether another try may help); ("", False) when it was taken."""
    request = urllib.request.Request(target.url, content, dict(target.headers), method="POST")
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
