"""URL patterns become shards; a shard becomes its encoded images in order. One file per format.

- listing.py: the shards of a source; files.py, manifest.py, parquet.py, tar.py: a kind each
- reading.py: any shard, by the reader of its kind; objects.py: bytes at the planned version
- selection.py: `since`, `sample` and `limit`; estimates.py: numbers of images
- passthrough.py: types of passthrough columns; key_column.py: the column that names rows

This file only re-exports. The modules of the package import each other directly.
"""

from vitray.sources.estimates import count_again, estimate_images
from vitray.sources.files import Group
from vitray.sources.key_column import find_key_column
from vitray.sources.listing import Listing, list_shards
from vitray.sources.names import kind_of
from vitray.sources.passthrough import (
    file_passthrough_schema,
    passthrough_schema,
    require_passthrough,
    wider,
)
from vitray.sources.reading import read_shard
from vitray.sources.selection import Selection, count_selection, select_shards
from vitray.sources.tables import python_value
from vitray.sources.tar import absent_members

__all__ = [
    "Group",
    "Listing",
    "Selection",
    "absent_members",
    "count_again",
    "count_selection",
    "estimate_images",
    "file_passthrough_schema",
    "find_key_column",
    "kind_of",
    "list_shards",
    "passthrough_schema",
    "python_value",
    "read_shard",
    "require_passthrough",
    "select_shards",
    "wider",
]
