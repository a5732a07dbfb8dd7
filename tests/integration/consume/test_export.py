"""vitray export: what other tools read is what the dataset holds, row for row, and it appears whole
or not at all.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_files
from support.exports import made
from vitray.consume.exporting import ExportOptions, export
from vitray.consume.report import report
from vitray.storage import new_folder


def test_lance_holds_every_column(tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    dataset, into = made(tmp_path, "float16", more=["other"]), tmp_path / "into"
    assert export(dataset.out, str(into), ExportOptions("lance")).rows == 39
    table = lancedb.connect(into).open_table("images").to_arrow()
    stored = vitray.read(dataset.out)
    assert table.column_names == stored.column_names
    assert table.to_pylist() == stored.to_pylist()


def test_a_file_of_a_group_that_went_costs_its_own_image_alone(
    shapes_model: str, tmp_path: Path
) -> None:
    items = pictures(12)
    put_files(f"{tmp_path}/in", items)
    job = vitray.Job(
        source=f"{tmp_path}/in", model=shapes_model, out=f"{tmp_path}/out", engine="torch"
    )
    assert vitray.run(job).rows == 12
    shown = report(job.out, str(tmp_path / "page.html")).pictures
    (tmp_path / "in" / f"{items[3].key}.{items[3].suffix}").unlink()
    (tmp_path / "in" / f"{items[5].key}.{items[5].suffix}").write_bytes(items[0].data)
    result = export(job.out, str(tmp_path / "into"), ExportOptions("webdataset"))
    assert (result.rows, result.missing) == (10, 2)
    assert 0 < shown - 2 <= report(job.out, str(tmp_path / "page.html")).pictures < shown


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path: Path) -> None:
    into = str(tmp_path / "into")
    code = (
        f"import os\nfrom vitray.storage import new_folder\nwith new_folder({into!r}, '--into') as "
        f"f: (f / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    for _ in range(2):  # the second one deletes what the first left
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
        (abandoned,) = tmp_path.iterdir()
        assert (abandoned / "half").exists()
    with new_folder(str(tmp_path / "other"), "--into"):
        pass
    assert abandoned.exists()  # of another name
    with new_folder(into, "--into") as folder, pytest.raises(ZeroDivisionError):
        assert not abandoned.exists()
        with new_folder(into, "--into"):
            assert folder.exists()
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "other"]
