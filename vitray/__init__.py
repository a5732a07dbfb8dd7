"""vitray labels and embeds image collections of any size with a Vision Transformer.

import vitray
job = vitray.Job(source="s3://photos/*.tar", model="google/vit-base-patch16-224",
out="s3://photos-vit") result = vitray.run(job)
table = vitray.read(job.out, columns=["key", "label", "embedding"])
"""

from typing import TYPE_CHECKING

from vitray.errors import VitrayError
from vitray.job import Embedding, Job
from vitray.version import __version__

if TYPE_CHECKING:
    from vitray.dataset import read
    from vitray.operations.planning import plan
    from vitray.operations.validation import validate
    from vitray.pipeline import run

__all__ = ["Embedding", "Job", "VitrayError", "__version__", "plan", "read", "run", "validate"]

_HOMES = {
    "read": "vitray.dataset",
    "run": "vitray.pipeline",
    "plan": "vitray.operations.planning",
    "validate": "vitray.operations.validation",
}


def __getattr__(name: str) -> object:
    """The heavy names on first use, so that `import vitray` stays quick."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vitray' has no attribute {name!r}")
