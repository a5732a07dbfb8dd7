"""README.md of a dataset, as the Hugging Face Hub reads it. Private to this package."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import pyarrow as pa
import yaml

from vitray.dataset import Dataset, data_files, read_footer, require_dataset
from vitray.errors import JobError, ObjectMissing
from vitray.schema import ModelSpec
from vitray.storage import join, read, store_for

EDGES = [f"{10**zeros}{unit}" for unit in "KMBT" for zeros in range(3)][
    :10
]  # 1K to 1T, as the Hub writes them
SIZES = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(EDGES)), "n>1T"]
SEAL = re.compile(rb"(.*\n)<!-- vitray report --card ([0-9a-f]{64}) -->\n", re.DOTALL)


def write_card(out: str, license: str = "unknown") -> str:
    """Write the dataset card into OUT, anew where it is as we left it; returns its URL.

    license: an identifier of the Hub, such as cc-by-4.0. Raises JobError for a README.md that is
    not ours, or was edited.
    """
    dataset = require_dataset(out)
    url, store = join(dataset.out, "README.md"), store_for(dataset.out)
    footers = [read_footer(file) for file in data_files(dataset.out)]
    text = card_of(
        dataset, sum(f.rows for f in footers), sum(f.errors for f in footers), license
    ).encode()
    body = text + f"<!-- vitray report --card {hashlib.sha256(text).hexdigest()} -->\n".encode()
    if not store.create(url, body):
        if not _is_ours(url):
            raise JobError(
                f"{url} was not made by vitray, or was edited since. Move it away to have another "
                f"one written."
            )
        store.replace(url, body)
    return url


def card_of(dataset: Dataset, rows: int, errors: int, license: str) -> str:
    """Front matter and text. https://huggingface.co/docs/hub/datasets-cards names the fields."""
    spec, name = dataset.spec, dataset.out.rpartition("/")[2]
    configs = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    if errors:
        configs.append(
            {
                "config_name": "errors",
                "data_files": [{"split": "train", "path": f"{dataset.errors_folder}/*.parquet"}],
            }
        )
    tasks = ["image-classification"] * dataset.job.labelled + ["image-feature-extraction"] * bool(
        dataset.vectors
    )
    front = {
        "pretty_name": name,
        "license": license,
        "task_categories": tasks,
        "tags": ["vitray", spec.family, *(["embeddings"] if dataset.vectors else [])],
        "size_categories": [SIZES[min(max(0, len(str(rows)) - 3), len(SIZES) - 1)]],
        "configs": configs,
    }
    types = {
        f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type
        for f in dataset.schema
    }
    columns = [f"| `{_plain(name)}` | `{_plain(str(kind))}` |" for name, kind in types.items()]
    model = (
        spec.model.rpartition("/")[2] if spec.model.startswith("/") else spec.model
    )  # a card is for others to read
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
            f"# `{_plain(name)}`\n",
            f"{rows:,} images, labelled or embedded by `{_plain(model)}`"
            f"{f' at revision `{_plain(spec.revision)}`' if spec.revision else ''} with vitray. "
            f"{errors:,} more could not be decoded:",
            f"they are in `{dataset.errors_folder}/`, each with a reason. The images themselves "
            f"are not part of this dataset.\n",
            "| column | type |\n| --- | --- |",
            *columns,
            "\n| made with | |\n| --- | --- |",
            f"| weights, SHA-256 | `{spec.weights_sha256}` |",
            *_labelled_by(spec),
            f"| precision, engine, decode | {spec.precision}, {spec.engine}, "
            f"{dataset.job.decode} |",
            f"| fingerprint | `{dataset.fingerprint}` |\n",
        ]
    )


def _labelled_by(spec: ModelSpec) -> list[str]:
    """A row of the table where labels are not those of the checkpoint's own head."""
    if spec.head:
        over = f", over the stored `{spec.head_column}`" if spec.head_column else ""
        return [f"| labelled by a linear head, SHA-256 | `{spec.head_sha256}`{over} |"]
    return (
        [f"| labels read as | {', '.join(f'`{_plain(prompt)}`' for prompt in spec.prompts)} |"]
        if spec.prompts
        else []
    )


def _is_ours(url: str) -> bool:
    try:
        sealed = SEAL.fullmatch(read(url))
    except ObjectMissing:  # removed since
        return True
    return sealed is not None and hashlib.sha256(sealed[1]).hexdigest() == sealed[2].decode()


def _plain(text: str) -> str:
    """As code within one cell of a table in Markdown."""
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in " ".join(text.split()))
