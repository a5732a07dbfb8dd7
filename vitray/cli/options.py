"""Options and arguments that several commands share, and the job that they describe."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vitray.errors import JobError

if TYPE_CHECKING:
    from vitray.job import Job


def expand_path(path: str | None) -> str | None:
    """The callback of every option that is a path: `~` expanded, as shells do not in --out=~/x.

    Raises JobError if the user has no home directory.
    """
    from vitray.job import expand_home

    if path is None:
        return None
    try:
        return expand_home(path)
    except ValueError as error:
        raise JobError(f"{error}.") from error


Target = Annotated[
    str,
    typer.Argument(
        metavar="JOB.yaml|SOURCE",
        help="a job file (.yaml, .yml, .json), or images: path, glob, prefix, s3://…",
        callback=expand_path,
    ),
]
Fields = dict[str, object]  # of a job, as given on the command line: see job_flags.py
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="any field, read as YAML (repeatable)"),
]
OutArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="a dataset directory", callback=expand_path)
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="a Ray cluster, or `local` for a private one (default: RAY_ADDRESS, else none on a "
        "CPU)",
    ),
]
JobAddress = Annotated[
    str,
    typer.Option("--address", metavar="URL", help="the cluster's job API, like http://head:8265"),
]
Open = Annotated[
    bool,
    typer.Option("--allow-open-cluster", help="join a Ray cluster without token authentication"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@contextlib.contextmanager
def scratch_out() -> Iterator[str]:
    """An empty directory as the `out` of a job whose command writes no dataset."""
    with tempfile.TemporaryDirectory(prefix="vitray-out-") as out:
        yield out


def job_of(target: str, fields: Fields) -> Job:
    """The job of a job file, or of a source, with the fields of the command line on top."""
    from vitray.job import load_job, make_job

    if is_file(target):
        return load_job(target, fields)
    return make_job({"source": target, **fields})


def is_file(target: str) -> bool:
    """Whether the argument names a job file and not a source."""
    from vitray.job import is_job_file

    return is_job_file(target)
