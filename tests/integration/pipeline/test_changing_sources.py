"""Runs over a source whose files come, go, change or cannot be read."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from factories.shards import pictures, put_files
from vitray.dataset import load_group_log


def test_a_first_file_of_another_type_is_set_aside_once_the_types_are_frozen(
    shapes_model: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    images = [picture.data for picture in pictures(12)]
    pq.write_table(
        pa.table({"image": images, "price": list(range(12))}), tmp_path / "in" / "b.parquet"
    )
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        keep=["price"],
    )
    vitray.run(job)
    pq.write_table(
        pa.table({"image": images, "price": [["a"]] * 12}), tmp_path / "in" / "a0.parquet"
    )
    pq.write_table(pa.table({"image": images}), tmp_path / "in" / "a1.parquet")
    pq.write_table(
        pa.table({"image": images, "price": list(range(12))}), tmp_path / "in" / "c.parquet"
    )
    result = vitray.run(job)
    assert result.exit_code == 3 and result.images == 12 and len(result.set_aside) == 2
    whys = sorted(result.set_aside.values())
    assert "column `price` is list<element: string>, in this dataset it is int64" in whys[0]
    assert f"{tmp_path}/in/a1.parquet has no column `price`; it has image" in whys[1]


def test_passthrough_types_are_those_of_the_first_values_and_take_what_loses_nothing(
    shapes_model: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    images = [picture.data for picture in pictures(12)]

    def add(name: str, note: pa.Array, price: pa.Array) -> None:
        pq.write_table(
            pa.table({"image": images, "note": note, "price": price}),
            tmp_path / "in" / f"{name}.parquet",
        )

    nothing = pa.nulls(12)
    text = pa.array(["a"] * 12, pa.large_string())
    add("a", nothing, pa.array([0.5] * 12))
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        keep="note,price",
    )
    result = vitray.run(job)
    assert result.exit_code == 0 and vitray.read(job.out)["note"].null_count == 12
    add("b", text, pa.array(range(12)))
    add(
        "c", text.cast(pa.string()).dictionary_encode(), pa.array([2**60 + 1] * 12)
    )  # no double has it
    add("d", text.cast(pa.string()), nothing)
    result = vitray.run(job)
    (why,) = result.set_aside.values()
    assert (
        result.rows == 36 and "a value of column `price` does not fit the dataset's double" in why
    )
    rows = vitray.read(job.out, ["note", "price"])
    assert (
        rows["note"].to_pylist() == [None] * 12 + ["a"] * 24
        and rows["price"].to_pylist() == [0.5] * 12 + [*range(12)] + [None] * 12
    )
    assert (
        vitray.read(vitray.run(job.model_copy(update={"out": f"{tmp_path}/new"})).out)
        .schema.field("note")
        .type
        == pa.large_string()
    )


def test_files_that_are_deleted_later_are_missing_and_not_bad(
    shapes_model: str, tmp_path: Path
) -> None:
    put_files(str(tmp_path / "in"), pictures(12))
    job = vitray.Job(
        source=[f"{tmp_path}/in"], model=shapes_model, out=f"{tmp_path}/out", engine="torch"
    )
    assert vitray.run(job).exit_code == 0
    for path in sorted((tmp_path / "in").iterdir())[:5]:
        path.unlink()
    result = vitray.run(job)
    assert (result.rows, result.errors, result.reasons, result.exit_code) == (
        7,
        5,
        {"missing": 5},
        0,
    )
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    again = vitray.run(job)
    assert (again.rows, again.errors, again.exit_code) == (7, 6, 4)  # one of eight is bad


def test_a_file_that_cannot_be_read_costs_its_row_and_a_name_that_is_not_utf8_costs_none(
    shapes_model: str, tmp_path: Path
) -> None:
    items = pictures(12)
    put_files(str(tmp_path / "in"), items)
    (tmp_path / "in" / "00003.png").unlink()
    (tmp_path / "in" / "00003.png").symlink_to(
        "/proc/sys/vm/drop_caches"
    )  # nobody may read it, not even root
    os.rename(tmp_path / "in" / "00004.jpg", os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg")
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        max_error_rate=0.5,
    )
    result = vitray.run(job)
    assert (result.rows, result.errors, result.reasons, result.set_aside) == (
        11,
        1,
        {"missing": 1},
        {},
    )
    names = sorted(
        [f"{p.key}.{p.suffix}" for n, p in enumerate(items) if n not in (3, 4)] + [r"caf\udce9.jpg"]
    )
    table = vitray.read(job.out)
    assert (
        table["key"].to_pylist()
        == table["uri"].to_pylist()
        == [f"{tmp_path}/in/{name}" for name in names]
    )
    (path,) = (tmp_path / "out" / "_errors").iterdir()
    (error,) = pq.read_table(path).to_pylist()
    assert error["key"] == f"{tmp_path}/in/00003.png" and error["message"].startswith(
        f"{error['key']}: Permission denied."
    )
    assert vitray.validate(job.out, content=True).ok and vitray.run(job).committed == 0


@pytest.mark.parametrize("seen_before", [True, False])
def test_pruned_files_leave_their_group_and_come_back_in_another(
    shapes_model: str, tmp_path: Path, seen_before: bool
) -> None:
    """seen_before: a run without --prune has made `missing` rows of them. Every id is compared."""
    items = pictures(12)
    put_files(str(tmp_path / "in"), items)
    job = vitray.Job(
        source=[f"{tmp_path}/in"],
        model=shapes_model,
        out=f"{tmp_path}/out",
        engine="torch",
        group_size=8,
    )
    vitray.run(job)
    paths = sorted((tmp_path / "in").iterdir())
    for path in [*paths[1:3], *paths[8:]]:  # two of the first group, all of the second
        path.unlink()
    if seen_before:
        assert vitray.run(job).reasons == {"missing": 2}
    result = vitray.run(job, prune=True)
    assert (result.rows, result.errors, result.gone, result.exit_code) == (6, 0, 0, 0)
    kept = [str(path) for path in [paths[0], *paths[3:8]]]
    rows = vitray.read(job.out)
    assert rows["key"].to_pylist() == kept and rows["index"].to_pylist() == list(range(6))
    assert vitray.run(job, prune=True).committed == 0 and vitray.validate(job.out, content=True).ok
    put_files(str(tmp_path / "in"), items)
    assert vitray.run(job).rows == 12 and vitray.validate(job.out).ok
    assert sorted(vitray.read(job.out)["key"].to_pylist()) == sorted(map(str, paths))


def test_files_that_arrive_while_a_run_plans_wait_for_the_next_one_and_make_no_groups_of_their_own(
    shapes_model: str, tmp_path: Path
) -> None:
    items = pictures(60)
    ended = threading.Event()
    put_files(str(tmp_path / "in"), items[:10])

    def arrive() -> None:
        for n in range(100_000):
            if ended.wait(0.01):
                return
            put_files(str(tmp_path / "in"), [replace(items[n % 50 + 10], key=f"late-{n:06d}")])

    thread = threading.Thread(target=arrive)
    thread.start()
    try:
        vitray.run(
            vitray.Job(
                source=[str(tmp_path / "in")],
                model=shapes_model,
                out=str(tmp_path / "out"),
                engine="torch",
            )
        )
    finally:
        ended.set()
        thread.join()
    assert len(load_group_log(str(tmp_path / "out"))) >= 10
    assert {number for number, _ in load_group_log(str(tmp_path / "out"))} == {0}
