"""Deleting a whole dataset: the files that vitray writes, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from vitray.crash import crash_point
from vitray.dataset.files import under
from vitray.dataset.identity import Dataset
from vitray.dataset.layout import (
    data_folder,
    dataset_url,
    internal_url,
    is_own_file,
    success_url,
)
from vitray.dataset.ledger import require_own_remaining_files
from vitray.storage import ObjectInfo, join, store_for


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """The files in a dataset's directory.

    own: those that vitray wrote. others: the URLs of those that stay.
    """

    own: tuple[ObjectInfo, ...]
    others: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(info.size for info in self.own)


def list_dataset_files(dataset: Dataset) -> DatasetFiles:
    """The files in a dataset's directory. Another command may delete them meanwhile.

    Raises FingerprintError or CommitError where data files are of another job, or renamed.
    """
    require_own_remaining_files(dataset)
    infos = under(dataset.out)
    own = [info for info in infos if is_own_file(dataset.out, dataset.job.rules, info.url)]
    own_urls = {info.url for info in own}
    return DatasetFiles(tuple(own), tuple(i.url for i in infos if i.url not in own_urls))


def delete_dataset(dataset: Dataset, files: DatasetFiles) -> None:
    """Delete these files of a dataset, and the folders that are empty then.

    dataset.json goes last: until then the directory holds a dataset, and the same call continues.
    A file that is gone already counts as deleted.
    """
    store = store_for(dataset.out)
    first, last = success_url(dataset.out), dataset_url(dataset.out)
    store.delete([first])
    crash_point("version-unmarked")
    store.delete(info.url for info in files.own if info.url not in (first, last))
    row_folders = (data_folder(dataset.out), join(dataset.out, dataset.errors_folder))
    for folder in row_folders:
        store.delete(store.abandoned(folder))
    crash_point("version-emptied")
    store.delete([last])
    store.delete_tree(internal_url(dataset.out))
    for folder in (*row_folders, dataset.out):
        store.delete_folder(folder)
