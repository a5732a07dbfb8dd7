"""Ask before a command deletes something."""

from __future__ import annotations

import sys

import typer

from vitray.cli.console import printable, say, screen
from vitray.errors import JobError
from vitray.exit_codes import ExitCode


def require_consent(what: str, yes: bool, listed: str = "") -> None:
    """Go on only with --yes, or if a person at the terminal agrees.

    what: what would be deleted, such as "3 data files". listed: lines about it, shown first.
    Raises JobError where there is neither --yes nor a terminal, or stderr is JSON; exits after a
    no.
    """
    if yes:
        return
    if listed:
        say(listed, err=True)
    if screen.is_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise JobError(f"{what} would be deleted. Add --yes to delete without a question.")
    if not typer.confirm(printable(f"Delete {what}?"), err=True):
        say("nothing was deleted", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
