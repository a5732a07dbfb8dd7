"""Models: from a job to a spec (`identify`), and from a spec to an open model (`open_model`).

Importing this is quick: torch and transformers are imported by the first call that needs them.
This file only re-exports. The modules of the package import each other directly.
"""

from vitray.models.checkpoint_check import (
    CheckedModel,
    check_model,
    possible_specs,
    require_machine,
)
from vitray.models.engines import TIMING_PAYS, open_model, require_precision
from vitray.models.machine import (
    compiles,
    describe_compile,
    resolve_device,
    torch_threads_kept,
    usable_gpus,
)
from vitray.models.resolve import identify, model_outputs, vector_columns, with_label_names
from vitray.models.types import Model, Predictions

__all__ = [
    "TIMING_PAYS",
    "CheckedModel",
    "Model",
    "Predictions",
    "check_model",
    "compiles",
    "describe_compile",
    "identify",
    "model_outputs",
    "open_model",
    "possible_specs",
    "require_machine",
    "require_precision",
    "resolve_device",
    "torch_threads_kept",
    "usable_gpus",
    "vector_columns",
    "with_label_names",
]
