"""vitray compare: what differs between two datasets of the same input, to the row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from factories import hand_made
from vitray.consume.comparing import Move, compare, linear_cka, neighbour_overlap
from vitray.errors import JobError


def test_labels_that_moved_and_rows_of_one_alone_are_counted(two: tuple[str, str]) -> None:
    result = compare(*two)
    assert (result.rows, result.only_old_rows, result.only_new_rows) == (16, 2, 2)
    assert (result.only_old_shards, result.only_new_shards) == (1, 0)
    # of 10 images a shard, 3 and 4 are bad in one: 0 6 9 are cats, 1 7 dogs, 2 5 8 emus
    assert result.agreement == 6 / 16 and result.score_shift == 0.0
    first, second = sorted(Path(path).stem for path in Path(two[1], "data").iterdir())
    assert result.moves == (
        Move(
            "cat",
            "dog",
            6,
            ("0/00", "0/06", "0/09", "1/00", "1/06", "1/09"),
            tuple((s, i) for s in (first, second) for i in (0, 6, 9)),
        ),
        Move(
            "dog",
            "cat",
            4,
            ("0/01", "0/07", "1/01", "1/07"),
            tuple((s, i) for s in (first, second) for i in (1, 7)),
        ),
    )
    assert (result.sample, result.cka, result.neighbours) == (16, pytest.approx(1), 1.0)


def test_a_long_label_leaves_its_line_readable(two: tuple[str, str]) -> None:
    result = compare(*two)
    move = replace(result.moves[0], old="a" * 500, examples=("k" * 500,))
    line = str(replace(result, moves=(move,))).splitlines()[-1]
    assert line == f"         6  {'a' * 40}…{'a' * 20} -> dog  ({'k' * 40}…{'k' * 20})"


def test_what_cannot_be_compared_is_one_error(two: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no vitray dataset"):
        compare(two[0], str(tmp_path))
    (tmp_path / "other").mkdir()
    foreign = hand_made.make_dataset(tmp_path / "other")
    with pytest.raises(JobError, match="no shard in common"):
        compare(two[0], foreign.out)


def test_cka_is_one_for_a_turned_space_and_small_for_a_foreign_one() -> None:
    rng = np.random.default_rng(0)
    x, turn = rng.normal(size=(500, 8)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(500, 8))) < 0.1
    assert linear_cka(x, np.ones((500, 8))) == 0


def test_neighbours_are_shared_by_turned_spaces_only() -> None:
    rng = np.random.default_rng(0)
    x, turn = rng.normal(size=(300, 8)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert neighbour_overlap(x, x @ turn, 10) == pytest.approx(1)
    assert neighbour_overlap(x, rng.normal(size=(300, 8)), 10) < 0.1
