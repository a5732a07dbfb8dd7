"""What commands print as JSON: an object of a versioned schema, named in its first field.

docs/schemas/ has a JSON Schema of each, made from the types below by tools/make_schemas.py. Within
a version, fields and values of an enum are only added. To remove a field, or to change its type or
meaning, raise the version.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema of one kind of output.

    type: `module:class` of the dataclass that is printed; named, as some import heavy libraries.
    commands: the commands that print it with --json; none for lines on stderr, and for what
    `run --notify` posts.
    """

    name: str
    version: int
    type: str
    commands: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"vitray/{self.name}/v{self.version}"


SCHEMAS = (
    Schema("run", 1, "vitray.pipeline.progress:Result", ("run", "backfill")),
    Schema("try", 1, "vitray.operations.trying:Trial", ("run --try",)),
    Schema("plan", 1, "vitray.operations.planning:Plan", ("plan",)),
    Schema("estimate", 1, "vitray.operations.costing:Estimate", ("plan --probe",)),
    Schema("check", 1, "vitray.operations.checking:Check", ("check",)),
    Schema("relabel", 1, "vitray.operations.relabelling:Relabelling", ("relabel",)),
    Schema("status", 1, "vitray.operations.planning:Status", ("status",)),
    Schema("runs", 1, "vitray.operations.runs:Runs", ("runs",)),
    Schema("validate", 1, "vitray.operations.validation:Validation", ("validate",)),
    Schema("report", 1, "vitray.consume.report:Report", ("report",)),
    Schema("compare", 1, "vitray.consume.comparing:Comparison", ("compare",)),
    Schema("search", 1, "vitray.consume.searching:SearchResult", ("search",)),
    Schema("accept", 1, "vitray.operations.accepting:AcceptedShards", ("accept",)),
    Schema("remove", 1, "vitray.operations.removing:Removal", ("remove",)),
    Schema("redo", 1, "vitray.operations.redoing:Redo", ("redo",)),
    Schema("clean", 1, "vitray.operations.cleaning:Cleaning", ("clean",)),
    Schema(
        "clean-versions",
        1,
        "vitray.operations.promoting:Retention",
        ("clean --keep-versions",),
    ),
    Schema("pointer", 1, "vitray.operations.promoting:PointerChange", ("promote", "rollback")),
    Schema("export", 1, "vitray.consume.exporting:Export", ("export",)),
    Schema("compact", 1, "vitray.operations.compacting:Compaction", ("compact",)),
    Schema("finetune", 1, "vitray.training.outcome:TrainingResult", ("finetune",)),
    Schema("export-model", 1, "vitray.model_export.export:ExportFigures", ("export-model",)),
    Schema(
        "submission",
        1,
        "vitray.operations.submitting:Submission",
        ("submit", "stop", "status --address"),
    ),
    Schema("bench", 1, "vitray.operations.bench:Bench", ("bench",)),
    Schema(
        "bench-free",
        1,
        "vitray.operations.bench_free_figures:FreeBench",
        ("bench --free-model",),
    ),
    Schema("progress", 1, "vitray.cli.progress_view:ProgressLine"),
    Schema("training-progress", 1, "vitray.cli.training_view:TrainingLine"),
    Schema("log", 1, "vitray.cli.json_output:LogLine"),
    Schema("error", 1, "vitray.cli.json_output:ErrorLine"),
    Schema("notification", 1, "vitray.operations.notifying:Notification"),
)
_BY_TYPE = {schema.type: schema for schema in SCHEMAS}


@dataclass(frozen=True, slots=True)
class LogLine:
    """A message on stderr with `--log-format json`.

    at: in ISO format, in UTC. level: DEBUG, INFO, WARNING, ERROR or CRITICAL. logger: the module
    that wrote it. message: may have several lines. traceback: None unless there was an exception.
    """

    at: str
    level: str
    logger: str
    message: str
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """The error that ends a command, on stderr with `--log-format json`.

    at: in ISO format, in UTC. error: its kind, such as SourceError,
    UsageError or Interrupted. message: what is wrong, where, and what to do next. exit_code: of the
    command.
    """

    at: str
    level: Literal["ERROR"]
    error: str
    message: str
    exit_code: int


def schema_of(result: object) -> Schema:
    """The schema of a result. Raises LookupError for a type that is not in SCHEMAS."""
    kind = type(result)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if name not in _BY_TYPE:
        raise LookupError(f"{name} has no schema: add it to SCHEMAS in {__name__}.")
    return _BY_TYPE[name]


def json_text(result: Any) -> str:
    """A dataclass as one line of JSON."""
    return json.dumps(as_object(result))


def as_object(result: Any) -> dict[str, Any]:
    """The fields of a dataclass, after the name of its schema."""
    return {"schema": str(schema_of(result)), **dataclasses.asdict(result)}
