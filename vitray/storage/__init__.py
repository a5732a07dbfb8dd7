"""The only package that opens stores: list, read, stream and create-if-absent, on disk and on S3.

Every call has a deadline and ten attempts with jittered backoff. Reads are conditional on the
version that was planned. pyarrow's own file systems are not used: see docs/decisions/0008.
"""

from vitray.storage.cache import cache_directory
from vitray.storage.folder import new_folder
from vitray.storage.local import missing_folders, on_disk
from vitray.storage.objects import ABANDONED_S, ObjectInfo, Store, absolute, is_local
from vitray.storage.patterns import PatternObjects, expand, expand_braces, reads, search
from vitray.storage.stores import exists, join, read, sha256_of, store_for

__all__ = [
    "ABANDONED_S",
    "ObjectInfo",
    "PatternObjects",
    "Store",
    "absolute",
    "cache_directory",
    "exists",
    "expand",
    "expand_braces",
    "is_local",
    "join",
    "missing_folders",
    "new_folder",
    "on_disk",
    "read",
    "reads",
    "search",
    "sha256_of",
    "store_for",
]
