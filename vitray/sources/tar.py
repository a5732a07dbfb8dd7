"""Tars as WebDataset writes them: members with one key are one sample, and every sample is one row.

A member's key ends at a dot of its name. WebDataset takes the first one, so that `0.depth.png` and
`0.jpg` are two members of sample `0`. In `Mr. Bean.jpg` that dot is part of the name. `auto` looks
at the start of the tar to tell the two apart: see `dotted_extensions`.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from vitray.errors import ShardError, SourceError
from vitray.job import Job
from vitray.left_out import LeftOut
from vitray.schema import (
    ALL_IMAGE_SUFFIXES,
    IMAGE_SUFFIXES_V1,
    Encoded,
    End,
    PassthroughRow,
    Shard,
)
from vitray.sources.names import folder_value, hive_columns
from vitray.sources.objects import MAX_IMAGE_BYTES, open_shard, printable, text_of, too_large
from vitray.sources.tar_headers import TarCutError, TarSource, members_of, not_a_tar

TEXT_EXTENSIONS = frozenset(("txt", "json", "cls", "caption", "url", "csv", "html", "md", "label"))
MAX_KEPT_BYTES = 16 << 20
START_BYTES = 64 << 20  # what is walked of a tar to tell what is in it: eight GETs of S3
PEEK_BYTES = 8 << 20  # one GET of S3, which the reader keeps: a peek of so much costs no second one
PEEK_MEMBERS = 200
MEMBERS_TOLD = 8
MAX_TRACKED_KEYS = 1_000_000  # 100 MB; beyond, keys that come again are not reported
# `depth.png`, `left.final.jpg`: words, unlike ` bean_0.jpg`, `0001.jpg` or `_0.jpg`
_MEMBER_EXTENSION = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z][a-z0-9_-]*)+")


def read_tar(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The samples of a tar in order, then its End. Raises ShardError when it is no tar at all, or
    not clear.
    """
    reader = _Reader(shard, job, wanted)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.dotted = _peek(source, job)
        for sample in reader.samples(source):
            if sample.wanted:
                yield reader.row_of(sample)
    notes = [source.why, *reader.notes()]
    yield End(
        reader.total,
        source.truncated_at,
        "; ".join(filter(None, notes)),
        dict(+reader.left_out),
        _most_common(reader.image_members),
    )


def _most_common(members: Counter[str]) -> dict[str, int]:
    """The most frequent extensions and `other`: names come from the tar, and their number must not
    grow with it.
    """
    most = Counter(
        {printable(name)[:40]: count for name, count in members.most_common(MEMBERS_TOLD)}
    )
    return dict(+(most + Counter(other=members.total() - most.total())))


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    folders = _folder_columns(shard, job)
    is_text = {name: name in folders or _is_text(_extension(name)) for name in job.keep}
    return pa.schema([(name, pa.string() if is_text[name] else pa.binary()) for name in job.keep])


def _folder_columns(shard: Shard, job: Job) -> set[str]:
    """The names that mean a folder of the tar where no member has them."""
    return {"folder", *hive_columns(shard.url)} if job.rules > 1 else set()


def count_whole(shard: Shard, job: Job) -> tuple[int, dict[str, int]]:
    """(samples, what has no row) of a whole tar."""
    reader = _Reader(shard, job, lambda index: False)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.dotted = _peek(source, job)
        for _ in reader.samples(source):
            pass
    return reader.total, dict(+reader.left_out)


def count_samples(shard: Shard, job: Job) -> tuple[int, int, set[str]]:
    """(samples, bytes walked, extensions) of the start of a tar; walked equals the shard's size
    when it was all.
    """
    count, extensions = 0, set[str]()
    reader = _Reader(shard, job, lambda index: False)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.dotted = _peek(source, job)
        for sample in reader.samples(source):
            count += 1
            extensions |= sample.extensions.keys()
            if source.at >= START_BYTES:
                return count, source.at, extensions
    return count, shard.size, extensions


def absent_members(shard: Shard, job: Job) -> list[str]:
    """The passthrough extensions that no sample at the start of a tar has; none for an empty tar
    and for other kinds.

    Raises ShardError when the tar cannot be read, ObjectChanged, StorageError.
    """
    if shard.kind != "tar" or not job.keep:
        return []
    samples, _, extensions = count_samples(shard, job)
    folders = _folder_columns(shard, job)
    members = [_extension(name) for name in job.keep if name not in folders]
    return [name for name in members if samples and name not in extensions]


def require_clear_samples(shard: Shard, job: Job) -> None:
    """Raises SourceError where a sample at the start of a tar has several images, and nothing says
    which one is meant.
    """
    if job.rules == 1 or job.image_member:
        return
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader = _Reader(shard, job, lambda index: False)
        reader.dotted = _peek(source, job)
        try:
            for _ in reader.samples(source):
                if source.at >= PEEK_BYTES:
                    return
        except _SeveralImagesError as error:
            raise SourceError(str(error)) from error


class DottedExtensions(NamedTuple):
    """What follows the first dot of names with several dots. members: extensions, such as
    `depth.png`.

    names: parts of names, because an image and its sidecar have them, such as `smith.jpg` and
    `smith.txt`.
    """

    members: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


def dotted_extensions(names: Sequence[str]) -> DottedExtensions:
    """Tell extensions with a dot, such as `depth.png` beside `jpg`, from parts of names.

    names: member names at the start of a tar, in order. Such an extension is made of words and
    comes in two samples, or in the only one. In all else what follows the first dot is part of a
    name: ` bean_0.jpg` of `Mr. Bean_0.jpg`, `0001.png` of `shot.0001.png`, `smith.jpg` beside
    `smith.txt`.
    """
    samples = list[tuple[str, set[str]]]()
    for name in names:
        key, extension = _split_first(name)
        if not extension:
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, set()))
        samples[-1][1].add(extension)
    seen, names_of_images = Counter[str](), set[str]()
    for _, extensions in samples:
        stems = Counter(
            extension.rpartition(".")[0] for extension in extensions if "." in extension
        )
        for extension in extensions:
            seen[extension] += 1
            if (
                stems[extension.rpartition(".")[0]] > 1 and "." in extension
            ):  # an image and its sidecar
                names_of_images.add(extension)
    images = [set(filter(_is_image_extension, extensions)) for _, extensions in samples]
    with_images = [found for found in images if found]
    is_single = len(with_images) == 1 and (
        len(with_images[0]) == 1 or any("." not in found for found in with_images[0])
    )
    least = 1 if is_single else 2
    frequent = {extension for extension, count in seen.items() if count >= least}
    members = {
        extension
        for extension in frequent - names_of_images
        if _MEMBER_EXTENSION.fullmatch(extension)
    }
    return DottedExtensions(frozenset(members), frozenset(names_of_images))


def _peek(source: TarSource, job: Job) -> DottedExtensions:
    """The dotted extensions of a tar, by its start. The source stands at its first byte again."""
    asked = {_extension(name) for name in (*job.keep, job.image_member or "")}
    names = list[str]()
    if job.rules > 1 and job.tar_keys == "auto":
        try:
            for member in members_of(source):
                if member.isreg():
                    names.append(member.name)
                if source.at + member.size >= PEEK_BYTES or len(names) >= PEEK_MEMBERS:
                    break  # before the next header, which may cost another GET
        except TarCutError:
            pass  # the reader comes to the same place, and says so
        source.restart()
    found = dotted_extensions(names)
    return found._replace(
        members=found.members | {extension for extension in asked if "." in extension}
    )


class _SeveralImagesError(ShardError):
    """A sample has several images, and nothing says which one is meant."""


@dataclass(slots=True)
class _Sample:
    """Members with one key. passthrough: passthrough values by extension. image: the extension that
    the data came from.
    """

    index: int
    key: str
    start: int
    wanted: bool
    extensions: dict[str, None] = field(default_factory=dict)  # in order
    passthrough: dict[str, bytes] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    image: str | None = None
    data: bytes | None = None
    reason: str | None = None
    message: str = ""


@dataclass
class _Reader:
    """Turns the members of one tar into samples and rows, and counts what has no row."""

    shard: Shard
    job: Job
    wanted: Callable[[int], bool]
    dotted: DottedExtensions = field(default_factory=DottedExtensions)
    total: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    image_members: Counter[str] = field(default_factory=Counter)
    _keys: dict[str, bool] = field(
        default_factory=dict
    )  # whether a sample of that key had an image
    _parted: list[str] = field(default_factory=list)  # keys whose members are not adjacent
    _not_utf8: int = 0  # kept texts

    def __post_init__(self) -> None:
        self.image_member = _extension(self.job.image_member) if self.job.image_member else None
        self.kept_extensions = {_extension(name) for name in self.job.keep}
        self.file_passthrough_schema = file_passthrough_schema(self.shard, self.job)
        self.folders = {
            name: folder_value(name, self.shard.url)
            for name in _folder_columns(self.shard, self.job)
        }

    def samples(self, source: TarSource) -> Iterator[_Sample]:
        """Consecutive members with one key. A cut is noted in the source; the last sample survives
        when its image is whole.
        """
        sample: _Sample | None = None
        try:
            for member in members_of(source):
                key, extension = self._place(member, sample)
                if not extension:
                    continue
                # the same extension again is another image of the same name, not a part of this
                # sample
                if sample is None or sample.key != key or extension in sample.extensions:
                    if sample is not None:
                        yield self._complete(sample)
                    sample = _Sample(self.total, key, source.start, self.wanted(self.total))
                self._add(sample, extension, member, source)
        except TarCutError as cut:
            if not source.is_tar:
                raise not_a_tar(source) from None
            source.truncated_at, source.why = source.start, str(cut)
            if sample is not None and not sample.images:
                # its image may lie beyond the cut: the verdict accounts for it, not an error row
                source.truncated_at, sample = sample.start, None
        if sample is not None:
            yield self._complete(sample)

    def row_of(self, sample: _Sample) -> Encoded:
        if not sample.images:
            sample.reason, sample.message = "missing", self._why_without_image(sample)
        passthrough = self._passthrough(sample) if self.job.keep else None
        key, uri = printable(sample.key), self.shard.url
        return Encoded(
            sample.index, key, uri, sample.data, sample.reason, sample.message, passthrough
        )

    def notes(self) -> list[str]:
        """What a person should know of this tar beside its rows."""
        found = [f"{count} {_NOTES[what]}" for what, count in self.left_out.items() if count]
        if self._parted:
            count, first = len(self._parted), printable(self._parted[0])[:200]
            found.append(
                f"the members of {count} samples are not adjacent (first: {first}): sort the tar "
                f"by name"
            )
        if self._not_utf8:
            found.append(f"{self._not_utf8} kept texts are not UTF-8 and were read as Windows-1252")
        return found

    def _place(self, member: tarfile.TarInfo, sample: _Sample | None) -> tuple[str, str]:
        """(key, extension) of a member; no extension for what is no part of a sample, which is
        counted.
        """
        key, extension = _split_first(member.name)
        if extension and "." in extension:
            key, extension = self._place_dotted(member.name, sample)
        is_link = member.islnk() or member.issym()
        if extension and (member.isreg() or (is_link and self._is_image(extension))):
            return key, extension
        if not member.isdir():
            self.left_out[self._why_left_out(member)] += 1
        return key, ""

    def _place_dotted(self, name: str, sample: _Sample | None) -> tuple[str, str]:
        """The same for a name with several dots. A sidecar follows the image in front of it."""
        first, last = _split_first(name), _split_last(name)
        job = self.job
        if job.tar_keys == "first_dot" or (job.tar_keys == "auto" and job.rules == 1):
            return first
        if job.tar_keys == "last_dot":
            return last
        if first[1] in self.dotted.members:
            return first
        if self.image_member and _MEMBER_EXTENSION.fullmatch(
            first[1]
        ):  # the job takes members for what they are called
            return first
        is_image = _is_image_extension(first[1]) and self.image_member in (None, last[1])
        if (
            not is_image
            and sample is not None
            and sample.images
            and name.startswith(f"{sample.key}.")
        ):
            rest = name[len(sample.key) + 1 :].lower()
            if rest not in self.dotted.names and (
                "." not in rest or _MEMBER_EXTENSION.fullmatch(rest)
            ):
                return sample.key, rest
        return last

    def _add(
        self, sample: _Sample, extension: str, member: tarfile.TarInfo, source: TarSource
    ) -> None:
        """Take what the row needs of a member: the image and kept values, nothing else is read."""
        sample.extensions[extension] = None
        is_picked = False
        if self._is_image(extension):
            is_picked = self._is_better(extension, sample.image)
            sample.images.append(extension)
        is_kept = extension in self.kept_extensions and member.size <= MAX_KEPT_BYTES
        if is_picked:
            sample.image, sample.data = extension, None
            sample.reason, sample.message = None, ""
        if is_picked and member.size > MAX_IMAGE_BYTES:
            sample.reason, sample.message = too_large(member.size)
        elif not member.isreg():
            if is_picked:
                link = printable(member.linkname)[:200]
                sample.reason, sample.message = (
                    "missing",
                    f"a link to {link}, which is not followed",
                )
        elif sample.wanted and (is_picked or is_kept):
            data = source.take(member.size)
            sample.data = data if is_picked else sample.data
            if is_kept:
                sample.passthrough[extension] = data

    def _is_better(self, extension: str, than: str | None) -> bool:
        """Whether an image of this extension is the sample's: the first one, and a plain one rather
        than `depth.png`.
        """
        return than is None or (self.job.rules > 1 and "." in than and "." not in extension)

    def _complete(self, sample: _Sample) -> _Sample:
        """Count a sample and its images. Raises _SeveralImagesError when it is not clear which one
        is meant.
        """
        plain = [extension for extension in sample.images if "." not in extension]
        candidates = plain or sample.images
        if len(candidates) > 1 and self.job.rules > 1:
            names = ", ".join(sorted(set(candidates)))
            setting = (
                f"`image_member` to one of them (image_member: {candidates[0]}; a dataset with "
                f"rows needs another `out` for that)"
            )
            keys = "" if plain else ", or `tar_keys: last_dot` for a row for each"
            raise _SeveralImagesError(
                f"{self.shard.url}: sample {printable(sample.key)[:200]} has several images: "
                f"{names}. Set {setting}{keys}."
            )
        self.total += 1
        # what `image_member` passes over is an image all the same
        images = (
            {*sample.images, *filter(_is_image_extension, sample.extensions)}
            if self.job.rules > 1
            else sample.images
        )
        self.left_out[LeftOut.FURTHER_IMAGE] += max(0, len(images) - 1)
        if sample.image is not None:
            self.image_members[sample.image] += 1
        self._track(sample)
        return sample

    def _track(self, sample: _Sample) -> None:
        before = self._keys.get(sample.key)
        has_image = bool(sample.images)
        if before is not None and not (before and has_image):
            self._parted.append(sample.key)
        if before is not None or len(self._keys) < MAX_TRACKED_KEYS:
            self._keys[sample.key] = has_image or bool(before)

    def _why_without_image(self, sample: _Sample) -> str:
        if self._parted and self._parted[-1] == sample.key:
            return (
                f"key {printable(sample.key)[:200]} came before: the members of a sample must be "
                f"adjacent; sort the tar"
            )
        what = f".{self.image_member}" if self.image_member else "image"
        has = printable(", ".join(islice(sample.extensions, 8)))[:200]
        return f"the sample has no {what} member: it has {has}"

    def _passthrough(self, sample: _Sample) -> PassthroughRow:
        columns = list[pa.Array]()
        for field_ in self.file_passthrough_schema:
            value: object = sample.passthrough.get(
                _extension(field_.name), self.folders.get(field_.name)
            )
            if isinstance(value, bytes) and field_.type == pa.string():
                value = self._text(value)
            columns.append(pa.array([value], field_.type))
        return PassthroughRow(
            pa.RecordBatch.from_arrays(columns, schema=self.file_passthrough_schema), 0
        )

    def _text(self, data: bytes) -> str:
        if self.job.rules == 1:
            return data.decode("utf-8", "replace")
        text, is_utf8 = text_of(data)
        self._not_utf8 += not is_utf8
        return text

    def _is_image(self, extension: str) -> bool:
        if self.image_member:
            return extension == self.image_member
        if self.job.rules == 1:
            return extension.rpartition(".")[2] in IMAGE_SUFFIXES_V1
        return _is_image_extension(extension)

    def _why_left_out(self, member: tarfile.TarInfo) -> LeftOut:
        if not member.isreg():
            return LeftOut.LINK if member.islnk() or member.issym() else LeftOut.SPECIAL_FILE
        return (
            LeftOut.HIDDEN if member.name.rpartition("/")[2].startswith(".") else LeftOut.NO_SUFFIX
        )


_NOTES: dict[str, str] = {
    LeftOut.FURTHER_IMAGE: "further images of samples were not used (`image_member` chooses)",
    LeftOut.HIDDEN: "hidden members were skipped",
    LeftOut.NO_SUFFIX: "members without an extension were skipped",
    LeftOut.LINK: "links were not followed",
    LeftOut.SPECIAL_FILE: "special files were skipped",
}


def _split_first(path: str) -> tuple[str, str]:
    """(key, lower-case extension) at the first dot; no extension for hidden files and names without
    a dot.
    """
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _split_last(path: str) -> tuple[str, str]:
    """The same at the last dot."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.rpartition(".")
    return folder + slash + stem, extension.lower() if not name.startswith(".") else ""


def _extension(name: str) -> str:
    return name.lower().lstrip(".")


def _is_image_extension(extension: str) -> bool:
    return extension.rpartition(".")[2] in ALL_IMAGE_SUFFIXES


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in TEXT_EXTENSIONS
