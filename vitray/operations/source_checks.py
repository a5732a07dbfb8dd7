"""Whether a data file still matches its source: the number of images, and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from vitray.dataset import Dataset, Footer, hash_of, read_table, removed_keys
from vitray.errors import ObjectChanged, ObjectMissing, ShardError, count, one_line
from vitray.left_out import LeftOut, describe
from vitray.operations.data_file_checks import UNREADABLE
from vitray.schema import Encoded, End, Shard, ShardKind, SourceRules, content_hash
from vitray.sources import count_again, read_shard
from vitray.storage import is_local, store_for


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What the source holds in a committed shard. images: None if a tar was not read."""

    images: int | None
    problems: list[str] = field(default_factory=list)


def count_in_source(
    dataset: Dataset, shard: Shard, footer: Footer, is_content_checked: bool
) -> SourceCount:
    """Count the images of a committed shard in the source, and compare with its data file.

    A tar on a store is counted only if `is_content_checked`, because that reads all of it.
    """
    if shard.kind == ShardKind.TAR and not is_local(shard.url) and not is_content_checked:
        return SourceCount(None)
    try:
        images, left_out = count_again(shard, dataset.job)
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        problem = f"the source cannot be counted again: {one_line(error)}"
        return SourceCount(footer.total, [] if is_content_checked else [problem])
    problems = []
    if images != footer.total and not is_content_checked:  # else check_content reports it
        problems.append(_other_total(images, footer))
    if left_out is not None:
        problems += _check_left_out(left_out, footer)
    return SourceCount(images, problems)


def check_content(dataset: Dataset, shard: Shard, footer: Footer) -> Iterator[str]:
    """Read the source again: are there the same images, in the same order, with the same keys?"""
    try:
        labelled = _labelled_images(dataset, shard, footer)
    except UNREADABLE:
        return  # check_file reports it
    left_out = Counter[str]()
    removed = removed_keys(dataset.out).hashes
    try:
        for item in read_shard(shard, dataset.job, lambda _: True):
            if isinstance(item, End):
                if item.total != footer.total:
                    yield _other_total(item.total, footer)
                left_out.update(item.left_out)
            elif isinstance(item, Encoded):
                left_out[LeftOut.FURTHER_IMAGE] += item.further_images
                if hash_of(item.key) in removed and item.index not in labelled:
                    continue
                image_hash = None if item.data is None else content_hash(item.data)
                if labelled.get(item.index) != (item.key, image_hash):
                    yield f"image {item.index} ({item.key}) is not what was labelled"
                    return
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        yield f"the source cannot be read again: {one_line(error)}"
        return
    yield from _check_left_out(dict(+left_out), footer)


def _labelled_images(
    dataset: Dataset, shard: Shard, footer: Footer
) -> dict[int, tuple[str, bytes | None]]:
    """Key and content hash of each image in a data file, good and bad, by index."""
    names = ["index", "key", "content_hash"]
    with store_for(dataset.out).open(dataset.data_url(shard.id)) as stream:
        rows = read_table(stream, names)
    images = {}
    for table in (rows, footer.error_rows):
        for index, key, image_hash in zip(*(table[name].to_pylist() for name in names)):
            images[index] = (key, image_hash)
    return images


def _other_total(images: int, footer: Footer) -> str:
    return f"the source holds {count(images, 'image')}, the dataset {footer.total:,}"


def _check_left_out(left_out: dict[str, int], footer: Footer) -> Iterator[str]:
    """Compare what has no row; datasets made by the first source rules did not count that."""
    countable = {  # without decoding
        reason: number
        for reason, number in footer.left_out.items()
        if reason not in (LeftOut.FURTHER_PAGE, LeftOut.REMOVED)
    }
    if footer.source_rules >= SourceRules.V2 and left_out != countable:
        yield (
            f"the source has {describe(left_out)} without a row, the dataset counted "
            f"{describe(footer.left_out)}"
        )
