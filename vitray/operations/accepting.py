"""Accept known-bad inputs, so that they do not make every later run incomplete."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

from vitray.clock import utc_now
from vitray.dataset import (
    Acceptance,
    Dataset,
    Problem,
    accept_shard,
    committed_files,
    cut_text,
    is_run,
    newest_run_records,
    read_acceptances,
    require_dataset,
    withdraw_acceptance,
)
from vitray.errors import JobError, count, one_line
from vitray.operations.planning import status
from vitray.operations.requester import default_requester


@dataclass(frozen=True, slots=True)
class KnownProblem:
    """What is wrong with a shard: it is cut short, or was set aside by the last run."""

    problem: Problem
    detail: str


@dataclass(frozen=True, slots=True)
class AcceptedShards:
    """The shards that a call accepted, withdrew or lists.

    added: ids that this call accepted. withdrawn: ids that it asks about again.
    """

    out: str
    shards: tuple[Acceptance, ...]
    added: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"accepted   {one.shard}: {one}" for one in self.shards]
        lines += [f"withdrawn  {shard}: the next run reports it again" for shard in self.withdrawn]
        if self.added:
            lines.append(
                f"{count(len(self.added), 'shard')} accepted now: later runs still report them, "
                "and exit with 0. A new version of an input is not accepted."
            )
        return "\n".join(lines or [f"{self.out}: no shard is accepted"])


def accept(
    out: str,
    shards: Collection[str] = (),
    problems: Collection[Problem] = (),
    *,
    by: str | None = None,
    note: str = "",
) -> AcceptedShards:
    """Accept these shards, and all others with one of these problems.

    by: who accepts; user@host by default. Shards that were accepted before stay as they are. Raises
    JobError where nothing is chosen, or a chosen shard has no such problem.
    """
    dataset = require_dataset(out, follow=False)
    existing = read_acceptances(dataset.out)
    known = known_problems(dataset, existing)
    chosen = choose(known, existing, shards, problems)
    moment = utc_now()
    requester = by or default_requester()
    added = [
        shard
        for shard in chosen
        if accept_shard(
            dataset.out,
            Acceptance(
                shard, known[shard].problem, known[shard].detail, requester, moment, one_line(note)
            ),
        )
    ]
    accepted = read_acceptances(dataset.out, {*chosen, *shards, *_with(existing, problems)})
    return AcceptedShards(dataset.out, tuple(accepted.values()), added=tuple(added))


def list_accepted(out: str) -> AcceptedShards:
    """Every accepted shard. Raises JobError if there is no dataset."""
    dataset = require_dataset(out)
    return AcceptedShards(dataset.out, tuple(read_acceptances(dataset.out).values()))


def withdraw(out: str, shards: Collection[str]) -> AcceptedShards:
    """Withdraw the acceptance of these shards. Raises JobError for one that is not accepted."""
    dataset = require_dataset(out, follow=False)
    existing = read_acceptances(dataset.out)
    unknown = sorted(set(shards) - existing.keys())
    if unknown or not shards:
        what = f"{unknown[0]} is not accepted" if unknown else "choose --shard ID"
        raise JobError(f"{what}. Accepted in {dataset.out}: {', '.join(existing) or 'no shard'}.")
    withdraw_acceptance(dataset.out, shards)
    return AcceptedShards(dataset.out, (), withdrawn=tuple(sorted(set(shards))))


def choose(
    known: Mapping[str, KnownProblem],
    accepted: Mapping[str, Acceptance],
    shards: Collection[str],
    problems: Collection[Problem],
) -> list[str]:
    """The ids to accept now, in order. Raises JobError for a choice that does not fit.

    known: shards with a problem that are not accepted yet.
    """
    possible = "; ".join(f"{shard} ({one.detail})" for shard, one in sorted(known.items()))
    hint = f"Shards to accept: {possible or 'none'}."
    if not shards and not problems:
        names = ", ".join(problem.value for problem in Problem)
        raise JobError(f"choose --shard ID, or --reason with one of {names}. {hint}")
    if unknown := sorted(set(shards) - known.keys() - accepted.keys()):
        raise JobError(f"{unknown[0]} is neither cut short nor set aside by the last run. {hint}")
    by_problem = {shard for shard, one in known.items() if one.problem in problems}
    if not shards and not by_problem and not _with(accepted, problems):
        raise JobError(f"no shard is {' or '.join(problems)}. {hint}")
    return sorted((set(shards) & known.keys()) | by_problem)


def _with(accepted: Mapping[str, Acceptance], problems: Collection[Problem]) -> set[str]:
    return {shard for shard, one in accepted.items() if one.problem in problems}


def known_problems(dataset: Dataset, accepted: Container[str]) -> dict[str, KnownProblem]:
    """The shards that make a run incomplete, except those that are accepted."""
    problems = {
        shard: KnownProblem(Problem.TRUNCATED, cut_text(byte))
        for shard, byte in status(dataset.out).truncated.items()
    }
    committed = committed_files(dataset.out)
    for shard, why in _set_aside_last(dataset).items():
        if shard not in committed:
            problems[shard] = KnownProblem(Problem.SET_ASIDE, f"set aside: {one_line(why)}")
    return {shard: problem for shard, problem in problems.items() if shard not in accepted}


def _set_aside_last(dataset: Dataset) -> dict[str, str]:
    """{shard: why} of the last run that recorded which shards it set aside."""
    for _, record in newest_run_records(dataset.out):
        if record is not None and is_run(record) and "set_aside" in record:
            return dict(record["set_aside"])
    return {}
