"""A bad job gets one line that names the field, exit code 2, and writes nothing."""

from __future__ import annotations

from pathlib import Path

from support.command_line import Call


def test_a_message_of_megabytes_is_shortened_in_its_middle(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"source: s\nmodel: m\nout: o\nlabels: [{'x' * 5_000_000}, {'x' * 5_000_000}]\n"
    )
    code, _, err = vitray("run", tmp_path / "job.yaml")
    assert code == 2 and len(err) < 5000
    assert err.startswith("JobError: the job is not valid: `labels`: label xxx") and err.endswith(
        "xxx appears twice\n"
    )
