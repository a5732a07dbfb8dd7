"""`vitray report --truth`: a column, the folders of the images, or a CSV file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, vitray
from vitray.consume.report.truth import FolderLabels, TableLabels, labels_of, matching_name
from vitray.errors import JobError

__all__ = ["vitray"]


@pytest.mark.parametrize(
    ("key", "folder"),
    [("photos/cat/1.jpg", "cat"), ("s3://b/dog/1.jpg", "dog"), ("cat/0001", "cat"), ("0001", "")],
)
def test_the_folder_of_a_key(key: str, folder: str) -> None:
    assert FolderLabels().label_of(key) == folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.jpg"], "1.jpg"),
        (["1.jpg", "cat/1.jpg"], "cat/1.jpg"),
        (["/in/cat/1.jpg", "cat/1.jpg"], "/in/cat/1.jpg"),
        (["t/1.jpg", ".jpg"], None),
    ],
)
def test_a_table_names_an_image_by_the_end_of_its_key(
    names: list[str], expected: str | None
) -> None:
    assert matching_name("/in/cat/1.jpg", dict.fromkeys(names)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key,label\na,cat\nb, dog \n", {"a": "cat", "b": "dog"}),
        ("label;key\ncat;a\n", {"a": "cat"}),
        ("key\tlabel\na\tcat\n", {"a": "cat"}),
        ('id,key,label\n1,"a,b",cat\n2,c,\n', {"a,b": "cat"}),
    ],
)
def test_the_labels_of_a_table(text: str, expected: dict[str, str]) -> None:
    assert labels_of("t.csv", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na,cat\n", "needs the columns key and label .* it has file, class"),
        ("", "it has none"),
        ("key,label\na,cat\na,dog\n", "gives a two labels, cat and dog"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        labels_of("t.csv", text)


def test_keys_that_name_no_image_or_several_are_counted() -> None:
    table = TableLabels(
        "t.csv", {"a": "cat", "1.jpg": "dog", "x": "emu"}, Counter({"a": 1, "1.jpg": 2})
    )
    assert [table.label_of(key) for key in ("a", "cat/1.jpg", "dog/1.jpg", "z")] == [
        "cat",
        "",
        "",
        "",
    ]
    assert table.notes() == [
        "1 key of t.csv names no image of this dataset, such as x.",
        "1 key of t.csv names several images, such as 1.jpg: write more of their paths.",
    ]


def test_a_report_with_true_labels_of_a_table(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    keys = hand_made_keys(dataset.out)
    table = tmp_path / "labels.csv"
    rows = [f"{key},{label}" for key, label in list(keys.items())[1:]]
    table.write_text("\n".join(["key,label", *rows, "none.jpg,cat", ""]))
    page = tmp_path / "page.html"
    code, out, err = vitray("report", dataset.out, "--truth", table, "--to", page, "--no-pictures")
    assert (code, err) == (0, "")
    assert f"1 key of {table} names no image of this dataset, such as none.jpg." in out
    assert f"1 of {len(keys)} labelled images have no true label in {table}." in out
    assert "100.0%" in page.read_text()


def test_what_is_no_true_label_is_one_line(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    other = tmp_path / "other.csv"
    other.write_text("key,label\nnone.jpg,cat\n")
    for truth, message in (
        ("cls", "Give --truth a passthrough column, `folder`"),
        (tmp_path / "no.csv", "does not exist"),
        (other, "names none of the images: its keys are none.jpg"),
    ):
        code, out, err = vitray("report", dataset.out, "--truth", truth, "--to", tmp_path / "p")
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "p").exists()


def hand_made_keys(out: str) -> dict[str, str]:
    """The label that the model chose for each image, by key: so all of them are right."""
    import vitray as api

    rows = api.read(out, ["key", "label"])
    return dict(zip(rows["key"].to_pylist(), rows["label"].to_pylist()))
