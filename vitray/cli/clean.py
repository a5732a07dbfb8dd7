"""`vitray clean`."""

from __future__ import annotations

from vitray.cli.console import say
from vitray.cli.options import OutArgument
from vitray.errors import count


def clean(out: OutArgument) -> None:
    """Remove staging that no run needs, and files that killed commands left behind."""
    from vitray.dataset import clean as clean_dataset
    from vitray.dataset import require_dataset
    from vitray.pipeline import list_source

    dataset = require_dataset(out)
    shards = [shard.id for shard in list_source(dataset.job, dataset.out).shards]
    removed = clean_dataset(dataset, shards)
    say("\n".join([*removed, f"removed {count(len(removed), 'item')}"]))
