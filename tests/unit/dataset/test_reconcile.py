"""The decision of the manifest step: which data files stay, which go, and what is pending."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vitray.dataset.reconcile import Actions, FileState, reconcile

# ids of two inputs, each in an older and a newer version
CAT_1, CAT_2 = "cats-0123456789-aaaaaaaa", "cats-0123456789-bbbbbbbb"
DOG_1, DOG_2 = "dogs-0123456789-aaaaaaaa", "dogs-0123456789-bbbbbbbb"

# two ranges of row groups of one file: the same base, other versions of the input
RANGE_1, RANGE_2 = "cats-rg0-4-0123456789-aaaaaaaa", "cats-rg0-8-0123456789-bbbbbbbb"
CURRENT, OUTDATED, GONE = FileState.CURRENT, FileState.OUTDATED, FileState.GONE


@dataclass(frozen=True)
class Case:
    listed: tuple[str, ...] = ()
    planned: tuple[str, ...] | None = None  # None: all that are listed
    existing: tuple[str, ...] = ()
    seen: tuple[str, ...] | None = None  # None: all that exist
    prune: bool = False
    admit: dict[str, FileState] = field(default_factory=dict)
    delete: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


CASES = {
    "nothing exists": Case(listed=(CAT_1, DOG_1), pending=(CAT_1, DOG_1)),
    "everything is committed": Case(
        listed=(CAT_1, DOG_1), existing=(CAT_1, DOG_1), admit={CAT_1: CURRENT, DOG_1: CURRENT}
    ),
    "one shard is missing": Case(
        listed=(CAT_1, DOG_1), existing=(CAT_1,), admit={CAT_1: CURRENT}, pending=(DOG_1,)
    ),
    "a limit leaves a shard out of the plan": Case(
        listed=(CAT_1, DOG_1), planned=(CAT_1,), existing=(CAT_1,), admit={CAT_1: CURRENT}
    ),
    "a committed shard beyond the limit stays": Case(
        listed=(CAT_1, DOG_1),
        planned=(CAT_1,),
        existing=(CAT_1, DOG_1),
        admit={CAT_1: CURRENT, DOG_1: CURRENT},
    ),
    "an old version stays until the new one is committed": Case(
        listed=(CAT_2,), existing=(CAT_1,), admit={CAT_1: OUTDATED}, pending=(CAT_2,)
    ),
    "an old version stays when the new one is not planned": Case(
        listed=(CAT_2,), planned=(), existing=(CAT_1,), admit={CAT_1: OUTDATED}
    ),
    "an old version is deleted when the new one is committed": Case(
        listed=(CAT_2,), existing=(CAT_1, CAT_2), admit={CAT_2: CURRENT}, delete=(CAT_1,)
    ),
    "an old version with other row groups stays, too": Case(
        listed=(RANGE_2,), existing=(RANGE_1,), admit={RANGE_1: OUTDATED}, pending=(RANGE_2,)
    ),
    "an old version waits for every part of the new one": Case(
        listed=(CAT_2, RANGE_2),
        existing=(CAT_1, CAT_2),
        admit={CAT_1: OUTDATED, CAT_2: CURRENT},
        pending=(RANGE_2,),
    ),
    "the input of a file is gone": Case(
        listed=(CAT_1,), existing=(CAT_1, DOG_1), admit={CAT_1: CURRENT, DOG_1: GONE}
    ),
    "prune deletes a file whose input is gone": Case(
        listed=(CAT_1,),
        existing=(CAT_1, DOG_1),
        prune=True,
        admit={CAT_1: CURRENT},
        delete=(DOG_1,),
    ),
    "prune does not delete an old version before the new one is committed": Case(
        listed=(CAT_2,), existing=(CAT_1,), prune=True, admit={CAT_1: OUTDATED}, pending=(CAT_2,)
    ),
    "every input is gone": Case(existing=(CAT_1, DOG_2), admit={CAT_1: GONE, DOG_2: GONE}),
    "prune of everything": Case(existing=(CAT_1, DOG_2), prune=True, delete=(CAT_1, DOG_2)),
    "a listed shard that another run commits meanwhile is current": Case(
        listed=(CAT_1,), existing=(CAT_1,), seen=(), admit={CAT_1: CURRENT}
    ),
    "a file of another listing is not deleted, even with prune": Case(
        listed=(CAT_1,),
        existing=(CAT_1, DOG_2),
        seen=(CAT_1,),
        prune=True,
        admit={CAT_1: CURRENT, DOG_2: GONE},
        unlisted=(DOG_2,),
    ),
    "a newer version than the listed one is not deleted": Case(
        listed=(CAT_1,),
        existing=(CAT_1, CAT_2),
        seen=(CAT_1,),
        admit={CAT_1: CURRENT},
        unlisted=(CAT_2,),
    ),
    "a seen file that another run deleted is only pending": Case(
        listed=(CAT_1,), existing=(), seen=(CAT_1,), pending=(CAT_1,)
    ),
    "a data file whose name is not an id is gone": Case(
        listed=(CAT_1,), existing=(CAT_1, "a"), admit={CAT_1: CURRENT, "a": GONE}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_file_gets_one_action(case: Case) -> None:
    existing = set(case.existing)
    actions = reconcile(
        listed=case.listed,
        planned=case.listed if case.planned is None else case.planned,
        existing=existing,
        seen=existing if case.seen is None else set(case.seen),
        prune=case.prune,
    )
    assert actions == Actions(
        unlisted=frozenset(case.unlisted),
        delete=frozenset(case.delete),
        pruned=frozenset(case.delete if case.prune else ()),
        admit=case.admit,
        pending=frozenset(case.pending),
    )
    assert not actions.delete & actions.admit.keys()
    assert actions.delete | actions.admit.keys() | actions.unlisted == existing


def test_files_without_an_input_are_counted() -> None:
    actions = reconcile([CAT_1], [CAT_1], {CAT_1, DOG_1, DOG_2}, {CAT_1, DOG_1, DOG_2}, False)
    assert actions.gone == 2
