"""`vitray report`: its numbers are those of the dataset, and text from data stays text."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd
import pytest
import yaml
from PIL import Image

import vitray
from factories import hand_made, shards
from support.reports import Tables
from vitray.consume.report import report, write_card
from vitray.consume.report.counts import count
from vitray.consume.report.truth import ColumnLabels
from vitray.dataset import Dataset, card_url, data_files, open_dataset
from vitray.errors import JobError


@pytest.fixture(scope="module")
def shapes_dataset(shapes_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 drawn shapes in four tars, some of them twice, some broken, labelled by the trained
    model.
    """
    folder = tmp_path_factory.mktemp("report")
    pictures = shards.pictures(300)
    for n in (7, 150, 299):
        pictures[n] = replace(pictures[n], data=pictures[n].data[: len(pictures[n].data) // 2])
    for n in (20, 21, 200):
        pictures[n] = replace(pictures[10], key=pictures[n].key)
    shards.put_tars(str(folder / "in"), pictures, 4, folder)
    job = vitray.Job(
        source=f"{folder}/in/*.tar",
        model=shapes_model,
        out=str(folder / "out"),
        keep=["cls"],
        engine="torch",
    )
    assert vitray.run(job).exit_code in (0, 4)
    return job.out


def test_its_numbers_are_those_of_duckdb(shapes_dataset: str, tmp_path: Path) -> None:
    result = report(shapes_dataset, str(tmp_path / "page.html"), truth="cls")
    page = Tables((tmp_path / "page.html").read_text())
    data = f"'{shapes_dataset}/data/*.parquet'"

    def ask(query: str) -> list[tuple[object, ...]]:
        return duckdb.sql(query).fetchall()

    assert result.images == 300 and result.notes == ()
    labels = ask(f"select label, count(*) n from {data} group by 1 order by n desc, 1")
    assert sorted((row[0], int(row[2])) for row in page.tables["Images by label"]) == sorted(labels)
    by_score = dict(
        ask(f"select least(floor(score * 20), 19)::int, count(*) from {data} group by 1")
    )
    assert [int(row[1]) for row in page.tables["Images by score"]] == [
        by_score.get(n, 0) for n in range(20)
    ]
    bins = ask(
        f"select avg(score), avg((label = cls)::int), count(*) from {data} group by "
        f"least(floor(score::float * 10), 9) order by 1"
    )
    expected_rows = [(f"{score:.3f}", f"{100 * right:.1f}%", f"{n}") for score, right, n in bins]
    assert [tuple(row) for row in page.tables["Right labels by score"]] == expected_rows
    counts = count(_dataset(shapes_dataset), data_files(shapes_dataset), ColumnLabels("cls"))
    twins = ask(
        f"select list((shard, index) order by shard, index) from {data} group by content_hash "
        f"having count(*) > 1"
    )
    rows, groups = counts.same_bytes.groups(5)
    assert (rows, [size for size, _ in groups]) == (4, [4]) and len(twins) == 1
    assert [(counts.shards[s], i) for s, i in groups[0][1]] == twins[0][0][:3]
    assert counts.reasons == dict(
        ask(f"select reason, count(*) from '{shapes_dataset}/_errors/*.parquet' group by 1")
    )
    least = ask(f"select score, shard, index from {data} order by 1, 2, 3 limit 18")
    assert [(score, *ref) for score, ref in counts.least_sure] == least
    assert sum(map(len, counts.vectors)) == counts.rows  # a small dataset is its own sample


def test_pictures_are_made_anew_from_the_source(shapes_dataset: str, tmp_path: Path) -> None:
    result = report(shapes_dataset, str(tmp_path / "page.html"))
    html = (tmp_path / "page.html").read_text()
    urls = set(re.findall(r'<img src="([^"]*)"', html))
    assert result.pictures >= len(urls) > 40 and all(
        url.startswith("data:image/jpeg;base64,") for url in urls
    )
    assert html.count("<img ") <= 120 and len(html) < 2_000_000
    assert "no picture" not in html
    assert (
        report(shapes_dataset, str(tmp_path / "page.html"), pictures=False).pictures == 0
    )  # our own page is written anew
    html = (tmp_path / "page.html").read_text()
    assert 'id="least-sure"' in html and "no picture" not in html and "gallery-title" not in html


def test_an_image_that_is_not_the_one_that_was_labelled_is_not_shown(tmp_path: Path) -> None:
    """A file whose content changed under the same size and time: the same shard to a listing."""
    path, page = tmp_path / "in" / "s-000.tar", str(tmp_path / "page.html")

    def write(colour: str) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "BMP")
        members = {
            f"{i}.bmp": buffer.getvalue() if i == 5 else f"no image {i}".encode() for i in range(10)
        }
        hand_made.write_tar(path, members)
        os.utime(path, ns=(0, 10**18))

    write("red")
    dataset = hand_made.make_dataset(tmp_path)
    assert report(dataset.out, page).pictures == 1
    write("blue")
    result = report(dataset.out, page)
    assert (result.pictures, result.notes) == (
        0,
        ("Some images have changed since they were labelled.",),
    )


def test_sections_of_what_a_dataset_has_not_are_left_out(shapes_model: str, tmp_path: Path) -> None:
    shards.put_tars(str(tmp_path / "in"), shards.pictures(20), 1, tmp_path)
    base = {"source": f"{tmp_path}/in/*.tar", "model": shapes_model, "engine": "torch"}
    vitray.run(vitray.Job(**base, out=str(tmp_path / "vectors"), labels=False))
    vitray.run(vitray.Job(**base, out=str(tmp_path / "labels"), embeddings=[]))
    sections = {}
    for name in ("vectors", "labels"):
        report(str(tmp_path / name), str(tmp_path / f"{name}.html"))
        sections[name] = set(
            re.findall(r'<section id="([a-z-]+)"', (tmp_path / f"{name}.html").read_text())
        )
    assert sections["vectors"] == {
        "summary",
        "map",
        "duplicates",
        "failures",
        "throughput",
        "provenance",
    }
    assert sections["labels"] == sections["vectors"] - {"map"} | {
        "labels",
        "scores",
        "gallery",
        "least-sure",
    }


def test_the_card_is_what_the_hub_reads_and_only_ours_is_overwritten(shapes_dataset: str) -> None:
    path = Path(write_card(shapes_dataset, "cc-by-4.0"))
    text = path.read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "pretty_name": "out",
        "license": "cc-by-4.0",
        "task_categories": ["image-classification", "image-feature-extraction"],
        "tags": ["vitray", "vit", "embeddings"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            },
            {
                "config_name": "errors",
                "data_files": [{"split": "train", "path": "_errors/*.parquet"}],
            },
        ],
    }
    assert "297 images" in text and "/tmp" not in text and "| `format` | `string` |" in text
    write_card(shapes_dataset)
    assert "license: unknown" in path.read_text()
    path.write_text(path.read_text().replace("297 images", "297 fine images"))
    with pytest.raises(JobError, match="was edited since"):
        write_card(shapes_dataset)
    assert "fine images" in path.read_text()
    path.unlink()
    assert vitray.validate(shapes_dataset).ok


def test_the_command_writes_both_without_torch_or_ray(shapes_dataset: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vitray.cli import main\n"
        f"sys.argv = ['vitray', 'report', {shapes_dataset!r}, '--to', "
        f"{str(tmp_path / 'page.html')!r}, '--truth', 'cls', '--card']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "page.html: 300 images" in done.stdout and "README.md: the dataset card" in done.stdout
    assert len(pd.read_parquet(shapes_dataset)) == 297  # the card is not in the way
    Path(card_url(shapes_dataset)).unlink()


def _dataset(out: str) -> Dataset:
    dataset = open_dataset(out)
    assert dataset is not None
    return dataset
