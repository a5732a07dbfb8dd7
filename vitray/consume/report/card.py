"""The dataset card, a README.md as the Hugging Face Hub reads it."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import pyarrow as pa
import yaml

from vitray.dataset import DATA_GLOB, Dataset, card_url, data_files, read_footer, require_dataset
from vitray.errors import JobError, ObjectMissing, count
from vitray.schema import ModelSpec
from vitray.storage import read, store_for

# 1K to 1T, as the Hub writes them
EDGES = [f"{10**zeros}{unit}" for unit in "KMBT" for zeros in range(3)][:10]
SIZES = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(EDGES)), "n>1T"]
SEAL = re.compile(rb"(.*\n)<!-- vitray report --card ([0-9a-f]{64}) -->\n", re.DOTALL)


def write_card(out: str, license: str = "unknown") -> str:
    """Write the dataset card, over an unedited earlier one; returns its URL.

    license: an identifier of the Hub, such as cc-by-4.0. Raises JobError for a card that vitray did
    not write, or that was edited.
    """
    dataset = require_dataset(out)
    url = card_url(dataset.out)
    store = store_for(url)
    footers = [read_footer(file) for file in data_files(dataset.out)]
    rows, errors = sum(f.rows for f in footers), sum(f.errors for f in footers)
    text = card_of(dataset, rows, errors, license).encode()
    body = text + f"<!-- vitray report --card {hashlib.sha256(text).hexdigest()} -->\n".encode()
    if not store.create(url, body):
        if not _is_ours(url):
            raise JobError(
                f"{url} was not made by vitray, or was edited since. "
                "Move it away to have another one written."
            )
        store.replace(url, body)
    return url


def card_of(dataset: Dataset, rows: int, errors: int, license: str) -> str:
    """Front matter and text of the card."""
    front_matter = yaml.safe_dump(
        _front_matter(dataset, rows, errors, license), sort_keys=False, allow_unicode=True
    )
    spec = dataset.spec
    name = dataset.out.rpartition("/")[2]
    # a card is for other people, who do not have the same directories
    model = spec.model.rpartition("/")[2] if spec.model.startswith("/") else spec.model
    revision = f" at revision `{_code(spec.revision)}`" if spec.revision else ""
    types = {
        f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type
        for f in dataset.schema
    }
    lines = [
        f"---\n{front_matter}---\n",
        f"# `{_code(name)}`\n",
        f"{count(rows, 'image')}, labelled or embedded by `{_code(model)}`{revision} with vitray. "
        f"{errors:,} more could not be decoded:",
        f"they are in `{dataset.errors_folder}/`, each with a reason. "
        "The images themselves are not part of this dataset.\n",
        "| column | type |\n| --- | --- |",
    ]
    lines += [f"| `{_code(name)}` | `{_code(str(kind))}` |" for name, kind in types.items()]
    lines += [
        "\n| made with | |\n| --- | --- |",
        f"| weights, SHA-256 | `{spec.weights_sha256}` |",
        *_labelled_by(spec),
        f"| precision, engine, decode | {spec.precision}, {spec.engine}, {dataset.job.decode} |",
        f"| fingerprint | `{dataset.fingerprint}` |\n",
    ]
    return "\n".join(lines)


def _front_matter(dataset: Dataset, rows: int, errors: int, license: str) -> dict[str, object]:
    """The fields of https://huggingface.co/docs/hub/datasets-cards."""
    configs = [_config("default", DATA_GLOB)]
    if errors:
        configs.append(_config("errors", f"{dataset.errors_folder}/*.parquet"))
    tasks = list[str]()
    tags = ["vitray", dataset.spec.family]
    if dataset.job.labelled:
        tasks.append("image-classification")
    if dataset.vectors:
        tasks.append("image-feature-extraction")
        tags.append("embeddings")
    return {
        "pretty_name": dataset.out.rpartition("/")[2],
        "license": license,
        "task_categories": tasks,
        "tags": tags,
        "size_categories": [SIZES[min(max(0, len(str(rows)) - 3), len(SIZES) - 1)]],
        "configs": configs,
    }


def _config(name: str, glob: str) -> dict[str, object]:
    return {"config_name": name, "data_files": [{"split": "train", "path": glob}]}


def _labelled_by(spec: ModelSpec) -> list[str]:
    """A row of the table where labels do not come from the checkpoint's own head."""
    if spec.head:
        column = f", over the stored `{spec.head_column}`" if spec.head_column else ""
        return [f"| labelled by a linear head, SHA-256 | `{spec.head_sha256}`{column} |"]
    if spec.prompts:
        return [f"| labels read as | {', '.join(f'`{_code(text)}`' for text in spec.prompts)} |"]
    return []


def _is_ours(url: str) -> bool:
    """Whether a card is unchanged since vitray wrote it."""
    try:
        sealed = SEAL.fullmatch(read(url))
    except ObjectMissing:  # deleted meanwhile
        return True
    return sealed is not None and hashlib.sha256(sealed[1]).hexdigest() == sealed[2].decode()


def _code(text: str) -> str:
    """Text that is safe as code within one cell of a table in Markdown."""
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in " ".join(text.split()))
