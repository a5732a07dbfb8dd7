"""Odd inputs on any store and executor, compared with a run on this disk."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import vitray
from factories.shards import put
from support.user_inputs import DOTTED, job_for, jpg, write_tar
from vitray.dataset import read as read_rows
from vitray.operations.planning import plan, status
from vitray.operations.validation import validate
from vitray.storage import join

TYPES = {
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "time": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    "day": pa.array([2**31 - 1, None, 0], pa.int32()).view(pa.date32()),
    "kind": pa.array(["x", None, "x"]).dictionary_encode(),
    "view": pa.array(["s" * 40, None, ""], pa.string_view()),
}


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def tar_bytes(folder: Path, members: dict[str, bytes]) -> bytes:
    return write_tar(folder / "scratch.tar", members).read_bytes()


def run(root: str, source: str, out: str, **fields: object) -> vitray.Result:
    planned = plan(job_for(join(root, source), join(root, out), **fields))
    result = vitray.run(job_for(join(root, source), join(root, out), **fields))
    checked = validate(result.out, content=True)
    assert checked.ok, checked
    assert result.left_out == checked.left_out == status(result.out).left_out
    assert planned.left_out.items() <= result.left_out.items()
    return result


def keys(result: vitray.Result) -> list[str]:
    return [key.rpartition("/")[2] for key in read_rows(result.out, ["key"])["key"].to_pylist()]


def check_everywhere(root: str, scratch: Path) -> None:
    put(f"{root}/tars/a.tar", tar_bytes(scratch, {name: jpg(n) for n, name in enumerate(DOTTED)}))
    put(
        f"{root}/tars/b.tar",
        tar_bytes(scratch, {"0.depth.png": jpg(1, "PNG"), "0.jpg": jpg(2), "bare": jpg(3)}),
    )
    tars = run(root, "tars", "out-tars")
    assert keys(tars) == [*(name.removesuffix(".jpg") for name in DOTTED), "0"]
    assert tars.left_out == {"further_image": 1, "no_suffix": 1}
    for name in (
        "a.jpg",
        "b.jfif",
        "label=cat/c.jpe",
        "d.heic",
        "bare",
        "notes.txt",
        ".e.jpg",
        "_f/g.jpg",
    ):
        put(
            f"{root}/files/{name}",
            jpg(len(name)) if name != "d.heic" else b"\0\0\0\x18ftypheic" + bytes(99),
        )
    files = run(root, "files", "out-files", keep="label")
    assert (keys(files), files.errors) == (["a.jpg", "b.jfif", "c.jpe"], 1)
    assert files.left_out == {"hidden": 2, "no_suffix": 1, "other_suffix": 1}
    put(f"{root}/files/list.csv", b"path\n")
    assert run(root, "files", "out-files", keep="label").left_out == {
        **files.left_out,
        "other_kind": 1,
    }
    table = pa.table({**TYPES, "image": [jpg(n) for n in range(3)], "id": [7, 8, 9]})
    put(f"{root}/tables/a.parquet", parquet_bytes(table))
    tables = run(root, "tables", "out-tables", keep=",".join(TYPES))
    assert keys(tables) == ["7", "8", "9"]
    rows = read_rows(tables.out, list(TYPES))
    for name, values in TYPES.items():
        assert (
            rows[name].type == values.type
            and rows[name].combine_chunks().to_string() == values.to_string()
        ), name
    for name in ("img/a.jpg", "img/b c.jpg"):
        put(f"{root}/lists/{name}", jpg(len(name)))
    put(
        f"{root}/lists/m.csv",
        b"path;n\n./img/a.jpg;1\nimg\\a.jpg;2\nimg/b%20c.jpg;3\n./../x.jpg;4\nhttps://example.org/a.jpg;5\n",
    )
    lists = run(root, "lists/m.csv", "out-lists", keep="n")
    assert read_rows(lists.out, ["n"])["n"].to_pylist() == ["1", "2", "3"]
    assert lists.reasons == {"path_not_allowed": 2}
