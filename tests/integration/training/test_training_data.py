"""What a training reads: labels, the images held out, corrupt images, tables."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from factories import digits
from support.training_runs import PIXELS, embedded
from vitray.errors import JobError
from vitray.training.config import TrainingConfig
from vitray.training.examples import gather, is_held_out
from vitray.training.finetuning import finetune
from vitray.training.labelled_source import LabelledSource
from vitray.training.labels import labels_by_key
from vitray.training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")


def test_keys_and_so_the_split_are_the_same_for_every_way_to_name_a_source(
    small: dict[str, object], tmp_path: Path
) -> None:
    root = str(digits.folders(tmp_path / "in", digits.few(5, [0, 1])))
    ways = (root, f"{root}/*/*.png", f"{root}/?/*.png", f"{root}/[0-9]/*", f"{root}/{{0,1}}/*.png")
    keys = [
        [
            image.key
            for image in LabelledSource(
                TrainingConfig(**{**small, "source": way, "out": "o", "label": "folder"})
            ).images()
        ]
        for way in ways
    ]
    assert (
        len(keys[0]) == 10
        and all(key[:2] in ("0/", "1/") for key in keys[0])
        and keys == [keys[0]] * len(ways)
    )


def test_a_label_is_found_wherever_it_stands(small: dict[str, object], tmp_path: Path) -> None:
    images, labels = digits.load()
    chosen = digits.few(12, [3, 5, 8])
    source = digits.tar(tmp_path / "d.tar", chosen)
    blobs = [digits.png(images[n]) for n in chosen]
    table = pa.table(
        {
            "image": blobs,
            "key": [f"{labels[n]}/{n:04d}" for n in chosen],
            "digit": [int(labels[n]) for n in chosen],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    pq.write_table(table.drop(["image"]), tmp_path / "labels.parquet")
    lines = [f"{labels[n]}/{n:04d}.png,{labels[n]}" for n in chosen]
    (tmp_path / "labels.csv").write_text("\n".join(["file,digit", *lines]))
    loose = digits.folders(tmp_path / "loose", chosen)
    pattern = f"{tmp_path}/loose/*/*.png"
    ways: list[dict[str, object]] = [
        {"source": source, "label": "cls"},
        {"source": source, "label": "folder"},
        {"source": source, "label": "json", "label_field": "digit"},
        {"source": str(tmp_path / "d.parquet"), "label": "digit", "key_column": "key"},
        {"source": source, "label": "digit", "label_table": str(tmp_path / "labels.parquet")},
        {"source": loose},
        {
            "source": pattern,
            "label": "digit",
            "label_table": str(tmp_path / "labels.csv"),
            "table_key": "file",
        },
    ]
    found = []
    for n, way in enumerate(ways):
        fields = {name: value for name, value in small.items() if name not in ("source", "label")}
        training_data = gather(
            TrainingConfig(**fields, **way, out="unused"), PIXELS, (), str(tmp_path / f"work{n}")
        )
        assert training_data.classes == ("3", "5", "8") and not training_data.skipped
        sides = (training_data.train, training_data.held_out)
        found.append(
            {
                h: (training_data.classes[i], k.removesuffix(".png"))
                for side in sides
                for h, i, k in zip(side.hashes, side.ids, side.keys)
            }
        )
    assert (
        len(found[0]) == 36
        and sorted(label for label, _ in found[0].values()) == ["3"] * 12 + ["5"] * 12 + ["8"] * 12
    )
    assert all(other == found[0] for other in found[1:])


def test_held_out_images_stay_held_out_while_data_grows_and_moves(
    small: dict[str, object], tmp_path: Path
) -> None:
    keys = [f"{n:05d}" for n in range(20_000)]
    share = np.mean([is_held_out(key, 0.1) for key in keys])
    assert 0.09 < share < 0.11 and not any(is_held_out(key, 0.0) for key in keys)
    sides = []
    for folder, chosen in (("one", digits.few(10)), ("two", digits.few(15))):
        root = digits.folders(tmp_path / folder, chosen)
        training_data = gather(
            TrainingConfig(**{**small, "source": root, "label": "folder", "out": "x"}),
            PIXELS,
            (),
            str(tmp_path / f"w-{folder}"),
        )
        sides.append(
            {
                key: side
                for side, part in enumerate((training_data.train, training_data.held_out))
                for key in part.keys
            }
        )
    assert (
        sides[0].items() <= sides[1].items()
        and len(sides[1]) == 150
        and 0 < sum(sides[0].values()) < 50
    )


def test_images_are_decoded_once_and_held_out_ones_as_the_processor_does(
    small: dict[str, object], tmp_path: Path
) -> None:

    config = TrainingConfig(**{**small, "out": "x"})
    training_data = gather(config, PIXELS, (), str(tmp_path))
    assert training_data.train.pixels.shape[1:] == (
        19,
        19,
        3,
    ) and training_data.held_out.pixels.shape[1:] == (16, 16, 3)
    images, _ = digits.load()
    key = training_data.held_out.keys[0]
    plain = (
        Image.fromarray(images[int(key.rpartition("/")[2])])
        .convert("RGB")
        .resize((16, 16), Image.Resampling.BILINEAR)
    )
    np.testing.assert_array_equal(training_data.held_out.pixels[0], np.asarray(plain))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.u8")}
    again = gather(config, PIXELS, (), str(tmp_path))
    assert (
        again.digest == training_data.digest
        and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.u8")} == files
    )


def test_corrupt_images_are_counted_skipped_and_listed(
    small: dict[str, object], tmp_path: Path
) -> None:
    root = Path(digits.folders(tmp_path / "in", digits.few(15, [0, 1])))
    broken = sorted(root.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "0" / "text.png").write_bytes(b"no image")
    result = finetune(
        TrainingConfig(
            **{
                **small,
                "source": str(root),
                "label": "folder",
                "out": str(tmp_path / "out"),
                "epochs": 1,
            }
        )
    )
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert (result.skipped, result.images + result.held_out) == (2, 29)
    assert {entry["key"]: entry["reason"] for entry in listed} == {
        f"0/{broken.name}": "truncated",
        "0/text.png": "not_an_image",
    }
    assert "2 images were not used" in (tmp_path / "out" / "report.html").read_text()


def test_corrupt_images_of_a_dataset_are_listed_too(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    root = Path(digits.folders(tmp_path / "in", digits.few(15, [0, 1])))
    (root / "0" / "text.png").write_bytes(b"no image")
    dataset = embedded(trained, str(root), tmp_path / "dataset", keep=[], max_error_rate=1)
    for train in ("full", "probe"):
        fields = {**small, "source": []} if train == "full" else {"train": "probe"}
        out = tmp_path / train
        result = finetune(
            TrainingConfig(
                **{**fields, "dataset": dataset, "label": "folder", "epochs": 1, "out": str(out)}
            )
        )
        listed = json.loads((out / "skipped.json").read_text())
        assert [(it["key"], it["reason"]) for it in listed] == [
            ("0/text.png", "not_an_image")
        ] and listed[0]["message"]
        assert (result.skipped, result.images + result.held_out) == (1, 30)


def test_a_table_of_bytes_and_numbers_and_nothing(tmp_path: Path, small: dict[str, object]) -> None:
    path = tmp_path / "t.PARQUET"
    config = TrainingConfig(**{**small, "out": "o", "label": "l", "label_table": str(path)})

    def labels(keys: list[object], values: list[object]) -> dict[str, str] | None:
        pq.write_table(pa.table({"key": keys, "l": values}), path)
        return labels_by_key(config)

    assert labels([b"a.png", b" b "], [b"cat", b" dog"]) == {"a.png": "cat", "b": "dog"}
    assert labels(["a", "b", None, "d"], [1.5, float("nan"), 2.0, None]) == {"a": "1.5"}
    with pytest.raises(JobError, match=r"\['cat'\] is not a label \(l of .*, by its column key\)"):
        labels(["a"], [["cat"]])
    path = tmp_path / "t.csv"
    path.write_text("key,l\na,cat\na, cat\n")
    assert labels_by_key(
        TrainingConfig(**{**small, "out": "o", "label": "l", "label_table": str(path)})
    ) == {"a": "cat"}


def test_a_table_with_two_labels_of_one_image_or_one_of_two_images_is_refused(
    small: dict[str, object], tmp_path: Path
) -> None:
    root = digits.folders(tmp_path / "in", digits.few(5, [0, 1]))
    names = sorted(os.listdir(f"{root}/0"))
    table, out = tmp_path / "labels.csv", str(tmp_path / "out")
    fields = {**small, "source": root, "label": "digit", "label_table": str(table), "out": out}
    whole = ["key,digit", *(f"0/{name},0" for name in names)]
    table.write_text("\n".join([*whole, f"0/{names[1]},0", f"0/{names[2]},1"]))
    with pytest.raises(
        JobError, match=rf"labels\.csv gives 0/{names[2]} two labels, 0 and 1\. Keep one of them\.$"
    ):
        finetune(TrainingConfig(**fields))
    os.rename(f"{root}/1/{sorted(os.listdir(f'{root}/1'))[0]}", f"{root}/1/{names[0]}")
    table.write_text(
        "\n".join(
            [
                "key,digit",
                *(
                    f"{name},0"
                    for folder in "01"
                    for name in sorted(os.listdir(f"{root}/{folder}"))
                ),
            ]
        )
    )
    with pytest.raises(
        JobError,
        match=rf"one row for {names[0]}, and several images have that name, such as "
        rf".*/1/{names[0]}\. Write",
    ):
        finetune(TrainingConfig(**fields))
    with pytest.raises(
        JobError, match=rf"one row for {names[0]}, and several"
    ):  # below each of two sources it is the whole name
        finetune(TrainingConfig(**{**fields, "source": [f"{root}/0", f"{root}/1"]}))
    for name in "ab":
        digits.tar(tmp_path / f"{name}.tar", digits.few(5, [0, 1]))
    with tarfile.open(tmp_path / "a.tar") as tar:
        keys = sorted({name.partition(".")[0] for name in tar.getnames()})
    table.write_text("\n".join(["key,digit", *(f"{key},{key[0]}" for key in keys)]))
    with pytest.raises(
        JobError, match=r"one row for \d/\d{4}, and several images have that name"
    ):  # tars that share their keys
        finetune(TrainingConfig(**{**fields, "source": f"{tmp_path}/*.tar"}))
    assert not os.path.exists(out)


def test_images_of_a_dataset_that_changed_since_are_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    root = digits.folders(tmp_path / "in", digits.few(5, [0, 1]))
    job = vitray.Job(
        source=root,
        model=trained,
        out=str(tmp_path / "dataset"),
        precision="fp32",
        engine="torch",
        group_size=4,
    )
    vitray.run(job)
    sorted(Path(root).rglob("*.png"))[0].unlink()
    with pytest.raises(
        JobError,
        match=r"4 of 10 images of .*/dataset are no longer where they were labelled: 1 of its "
        r"shards changed",
    ):
        finetune(
            TrainingConfig(
                **{
                    **small,
                    "source": [],
                    "label": "folder",
                    "dataset": job.out,
                    "out": str(tmp_path / "out"),
                }
            )
        )


def test_another_way_to_read_the_source_is_not_taken_for_the_same(
    small: dict[str, object], tmp_path: Path
) -> None:
    """Decoded images may outlive OUT: on S3 they are in the machine's cache."""
    source = tmp_path / "in.parquet"
    images, labels = digits.load()
    names = digits.few(5, [0, 1])
    plain, dark = ([digits.png(images[n] // k) for n in names] for k in (1, 4))
    pq.write_table(
        pa.table({"one": plain, "two": dark, "label": [str(labels[n]) for n in names]}), source
    )
    sums = []
    for column in ("one", "two"):
        fields = {
            **small,
            "source": str(source),
            "label": "label",
            "image_column": column,
            "out": str(tmp_path / "out"),
        }
        training_run = TrainingRun.of(TrainingConfig(**fields))
        sums.append(int(training_run.training_data.train.pixels.astype(np.int64).sum()))
    assert sums[0] > 2 * sums[1]
