"""`vitray validate` finds every damaged, missing, foreign or changed file of a dataset."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import hand_made
from support.command_line import Call, files, problems_of, snapshot
from vitray.dataset import Dataset, read_footer
from vitray.schema import ERROR_SCHEMA, SCHEMA_VERSION, ipc_bytes


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **marks: str) -> None:
    """The data file anew with other rows and, but for `marks`, the same footer."""
    footer = {
        k: v for k, v in (pq.read_metadata(path).metadata or {}).items() if k.startswith(b"vitray.")
    }
    footer |= {f"vitray.{name}".encode(): value.encode() for name, value in marks.items()}
    table = change(pq.ParquetFile(path).read().replace_schema_metadata(None))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(footer)


def with_vector(table: pa.Table, at: int, vector: list[float]) -> pa.Table:
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()
    values[at] = vector
    kind = table.schema.field("embedding").type
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), type=kind)
    return table.set_column(
        table.schema.get_field_index("embedding"), table.schema.field("embedding"), column
    )


def with_value(table: pa.Table, name: str, at: int, value: object) -> pa.Table:
    values = [*table[name].to_pylist()[:at], value, *table[name].to_pylist()[at + 1 :]]
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def test_a_whole_dataset_is_valid(vitray: Call, dataset: Dataset, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for argv in ([], ["--content"], ["--no-inputs"]):
        assert problems_of(vitray, dataset, *argv) == []
    code, out, _ = vitray("validate", dataset.out)
    assert (code, out) == (
        0,
        f"{dataset.out}: valid; 3 files, 27 rows, 3 errors\nsource: 30 images in the committed "
        f"shards\n",
    )
    found = json.loads(vitray("validate", dataset.out, "--json")[1])
    assert (found["files"], found["rows"], found["errors"], found["pending"], found["gone"]) == (
        3,
        27,
        3,
        0,
        0,
    )
    assert (found["images"], found["uncounted"], found["left_out"]) == (30, 0, {})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kept", [0, 3, 40, -1])
def test_validate_finds_a_cut_file(vitray: Call, dataset: Dataset, kept: int) -> None:
    path = files(dataset)[0]
    path.write_bytes(path.read_bytes()[:kept])
    problems = problems_of(vitray, dataset)
    assert (
        len(problems) == 1
        and path.name in problems[0]
        and "is not a data file of vitray" in problems[0]
    )


DAMAGE: list[tuple[str, Callable[[pa.Table], pa.Table], set[str]]] = [
    (
        "row removed",
        lambda t: t.slice(1),
        {"8 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "last row removed",
        lambda t: t.slice(0, 8),
        {"8 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "row twice",
        lambda t: pa.concat_tables([t.slice(0, 1), t]),
        {
            "10 rows, but its footer says 9",
            "rows are not in the order of their shard, or one appears twice",
            "rows and errors do not make up 0..9",
        },
    ),
    (
        "out of order",
        lambda t: t.take([1, 0, *range(2, 9)]),
        {"rows are not in the order of their shard, or one appears twice"},
    ),
    (
        "no rows",
        lambda t: t.slice(0, 0),
        {"0 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "NaN",
        lambda t: with_vector(t, 4, [float("nan"), 0, 0, 0]),
        {"embedding holds NaN or infinity"},
    ),
    (
        "infinity",
        lambda t: with_vector(t, 4, [float("inf"), 0, 0, 0]),
        {"embedding holds NaN or infinity"},
    ),
    ("norm", lambda t: with_vector(t, 4, [0.6, 0.8, 0.1, 0]), {"embedding is not of unit length"}),
    ("zero vector", lambda t: with_vector(t, 4, [0, 0, 0, 0]), {"embedding is not of unit length"}),
    ("vector of another row", lambda t: with_vector(t, 4, [1, 0, 0, 0]), set()),
    ("null vector", lambda t: with_value(t, "embedding", 4, None), {"embedding holds a null"}),
    (
        "label",
        lambda t: with_value(t, "label", 0, "owl"),
        {"a label is not the name of its label_id"},
    ),
    (
        "label_id",
        lambda t: with_value(t, "label_id", 0, 3),
        {"a label_id is not a class of the model"},
    ),
    (
        "negative label_id",
        lambda t: with_value(t, "label_id", 0, -1),
        {"a label_id is not a class of the model"},
    ),
    (
        "no label_id",
        lambda t: with_value(t, "label_id", 0, None),
        {"a label_id is not a class of the model"},
    ),
    ("score", lambda t: with_value(t, "score", 0, 1.5), {"a score is not within 0 and 1"}),
    (
        "NaN score",
        lambda t: with_value(t, "score", 0, float("nan")),
        {"a score is not within 0 and 1"},
    ),
    ("shard", lambda t: with_value(t, "shard", 0, "other"), {"a row names another shard"}),
    ("key", lambda t: with_value(t, "key", 0, "other"), set()),
    ("no key", lambda t: with_value(t, "key", 0, None), set()),
]


@pytest.mark.parametrize(
    ("change", "found"), [pytest.param(c, f, id=name) for name, c, f in DAMAGE]
)
def test_validate_finds_changed_rows(
    vitray: Call, dataset: Dataset, change: Callable[[pa.Table], pa.Table], found: set[str]
) -> None:
    path = files(dataset)[1]
    rewrite(path, change)
    expected = found | {
        "sha256 differs from the manifest",
        "the hash of its rows differs from its footer",
    }
    assert set(problems_of(vitray, dataset)) == {f"data/{path.name}: {text}" for text in expected}


def test_validate_finds_a_missing_column(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[1]
    rewrite(path, lambda t: t.drop_columns(["score"]))
    assert f"data/{path.name}: its schema is not the dataset's" in problems_of(vitray, dataset)


@pytest.mark.parametrize("argv", [[], ["--content"]])
def test_validate_survives_footers_and_columns_that_are_not_ours(
    vitray: Call, dataset: Dataset, argv: list[str]
) -> None:
    first, second, third = files(dataset)
    rewrite(first, lambda t: t.rename_columns(["kex", *t.column_names[1:]]))
    other = pa.table({"index": [3]})
    rewrite(second, lambda t: t, error_rows=base64.b64encode(ipc_bytes(other, "zstd")).decode())
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xb5\xb5")]
    )
    rewrite(
        third,
        lambda t: t.set_column(
            0, "key", pa.concat_arrays([broken, t["key"].combine_chunks().slice(1)])
        ),
    )
    problems = problems_of(vitray, dataset, *argv)
    assert {p.split(":")[0] for p in problems} == {
        f"data/{path.name}" for path in (first, second, third)
    }
    assert f"data/{first.name}: its schema is not the dataset's" in problems


def test_validate_finds_changed_rows_without_a_manifest_too(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    assert problems_of(vitray, dataset) == []
    path = files(dataset)[0]
    rewrite(path, lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    assert problems_of(vitray, dataset) == [
        f"data/{path.name}: the hash of its rows differs from its footer"
    ]


def test_validate_finds_a_file_under_a_wrong_name(vitray: Call, dataset: Dataset) -> None:
    first, second, _ = files(dataset)
    shutil.copy(first, second)
    problems = problems_of(vitray, dataset)
    assert f"data/{second.name}: its footer names shard {first.stem}" in problems
    assert f"data/{second.name}: sha256 differs from the manifest" in problems
    assert f"data/{second.name}: a row names another shard" in problems
    assert all(problem.startswith(f"data/{second.name}: ") for problem in problems)


def test_validate_finds_a_file_of_another_job(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    other = hand_made.make_dataset(tmp_path, out=str(tmp_path / "other"), max_pixels=1000)
    path = files(dataset)[0]
    shutil.copy(Path(other.out, "data", path.name), path)
    problems = problems_of(vitray, dataset)
    assert (
        f"data/{path.name}: fingerprint {other.fingerprint[:8]}… is not the dataset's" in problems
    )


def test_validate_finds_a_file_that_is_no_data_file(vitray: Call, dataset: Dataset) -> None:
    path = Path(dataset.out, "data", "stray.parquet")
    pq.write_table(pa.table({"a": [1]}), path)
    problems = problems_of(vitray, dataset)
    assert any(path.name in p and "is not a data file of vitray" in p for p in problems)


def test_validate_finds_a_missing_data_file(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[2]
    path.unlink()
    assert problems_of(vitray, dataset) == [f"data/{path.name} is in the manifest but missing"]
    assert json.loads(vitray("validate", dataset.out, "--json")[1])["pending"] == 1


def test_validate_finds_a_missing_or_different_errors_file(vitray: Call, dataset: Dataset) -> None:
    first, second, third = files(dataset)
    errors = Path(dataset.out, "_errors")
    (errors / first.name).unlink()
    table = pq.ParquetFile(errors / second.name).read()
    pq.write_table(
        table.set_column(4, table.schema.field(4), pa.array(["empty"])), errors / second.name
    )
    (errors / third.name).write_bytes(b"no parquet at all")
    problems = problems_of(vitray, dataset)
    assert problems[:2] == [
        f"data/{first.name}: its file of error rows is missing; run the job again to repair it",
        f"data/{second.name}: its error rows differ from those in the data file; run the job "
        f"again to repair it",
    ]
    assert problems[2].startswith(f"data/{third.name}: its file of error rows cannot be read")
    assert len(problems) == 3


def test_validate_finds_a_data_file_that_the_manifest_lacks(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[0]
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    table = pq.ParquetFile(manifest).read()
    pq.write_table(table.slice(1), manifest)
    assert problems_of(vitray, dataset) == [
        f"data/{path.name}: is not in the manifest, though _SUCCESS.json exists"
    ]


def test_a_data_file_committed_since_the_manifest_is_no_problem_while_a_run_is_not_done(
    vitray: Call, dataset: Dataset
) -> None:
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    pq.write_table(pq.ParquetFile(manifest).read().slice(1), manifest)
    Path(dataset.out, "_SUCCESS.json").unlink()
    assert problems_of(vitray, dataset) == []


@pytest.mark.parametrize("what", ["gone", "garbage", "success"])
def test_validate_checks_the_files_even_when_the_manifest_is_damaged(
    vitray: Call, dataset: Dataset, what: str
) -> None:
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    if what == "gone":
        manifest.unlink()
    elif what == "garbage":
        manifest.write_bytes(b"garbage")
    else:
        Path(dataset.out, "_SUCCESS.json").write_text("{")
    path = files(dataset)[0]
    rewrite(path, lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    problems = problems_of(vitray, dataset)
    assert (
        problems[0].startswith("the manifest cannot be read") and "run the job again" in problems[0]
    )
    assert f"data/{path.name}: the hash of its rows differs from its footer" in problems


def test_inputs_that_changed_went_or_came_are_counted_and_are_no_damage(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    def counts() -> tuple[int, int, int]:
        code, out, _ = vitray("validate", dataset.out, "--json")
        found = json.loads(out)
        return code, found["pending"], found["gone"]

    hand_made.write_tar(tmp_path / "in" / "s-003.tar", {"0.jpg": b"new"})
    assert counts() == (0, 1, 0)
    (tmp_path / "in" / "s-000.tar").unlink()
    assert counts() == (0, 1, 1)
    hand_made.write_tar(tmp_path / "in" / "s-001.tar", {"0.jpg": b"another"})
    assert counts() == (0, 2, 2)
    text = vitray("validate", dataset.out)[1]
    assert ": valid so far; 3 files" in text.splitlines()[0]
    assert (
        text.splitlines()[1]
        == "inputs: 2 shards not committed yet, 2 committed ones no longer listed"
    )
    assert vitray("validate", dataset.out, "--no-inputs")[1].count("\n") == 1


def test_validate_checks_the_files_even_when_the_source_is_gone(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "in")
    rewrite(files(dataset)[0], lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    problems = problems_of(vitray, dataset)
    assert problems[0].startswith(
        f"the source cannot be listed: source {tmp_path}/in/*.tar names no object"
    )
    assert (
        f"data/{files(dataset)[0].name}: the hash of its rows differs from its footer" in problems
    )
    assert len(problems_of(vitray, dataset, "--no-inputs")) == len(problems) - 1


def test_content_finds_bytes_that_rotted_in_the_source(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    """The version of a local input is its size and time: only reading it again tells."""
    names = [path.name for path in files(dataset)]
    for shard, old, new in (
        (0, b"image 0 7", b"image 0 8"),
        (1, b"1/04.jpg", b"1/44.jpg"),
        (2, None, None),
    ):
        path = tmp_path / "in" / f"s-{shard:03d}.tar"
        stat, whole = path.stat(), path.read_bytes()
        if old is None:
            path.write_bytes(b"\xff" * len(whole))
        elif old.startswith(b"image"):
            path.write_bytes(whole.replace(old, new))
        else:
            images = [
                (f"1/{i:02d}.jpg" if i != 4 else "1/44.jpg", f"image 1 {i}".encode())
                for i in range(hand_made.IMAGES)
            ]
            hand_made.write_tar(path, dict(images))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    (problem,) = problems_of(vitray, dataset)
    assert (
        problem.startswith(f"data/{names[2]}: the source cannot be counted again: ")
        and "is not a tar" in problem
    )
    problems = problems_of(vitray, dataset, "--content")
    assert problems[:2] == [
        f"data/{names[0]}: image 7 (0/07) is not what was labelled",
        f"data/{names[1]}: image 4 (1/44) is not what was labelled",
    ]
    assert len(problems) == 3 and problems[2].startswith(
        f"data/{names[2]}: the source cannot be read again: "
    )


def test_the_footer_of_a_data_file_is_checked_against_the_dataset(
    vitray: Call, dataset: Dataset
) -> None:
    path = files(dataset)[0]
    bad = pa.Table.from_pylist([{"key": "k", "index": 9}], schema=ERROR_SCHEMA)
    rewrite(path, lambda t: t, errors="0", reasons="{}", error_rows="")
    assert f"data/{path.name}: rows and errors do not make up 0..8" in problems_of(vitray, dataset)
    rewrite(
        path, lambda t: t, errors="1", error_rows=base64.b64encode(ipc_bytes(bad, "zstd")).decode()
    )
    assert (
        f"data/{path.name}: its error rows differ from those in the data file; run the job "
        f"again to repair it" in problems_of(vitray, dataset)
    )
    assert read_footer(str(path)).errors == 1 and SCHEMA_VERSION == 1
    assert np.isclose(
        np.linalg.norm(pq.ParquetFile(files(dataset)[1]).read()["embedding"][0].as_py()), 1
    )
