"""Publish the metrics of a run without Ray: as a file for node_exporter, or on a port."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator

from vitray.errors import JobError, one_line
from vitray.pipeline.metrics import Meter, PrometheusMeter
from vitray.pipeline.progress import Progress

WRITE_EVERY_S = 10.0
SUFFIX = ".prom"  # node_exporter reads no other files
FIRST_BYTES = b"# HELP vitray_"  # of a file that vitray wrote
LAST_COMPLETE = "vitray_run_last_complete_timestamp_seconds"

log = logging.getLogger(__name__)


def require_metrics_path(path: str) -> None:
    """Raise JobError unless this is FILE.prom, new, empty or with the metrics of an earlier run."""
    if not path.endswith(SUFFIX):
        raise JobError(f"--metrics-file {path}: give a path that ends in {SUFFIX}.")
    try:
        with open(path, "rb") as file:
            start = file.read(len(FIRST_BYTES))
    except FileNotFoundError:
        return
    except OSError as error:
        raise JobError(
            f"--metrics-file {path} cannot be read: {error.strerror or error}."
        ) from error
    if start not in (b"", FIRST_BYTES):
        raise JobError(
            f"--metrics-file {path} exists, and is no metrics file of vitray: it would be "
            "replaced. Give another path, or delete the file."
        )


class MetricsFile(Meter):
    """Writes a meter's registry to a file, at most every WRITE_EVERY_S while the run works.

    Each write replaces the file as a whole, as node_exporter's textfile collector asks for. Raises
    JobError where the file cannot be written at first; later failures are logged once.
    """

    def __init__(self, path: str, meter: PrometheusMeter) -> None:
        self._path = path
        self._meter = meter
        self._has_failed = False
        try:
            self._replace()
        except OSError as error:
            raise JobError(
                f"--metrics-file {path} cannot be written: {error.strerror or error}."
            ) from error

    def progress(self, progress: Progress) -> None:
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Replace the file now."""
        try:
            self._replace()
        except OSError as error:
            if not self._has_failed:
                log.warning("--metrics-file %s: %s", self._path, error.strerror or error)
            self._has_failed = True

    def _replace(self) -> None:
        from prometheus_client import write_to_textfile

        self._written_at = time.monotonic()
        write_to_textfile(self._path, self._meter.registry)


def last_complete_in(path: str) -> float | None:
    """When a run last ended with exit code 0, by the metrics file of an earlier run."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with open(path, encoding="utf-8") as file:
            for family in text_string_to_metric_families(file.read()):
                for sample in family.samples:
                    if sample.name == LAST_COMPLETE:
                        return float(sample.value)
    except (OSError, ValueError):  # no such file yet, or a damaged one, which this run replaces
        pass
    return None


@contextlib.contextmanager
def served(meter: PrometheusMeter, host: str, port: int) -> Iterator[str]:
    """Serve a meter's registry over HTTP. Yields the URL. port: 0 takes a free one.

    Raises JobError where this machine does not let the command listen there.
    """
    from prometheus_client import start_http_server

    try:
        server, _ = start_http_server(port, host, meter.registry)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else one_line(error)
        raise JobError(
            f"--metrics-port {port}: no metrics on {host}: {why}. Choose another port, or 0 for a "
            "free one."
        ) from error
    shown_host = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown_host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
