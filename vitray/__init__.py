"""vitray labels and embeds image collections of any size with a Vision Transformer.

import vitray

job = vitray.Job(
    source="s3://photos/*.tar",
    model="google/vit-base-patch16-224",
    out="s3://photos-vit",
)
result = vitray.run(job)
table = vitray.read(job.out, columns=["key", "label", "embedding"])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vitray.errors import VitrayError
from vitray.job import Embedding, Job
from vitray.version import __version__

if TYPE_CHECKING:
    from vitray.dataset import read
    from vitray.operations.planning import Plan, plan
    from vitray.operations.validation import Validation, validate
    from vitray.pipeline import Progress, Result, run

__all__ = [
    "Embedding",
    "Job",
    "Plan",
    "Progress",
    "Result",
    "Validation",
    "VitrayError",
    "__version__",
    "plan",
    "read",
    "run",
    "validate",
]

_LAZY_NAMES = {
    "Plan": "vitray.operations.planning",
    "Progress": "vitray.pipeline",
    "Result": "vitray.pipeline",
    "Validation": "vitray.operations.validation",
    "plan": "vitray.operations.planning",
    "read": "vitray.dataset",
    "run": "vitray.pipeline",
    "validate": "vitray.operations.validation",
}


def __dir__() -> list[str]:
    """The public names, for dir() and for completion in a notebook."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Import a heavy name on first use, so that `import vitray` stays quick."""
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'vitray' has no attribute {name!r}")
