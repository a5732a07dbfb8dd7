"""How far a run is, and what it came to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vitray.exit_codes import ExitCode
from vitray.schema import ShardEvent

MARKS = 400
NOW_S = 10.0


@dataclass
class Progress:
    """How far a run is; one object that grows. Counts are images of this run's shards."""

    shards: int = 0
    shards_done: int = 0
    shards_staged: int = 0  # of which something is staged, and which are not committed
    images_expected: int | None = None
    bytes_expected: int = 0  # of the shards, with all that is in them
    good: int = 0
    errors: int = 0
    resumed: int = 0
    set_aside: int = 0
    size_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    timeline: list[tuple[float, int]] = field(
        default_factory=list
    )  # seconds since the start, images computed by then
    every: int = 1  # so many fragments make a mark of the timeline
    fragments: int = 0
    # marks of every fragment; the first is NOW_S old, or of the start
    latest: deque[tuple[float, int]] = field(default_factory=deque)
    waiting: Callable[[], str] = lambda: ""  # what waits for which step; for people

    @property
    def images(self) -> int:
        return self.good + self.errors

    def rate(self) -> float:
        """Images a second that this run computed."""
        return (self.images - self.resumed) / max(1e-9, time.monotonic() - self.started)

    def rate_now(self) -> float:
        """Images a second, of the last NOW_S or more."""
        seconds, images = time.monotonic() - self.started, self.images - self.resumed
        at, there = next(
            (mark for mark in reversed(self.latest) if seconds - mark[0] >= NOW_S), (0.0, 0)
        )
        return (images - there) / max(1e-9, seconds - at)

    def left_s(self) -> float | None:
        """Seconds that what is left will take at the mean rate so far; None where nothing is known
        yet.
        """
        if 0 < self.shards <= self.shards_done:
            return 0.0
        computed = self.images - self.resumed  # what was found staged took no time
        expected: float | None = self.images_expected
        if expected is None and self.size_bytes:  # a tar does not tell; its size does, nearly
            expected = self.bytes_expected * computed / self.size_bytes
        if not computed or expected is None:
            return None
        return (time.monotonic() - self.started) * max(0, expected - self.images) / computed

    def add(self, event: ShardEvent) -> None:
        size = event.stop - event.start
        self.good += size - event.errors
        self.errors += event.errors
        self.resumed += size if event.kind == "staged" else 0
        self.size_bytes += event.size_bytes
        self._mark((round(time.monotonic() - self.started, 2), self.images - self.resumed))
        for reason, count in event.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for step, seconds in event.seconds.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def _mark(self, mark: tuple[float, int]) -> None:
        self.latest.append(mark)
        while len(self.latest) > 1 and mark[0] - self.latest[1][0] >= NOW_S:
            self.latest.popleft()
        self.fragments += 1
        if self.fragments % self.every == 0:
            self.timeline.append(mark)
        if (
            len(self.timeline) > MARKS
        ):  # every other one stays, of those to come too: as fine at the start as at the end
            self.timeline, self.every = self.timeline[1::2], 2 * self.every


@dataclass(frozen=True)
class Result:
    """What a run did.

    errors_path: the folder of its error rows. committed: shards it made or adopted; adopted: those
    of them that another run, or an earlier try, made. set_aside: {shard: why}; truncated: {shard:
    byte}.

    notes: what readers saw beside images, {shard: text}, of this run; reasons: of this run's bad
    images.

    deleted: files of groups that are listed no more; each is one of `errors`, and nothing is bad in
    it.
    left_out: what the source holds and has no row, by left_out.LEFT_OUT: files, members, pages.
    suffixes: of those files.
    shards_not_selected, images_not_selected: what since, sample or limit leave for later; images
    are estimated for tars.
    too_many_errors: of all the dataset's images more than the job's max_error_rate are bad.
    """

    out: str
    errors_path: str
    shards: int
    rows: int
    errors: int
    committed: int
    adopted: int
    images: int
    seconds: float
    set_aside: dict[str, str]
    notes: dict[str, str]
    truncated: dict[str, int]
    reasons: dict[str, int]
    gone: int
    deleted: int
    pending: int
    left_out: dict[str, int]
    suffixes: dict[str, int]
    shards_not_selected: int
    images_not_selected: int
    too_many_errors: bool

    @property
    def exit_code(self) -> ExitCode:
        if self.too_many_errors:
            return ExitCode.TOO_MANY_BAD_IMAGES
        is_whole = not self.set_aside and not self.truncated
        return ExitCode.DONE if is_whole else ExitCode.INCOMPLETE
