"""`vitray submit` and `vitray stop`: a job on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitray.cli.console import say, show
from vitray.cli.interrupts import end_at_once_when_interrupted
from vitray.cli.job_flags import job_flags
from vitray.cli.options import Fields, JobAddress, Json, Open, Target, expand_path, job_of
from vitray.exit_codes import ExitCode

if TYPE_CHECKING:
    from vitray.operations.submitting import Cluster, Submission


@job_flags
def submit(
    target: Target,
    address: JobAddress,
    fields: Fields,
    working_dir: Annotated[
        str | None,
        typer.Option(
            help="a directory to send along, without what its .gitignore names: the job's current "
            "directory on the cluster",
            callback=expand_path,
        ),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(help="a name for the submission; a cluster takes each name once")
    ] = None,
    wait: Annotated[bool, typer.Option(help="follow the job, and exit with its code")] = True,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Run a job on a cluster, through Ray's job API; Ctrl-C leaves it running."""
    from vitray.operations.submitting import Cluster, new_id

    cluster = Cluster(address, allow_open_cluster)
    name = submission_id or new_id()
    end_at_once_when_interrupted(
        f"it may have been submitted. Look: vitray status {name} --address {cluster.address}"
    )
    submission = cluster.submit(job_of(target, fields), working_dir, name)
    show_submission(cluster, submission, wait, as_json)


def stop(
    submission: Annotated[str, typer.Argument(metavar="SUBMISSION", help="the name from submit")],
    address: JobAddress,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Ask a submitted job to stop. What is staged stays; submit the job again to continue."""
    from vitray.operations.submitting import Cluster

    stopped = Cluster(address, allow_open_cluster).stop(submission)
    show(stopped, as_json, str(stopped))


def show_submission(cluster: Cluster, submission: Submission, follow: bool, as_json: bool) -> None:
    """Show a submitted job; with `follow` print its output, and exit with its code."""
    if not follow:
        show(submission, as_json, str(submission))
        return
    end_at_once_when_interrupted(
        f"the job continues. Come back with vitray status {submission.id} --follow --address "
        f"{cluster.address}"
    )
    if not as_json:
        say(str(submission))
    ended = cluster.follow(submission.id, lambda text: say(text.rstrip("\n"), err=as_json))
    show(ended, as_json, str(ended))
    raise typer.Exit(ended.exit_code or ExitCode.DONE)
