"""`Job`: what a user writes, with its defaults, validation and file formats."""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from vitray.errors import JobError, one_line

if TYPE_CHECKING:
    from vitray.schema import SourceRules

PROMPT = "This is a photo of {}."  # of transformers' zero-shot pipeline
FORMATS = ("bmp", "gif", "jpeg", "png", "tiff", "webp")
JOB_SUFFIXES = (".yaml", ".yml", ".json")
BEGINNING_CHARS = 60  # of a wrong value, in a message
JSON_IS_A_JOB = "a .json file is read as a job; call a manifest of JSON lines .jsonl"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def cut_at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _whole_or(word: str, most: int) -> BeforeValidator:
    """A validator with one message, where pydantic has one for each branch of the union."""

    def check(value: object) -> object:
        if value != word and not (str(value).isdecimal() and 1 <= int(str(value)) <= most):
            raise ValueError(f"a whole number from 1 to {most}, or {word}")
        return value

    return BeforeValidator(check)


def _labels(value: object) -> object:
    """The value of `labels`, with one message for all branches of the union.

    A text with a comma is a list, as in `keep`, unless it is the name of a file.
    """
    if isinstance(value, str) and "," in value and not _may_be_file(value):
        value = value.split(",")
    if isinstance(value, list):
        return distinct_labels(value)
    if not isinstance(value, bool) and (not isinstance(value, str) or not value):
        raise ValueError("true, false, a list of labels, or a file with one label per line")
    return expand_home(value) if isinstance(value, str) else value


def _may_be_file(text: str) -> bool:
    return "://" in text or text.endswith(".txt") or os.path.exists(expand_home(text))


def distinct_labels(names: Sequence[object]) -> list[str]:
    """Labels without the spaces around them.

    Raises ValueError if there is none, or if one is not text, is empty or appears twice.
    """
    if not names:
        raise ValueError("no label; write at least one")
    for name in names:
        if not isinstance(name, str):
            # YAML reads no, on and 7 as other types
            raise ValueError(f"{name!r} is not text; put it in quotes")
    labels = [str(name).strip() for name in names]
    if "" in labels:
        raise ValueError(f"label {labels.index('') + 1} is empty")
    if len(set(labels)) < len(labels):
        raise ValueError(f"label {max(labels, key=labels.count)} appears twice")
    return labels


def expand_home(url: str) -> str:
    """The local path or file:// URL with a leading `~` or `~user` replaced, as a shell does it.

    `./~` names a folder called `~`, and the name of an unknown user stays as it is. Only for paths
    that a user writes, never for those in data. Raises ValueError if the user has no home.
    """
    path = url.removeprefix("file://")
    expanded = os.path.expanduser(path)
    if expanded == path and path.split("/")[0] == "~":
        raise ValueError(
            f"{url}: this user has no home directory; set HOME, or write the whole path"
        )
    return url.removesuffix(path) + expanded


Text = Annotated[str, Field(min_length=1)]  # as a path, "" would be the current directory
Location = Annotated[Text, AfterValidator(expand_home)]  # a path or URL that a user writes
Urls = Annotated[list[Location], BeforeValidator(_as_list)]
Prefixes = Annotated[list[Location], BeforeValidator(cut_at_commas)]
Labels = Annotated[bool | Text | list[Text], BeforeValidator(_labels)]
Prompts = Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)]
Strings = Annotated[list[Text], BeforeValidator(cut_at_commas)]
Color = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
Count = Annotated[int | Literal["auto"], _whole_or("auto", 8192)]
Layer = Annotated[int | Literal["last"], _whole_or("last", 999)]
# by pydantic's name of the problem
TYPES = {
    "string_type": "is not text; put it in quotes",
    "list_type": "is not a list; write [a, b]",
}
# parts of pydantic's messages, and ours
WORDS = {
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
    "Input should be greater than": "must be more than",
    "Input should be less than": "must be less than",
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid number": "must be a number",
    "Input should be ": "must be ",
}
YAML_SYNTAX = ("[", "{", "!", "&", "*", "'", '"', "|", ">")  # how a value begins that is no text
# ValueError: a date like 2024-13-45, or bytes that are not UTF-8
# RecursionError: thousands of open brackets
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)


class Embedding(BaseModel):
    """One vector column. With a single one the column is `embedding`, else `embedding_<name>`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Layer = Field(
        "last",
        description="`1` to L: output of that block. `last`: output after the final LayerNorm",
    )
    pool: Literal["cls", "mean", "patches_mean"] = Field(
        "cls",
        description="`cls`: the CLS token. `mean`: mean of all tokens. `patches_mean`: mean of the "
        "patches",
    )
    normalize: bool = Field(False, description="scale to unit L2 norm, in float32, before dtype")
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored values")
    name: str = Field(
        "", description="suffix of the column (default: <pool>_<layer>)", pattern=r"^[a-z0-9_]*$"
    )

    @property
    def label(self) -> str:
        return self.name or f"{self.pool}_{self.layer}"


class UserConfig(BaseModel):
    """The fields of a file that a user writes: a job, or a training."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, /, **fields: object) -> None:
        """Raises JobError, which names every wrong field and the nearest known one."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            # of the wrong entries of a list, only the first is named
            problems = {(p["loc"][:1], p["type"]): p for p in reversed(error.errors())}
            messages = [
                _problem_text(type(self), p["type"], p["loc"], p["msg"], p["input"])
                for p in reversed(problems.values())
            ]
            raise JobError(f"the job is not valid: {'; '.join(messages)}") from None


class Job(UserConfig):
    """A dataset to make: which images, which model, and where to write."""

    source: Urls = Field(
        description="URL, path, glob, prefix, a range such as {000..099}, or a list of these; "
        "local or s3://",
        min_length=1,
    )
    model: Location = Field(description="Hugging Face id, local directory, or s3:// directory")
    out: Location = Field(description="output directory, local or s3://")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    format: Literal["auto", "tar", "parquet", "files", "manifest"] = Field(
        "auto", description="kind of source. `auto`: detected"
    )
    labels: Labels = Field(
        True,
        description="`true`: classify with the checkpoint's trained head. A list, a,b, or a file "
        "with one label in each line: classify with the text tower of CLIP or SigLIP. `false`: "
        "only embed. Text with a comma is a list unless such a file exists",
    )
    prompts: Prompts = Field(
        [PROMPT],
        description="texts that the text tower reads for each label, which replaces {}. The "
        "vectors of several prompts are averaged",
    )
    head: Location | None = Field(
        None,
        description="directory of a linear head over this model's embeddings, which labels instead "
        "of the model's own head",
    )
    embeddings: list[Embedding] = Field(
        [Embedding.model_validate({})],
        description="vectors to store; one forward pass computes all of them",
    )
    top_k: int = Field(5, description="number of best labels to store", ge=1, le=1000)
    keep: Strings = Field(
        [],
        description="passthrough columns: input columns or tar member extensions to copy into the "
        "output. A list, or a,b",
    )
    image_column: str | None = Field(
        None, description="Parquet or manifest: column with the image (default: detected)"
    )
    key_column: str | None = Field(None, description="Parquet or manifest: column that names a row")
    image_member: str | None = Field(
        None, description="tar: extension of the member to use if a sample has several images"
    )
    tar_keys: Literal["auto", "first_dot", "last_dot"] = Field(
        "auto",
        description="tar: where a member's key ends. `auto`: at the first dot, as in WebDataset, "
        "or at the last dot if what follows the first one is part of the name",
    )
    source_rules: Literal["auto", 1, 2] = Field(
        "auto",
        description="how names in the source become rows. `auto`: as in the dataset's first run. "
        "`1`: as before December 2026",
    )
    allow: Prefixes = Field(
        [],
        description="manifest: prefixes that its paths may point into (default: the manifest's "
        "directory)",
    )
    formats: Strings = Field(list(FORMATS), description="image formats to decode")
    max_pixels: int = Field(50_000_000, description="most pixels that an image may have", ge=1)
    background: Color | None = Field(
        None,
        description="colour behind transparent images, as '#rrggbb' in quotes (default: alpha is "
        "dropped)",
    )
    decode: Literal["exact", "fast", "draft", "gpu", "hybrid"] = Field(
        "exact",
        description="`exact`: Hugging Face's pixels. `fast`: some pixels a level off. `draft`: "
        "large JPEGs at reduced size. `gpu`: baseline JPEGs with the GPU's decoder, the others as "
        "fast. `hybrid`: CPU threads take a share of those JPEGs, too",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = Field(
        "auto",
        description="`auto`: the fastest that the hardware has, except fp8. `fp8`: needs an Ada or "
        "Hopper GPU or newer, and logs how well it agrees with bf16",
    )
    engine: Literal["auto", "torch", "openvino", "onnx"] = Field(
        "auto",
        description="what runs the model. `auto`: the fastest installed engine whose output "
        "matches torch (fp32)",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile, for engine torch. `auto`: if the images repay its minute, "
        "which plan shows",
    )
    batch_size: Count = Field("auto", description="images in a forward pass")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="where the model runs"
    )
    group_size: int = Field(
        4096, description="loose files, or rows of a manifest, in a shard", ge=1, le=100_000
    )
    fragment_rows: Count = Field(
        "auto", description="images in a fragment; a crash costs a few fragments"
    )
    since: str | None = Field(
        None,
        description="only shards modified since a time: 2026-11-01, 2026-11-01T06:00Z (UTC if no "
        "zone is given), or a span that ends now: 36h, 7d, 7d ago",
    )
    sample: float | None = Field(
        None, description="only this share of the shards, chosen by their names", gt=0, le=1
    )
    limit: int | None = Field(
        None, description="only the first N shards that since and sample select", ge=1
    )
    max_error_rate: float = Field(
        0.05,
        description="share of bad images above which the exit code is 4. Once a run has 1,000 "
        "images, it stops as soon as the share is above",
        ge=0,
        le=1,
    )
    stall_timeout_s: float = Field(
        600, description="seconds without a finished fragment after which the run aborts", gt=0
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _on_and_off(cls, value: object) -> object:
        """YAML reads both as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("prompts")
    @classmethod
    def _with_placeholder(cls, value: list[str]) -> list[str]:
        for prompt in value:
            if "{}" not in prompt:
                raise ValueError(f"{prompt!r} has no {{}} for the label")
        return value

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, value: list[str]) -> list[str]:
        aliases = {"jpg": "jpeg", "tif": "tiff"}
        names = [aliases.get(v.lower(), v.lower()) for v in value]
        if unknown := sorted(set(names) - set(FORMATS)):
            raise ValueError(
                f"unknown image format {', '.join(unknown)}; known: {', '.join(FORMATS)}"
            )
        return sorted(set(names))

    @field_validator("since", mode="before")
    @classmethod
    def _readable_since(cls, value: object) -> object:
        text = None if value is None else str(value)  # YAML makes dates of dates
        _moment(text)
        return text

    def since_s(self) -> float | None:
        """`since` as seconds since 1970; None without it."""
        return _moment(self.since)

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        if not self.labels and not self.embeddings:
            raise ValueError("nothing to compute: labels is false and embeddings is empty")
        if self.head is not None and self.labels is not True:
            raise ValueError("head has labels of its own; leave labels out, or head")
        if self.prompts != [PROMPT] and isinstance(self.labels, bool):
            raise ValueError("prompts are for labels of your own, such as labels: [cat, dog]")
        names = [e.label for e in self.embeddings]
        if len(set(names)) != len(names):
            raise ValueError(
                f"two embeddings are called {max(names, key=names.count)}; give them a `name`"
            )
        columns = [self.passthrough_name(name) for name in self.keep]
        for name in columns:
            if name in self._taken_columns() or columns.count(name) > 1:
                raise ValueError(f"keep: two columns of the output would be called {name}")
        return self

    _key_is_found: bool = PrivateAttr(False)

    def with_found_key(self, name: str | None) -> Job:
        """The job with a detected key column. Rows of a file without it are named by number."""
        job = self.model_copy(update={"key_column": name})
        job._key_is_found = name is not None
        return job

    @property
    def key_is_found(self) -> bool:
        """Whether the dataset's first run detected the key column."""
        return self._key_is_found

    @property
    def rules(self) -> SourceRules:
        """The source rules: the newest, if the dataset has not set them."""
        from vitray.schema import SourceRules

        return SourceRules.V2 if self.source_rules == "auto" else SourceRules(self.source_rules)

    @property
    def labelled(self) -> bool:
        return self.labels is not False

    def passthrough_name(self, name: str) -> str:
        """The output column of an input column: its own name, or input_<name> if that is taken."""
        return f"input_{name}" if name in self._taken_columns() else name

    def _taken_columns(self) -> set[str]:
        """The columns that rows have without `keep`."""
        from vitray.schema import RESERVED  # pyarrow, which --help does not need

        return {*RESERVED, *(self.column(embedding) for embedding in self.embeddings)}

    def column(self, embedding: Embedding) -> str:
        return (
            "embedding"
            if len(self.embeddings) == 1 and not embedding.name
            else f"embedding_{embedding.label}"
        )


def _moment(text: str | None) -> float | None:
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d{1,6})\s*([hd])(\s+ago)?", text):
        return time.time() - int(ago[1]) * {"h": 3600, "d": 86400}[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            "a date like 2026-11-01, a time like 2026-11-01T06:00Z, or a span like 36h or 7d"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def make_job(fields: dict[str, Any]) -> Job:
    """A Job, or a JobError."""
    return Job(**fields)


def _problem_text(
    config: type[UserConfig],
    kind: str,
    location: tuple[int | str, ...],
    message: str,
    value: object,
) -> str:
    """The message of a problem that pydantic found."""
    name = ".".join(map(str, location))
    if kind == "extra_forbidden":
        fields = (Embedding if len(location) > 1 else config).model_fields
        nearest = difflib.get_close_matches(str(location[-1]), fields, n=1)
        hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
        return f"unknown field `{name}`{hint}"
    if kind == "missing":
        return f"`{name}` is missing: {config.model_fields[name].description}"
    if kind in TYPES:
        return f"`{name}`: {_beginning(value)} {TYPES[kind]}"
    text = _in_our_words(message)
    return f"`{name}`: {text}" if name else text  # without a name it is about several fields


def _in_our_words(message: str) -> str:
    """A message of pydantic, or of a validator of ours."""
    text = message.removeprefix("Value error, ").partition(", unable to parse")[0]
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _beginning(value: object) -> str:
    """The first characters of the value as JSON.

    Lazily: with aliases, a small file can have a value of terabytes, or one that contains itself.
    """
    pieces = json.JSONEncoder(default=str, check_circular=False).iterencode(value)
    return "".join(islice(pieces, BEGINNING_CHARS))[:BEGINNING_CHARS]


class _Loader(yaml.SafeLoader):
    """As yaml.safe_load, but a repeated field is an error; PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if value.tag.endswith(":null") and not value.value:
                raise ValueError(
                    f"`{key.value}` has no value in line {key.start_mark.line + 1}; "
                    "what begins with # goes in quotes"
                )
            if first.setdefault(str(key.value), key) is not key:
                raise ValueError(
                    f"`{key.value}` appears twice, again in line {key.start_mark.line + 1}"
                )
        return node


def is_job_file(path: str | Path) -> bool:
    """Whether an argument names a job file and not a source, by its suffix in any case."""
    return str(path).lower().endswith(JOB_SUFFIXES)


def _is_json(path: str | Path) -> bool:
    return str(path).lower().endswith(".json")


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a job file: JSON if its suffix is .json, else YAML. Raises JobError."""
    language = "JSON" if _is_json(path) else "YAML"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        loaded = _read_json(text) if _is_json(path) else _Loader(text).get_single_data()
    except OSError as error:
        step = "Give the path of a YAML or JSON file."
        raise JobError(f"cannot read the job file {path}: {error.strerror}. {step}") from error
    except BAD_YAML as error:
        raise JobError(f"{path} is not valid {language}: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        step = "write lines like `source: photos/*.tar`"
        if _is_json(path):
            step = f'write an object like {{"source": "photos/*.tar"}} ({JSON_IS_A_JOB})'
        raise JobError(f"{path} holds no fields; {step}")
    return {str(key): value for key, value in loaded.items()}


def _read_json(text: str) -> object:
    """The value of a JSON text, as strict as _Loader: no name twice, no NaN. Raises ValueError.

    YAML's parser would refuse tabs, and break characters that JSON writes as surrogate pairs.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct_names, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ValueError(f"{error}; {JSON_IS_A_JOB}") from error
        raise


def _distinct_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"`{name}` appears twice")
        fields[name] = value
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def parse_set(pairs: list[str]) -> dict[str, object]:
    """The fields of `--set field=value`. Values are read as YAML, so lists and numbers work."""
    fields: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise JobError(f"--set {pair}: write --set field=value")
        fields[name.strip()] = read_value(f"--set {pair}", value)
    return fields


def read_value(option: str, value: str) -> object:
    """The value of an option, read as YAML. option: as the user wrote it, for messages."""
    try:
        return value if value.startswith("#") else _Loader(value).get_single_data()
    except BAD_YAML as error:
        if not value.startswith(YAML_SYNTAX):
            return value  # the field has a message of its own
        raise JobError(f"{option}: the value is not valid YAML") from error


def load_job(path: str | Path, overrides: dict[str, object] | None = None) -> Job:
    """The job of a YAML or JSON file, with overrides from the command line on top."""
    fields = read_fields(path)
    if _is_json(path) and fields and not fields.keys() & Job.model_fields.keys():
        names = ", ".join(islice(fields, 3)) + (", …" if len(fields) > 3 else "")
        raise JobError(
            f"{path} is not a job file: none of its fields ({names}) is a job field "
            f"({JSON_IS_A_JOB})"
        )
    return make_job({**fields, **(overrides or {})})
