"""WebDataset tars: members with the same key are one sample, and every sample is one row.

A member's key ends at a dot of its name. WebDataset takes the first one, so `0.depth.png` and
`0.jpg` are two members of sample `0`. In `Mr. Bean.jpg` that dot is part of the name.
`tar_keys: auto` looks at the start of the tar to decide: see `dotted_extensions`.
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
    Reason,
    Shard,
    ShardKind,
    SourceRules,
)
from vitray.sources.names import folder_value, hive_columns
from vitray.sources.objects import MAX_IMAGE_BYTES, open_shard, printable, text_of, too_large
from vitray.sources.tar_headers import TarCutError, TarSource, members_of, not_a_tar

TEXT_EXTENSIONS = frozenset(("txt", "json", "cls", "caption", "url", "csv", "html", "md", "label"))
MAX_PASSTHROUGH_BYTES = 16 << 20
START_BYTES = 64 << 20  # walked to estimate the content of a tar: eight GETs of S3
PEEK_BYTES = 8 << 20  # one GET of S3, whose bytes the reader keeps: the peek costs no second GET
PEEK_MEMBERS = 200
EXTENSIONS_REPORTED = 8
MAX_TRACKED_KEYS = 1_000_000  # 100 MB; beyond, repeated keys are not reported
# `depth.png`, `left.final.jpg`: words, unlike ` bean_0.jpg`, `0001.jpg` or `_0.jpg`.
_MEMBER_EXTENSION = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z][a-z0-9_-]*)+")


def read_tar(shard: Shard, job: Job, is_wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The samples of a tar in order, then its End.

    Raises ShardError when it is not a tar, or when a sample has several images and the job does not
    say which one to use.
    """
    reader = _Reader(shard, job, is_wanted)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.dotted = _peek(source, job)
        for sample in reader.samples(source):
            if sample.is_wanted:
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
    """Counts of the most frequent extensions, and `other` for the rest.

    Extensions come from the tar, so their number must be bounded.
    """
    most = Counter[str]()
    for name, count in members.most_common(EXTENSIONS_REPORTED):
        most[printable(name)[:40]] = count
    return dict(+(most + Counter(other=members.total() - most.total())))


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """Text for text extensions and folder columns, binary for all other extensions."""
    folders = _folder_columns(shard, job)
    is_text = {name: name in folders or _is_text(_extension(name)) for name in job.keep}
    return pa.schema([(name, pa.string() if is_text[name] else pa.binary()) for name in job.keep])


def _folder_columns(shard: Shard, job: Job) -> set[str]:
    """The names that mean a folder of the tar where no member has this extension."""
    return {"folder", *hive_columns(shard.url)} if job.rules >= SourceRules.V2 else set()


def count_all_samples(shard: Shard, job: Job) -> tuple[int, dict[str, int]]:
    """(number of samples, number of what has no row by reason), from a walk over the whole tar."""
    reader = _Reader(shard, job, lambda index: False)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.dotted = _peek(source, job)
        for _ in reader.samples(source):
            pass
    return reader.total, dict(+reader.left_out)


def count_samples(shard: Shard, job: Job) -> tuple[int, int, set[str]]:
    """(samples, bytes walked, extensions) of the start of a tar.

    The bytes walked equal the shard's size when the walk reached the end.
    """
    count = 0
    extensions = set[str]()
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
    """The passthrough extensions that no sample at the start of a tar has.

    The list is empty for an empty tar and for other kinds of shards.

    Raises ShardError when the tar cannot be read, ObjectChanged, StorageError.
    """
    if shard.kind != ShardKind.TAR or not job.keep:
        return []
    samples, _, extensions = count_samples(shard, job)
    folders = _folder_columns(shard, job)
    members = [_extension(name) for name in job.keep if name not in folders]
    return [name for name in members if samples and name not in extensions]


def require_clear_samples(shard: Shard, job: Job) -> None:
    """Raise SourceError where the job does not say which image of a sample to use.

    Only samples at the start of the tar are checked.
    """
    if job.rules == SourceRules.V1 or job.image_member:
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
    """What follows the first dot, in member names with several dots.

    members: those that are extensions, such as `depth.png`.
    names: those that are parts of names, such as `smith.jpg` and `smith.txt`: an image and its
    sidecar share the stem.
    """

    members: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


def dotted_extensions(names: Sequence[str]) -> DottedExtensions:
    """Tell extensions with a dot, such as `depth.png` beside `jpg`, from parts of names.

    names: member names at the start of a tar, in order.

    An extension with a dot consists of words and is in two samples, or in the only sample.
    Everything else after a first dot is part of a name: ` bean_0.jpg` of `Mr. Bean_0.jpg`,
    `0001.png` of `shot.0001.png`, `smith.jpg` beside `smith.txt`.
    """
    samples = _extensions_of_samples(names)
    counts = Counter(extension for extensions in samples for extension in extensions)
    parts_of_names = set[str]()
    for extensions in samples:
        parts_of_names |= _with_a_common_stem(extensions)
    least = 1 if _has_one_clear_image(samples) else 2
    members = {
        extension
        for extension, count in counts.items()
        if count >= least
        and extension not in parts_of_names
        and _MEMBER_EXTENSION.fullmatch(extension)
    }
    return DottedExtensions(frozenset(members), frozenset(parts_of_names))


def _extensions_of_samples(names: Sequence[str]) -> list[set[str]]:
    """The extensions after the first dot, of each run of names with the same key."""
    samples = list[set[str]]()
    last_key: str | None = None
    for name in names:
        key, extension = _split_first(name)
        if not extension:
            continue
        if key != last_key:
            samples.append(set())
            last_key = key
        samples[-1].add(extension)
    return samples


def _with_a_common_stem(extensions: set[str]) -> set[str]:
    """Those with a dot whose stem another one has too: an image and its sidecar."""
    dotted = [extension for extension in extensions if "." in extension]
    stems = Counter(extension.rpartition(".")[0] for extension in dotted)
    return {extension for extension in dotted if stems[extension.rpartition(".")[0]] > 1}


def _has_one_clear_image(samples: Sequence[set[str]]) -> bool:
    """Whether exactly one sample has images: one image, or one whose extension has no dot."""
    images = [set(filter(_is_image_extension, extensions)) for extensions in samples]
    with_images = [extensions for extensions in images if extensions]
    if len(with_images) != 1:
        return False
    only = with_images[0]
    return len(only) == 1 or any("." not in extension for extension in only)


def _peek(source: TarSource, job: Job) -> DottedExtensions:
    """The dotted extensions of a tar, by its start. Afterwards the source is at byte 0 again."""
    of_job = {_extension(name) for name in (*job.keep, job.image_member or "")}
    names = list[str]()
    if job.rules >= SourceRules.V2 and job.tar_keys == "auto":
        try:
            for member in members_of(source):
                if member.isreg():
                    names.append(member.name)
                if source.at + member.size >= PEEK_BYTES or len(names) >= PEEK_MEMBERS:
                    break  # before the next header, which may cost another GET
        except TarCutError:
            pass  # the reader reaches the same byte and reports it
        source.restart()
    dotted = dotted_extensions(names)
    of_job = {extension for extension in of_job if "." in extension}
    return dotted._replace(members=dotted.members | of_job)


class _SeveralImagesError(ShardError):
    """A sample has several images, and the job does not say which one to use."""


@dataclass(slots=True)
class _Sample:
    """Members with one key.

    extensions: all, in order. passthrough: values by extension. image: the extension of the image
    in `data`.
    """

    index: int
    key: str
    start: int
    is_wanted: bool
    extensions: dict[str, None] = field(default_factory=dict)
    passthrough: dict[str, bytes] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    image: str | None = None
    data: bytes | None = None
    reason: Reason | None = None
    message: str = ""


@dataclass
class _Reader:
    """Turns the members of one tar into samples and rows, and counts what has no row."""

    shard: Shard
    job: Job
    is_wanted: Callable[[int], bool]
    dotted: DottedExtensions = field(default_factory=DottedExtensions)
    total: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    image_members: Counter[str] = field(default_factory=Counter)
    _keys: set[str] = field(default_factory=set)
    _repeated_keys: list[str] = field(default_factory=list)  # the members are not adjacent
    _not_utf8: int = 0  # passthrough texts

    def __post_init__(self) -> None:
        self.image_member = _extension(self.job.image_member) if self.job.image_member else None
        self.passthrough_extensions = {_extension(name) for name in self.job.keep}
        self.passthrough_schema = file_passthrough_schema(self.shard, self.job)
        self.folders = {
            name: folder_value(name, self.shard.url)
            for name in _folder_columns(self.shard, self.job)
        }

    def samples(self, source: TarSource) -> Iterator[_Sample]:
        """Consecutive members with one key.

        A truncation is recorded in the source. The last sample before it is yielded when its image
        is complete.
        """
        sample: _Sample | None = None
        try:
            for member in members_of(source):
                key, extension = self._split(member, sample)
                if not extension:
                    continue
                # An extension that the sample already has belongs to another image of that name.
                if sample is None or sample.key != key or extension in sample.extensions:
                    if sample is not None:
                        yield self._complete(sample)
                    sample = _Sample(self.total, key, source.start, self.is_wanted(self.total))
                self._add(sample, extension, member, source)
        except TarCutError as cut:
            if not source.is_tar:
                raise not_a_tar(source) from None
            source.truncated_at = source.start
            source.why = str(cut)
            if sample is not None and not sample.images:
                # Its image may be beyond the cut. So the truncation accounts for it, not a row.
                source.truncated_at = sample.start
                sample = None
        if sample is not None:
            yield self._complete(sample)

    def row_of(self, sample: _Sample) -> Encoded:
        """The row of a sample; an error row where it has no image."""
        if not sample.images:
            sample.reason = Reason.MISSING
            sample.message = self._why_without_image(sample)
        return Encoded(
            sample.index,
            printable(sample.key),
            self.shard.url,
            sample.data,
            sample.reason,
            sample.message,
            self._passthrough(sample) if self.job.keep else None,
        )

    def notes(self) -> list[str]:
        """Messages about this tar that are not about a single row."""
        notes = [f"{count} {_NOTES[reason]}" for reason, count in self.left_out.items() if count]
        if self._repeated_keys:
            first = printable(self._repeated_keys[0])[:200]
            notes.append(
                f"{len(self._repeated_keys)} times the key of an earlier sample comes again "
                f"(first: {first}): members of a sample must be adjacent; sort the tar by name"
            )
        if self._not_utf8:
            notes.append(
                f"{self._not_utf8} passthrough texts are not UTF-8 and were read as Windows-1252"
            )
        return notes

    def _split(self, member: tarfile.TarInfo, sample: _Sample | None) -> tuple[str, str]:
        """(key, extension) of a member.

        The extension is empty for a member that is not part of a sample; it is counted.
        """
        key, extension = _split_first(member.name)
        if extension and "." in extension:
            key, extension = self._split_dotted(member.name, sample)
        is_link = member.islnk() or member.issym()
        if extension and (member.isreg() or (is_link and self._is_image(extension))):
            return key, extension
        if not member.isdir():
            self.left_out[self._why_left_out(member)] += 1
        return key, ""

    def _split_dotted(self, name: str, sample: _Sample | None) -> tuple[str, str]:
        """The same for a name with several dots. A sidecar belongs to the image before it."""
        at_first_dot = _split_first(name)
        at_last_dot = _split_last(name)
        extension = at_first_dot[1]
        job = self.job
        if job.tar_keys == "first_dot" or (job.tar_keys == "auto" and job.rules == SourceRules.V1):
            return at_first_dot
        if job.tar_keys == "last_dot":
            return at_last_dot
        if extension in self.dotted.members:
            return at_first_dot
        # With `image_member`, the job takes extensions literally.
        if self.image_member and _MEMBER_EXTENSION.fullmatch(extension):
            return at_first_dot
        is_image = _is_image_extension(extension) and self.image_member in (None, at_last_dot[1])
        if not is_image and sample is not None and self._is_sidecar(name, sample):
            return sample.key, _after_key(name, sample.key)
        return at_last_dot

    def _is_sidecar(self, name: str, sample: _Sample) -> bool:
        """Whether a member belongs to the sample before it, which has an image."""
        if not sample.images or not name.startswith(f"{sample.key}."):
            return False
        extension = _after_key(name, sample.key)
        is_extension = "." not in extension or bool(_MEMBER_EXTENSION.fullmatch(extension))
        return is_extension and extension not in self.dotted.names

    def _add(
        self, sample: _Sample, extension: str, member: tarfile.TarInfo, source: TarSource
    ) -> None:
        """Read what the row needs of a member: only the image and passthrough values."""
        sample.extensions[extension] = None
        is_picked = False
        if self._is_image(extension):
            is_picked = self._is_better(extension, sample.image)
            sample.images.append(extension)
        is_passthrough = (
            extension in self.passthrough_extensions and member.size <= MAX_PASSTHROUGH_BYTES
        )
        if is_picked:
            sample.image = extension
            sample.data = None
            sample.reason = None
            sample.message = ""
        if is_picked and member.size > MAX_IMAGE_BYTES:
            sample.reason, sample.message = too_large(member.size)
        elif not member.isreg():
            if is_picked:
                link = printable(member.linkname)[:200]
                sample.reason = Reason.MISSING
                sample.message = f"a link to {link}, which is not followed"
        elif sample.is_wanted and (is_picked or is_passthrough):
            data = source.take(member.size)
            if is_picked:
                sample.data = data
            if is_passthrough:
                sample.passthrough[extension] = data

    def _is_better(self, extension: str, current: str | None) -> bool:
        """Whether this image replaces the sample's current one.

        The first image is taken, but `png` rather than `depth.png`.
        """
        if current is None:
            return True
        return self.job.rules >= SourceRules.V2 and "." in current and "." not in extension

    def _complete(self, sample: _Sample) -> _Sample:
        """Count a sample and its images.

        Raises _SeveralImagesError when the job does not say which image to use.
        """
        without_dot = [extension for extension in sample.images if "." not in extension]
        candidates = without_dot or sample.images
        if len(candidates) > 1 and self.job.rules >= SourceRules.V2:
            names = ", ".join(sorted(set(candidates)))
            setting = (
                f"`image_member` to one of them (image_member: {candidates[0]}; a dataset with "
                "rows needs another `out` for that)"
            )
            keys = "" if without_dot else ", or `tar_keys: last_dot` for a row for each"
            raise _SeveralImagesError(
                f"{self.shard.url}: sample {printable(sample.key)[:200]} has several images: "
                f"{names}. Set {setting}{keys}."
            )
        self.total += 1
        images = len(sample.images)
        if self.job.rules >= SourceRules.V2:  # images that `image_member` does not choose count too
            images = len({*sample.images, *filter(_is_image_extension, sample.extensions)})
        self.left_out[LeftOut.FURTHER_IMAGE] += max(0, images - 1)
        if sample.image is not None:
            self.image_members[sample.image] += 1
        self._track(sample)
        return sample

    def _track(self, sample: _Sample) -> None:
        if sample.key in self._keys:
            self._repeated_keys.append(sample.key)
        elif len(self._keys) < MAX_TRACKED_KEYS:
            self._keys.add(sample.key)

    def _why_without_image(self, sample: _Sample) -> str:
        if self._repeated_keys and self._repeated_keys[-1] == sample.key:
            return (
                f"key {printable(sample.key)[:200]} came before: the members of a sample must be "
                "adjacent; sort the tar"
            )
        what = f".{self.image_member}" if self.image_member else "image"
        extensions = printable(", ".join(islice(sample.extensions, 8)))[:200]
        return f"the sample has no {what} member: it has {extensions}"

    def _passthrough(self, sample: _Sample) -> PassthroughRow:
        columns = list[pa.Array]()
        for column in self.passthrough_schema:
            folder = self._folder_of(sample, column.name)
            value: object = sample.passthrough.get(_extension(column.name), folder)
            if isinstance(value, bytes) and column.type == pa.string():
                value = self._text(value)
            columns.append(pa.array([value], column.type))
        batch = pa.RecordBatch.from_arrays(columns, schema=self.passthrough_schema)
        return PassthroughRow(batch, 0)

    def _folder_of(self, sample: _Sample, name: str) -> str | None:
        """The value of a folder column. `folder` is the member's, else that of the tar."""
        if name == "folder" and name in self.folders and "/" in sample.key:
            return folder_value(name, printable(sample.key))
        return self.folders.get(name)

    def _text(self, data: bytes) -> str:
        if self.job.rules == SourceRules.V1:
            return data.decode("utf-8", "replace")
        text, is_utf8 = text_of(data)
        self._not_utf8 += not is_utf8
        return text

    def _is_image(self, extension: str) -> bool:
        if self.image_member:
            return extension == self.image_member
        if self.job.rules == SourceRules.V1:
            return extension.rpartition(".")[2] in IMAGE_SUFFIXES_V1
        return _is_image_extension(extension)

    def _why_left_out(self, member: tarfile.TarInfo) -> LeftOut:
        if not member.isreg():
            return LeftOut.LINK if member.islnk() or member.issym() else LeftOut.SPECIAL_FILE
        is_hidden = member.name.rpartition("/")[2].startswith(".")
        return LeftOut.HIDDEN if is_hidden else LeftOut.NO_SUFFIX


_NOTES: dict[str, str] = {
    LeftOut.FURTHER_IMAGE: "further images of samples were not used (`image_member` chooses)",
    LeftOut.HIDDEN: "hidden members were skipped",
    LeftOut.NO_SUFFIX: "members without an extension were skipped",
    LeftOut.LINK: "links were not followed",
    LeftOut.SPECIAL_FILE: "special files were skipped",
}


def _split_first(path: str) -> tuple[str, str]:
    """(key, lower-case extension) at the first dot.

    The extension is empty for hidden files and for names without a dot.
    """
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _split_last(path: str) -> tuple[str, str]:
    """The same at the last dot."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.rpartition(".")
    return folder + slash + stem, extension.lower() if not name.startswith(".") else ""


def _after_key(name: str, key: str) -> str:
    return name[len(key) + 1 :].lower()


def _extension(name: str) -> str:
    return name.lower().lstrip(".")


def _is_image_extension(extension: str) -> bool:
    return extension.rpartition(".")[2] in ALL_IMAGE_SUFFIXES


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in TEXT_EXTENSIONS
