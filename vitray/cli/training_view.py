"""The progress of a training: one line of a terminal that changes, or a JSON object per line."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vitray.cli.console import draws_view, live_view, say, screen
from vitray.cli.json_output import json_text
from vitray.clock import utc_now
from vitray.errors import count
from vitray.training.activity import Activity, Phase

LINE_EVERY_S = 10.0
BAR_WIDTH = 20
LEAST_S = 1.0  # of work before its remaining time is estimated


@dataclass(frozen=True, slots=True)
class TrainingLine:
    """How far a training is, as a line on stderr.

    at: in ISO format, in UTC. phase: what the training does now. percent: of this phase that is
    done; None while that is not known. images: images that this phase has seen; an image counts
    once in every epoch. detail: the epoch and the step, or what else is worked on. eta_s: seconds
    until the phase ends; None while that is not known.
    """

    at: str
    phase: Phase
    percent: float | None
    images: int
    detail: str
    eta_s: int | None


@dataclass
class TrainingClock:
    """How long each phase of a training takes.

    activity: the last one; None before the first. first_share: of the phase, which is not 0 for a
    training that goes on. now: a clock in seconds.
    """

    now: Callable[[], float] = time.monotonic
    activity: Activity | None = None
    began: float = field(init=False)
    first_share: float | None = None

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def phase(self) -> Phase:
        return Phase.STARTING if self.activity is None else self.activity.phase

    def update(self, activity: Activity) -> None:
        if self.activity is None or activity.phase is not self.activity.phase:
            self.began = self.now()
            self.first_share = activity.share
        self.activity = activity

    def left_s(self) -> float | None:
        """Seconds until the phase ends, as fast as it went so far; None while that is unknown."""
        share = None if self.activity is None else self.activity.share
        if share is None or self.first_share is None:
            return None
        seconds = self.now() - self.began
        done = share - self.first_share
        if done <= 0 or seconds < LEAST_S:
            return None
        return seconds * (1 - share) / done

    def line(self) -> str:
        """The progress as one JSON object."""
        activity, left_s = self.activity, self.left_s()
        share = None if activity is None else activity.share
        return json_text(
            TrainingLine(
                at=utc_now(),
                phase=self.phase,
                percent=None if share is None else round(100 * share, 1),
                images=0 if activity is None else activity.images,
                detail="" if activity is None else activity.detail,
                eta_s=None if left_s is None else round(left_s),
            )
        )

    def text(self) -> str:
        """The figures behind the bar: `34%  epoch 2 of 20, step 13 of 160  0:00:12 left`."""
        activity, left_s = self.activity, self.left_s()
        if activity is None:
            return ""
        parts = []
        if activity.share is not None:
            parts.append(f"{100 * activity.share:.1f}%")
        if activity.detail:
            parts.append(activity.detail)
        elif activity.images:
            parts.append(f"{count(activity.images, 'image')}")
        if left_s is not None:
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        return "  ".join(parts)


class TrainingView:
    """One line: a spinner, the phase with its seconds, a bar, and figures.

    It is drawn several times a second, by another thread than that of the training.
    """

    def __init__(self, clock: TrainingClock) -> None:
        self._clock = clock
        self._spinner = Spinner("dots")

    def __rich__(self) -> Table:
        clock = self._clock
        self._spinner.update(text=Text(f"{clock.phase}… {clock.now() - clock.began:.0f} s"))
        share = None if clock.activity is None else clock.activity.share
        row = Table.grid(padding=(0, 2))
        if share is None:
            row.add_row(self._spinner, Text(clock.text(), no_wrap=True))
        else:
            bar = ProgressBar(total=1.0, completed=share, width=BAR_WIDTH)
            text = Text(clock.text(), no_wrap=True, overflow="ellipsis")
            row.add_row(self._spinner, bar, text)
        return row


@contextlib.contextmanager
def watched_training() -> Iterator[Callable[[Activity], None]]:
    """A function that shows what a training does.

    On a terminal it updates one line, which is removed after a training that ended well. Elsewhere,
    and where stderr is JSON, it prints a JSON line for each phase and every LINE_EVERY_S, also
    while nothing is reported.
    """
    clock = TrainingClock()
    if not draws_view():
        with _lines(clock) as watch:
            yield watch
        return
    with live_view(TrainingView(clock)):
        yield clock.update


@contextlib.contextmanager
def _lines(clock: TrainingClock) -> Iterator[Callable[[Activity], None]]:
    ended = threading.Event()
    stream = sys.stderr

    def show() -> None:
        print(clock.line(), file=stream, flush=True)

    def update(activity: Activity) -> None:
        is_new = clock.activity is None or activity.phase is not clock.activity.phase
        clock.update(activity)
        if is_new:
            show()

    def repeat() -> None:
        while not ended.wait(LINE_EVERY_S):
            show()

    show()
    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield update
    finally:
        ended.set()


def print_epoch(record: dict[str, float]) -> None:
    """Print the figures of an epoch, above the view if there is one."""
    figures = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in record.items()
        if name not in ("epoch", "step")
    )
    text = f"epoch {record['epoch']:g}: {figures}"
    if screen.view is not None:
        screen.view.console.print(text, markup=False, highlight=False)
    else:
        say(text, err=True)
