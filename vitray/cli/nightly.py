"""Options of `run` for jobs that run on a schedule: metrics, a notification, prices and limits."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from vitray.budget import PRICES
from vitray.cli.interrupts import REPORT_S, on_interrupt
from vitray.cli.json_output import json_text
from vitray.cli.options import expand_path
from vitray.errors import JobError, VitrayError
from vitray.exit_codes import ExitCode

if TYPE_CHECKING:
    from vitray.budget import Budget
    from vitray.operations.notifying import Notification
    from vitray.operations.run_metrics import MetricsFile
    from vitray.operations.run_reports import Send
    from vitray.pipeline.metrics import Meter, PrometheusMeter

PANEL = "Every night"
DEFAULT_HOST = "127.0.0.1"
NOTIFY = "VITRAY_NOTIFY"  # environment variable that replaces the option
SIGNALLED = 128  # exit codes above it are of signals

log = logging.getLogger(__name__)

MetricsFileOption = Annotated[
    str | None,
    typer.Option(
        "--metrics-file",
        metavar="FILE.prom",
        help="write Prometheus metrics for node_exporter's textfile collector",
        callback=expand_path,
        rich_help_panel=PANEL,
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        help="serve Prometheus metrics while the run works; 0 takes a free port",
        min=0,
        max=65535,
        rich_help_panel=PANEL,
    ),
]
MetricsHost = Annotated[
    str | None,
    typer.Option(
        "--metrics-host",
        metavar="ADDRESS",
        help=f"listen on this address (default: {DEFAULT_HOST})",
        rich_help_panel=PANEL,
    ),
]
MetricsName = Annotated[
    str | None,
    typer.Option(
        "--metrics-name",
        metavar="NAME",
        help="the label `dataset` of every metric (default: no label)",
        rich_help_panel=PANEL,
    ),
]
Notify = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="URL",
        envvar=NOTIFY,  # other users of the machine can read the command line
        help=f"post a JSON summary there when the run ends, also when it fails; or set {NOTIFY}",
        rich_help_panel=PANEL,
    ),
]
Prices = Annotated[
    str | None,
    typer.Option(
        "--prices",
        metavar="PRICES.yaml",
        help=f"record what the run costs: {', '.join(PRICES)}",
        callback=expand_path,
        rich_help_panel=PANEL,
    ),
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours",
        metavar="HOURS",
        help="end the run after this time, with exit code 7; the same command continues",
        rich_help_panel=PANEL,
    ),
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        metavar="AMOUNT",
        help="end the run at this cost, with exit code 7; needs --prices with machine_hour",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True, slots=True)
class Nightly:
    """The options as they were given."""

    metrics_file: str | None = None
    metrics_port: int | None = None
    metrics_host: str | None = None
    metrics_name: str | None = None
    notify: str | None = None
    prices: str | None = None
    max_hours: float | None = None
    max_cost: float | None = None

    def budget(self) -> Budget:
        """The prices and limits of the run. Raises JobError."""
        from vitray.budget import Budget
        from vitray.operations.costing import read_prices

        prices = {} if self.prices is None else read_prices(self.prices)
        return Budget(self.max_hours, self.max_cost, prices)


@dataclass(slots=True)
class RunReporting:
    """What a run gives to other systems. exit_code: of a run that returns; set it then."""

    meter: Meter | None = None
    exit_code: int = field(default=ExitCode.DONE)


NOT_NIGHTLY = Nightly()


@contextlib.contextmanager
def report_end(options: Nightly, out: str) -> Iterator[RunReporting]:
    """Report a run to other systems, from its start to its end, however it ends.

    The exit code is that of the exception that leaves the block, else the one set in it. Raises
    JobError, before the block, where an option does not fit.
    """
    _require_metrics(options)
    if options.notify is None and options.metrics_file is None and options.metrics_port is None:
        yield RunReporting()  # which does without the imports below
        return
    from vitray.operations.run_reports import EndReport
    from vitray.pipeline.metrics import Meters

    send = None if options.notify is None else _sender(options.notify)
    with contextlib.ExitStack() as stack:
        meter, file = _metrics(options, stack)
        end = EndReport(out, send, meter, file)
        listener = functools.partial(end.report, tries=1, timeout_s=REPORT_S)
        stack.enter_context(on_interrupt(listener))
        try:
            reporting = RunReporting(Meters([m for m in (meter, file, end) if m is not None]))
            yield reporting
        except BaseException as error:
            code = _code_of(error)
            name = "" if isinstance(error, (typer.Exit, SystemExit)) else type(error).__name__
            if code > SIGNALLED:  # the process has little time left
                end.report(code, name, tries=1, timeout_s=REPORT_S)
            else:
                end.report(code, name)
            raise
        end.report(reporting.exit_code)


def _sender(url: str) -> Send:
    """What sends a notification to a URL. Raises JobError where it is not http or https."""
    from vitray.operations.notifying import parse_target, post

    target = parse_target(url)

    def send(notification: Notification, tries: int, timeout_s: float) -> None:
        post(target, json_text(notification), tries, timeout_s)

    return send


def _require_metrics(options: Nightly) -> None:
    if options.metrics_host is not None and options.metrics_port is None:
        raise JobError("--metrics-host is for --metrics-port. Add it, or leave --metrics-host out.")
    is_exported = options.metrics_file is not None or options.metrics_port is not None
    if options.metrics_name is not None and not is_exported:
        raise JobError(
            "--metrics-name names the metrics of --metrics-file or --metrics-port. Add one of them."
        )


def _metrics(
    options: Nightly, stack: contextlib.ExitStack
) -> tuple[PrometheusMeter | None, MetricsFile | None]:
    """The meter that counts the run, if its counts are published, and the file that does so."""
    path, port = options.metrics_file, options.metrics_port
    if path is None and port is None:
        return None, None
    from vitray.operations.run_metrics import (
        MetricsFile,
        last_complete_in,
        require_metrics_path,
        served,
    )
    from vitray.pipeline.metrics import PrometheusMeter

    if path is not None:
        require_metrics_path(path)
    meter = PrometheusMeter(
        options.metrics_name or "", None if path is None else last_complete_in(path)
    )
    if port is not None:
        url = stack.enter_context(served(meter, options.metrics_host or DEFAULT_HOST, port))
        log.warning("metrics of this run: %s", url)
    return meter, None if path is None else MetricsFile(path, meter)


def _code_of(error: BaseException) -> int:
    """The exit code of a command that ends with this exception."""
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, VitrayError):
        return int(error.exit_code)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.BROKEN_SYSTEM)
