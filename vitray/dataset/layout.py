"""The names of all files in an output directory. No other module spells them.

Every function takes a path or URL of the directory, absolute or not, and returns an absolute URL.
"""

from __future__ import annotations

from vitray.schema import SourceRules
from vitray.storage import absolute, join

INTERNAL_FOLDER = "_vitray"  # readers of a directory skip names that begin with an underscore
DATA_GLOB = "data/*.parquet"
SCRATCH_PREFIX = "probe-"
MANIFEST_PREFIX = "manifest-"
# relative to the directory, for messages
RUN_RECORDS = f"{INTERNAL_FOLDER}/runs"
MANIFEST_GLOB = f"{INTERNAL_FOLDER}/{MANIFEST_PREFIX}*.parquet"
COMPACTED = ("_COMPACT.json", "_COMPACTING.json")  # what `vitray compact` leaves in its own output


def internal_url(out: str, *parts: str) -> str:
    """The URL of a file or folder of vitray's own, which is not part of the data."""
    return join(absolute(out), INTERNAL_FOLDER, *parts)


def training_url(out: str, *parts: str) -> str:
    """The URL of a file or folder of a training into this directory."""
    return internal_url(out, *parts)


def scratch_url(out: str, suffix: str) -> str:
    """The URL of a scratch object or folder, which no later run needs."""
    return internal_url(out, f"{SCRATCH_PREFIX}{suffix}")


def is_scratch(out: str, url: str) -> bool:
    """Whether a URL is a scratch object of the directory, or is in a scratch folder."""
    return url.startswith(scratch_url(out, ""))


def dataset_url(out: str) -> str:
    """The URL of dataset.json: the fingerprint and the frozen job."""
    return internal_url(out, "dataset.json")


def source_url(out: str) -> str:
    """The URL of source.json: where the last run found the images."""
    return internal_url(out, "source.json")


def group_log_url(out: str, *name: str) -> str:
    """The URL of the log of groups of loose files, or of one part of it."""
    return internal_url(out, "shards", *name)


def is_group_log(url: str) -> bool:
    """Whether a URL is a part of a log of groups."""
    return f"/{INTERNAL_FOLDER}/shards/" in url


def staging_url(out: str, *shard_id: str) -> str:
    """The URL of all staging, or of one shard's."""
    return internal_url(out, "staging", *shard_id)


def leases_url(out: str, *name: str) -> str:
    """The URL of the folder of the leases of runs, or of one lease."""
    return internal_url(out, "leases", *name)


def runs_url(out: str, *name: str) -> str:
    """The URL of the folder of run records, or of one record."""
    return internal_url(out, "runs", *name)


def accepted_url(out: str, *name: str) -> str:
    """The URL of the folder of accepted shards, or of one of them."""
    return internal_url(out, "accepted", *name)


def removed_url(out: str, *name: str) -> str:
    """The URL of the folder of lists of removed keys, or of one list."""
    return internal_url(out, "removed", *name)


def pointers_url(out: str, *name: str) -> str:
    """The URL of the folder of notes about pointers to this dataset, or of one note."""
    return internal_url(out, "pointers", *name)


def manifest_url(out: str, name: str) -> str:
    """The URL of the manifest with that name."""
    return internal_url(out, name)


def success_url(out: str) -> str:
    """The URL of _SUCCESS.json, which exists exactly while nothing is pending."""
    return join(absolute(out), "_SUCCESS.json")


def card_url(out: str) -> str:
    """The URL of the dataset card. Outside this folder, it would break readers of Parquet."""
    return internal_url(out, "README.md")


def data_folder(out: str) -> str:
    """The URL of the folder of data files."""
    return join(absolute(out), "data")


def data_path(shard_id: str) -> str:
    """The path of a shard's data file, relative to the directory."""
    return f"data/{shard_id}.parquet"


def data_url(out: str, shard_id: str) -> str:
    """The URL of a shard's data file."""
    return join(absolute(out), data_path(shard_id))


def errors_folder(source_rules: SourceRules) -> str:
    """The name of the folder of error rows; datasets with source rules 1 keep `errors`."""
    return "errors" if source_rules == SourceRules.V1 else "_errors"


def is_own_file(out: str, source_rules: SourceRules, url: str) -> bool:
    """Whether a file in a dataset's directory has a name that vitray writes there."""
    folder, _, name = url.rpartition("/")
    if url == success_url(out) or url.startswith(f"{internal_url(out)}/"):
        return True
    row_folders = (data_folder(out), join(absolute(out), errors_folder(source_rules)))
    return folder in row_folders and name.endswith(".parquet")


def shard_of(url: str) -> str:
    """The shard id in the name of a data file, or of a file of error rows."""
    return url.rsplit("/", 1)[-1].removesuffix(".parquet")


def base_of(shard_id: str) -> str:
    """The part of an id that stays when the input's version changes; any other name as it is."""
    parts = shard_id.split("-")
    return f"{parts[0]}-{parts[-2]}" if len(parts) > 2 else shard_id


def version_of(shard_id: str) -> str:
    """The part of an id that stands for the input's version."""
    return shard_id.rsplit("-", 1)[-1]
