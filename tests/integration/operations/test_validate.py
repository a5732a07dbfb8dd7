"""`vitray validate` finds every damaged, missing, foreign or changed file of a dataset."""

from __future__ import annotations

from support.command_line import Call, files, problems_of
from vitray.dataset import Dataset


def test_validate_finds_a_flipped_byte_wherever_it_is(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[1]
    whole = path.read_bytes()
    for at in [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 8, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        code, out, err = vitray("validate", dataset.out, "--no-inputs")
        assert (code, err) == (1, ""), f"byte {at}"
        assert all(path.name in line for line in out.splitlines()[1:]) and "NOT valid: " in out, out
    path.write_bytes(whole)
    assert problems_of(vitray, dataset) == []
