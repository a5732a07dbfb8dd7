"""Ask before a command deletes something."""

from __future__ import annotations

import sys
from enum import Enum

import typer

from vitray.cli.console import printable, say, screen
from vitray.errors import JobError
from vitray.exit_codes import ExitCode


class Change(Enum):
    """What a person agrees to: the verb, and its participle."""

    DELETE = ("delete", "deleted")
    BLOCK = ("block", "blocked")


def require_consent(what: str, yes: bool, listed: str = "", change: Change = Change.DELETE) -> None:
    """Go on only with --yes, or if a person at the terminal agrees.

    what: what would change, such as "3 data files". listed: lines about it, shown first.
    Raises JobError where there is neither --yes nor a terminal, or stderr is JSON; exits after a
    no.
    """
    if yes:
        return
    if listed:
        say(listed, err=True)
    verb, participle = change.value
    if not _can_ask():
        raise JobError(f"{what} would be {participle}. Add --yes to {verb} without a question.")
    try:
        agrees = typer.confirm(printable(f"{verb.capitalize()} {what}?"), err=True)
    except typer.Abort:  # Ctrl-D
        agrees = False
    if not agrees:
        say(f"nothing was {participle}", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)


def require_terminal(why: str) -> None:
    """Raise JobError where nobody can be asked. why: what asks, as the start of the message."""
    if not _can_ask():
        raise JobError(f"{why}, and here is nobody to ask. Add --yes.")


def _can_ask() -> bool:
    return not screen.is_json and sys.stdin.isatty() and sys.stderr.isatty()
