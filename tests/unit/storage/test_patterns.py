"""Globs, braces and ranges name the same objects on every store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitray.errors import JobError, ObjectMissing
from vitray.storage import expand, expand_braces, reads


@pytest.mark.parametrize(
    ("pattern", "urls"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,.old}", ["x", "x.old"]),
        ("{07..07}", ["07"]),
        ("{a}", ["{a}"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, urls: list[str]) -> None:
    assert expand_braces(pattern) == urls


@pytest.mark.parametrize("pattern", ["{5..4}", "a-{000..1000000}.tar"])
def test_an_empty_or_endless_range_is_refused(pattern: str) -> None:
    with pytest.raises(JobError, match="empty or longer than a million"):
        expand_braces(pattern)


@given(st.integers(0, 99_999), st.integers(0, 30), st.integers(1, 6))
def test_a_range_has_every_number_once_and_keeps_its_zeros(
    first: int, more: int, width: int
) -> None:
    low, high = str(first).zfill(width), str(first + more).zfill(width)
    assert expand_braces(f"s-{{{low}..{high}}}.tar") == [
        f"s-{str(n).zfill(len(low))}.tar" for n in range(first, first + more + 1)
    ]


@pytest.mark.parametrize("name", ["photos [2020]", "what?", "a*b"])
def test_a_local_name_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"1")
    assert (
        [info.url for info in expand(str(folder))]
        == [info.url for info in expand(f"{folder}/1.jpg")]
        == [f"{folder}/1.jpg"]
    )
    assert reads(str(folder), f"{folder}/out") and not reads(str(folder), f"{tmp_path}/out")
    with pytest.raises(ObjectMissing, match=r"names no object$"):
        expand(f"{folder}x")
    with pytest.raises(
        ObjectMissing,
        match=r"names no object \(\* matches within one folder: give the folder, or "
        r"/\*\*\)$",
    ):
        expand(f"{tmp_path}/*")
