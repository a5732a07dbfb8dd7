"""Two datasets of the same input that differ in known rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from factories import hand_made


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Of three tars; the second calls cats dogs and dogs cats, could not read another image, and
    lacks the last shard.
    """
    old = hand_made.make_dataset(tmp_path)
    monkeypatch.setattr(hand_made, "BAD", 4)
    spec = replace(
        hand_made.spec_of(str(tmp_path / "model")),
        labels=("dog", "cat", "emu"),
        weights_sha256="8" * 64,
    )
    new = hand_made.make_dataset(tmp_path, commit=2, spec=spec, out=str(tmp_path / "new"))
    return old.out, new.out
