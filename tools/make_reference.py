"""Writes docs/reference.md and docs/schemas from the code: `python tools/make_reference.py`, or
`make docs`. tests/unit/docs/test_docs.py fails where it is stale.

Tables come from the job, the schema, the command line, the exception tree and the metrics. What a
column holds stands here, since an Arrow schema has no room for it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import make_schemas
import vitray
from vitray import errors
from vitray.cli import app
from vitray.cli.help_page import value_of
from vitray.cli.json_output import SCHEMAS, Schema
from vitray.dataset.ledger import MANIFEST_SCHEMA
from vitray.job import FORMATS, Embedding, Job
from vitray.left_out import LEFT_OUT
from vitray.pipeline import Result
from vitray.pipeline.metrics import COUNTERS, GAUGES, STEP_SECONDS
from vitray.schema import ERROR_SCHEMA, IMAGE_FIELDS, LABEL_FIELDS, REASONS
from vitray.training.config import TrainingConfig

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
IMAGE_COLUMNS = {
    "key": "the sample's own name. In a tar: the path up to a dot of the base name (`tar_keys`). "
    "Of a loose file: its whole path, equal to `uri`. In a manifest or Parquet: the key column, "
    "the image's path, or the row's number. "
    "A key need not be unique. (`shard`, `index`) is unique.",
    "shard": "id of the shard, which is the name of the data file",
    "index": "position of the image in its shard, from 0",
    "uri": "the object that the image came from: the tar, the Parquet file that has its bytes, or "
    "the image's own file",
    "content_hash": "BLAKE2b of the encoded bytes, 16 bytes",
}
ROW_COLUMNS = {
    "width": "width of the original in pixels, from its header (before EXIF orientation)",
    "height": "height, likewise",
    "format": f"one of {', '.join(FORMATS)}, found by content",
    "label": "name of the best class",
    "label_id": "its number in the model",
    "score": "softmax over the classes. Sigmoid if the model has several labels for an image or a "
    "single output, and for labels that a SigLIP reads. The raw value of a regression.",
    "top_labels": "names of the `top_k` best classes, best first",
    "top_ids": "their numbers",
    "top_scores": "their scores",
}
ERROR_COLUMNS = {
    "reason": "one of the reasons below",
    "message": "what the reader or the decoder reported",
    "size_bytes": "size of the encoded image",
}
MANIFEST_COLUMNS = {
    "shard": "id of the shard",
    "url": "its input",
    "source_version": "etag of the input. On a local disk size and time. "
    "For a group of files a hash over theirs.",
    "path": "path of the data file in the dataset",
    "etag": "etag of the data file; empty on a local disk",
    "size_bytes": "size of the data file",
    "rows": "number of good images",
    "errors": "number of bad images",
    "truncated_at": "byte at which the input was cut; null if it was whole",
    "sha256": "hash of the data file",
    "left_out": "what of the shard has no row, by reason, as JSON; "
    "null in manifests made before December 2026",
    "image_members": "number of images from tar members of each extension, as JSON; null likewise",
    "state": "`current`. `gone`: the input is not listed any more. "
    "`outdated`: the input changed, and its new version is not committed yet.",
}
RESULT_FIELDS = {
    "out": "the dataset",
    "errors_path": "folder of its error rows",
    "shards": "committed shards of the dataset",
    "rows": "its good rows",
    "errors": "its error rows",
    "committed": "shards that this run committed, with those that it adopted",
    "adopted": "of these, shards whose data file another run or an earlier attempt made",
    "images": "images that this run computed",
    "seconds": "time that this run took",
    "set_aside": "shards that could not be read, and why",
    "notes": "what readers of this run saw beside images, by shard",
    "truncated": "shards whose input was cut, and at which byte",
    "reasons": "bad images of this run, by [reason](#reasons)",
    "gone": "shards of the dataset whose input is not listed any more",
    "deleted": "files of groups that are not listed any more. Each is one of `errors`, and does "
    "not count as bad.",
    "pruned": "images whose rows `--prune` removed, good and bad",
    "accepted": "shards that are cut short, or were not read, and who accepted that",
    "pending": "planned shards without a data file",
    "left_out": "files, members and pages without a row, by [reason](#left-out)",
    "suffixes": "suffixes of those files",
    "shards_not_selected": "shards that `since`, `sample` or `limit` leave for later",
    "images_not_selected": "their images; estimated for tars",
    "too_many_errors": "whether more of the dataset's images are bad than `max_error_rate` allows",
    "cost": "cost of this run in the currency of the prices: `machines`, `requests` (estimated) "
    "and `total`; none without prices",
    "ended_by": "`max_hours` or `max_cost`, if that limit ended the run while shards were pending",
}
SECTIONS = (
    "Job",
    "Embeddings",
    "Training",
    "Files of a dataset",
    "Columns of `data/`",
    "Columns of `_errors/`",
    "Reasons",
    "Left out",
    "Manifest",
    "Exit codes",
    "Commands",
    "JSON",
    "Python",
    "Metrics",
)
JOB = """
The fields of a job file (YAML or JSON), of `--set`, and of `vitray.Job`.

- An unknown field is refused, with the nearest known name.
- Relative paths start at the directory where the command runs, also those in a job file.
- Credentials are never fields. They come from the environment, a profile or a role.
- `decode: gpu` and `hybrid` need a CUDA GPU and `vitray[gpu]`. See [run on GPUs](how-to/gpus.md).
"""
FILES = """
    OUT/data/<shard>.parquet       rows of the good images
    OUT/_errors/<shard>.parquet    rows of the bad images
    OUT/_SUCCESS.json              exists exactly while nothing is pending
    OUT/_vitray/                   the job, the manifest, run records, and what is staged
    OUT/_vitray/leases/            which shards each run works on, while it runs
    OUT/_vitray/README.md          the dataset card, if `report --card` wrote one

Every reader of Parquet can open `data/*.parquet` at any moment, and never sees half a file.
"""
EXIT_CODES = """
- 1: `validate` also ends with it, if the dataset is not valid.
- 3: `export --to webdataset` also ends with it, if it could not read every image again.
- 4: the share counts the whole dataset. Once a run has 1,000 images, it stops as soon as the share
  of its own images is above `max_error_rate`.
- 5: `compare` and `export-model` end with it, if fewer labels agree than `--min-agreement`.
- 6: `status --max-age` ends with it, if no run ended with 0 within that time. A run with nothing
  to do counts.
- 7: `run --max-hours` and `--max-cost` end with it, if shards are left. Everything that the run
  computed is stored.
- 129, 130: a terminal that closes, and Ctrl-C, end a run at once.
- 137: not from vitray. The process was killed with kill -9, or memory was short. The same command
  continues.
- 143: SIGTERM lets a run finish the writes that have begun. It has 15 s for the writes, and ends
  within 20 s in all.

[What to do after each code](how-to/spot.md#after-each-exit-code).
"""
COMMANDS = """
A tour. Each command has `--help`.

```sh
vitray run 's3://photos/shards-{000..099}.tar' --model google/vit-base-patch16-224 --out s3://out
vitray run job.yaml --set precision=bf16 --set keep=txt,cls    # flags override the file
vitray plan job.yaml                          # what a run would do; writes nothing
vitray plan job.yaml --probe 200 --prices prices.yaml    # time, bottleneck and cost
vitray submit job.yaml --address http://head:8265        # on a cluster; Ctrl-C leaves it running
vitray bench job.yaml                         # speed of each stage; writes nothing to out
vitray status s3://out                        # progress
vitray validate s3://out --content            # every file against manifest, footer and inputs
vitray redo s3://out --reason decode_error --yes     # delete data files; the next run makes them
vitray backfill job.yaml --model google/vit-large-patch16-224 --out s3://out-2
vitray compare s3://out s3://out-2 --min-agreement 0.98 --page changes.html
vitray relabel s3://out --head s3://heads/pets --into s3://pets   # other labels, no image is read
vitray compact s3://out --into s3://out-large    # the same rows in few files of 256 MB and more
vitray search s3://out --image cat.jpg           # the nearest images
vitray export s3://out --to lance --into photos.lance    # or faiss, npy, csv, webdataset
vitray export-model google/vit-base-patch16-224 --to openvino --into vit-openvino
vitray report s3://out --truth cls               # one HTML page
vitray finetune pets.yaml                        # your own classes, or a smaller model
vitray clean s3://out                            # remove staging that nothing needs
```

Options before the command:
"""
JSON = """
`--json` prints one JSON object on stdout. With `--log-format json` each line on stderr is one, too:
progress, log messages, and the error that ends a command. The field `schema` names the schema of
the object. [How to use them in scripts](how-to/json.md).

Within a version, fields and values of an enum are only added. So programs should ignore fields that
they do not know. Where a field is removed, or its type or meaning changes, the version is raised.
"""


def page() -> str:
    parts = [
        "# Reference",
        "`make docs` makes this page from the code. Do not edit it.",
        "\n".join(f"- [{section}](#{_anchor(section)})" for section in SECTIONS),
        "## Job",
        JOB.strip(),
        _table("field | type | default | meaning", _fields_of(Job)),
        "## Embeddings",
        "The entries of `embeddings`. One forward pass computes all of them. A single embedding "
        "without a `name` is the column `embedding`. Otherwise columns are `embedding_<name>`.",
        _table("field | type | default | meaning", _fields_of(Embedding)),
        "## Training",
        "The fields of a `vitray finetune` file, and of its `--set`. "
        "See [train the model on your own classes](how-to/finetune.md).",
        _table("field | type | default | meaning", _fields_of(TrainingConfig)),
        "## Files of a dataset",
        FILES.strip("\n"),
        "## Columns of `data/`",
        "`OUT/data/<shard>.parquet` has the good images of a shard, in its order. "
        "Passthrough columns stand before `label`, under their own name. If the output already "
        "has that name, the column is called `input_<name>`. Vectors stand last. "
        "With `labels: false`, the columns from `label` to `top_scores` are absent.",
        _columns([*IMAGE_FIELDS, *LABEL_FIELDS], IMAGE_COLUMNS | ROW_COLUMNS, _vector_row()),
        "## Columns of `_errors/`",
        "`OUT/_errors/<shard>.parquet` has the bad images of a shard. It exists only if the shard "
        "has some. In datasets made before December 2026 the folder is called `errors/`.",
        _columns(ERROR_SCHEMA, IMAGE_COLUMNS | ERROR_COLUMNS),
        "## Reasons",
        "Why an image is bad: the values of `reason`.",
        _table("reason | meaning", [[f"`{name}`", meaning] for name, meaning in REASONS.items()]),
        "## Left out",
        "Why something in a source has no row: the names in `left_out`. "
        "See [which images get a row](how-to/sources.md).",
        _table("reason | meaning", [[f"`{name}`", meaning] for name, meaning in LEFT_OUT.items()]),
        "## Manifest",
        "`OUT/_SUCCESS.json` names the manifest, a Parquet file. It has a row for each data file.",
        _columns(MANIFEST_SCHEMA, MANIFEST_COLUMNS),
        "## Exit codes",
        _table("code | meaning", exit_codes()),
        EXIT_CODES.strip(),
        "The exceptions of `vitray.errors` and their codes:",
        f"```text\n{_exceptions()}\n```",
        "## Commands",
        COMMANDS.strip(),
        _table("option | meaning", _option_rows(group())),
        *[part for name, command in group().commands.items() for part in _command(name, command)],
        "## JSON",
        JSON.strip(),
        _table("schema | printed by | what it is", [_schema_row(schema) for schema in SCHEMAS]),
        "## Python",
        *[part for name in vitray.__all__ if name[0].islower() for part in _function(name)],
        "### `Result`",
        "What `vitray.run` returns. `vitray run --json` prints all of it but `exit_code`.",
        _table("field | type | meaning", _result_rows()),
        "## Metrics",
        "Ray's own exporter serves those called `ray_…` while a run on Ray works. `vitray run "
        "--metrics-file` and `--metrics-port` export all of them, on Ray and without it, and call "
        "them `vitray_…`. The run record in `OUT/_vitray/runs/` has the same counts.",
        _table("metric | kind | tags | meaning", metrics()),
    ]
    return "\n\n".join(parts) + "\n"


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _fields_of(model: type[BaseModel]) -> list[list[str]]:
    return [_field_row(*item) for item in model.model_fields.items()]


def _exceptions() -> str:
    """The tree in the docstring of vitray.errors: its second paragraph."""
    return inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]


def _result_rows() -> list[list[str]]:
    rows = [
        [f"`{field.name}`", f"`{field.type}`", RESULT_FIELDS[field.name]]
        for field in dataclasses.fields(Result)
    ]
    return [*rows, ["`exit_code`", "`int`", "[exit code](#exit-codes) of the command"]]


def _schema_row(schema: Schema) -> list[str]:
    """The name with a link to its file, the commands, and the beginning of its description."""
    file = make_schemas.file_of(schema)
    others = {
        "progress": "`run`, on stderr",
        "training-progress": "`finetune`, on stderr",
        "notification": "`run --notify`",
    }
    commands = ", ".join(f"`{name} --json`" for name in schema.commands)
    return [
        f"[{schema}](schemas/{file.name})",
        commands or others.get(schema.name, "all, on stderr"),
        make_schemas.json_schema(schema)["description"],
    ]


def group() -> Any:
    return typer.main.get_command(app)


def exit_codes() -> list[list[str]]:
    """What the command line says of them, a row each."""
    said = (app.info.epilog or "").removeprefix("Exit codes: ").removesuffix(".")
    return [
        [f"`{code}`", meaning]
        for code, meaning in (part.split(" ", 1) for part in re.split(r", (?=\d)", said))
    ]


def metrics() -> list[list[str]]:
    """Name as Prometheus sees it, kind, tags, meaning."""
    rows = [(f"ray_{name}_total", "counter", tags, what) for name, (what, tags) in COUNTERS.items()]
    name, what, tags = STEP_SECONDS
    rows.append((f"ray_{name}", "histogram", tags, what))
    rows += [(name, "gauge", (), what) for name, what in GAUGES.items()]
    return [
        [f"`{name}`", kind, ", ".join(f"`{tag}`" for tag in tags), what]
        for name, kind, tags, what in rows
    ]


def _field_row(name: str, field: FieldInfo) -> list[str]:
    return [f"`{name}`", _type_of(field.annotation), _default_of(field), field.description or ""]


def _type_of(kind: Any) -> str:
    """`list of text`, `one of a, b`, `whole number`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type_of(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type_of(arguments[0])}"
    if arguments:
        return " or ".join(_type_of(part) for part in arguments if part is not type(None))
    return {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true, false",
        Embedding: "embedding",
    }[kind]


def _default_of(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default in ([], ""):
        return "none"
    if isinstance(field.default, list):
        return f"[{', '.join(map(_entry, field.default))}]"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:,}" if isinstance(field.default, int) else f"{field.default}"


def _entry(value: object) -> str:
    return (
        f"{{layer: {value.layer}, pool: {value.pool}}}"
        if isinstance(value, Embedding)
        else str(value)
    )


def _columns(fields: Any, meanings: dict[str, str], *more: list[str]) -> str:
    rows = [[f"`{field.name}`", _arrow(field.type), meanings[field.name]] for field in fields]
    return _table("column | type | meaning", [*rows, *more])


def _arrow(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return f"{kind.value_type}, dictionary"
    if pa.types.is_list(kind):
        return f"list of {_arrow(kind.value_type)}"
    return "float32" if kind == pa.float32() else str(kind).replace("fixed_size_binary", "binary")


def _vector_row() -> list[str]:
    return [
        "`embedding`, or `embedding_<name>`",
        "fixed-size list of float32 or float16",
        "the vector; never null",
    ]


def _command(name: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["vitray", name, *(p.metavar or f"[{p.name.upper()}]" for p in arguments)])
    rows = [
        [f"`{p.metavar or p.name.upper()}`", (p.help or "") + _with_default(p)] for p in arguments
    ]
    return [
        f"### `vitray {name}`",
        f"`{usage} [OPTIONS]`",
        command.help,
        *_field_note(command),
        _table("name | meaning", rows + _option_rows(command)),
        *_schema_note(name),
    ]


def _option_rows(command: Any) -> list[list[str]]:
    """The options of a command, without those that are fields of a job or a training."""
    rows = []
    for option in command.params:
        if option.param_type_name == "option" and not _is_field(option):
            value = value_of(option)
            names = ", ".join(
                f"`{name} {value}`" if value else f"`{name}`"
                for name in [*option.opts, *option.secondary_opts]
            )
            rows.append([names, (option.help or "") + _with_default(option)])
    return rows


def _is_field(option: Any) -> bool:
    """Whether the option is one of those that are made from a field; see job_flags.py."""
    fields = Job.model_fields | TrainingConfig.model_fields
    return option.name in fields and isinstance(getattr(option, "rich_help_panel", None), str)


def _field_note(command: Any) -> list[str]:
    """A sentence about the options that _option_rows leaves out."""
    fields = [parameter for parameter in command.params if _is_field(parameter)]
    if not fields:
        return []
    config = "training" if command.name == "finetune" else "job"
    option = max((field.opts[0] for field in fields), key=lambda name: name == "--batch-size")
    name = option.removeprefix("--").replace("-", "_")
    return [f"The fields of the [{config}](#{config}) are options, too: `{name}` is `{option}`."]


def _schema_note(name: str) -> list[str]:
    """Links to the schemas of what a command prints with --json."""
    schemas = [
        f"[{schema}](schemas/{make_schemas.file_of(schema).name})"
        for schema in SCHEMAS
        if any(command.split()[0] == name for command in schema.commands)
    ]
    return [f"Schema of `--json`: {' or '.join(schemas)}."] if schemas else []


def _with_default(parameter: Any) -> str:
    if parameter.required:
        return " (required)"
    if parameter.default is None or parameter.default is False:
        return ""
    if parameter.default is True:
        return f" (default: `{parameter.opts[0]}`)"
    return f" (default: {parameter.default})"


def _function(name: str) -> list[str]:
    thing = getattr(vitray, name)
    return [
        f"### `vitray.{name}`",
        f"```text\nvitray.{name}{_signature(thing)}\n```",
        *(_parameter_list(part, thing) for part in _paragraphs(thing.__doc__)),
    ]


def _paragraphs(docstring: str | None) -> list[str]:
    return inspect.cleandoc(docstring or "").split("\n\n")


def _parameter_list(paragraph: str, function: Any) -> str:
    """A paragraph of a docstring as Markdown: `name: text` of parameters becomes a list."""
    names = "|".join(inspect.signature(function).parameters)
    described, *errors = re.split(r"\s(?=Raises )", paragraph, maxsplit=1)
    parts = re.split(rf"(?:^|\s)({names}): ", described)
    if len(parts) == 1 or parts[0]:
        return paragraph
    items = zip(parts[1::2], parts[2::2])
    listed = "\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in items)
    return "\n\n".join([listed, *(" ".join(text.split()) for text in errors)])


def _signature(thing: Any) -> str:
    """Without what only a type checker reads."""
    parameters = inspect.signature(thing).parameters.values()
    said = [p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters]
    if at := next((n for n, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None):
        said.insert(at, "*")
    return f"({', '.join(said)})"


def _table(heads: str, rows: list[list[str]]) -> str:
    width = heads.count("|") + 1
    assert all(len(row) == width for row in rows), rows
    return "\n".join(
        [
            f"| {heads} |",
            "| --- " * width + "|",
            *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
        ]
    )


def _cell(text: str) -> str:
    """Bars would end the cell, and <words> outside of code would be tags."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(
        part.replace("<", "&lt;") if n % 2 == 0 else part for n, part in enumerate(parts)
    )


if __name__ == "__main__":
    make_schemas.write()
    PAGE.write_text(page(), encoding="utf-8")
