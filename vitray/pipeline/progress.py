"""How far a run is, and its result."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vitray.budget import Cost, Limit
from vitray.exit_codes import ExitCode
from vitray.phases import Phase
from vitray.pipeline.events import FragmentEvent, FragmentSkipped, errors_of

TIMELINE_POINTS = 400
RECENT_S = 10.0


@dataclass
class Progress:
    """How far a run is; this one object is updated. Counts are images of this run's shards.

    shards_staged: shards with staged fragments that are not committed yet.
    images_expected: None where the sizes of shards are all that is known.
    bytes_expected: the size of the shards. size_bytes: of the encoded images that were read.
    copied_bytes: of pixels that were copied between the decoder and the model.
    timeline: (seconds since the start, images computed by then), a point for every `every`
    fragments. recent: a point for each fragment of the last RECENT_S and the one before.
    waiting: gives text about what waits for which stage.
    started, computing_since: by time.monotonic().
    predicted: by worker, the images that went through its model, also of fragments that are not
    written yet.
    """

    phase: Phase = Phase.STARTING
    shards: int = 0
    shards_done: int = 0
    shards_staged: int = 0
    images_expected: int | None = None
    bytes_expected: int = 0
    good: int = 0
    errors: int = 0
    resumed: int = 0
    set_aside: int = 0
    size_bytes: int = 0
    copied_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    computing_since: float | None = None
    timeline: list[tuple[float, int]] = field(default_factory=list)
    every: int = 1
    fragments: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    waiting: Callable[[], str] = lambda: ""
    predicted: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.good + self.errors

    @property
    def computed(self) -> int:
        """Images that this run computed; those that were already staged took no time."""
        return self.images - self.resumed

    @property
    def images_seen(self) -> int:
        """Images that are done or went through the model: grows with each batch."""
        seen = self.resumed + sum(self.predicted.values())
        if self.images_expected is not None:  # lost workers have predicted some of them twice
            seen = min(seen, self.images_expected)
        return max(self.images, seen)

    def share(self) -> float | None:
        """How much of the work is done, from 0 to 1; None while that is not known."""
        if 0 < self.shards <= self.shards_done + self.set_aside:
            return 1.0
        expected = self._expected()
        return None if not expected else min(1.0, self.images_seen / expected)

    def _expected(self) -> float | None:
        """The images of this run's shards; of tars estimated from the size of those so far."""
        if self.images_expected is None and self.size_bytes:
            return self.bytes_expected * self.computed / self.size_bytes
        return self.images_expected

    def rate(self) -> float:
        """Images per second that this run computed."""
        return (self.images_seen - self.resumed) / max(1e-9, self._computing_s())

    def recent_rate(self) -> float:
        """Images per second, over the last RECENT_S or longer."""
        elapsed_s = self._elapsed_s()
        old_points = (point for point in reversed(self.recent) if elapsed_s - point[0] >= RECENT_S)
        seconds, images = next(old_points, (elapsed_s - self._computing_s(), 0))
        return (self.images_seen - self.resumed - images) / max(1e-9, elapsed_s - seconds)

    def remaining_s(self) -> float | None:
        """Seconds that the remaining images take at the mean rate so far; None without a rate."""
        if 0 < self.shards <= self.shards_done:
            return 0.0
        expected = self._expected()
        computed = self.images_seen - self.resumed
        if not computed or expected is None:
            return None
        return self._computing_s() * max(0, expected - self.images_seen) / computed

    def add(self, event: FragmentEvent) -> None:
        """Count a fragment."""
        size = event.stop - event.start
        self.good += size - errors_of(event)
        self.errors += errors_of(event)
        if isinstance(event, FragmentSkipped):
            self.resumed += size
        else:
            self.size_bytes += event.size_bytes
            self.copied_bytes += event.copied_bytes
            for stage, seconds in event.seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for reason, count in event.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self._add_point((round(self._elapsed_s(), 2), self.computed))

    def _computing_s(self) -> float:
        """Seconds since the start, without those in which the model was opened."""
        started = self.started if self.computing_since is None else self.computing_since
        return time.monotonic() - started

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _add_point(self, point: tuple[float, int]) -> None:
        self.recent.append(point)
        while len(self.recent) > 1 and point[0] - self.recent[1][0] >= RECENT_S:
            self.recent.popleft()
        self.fragments += 1
        if self.fragments % self.every == 0:
            self.timeline.append(point)
        if len(self.timeline) > TIMELINE_POINTS:
            # Drop every other point, also of later ones: the whole timeline is equally fine.
            self.timeline = self.timeline[1::2]
            self.every *= 2


@dataclass(frozen=True)
class Result:
    """The result of a run, and the state of its dataset.

    errors_path: the folder of the error rows.
    committed: shards that this run made or adopted. adopted: those of them that another run, or an
    earlier attempt, made.
    set_aside: {shard: why}. truncated: {shard: byte at which it was cut}. accepted: {shard: its
    problem, and who accepted that}, of shards in `truncated` and of shards that were not read.
    notes: {shard: messages of its reader}, of this run. reasons: of this run's bad images.
    pruned: images whose rows --prune removed, good and bad.
    deleted: files of groups that no longer exist. Each is one of `errors`, but not a bad image.
    left_out: what the source holds and has no row, by left_out.LEFT_OUT: files, members, pages.
    suffixes: of those files.
    shards_not_selected, images_not_selected: what since, sample or limit leave for later. Images
    are estimated for tars.
    too_many_errors: whether more of the dataset's images than the job's max_error_rate are bad.
    cost: of this run; None without prices. ended_by: the limit of the budget that ended the run
    while shards were pending.
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
    pruned: int
    deleted: int
    pending: int
    left_out: dict[str, int]
    suffixes: dict[str, int]
    shards_not_selected: int
    images_not_selected: int
    too_many_errors: bool
    cost: Cost | None
    ended_by: Limit | None
    accepted: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> ExitCode:
        if self.too_many_errors:
            return ExitCode.TOO_MANY_BAD_IMAGES
        if self.ended_by is not None:
            return ExitCode.BUDGET_SPENT
        is_whole = not self.set_aside and self.truncated.keys() <= self.accepted.keys()
        return ExitCode.DONE if is_whole else ExitCode.INCOMPLETE
