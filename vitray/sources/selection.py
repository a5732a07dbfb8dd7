"""The shards that `since`, `sample` and `limit` select, and how many images these have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitray.errors import JobError, count
from vitray.job import Job
from vitray.schema import Shard, ShardKind, short_hash
from vitray.sources.estimates import images_per_byte
from vitray.sources.listing import Listing

FIELDS = ("since", "sample", "limit")  # in the order in which they apply


def select_shards(shards: Sequence[Shard], job: Job) -> list[Shard]:
    """The shards that `since`, `sample` and `limit` select, applied in this order.

    Shards are selected whole. The same ones are selected when the source has grown.
    """
    since = job.since_s()
    recent = [
        shard
        for shard in shards
        if since is None or shard.modified is None or shard.modified >= since
    ]
    sampled = [shard for shard in recent if job.sample is None or _lot(shard) < job.sample]
    return sampled[: job.limit]


def _lot(shard: Shard) -> float:
    """A number in 0..1 from the part of the id that stays when the shard's bytes change."""
    return int(short_hash(shard.id.rpartition("-")[0], 12), 16) / 16**12


@dataclass(frozen=True, slots=True)
class Selection:
    """How many shards and images `since`, `sample` and `limit` choose.

    fields: those that are set. images, all_images: estimates unless exact.
    """

    fields: tuple[str, ...] = ()
    kind: ShardKind | None = None
    shards: int = 0
    all_shards: int = 0
    images: int = 0
    all_images: int = 0
    exact: bool = True

    @property
    def is_set(self) -> bool:
        """Whether `since`, `sample` or `limit` is set."""
        return bool(self.fields)

    @property
    def images_left(self) -> int:
        return self.all_images - self.images

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        noun = "shard" if self.kind is None else self.kind.noun
        shards = f"{self.shards:,} of {count(self.all_shards, noun)}"
        images = f"{about}{self.images:,} of {count(self.all_images, 'image')}"
        verb = "choose" if len(self.fields) > 1 else "chooses"
        return f"{', '.join(self.fields)} {verb} whole shards: {shards}, {images}"


def count_selection(listing: Listing, job: Job) -> Selection:
    """The size of what `since`, `sample` and `limit` select.

    Where one of them is set and the source is of tars, one tar is walked for the estimate.

    Raises JobError when `sample` leaves no shard.
    """
    shards = select_shards(listing.shards, job)
    without_since = job.model_copy(update={"since": None})
    if job.sample is not None and not shards and not select_shards(listing.shards, without_since):
        step = "Raise `sample`, or use `limit`."
        if listing.kind in (ShardKind.FILES, ShardKind.MANIFEST):
            step += " With a smaller `group_size` the images become more shards."
        raise JobError(
            f"sample: {job.sample:g} of {count(len(listing.shards), 'shard')} is none. {step}"
        )
    fields = tuple(name for name in FIELDS if getattr(job, name) is not None)
    if not fields:
        return Selection((), listing.kind, len(shards), len(shards))
    if listing.kind == ShardKind.TAR:
        per_byte = images_per_byte(shards or listing.shards, job)
        images = round(sum(shard.size for shard in shards) * per_byte)
        all_images = round(sum(shard.size for shard in listing.shards) * per_byte)
    else:
        images = sum(shard.rows or 0 for shard in shards)
        all_images = sum(shard.rows or 0 for shard in listing.shards)
    exact = all(shard.rows is not None for shard in listing.shards)
    return Selection(
        fields, listing.kind, len(shards), len(listing.shards), images, all_images, exact
    )
