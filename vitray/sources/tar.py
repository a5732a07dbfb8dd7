"""Tars as WebDataset writes them: members with one key are one sample, and every sample is one row.

A member's key ends at a dot of its name. WebDataset takes the first one, so that `0.depth.png` and
`0.jpg` are two members of sample `0`. In `Mr. Bean.jpg` that dot is part of the name. `auto` looks at
the start of the tar to tell the two apart: see `member_extensions`.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from vitray.errors import ShardError, SourceError
from vitray.job import Job
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
MAX_TRACKED_KEYS = 1_000_000  # 100 MB; beyond, keys that come again are not reported
# `depth.png`, `left.final.jpg`: words, unlike ` bean_0.jpg`, `0001.jpg` or `_0.jpg`
_MEMBER_EXTENSION = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z][a-z0-9_-]*)+")


def read_tar(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The samples of a tar in order, then its End. Raises ShardError when it is no tar at all, or not clear."""
    reader = _Reader(shard, job, wanted)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.extensions = _peek(source, job)
        for sample in reader.samples(source):
            if sample.wanted:
                yield reader.row_of(sample)
    notes = [source.why, *reader.notes()]
    yield End(
        reader.total,
        source.truncated_at,
        "; ".join(filter(None, notes)),
        dict(+reader.left_out),
        dict(+reader.image_members),
    )


def kept_schema(shard: Shard, job: Job) -> pa.Schema:
    folders = _folder_columns(shard, job)
    is_text = {name: name in folders or _is_text(_extension(name)) for name in job.keep}
    return pa.schema([(name, pa.string() if is_text[name] else pa.binary()) for name in job.keep])


def _folder_columns(shard: Shard, job: Job) -> set[str]:
    """The names that mean a folder of the tar where no member has them."""
    return {"folder", *hive_columns(shard.url)} if job.rules > 1 else set()


def count_samples(shard: Shard, job: Job, whole: bool = False) -> tuple[int, int, set[str]]:
    """(samples, bytes walked, extensions) of the start of a tar, or of all of it.

    The bytes walked equal the shard's size when it was all.
    """
    count, extensions = 0, set[str]()
    reader = _Reader(shard, job, lambda index: False)
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader.extensions = _peek(source, job)
        for sample in reader.samples(source):
            count += 1
            extensions |= sample.extensions.keys()
            if source.at >= START_BYTES and not whole:
                return count, source.at, extensions
    return count, shard.size, extensions


def absent_members(shard: Shard, job: Job) -> list[str]:
    """The kept extensions that no sample at the start of a tar has; none for an empty tar and for other kinds.

    Raises ShardError when the tar cannot be read, ObjectChanged, StorageError.
    """
    if shard.kind != "tar" or not job.keep:
        return []
    samples, _, extensions = count_samples(shard, job)
    folders = _folder_columns(shard, job)
    members = [_extension(name) for name in job.keep if name not in folders]
    return [name for name in members if samples and name not in extensions]


def require_clear_samples(shard: Shard, job: Job) -> None:
    """Raises SourceError where a sample at the start of a tar has several images, and nothing says which one is meant."""
    if job.rules == 1 or job.image_member:
        return
    with open_shard(shard) as stream:
        source = TarSource(stream, shard.url, shard.size)
        reader = _Reader(shard, job, lambda index: False)
        reader.extensions = _peek(source, job)
        try:
            for _ in reader.samples(source):
                if source.at >= PEEK_BYTES:
                    return
        except _SeveralImagesError as error:
            raise SourceError(str(error)) from error


def member_extensions(names: Sequence[str]) -> frozenset[str]:
    """Those of the image extensions with a dot that belong to samples, such as `depth.png` beside `jpg`.

    names: member names at the start of a tar, in order. Such an extension is made of words. It comes in
    several samples, or beside one plain image, or alone. In all else, what follows the first dot is
    part of a name: ` bean_0.jpg` of `Mr. Bean_0.jpg`, `0001.png` of `shot.0001.png`, `who.jpg` beside `no.jpg`.
    """
    samples = list[tuple[str, set[str]]]()
    for name in names:
        key, extension = _split_first(name)
        if not _is_image_extension(extension):
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, set()))
        samples[-1][1].add(extension)
    seen, found = Counter[str](), set[str]()
    for _, extensions in samples:
        dotted = {extension for extension in extensions if "." in extension}
        seen.update(dotted)
        if len(extensions) == 1 or len(extensions - dotted) == 1:
            found |= dotted
    found |= {extension for extension, count in seen.items() if count > 1}
    return frozenset(extension for extension in found if _MEMBER_EXTENSION.fullmatch(extension))


def _peek(source: TarSource, job: Job) -> frozenset[str]:
    """The member extensions of a tar, by its start. The source stands at its first byte again."""
    names, far = list[str](), PEEK_BYTES
    if job.rules > 1 and job.tar_keys == "auto":
        try:
            for member in members_of(source):
                if member.isreg():
                    names.append(member.name)
                    _, extension = _split_first(member.name)
                    if "." in extension and _is_image_extension(extension):
                        far = START_BYTES  # there is something to decide
                if source.at + member.size >= far or len(names) >= PEEK_MEMBERS:
                    break  # before the next header, which may cost another GET
        except TarCutError:
            pass  # the reader comes to the same place, and says so
        source.restart()
    return member_extensions(names)


class _SeveralImagesError(ShardError):
    """A sample has several images, and nothing says which one is meant."""


@dataclass(slots=True)
class _Sample:
    """Members with one key. keys: the keys that it may have, one as soon as an image tells.

    kept: by key, the passthrough values by extension. image: the extension that the data came from.
    """

    index: int
    keys: tuple[str, ...]
    start: int
    wanted: bool
    extensions: dict[str, None] = field(default_factory=dict)  # in order
    kept: dict[tuple[str, str], bytes] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    image: str | None = None
    data: bytes | None = None
    reason: str | None = None
    message: str = ""

    @property
    def key(self) -> str:
        return self.keys[0]


@dataclass
class _Reader:
    """Turns the members of one tar into samples and rows, and counts what has no row."""

    shard: Shard
    job: Job
    wanted: Callable[[int], bool]
    extensions: frozenset[str] = frozenset()
    total: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    image_members: Counter[str] = field(default_factory=Counter)
    _keys: dict[str, bool] = field(default_factory=dict)  # whether a sample of that key had an image
    _parted: list[str] = field(default_factory=list)  # keys whose members are not adjacent
    _not_utf8: int = 0  # kept texts

    def __post_init__(self) -> None:
        self.image_member = _extension(self.job.image_member) if self.job.image_member else None
        self.kept_extensions = {_extension(name) for name in self.job.keep}
        self.kept_schema = kept_schema(self.shard, self.job)
        self.folders = {name: folder_value(name, self.shard.url) for name in _folder_columns(self.shard, self.job)}

    def samples(self, source: TarSource) -> Iterator[_Sample]:
        """Consecutive members with one key. A cut is noted in the source; the last sample survives when its image is whole."""
        sample: _Sample | None = None
        try:
            for member in members_of(source):
                options = self._options(member)
                if not options:
                    continue
                keys = tuple(key for key in (sample.keys if sample else ()) if key in options)
                # the same extension again is another image of the same name, not a part of this sample
                if sample is None or not keys or options[keys[0]] in sample.extensions:
                    if sample is not None:
                        yield self._complete(sample)
                    sample = self._begin(tuple(options), source)
                else:
                    sample.keys = keys
                self._add(sample, options, member, source)
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
        kept = self._kept(sample) if self.job.keep else None
        key, uri = printable(sample.key), self.shard.url
        return Encoded(sample.index, key, uri, sample.data, sample.reason, sample.message, kept)

    def notes(self) -> list[str]:
        """What a person should know of this tar beside its rows."""
        found = [f"{count} {_NOTES[what]}" for what, count in self.left_out.items() if count]
        if self._parted:
            count, first = len(self._parted), printable(self._parted[0])[:200]
            found.append(f"the members of {count} samples are not adjacent (first: {first}): sort the tar by name")
        if self._not_utf8:
            found.append(f"{self._not_utf8} kept texts are not UTF-8 and were read as Windows-1252")
        return found

    def _begin(self, keys: tuple[str, ...], source: TarSource) -> _Sample:
        return _Sample(self.total, keys, source.start, self.wanted(self.total))

    def _options(self, member: tarfile.TarInfo) -> dict[str, str]:
        """{key: extension} that a member's name may mean, the preferred one first; none for what is no part of a sample."""
        key, extension = _split_first(member.name)
        if member.isreg() and extension:
            return {key: extension} if "." not in extension else self._dotted_options(member.name)
        if extension and (member.islnk() or member.issym()):
            options = self._dotted_options(member.name)
            if any(map(self._is_image, options.values())):
                return options
        if not member.isdir():
            self.left_out[self._why_left_out(member)] += 1
        return {}

    def _dotted_options(self, name: str) -> dict[str, str]:
        """What a name with several dots may mean. An image means one thing; a sidecar follows the image beside it."""
        first, last = _split_first(name), _split_last(name)
        job = self.job
        if job.tar_keys == "first_dot" or (job.tar_keys == "auto" and job.rules == 1):
            return dict([first])
        if job.tar_keys == "last_dot":
            return dict([last])
        if first[1] in self.extensions or first[1] == self.image_member:
            return dict([first])
        if _is_image_extension(first[1]) and self.image_member in (None, last[1]):
            return dict([last])
        return dict([first, last])

    def _add(self, sample: _Sample, options: dict[str, str], member: tarfile.TarInfo, source: TarSource) -> None:
        """Take what the row needs of a member: the image and kept values, nothing else is read."""
        extension = options[sample.key]
        sample.extensions[extension] = None
        is_image, is_picked = self._is_image(extension), False
        if is_image:
            is_picked = self._is_better(extension, sample.image)
            sample.images.append(extension)
        kept_keys = [
            (key, extension)
            for key, extension in options.items()
            if extension in self.kept_extensions and key in sample.keys and member.size <= MAX_KEPT_BYTES
        ]
        if is_picked:
            sample.image, sample.data = extension, None
            sample.reason, sample.message = None, ""
        if is_picked and member.size > MAX_IMAGE_BYTES:
            sample.reason, sample.message = too_large(member.size)
        elif not member.isreg():
            if is_picked:
                link = printable(member.linkname)[:200]
                sample.reason, sample.message = "missing", f"a link to {link}, which is not followed"
        elif sample.wanted and (is_picked or kept_keys):
            data = source.take(member.size)
            sample.data = data if is_picked else sample.data
            sample.kept |= dict.fromkeys(kept_keys, data)

    def _is_better(self, extension: str, than: str | None) -> bool:
        """Whether an image of this extension is the sample's: the first one, and a plain one rather than `depth.png`."""
        return than is None or (self.job.rules > 1 and "." in than and "." not in extension)

    def _complete(self, sample: _Sample) -> _Sample:
        """Count a sample and its images. Raises _SeveralImagesError when it is not clear which one is meant."""
        plain = [extension for extension in sample.images if "." not in extension]
        candidates = plain or sample.images
        if len(candidates) > 1 and self.job.rules > 1:
            names = ", ".join(sorted(set(candidates)))
            setting = f"`image_member` to one of them (image_member: {candidates[0]})"
            keys = "" if plain else ", or `tar_keys: last_dot` for a row for each"
            raise _SeveralImagesError(
                f"{self.shard.url}: sample {printable(sample.key)[:200]} has several images: {names}. Set {setting}{keys}."
            )
        self.total += 1
        # what `image_member` passes over is an image all the same
        images = {*sample.images, *filter(_is_image_extension, sample.extensions)} if self.job.rules > 1 else sample.images
        self.left_out["further_image"] += max(0, len(images) - 1)
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
            return f"key {printable(sample.key)[:200]} came before: the members of a sample must be adjacent; sort the tar"
        what = f".{self.image_member}" if self.image_member else "image"
        has = printable(", ".join(islice(sample.extensions, 8)))[:200]
        return f"the sample has no {what} member: it has {has}"

    def _kept(self, sample: _Sample) -> PassthroughRow:
        columns = list[pa.Array]()
        for field_ in self.kept_schema:
            value: object = sample.kept.get((sample.key, _extension(field_.name)), self.folders.get(field_.name))
            if isinstance(value, bytes) and field_.type == pa.string():
                value = self._text(value)
            columns.append(pa.array([value], field_.type))
        return PassthroughRow(pa.RecordBatch.from_arrays(columns, schema=self.kept_schema), 0)

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

    def _why_left_out(self, member: tarfile.TarInfo) -> str:
        if not member.isreg():
            return "link" if member.islnk() or member.issym() else "special_file"
        return "hidden" if member.name.rpartition("/")[2].startswith(".") else "no_suffix"


_NOTES = {
    "further_image": "further images of samples were not used (`image_member` chooses)",
    "hidden": "hidden members were skipped",
    "no_suffix": "members without an extension were skipped",
    "link": "links were not followed",
    "special_file": "special files were skipped",
}


def _split_first(path: str) -> tuple[str, str]:
    """(key, lower-case extension) at the first dot; no extension for hidden files and names without a dot."""
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
