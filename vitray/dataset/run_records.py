"""Run records: one JSON object for each run, and for each other command that changed a dataset."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from vitray.dataset.files import under
from vitray.dataset.identity import Dataset
from vitray.dataset.layout import runs_url
from vitray.storage import read, store_for

_TIME = "%Y%m%dT%H%M%S"  # at the start of a run's id, in UTC


class RecordKind(StrEnum):
    """What a record is about, as the field `kind` stores it. Later versions may add others."""

    RUN = "run"
    REMOVE = "remove"


def new_run_id() -> str:
    """A unique id that begins with the time, such as 20261201T030000-1a2b3c4d."""
    return f"{datetime.now(UTC):{_TIME}}-{uuid.uuid4().hex[:8]}"


def run_start(run_id: str) -> datetime | None:
    """When a run began, to the second, from its id; None for an id of another form."""
    try:
        return datetime.strptime(run_id.partition("-")[0], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def is_run(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a run, and not of another command. The first records have no kind."""
    return bool(record.get("kind", RecordKind.RUN) == RecordKind.RUN)


def write_run_record(dataset: Dataset, run_id: str, record: dict[str, object]) -> None:
    """Store the record of a run, unless there is one."""
    url = runs_url(dataset.out, f"{run_id}.json")
    store_for(dataset.out).create(url, json.dumps(record, indent=1).encode())


def read_run_records(out: str) -> list[dict[str, Any]]:
    """Every readable run record, oldest first."""
    return [record for _, record in newest_run_records(out) if record is not None][::-1]


def newest_run_records(out: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(file name, record) of every run, newest first. The record is None where it is damaged.

    Reads each only when it is asked for: a dataset of a nightly job has hundreds.
    """
    for info in reversed(under(runs_url(out))):
        name = info.url.rsplit("/", 1)[-1]
        try:
            record = json.loads(read(info.url))
        except ValueError:
            record = None
        yield name, record if isinstance(record, dict) else None
