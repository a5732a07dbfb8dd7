"""Report the end of a run to other systems: to its metrics, and to a URL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from vitray.clock import utc_now
from vitray.operations.notifying import TIMEOUT_S, TRIES, Notification, notification_of
from vitray.operations.run_metrics import MetricsFile
from vitray.operations.runs import summary_of
from vitray.pipeline.metrics import Meter, PrometheusMeter
from vitray.pipeline.progress import Progress
from vitray.storage import absolute

# of a notification, with the number of tries and the seconds for each of them
Send: TypeAlias = Callable[[Notification, int, float], object]


class EndReport(Meter):
    """Follows a run, and reports once how it ended.

    send: called with the notification. meter: of the run, which `file` publishes. Each may be None.
    """

    def __init__(
        self,
        out: str,
        send: Send | None = None,
        meter: PrometheusMeter | None = None,
        file: MetricsFile | None = None,
    ) -> None:
        self._out = absolute(out)
        self._send = send
        self._meter = meter
        self._file = file
        self._record: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._started = time.monotonic()
        self._started_at = utc_now()
        self._is_reported = False
        self._lock = threading.Lock()

    def progress(self, progress: Progress) -> None:
        self._progress = progress

    def record(self, record: Mapping[str, Any]) -> None:
        self._record = dict(record)

    def report(
        self, exit_code: int, error: str = "", tries: int = TRIES, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Report the end, unless that was done. error: the type of the exception that ended it."""
        with self._lock:
            if self._is_reported:
                return
            self._is_reported = True
        if self._meter is not None:
            self._meter.ended(exit_code)
        if self._file is not None:
            self._file.write()
        if self._send is not None:
            summary = summary_of(self._last_record(exit_code, error))
            self._send(notification_of(summary, self._out), tries, timeout_s)

    def _last_record(self, exit_code: int, error: str) -> dict[str, Any]:
        """The run record; without one, as where the source cannot be read, a part of it."""
        measured: dict[str, Any] = {
            "started": self._started_at,
            "finished": utc_now(),
            "seconds": time.monotonic() - self._started,
        }
        if self._progress is not None:
            measured["images"] = self._progress.computed
            measured["reasons"] = dict(self._progress.reasons)
        record = {**measured, **self._record, "exit_code": exit_code}
        if error:
            record.setdefault("ended", error)
        return record
