"""Fine-tuning in seconds: what is read, what learns, what is written, what is refused. The bars are
in test_finetune_bars.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import browser
import digits
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file
from small_models import PREFIX, edit, make_checkpoint

import vitray
from vitray.decoding.decode import load_decoders
from vitray.errors import ClusterError, FingerprintError, JobError, ModelError, StorageError
from vitray.model_export.export import export_model
from vitray.models import checkpoint
from vitray.models.exported import hash_model
from vitray.models.linear_head import read_head
from vitray.schema import PixelSpec
from vitray.storage import read, store_for
from vitray.training import checkpoints, examples, fitting, outputs, workers
from vitray.training.batches import Batches
from vitray.training.config import TrainingConfig, load_config
from vitray.training.examples import gather, is_held_out
from vitray.training.finetuning import finetune
from vitray.training.labelled_source import LabelledSource
from vitray.training.labels import class_ids, labels_by_key
from vitray.training.linear_probe import LabelledRows, fit_linear_probe
from vitray.training.outcome import Outcome
from vitray.training.student import parameter_groups, prepare, rate_at
from vitray.training.teachers import OnlineTeacher, StoredTeacher, normalised
from vitray.training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = {"epochs": 25, "batch_size": 16, "lr": 3e-3}
BEYOND = "e.getBoundingClientRect().right > innerWidth + 1"
PIXELS = PixelSpec((16, 16), 2, None, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A config of a second: 200 digits, a ViT of two narrow layers, from scratch."""
    folder = tmp_path_factory.mktemp("small")
    source = digits.tar(folder / "digits.tar", digits.few(20))
    model = digits.model(folder / "model", width=32, layers=2)
    fields = {
        "source": source,
        "model": model,
        "train": "full",
        "init": "scratch",
        "epochs": 3,
        "validation": 0.2,
        "device": "cpu",
    }
    return {**digits.CONFIG, **fields, "batch_size": 32}


@pytest.fixture(scope="module")
def trained(small: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> str:
    """OUT of the small config."""
    out = str(tmp_path_factory.mktemp("trained") / "out")
    finetune(TrainingConfig(**{**small, **TRAINED, "out": out}))
    return out


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}/model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------- what is written


def test_the_output_is_a_checkpoint_that_model_takes(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    result = json.loads(Path(trained, "_vitray", "result.json").read_text())
    job = vitray.Job(
        source=small["source"],
        model=trained,
        out=str(tmp_path / "out"),
        keep=["cls"],
        precision="fp32",
        engine="torch",
    )
    vitray.run(job)
    rows = vitray.read(job.out).to_pylist()
    held = [row for row in rows if is_held_out(row["key"], 0.2)]
    assert len(held) == result["held_out"] and len(rows) == result["images"] + result["held_out"]
    accuracy = np.mean([row["label"] == row["cls"] for row in held])
    assert accuracy == pytest.approx(result["figures"]["validation_accuracy"]) and accuracy > 0.3
    # transformers alone says the same, and finds no weight missing
    model, info = AutoModelForImageClassification.from_pretrained(trained, output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and model.config.id2label[3] == "3"
    )
    assert AutoImageProcessor.from_pretrained(trained, backend="pil").size == {
        "height": 16,
        "width": 16,
    }


def test_metrics_events_card_and_page_agree(trained: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = [json.loads(line) for line in Path(trained, "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "epoch" in record]
    assert [record["epoch"] for record in epochs] == list(range(1, 26)) and epochs[-1][
        "loss"
    ] < records[0]["loss"]
    events = EventAccumulator(f"{trained}/tensorboard")
    events.Reload()
    reported = [(event.step, event.value) for event in events.Scalars("validation_accuracy")]
    assert [step for step, _ in reported] == [record["step"] for record in epochs]
    assert [value for _, value in reported] == pytest.approx(
        [record["validation_accuracy"] for record in epochs]
    )
    result = json.loads(Path(trained, "_vitray", "result.json").read_text())
    card, page = Path(trained, "README.md").read_text(), Path(trained, "report.html").read_text()
    assert (
        f"| accuracy | {result['figures']['validation_accuracy']:.4f} |" in card
        and trained not in card
    )
    assert (
        f"{100 * result['figures']['validation_accuracy']:.2f}%" in page
        and "data:image/jpeg;base64," in page
    )
    assert (
        not os.path.exists(f"{trained}/_vitray/images") and result["out"] == ""
    )  # not a path of this machine


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


def test_hostile_class_names_stay_inert(small: dict[str, object], tmp_path: Path) -> None:
    root = tmp_path / "in"
    digits.folders(root, digits.few(8, [0, 1]))
    (root / "0").rename(root / "<script>alert(1)<")
    (root / "1").rename(root / "{{ 7*7 }} [x](javascript:y) ‮")
    out = str(tmp_path / "out")
    finetune(
        TrainingConfig(
            **{
                **small,
                "source": [str(root)],
                "label": "folder",
                "out": out,
                "epochs": 1,
                "batch_size": 4,
            }
        )
    )
    page, card = Path(out, "report.html").read_text(), Path(out, "README.md").read_text()
    assert (
        "<script" not in page
        and "&lt;script&gt;" in page
        and "‮" not in page
        and "{{ 7*7 }}" in page
    )
    assert (
        "<script" not in card
        and "](javascript" not in card
        and "&lt;script&gt;alert\\(1\\)&lt;" in card
    )
    assert json.loads(Path(out, "config.json").read_text())["id2label"]["0"] == "<script>alert(1)<"


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page_asks_for_nothing_and_runs_nothing(
    chromium: browser.Browser, small: dict[str, object], tmp_path: Path, width: int
) -> None:
    names = {
        "0": "<img src=x onerror=alert(1)>",
        "1": "' onload='alert(1)",
        "2": "http:\u2215\u2215127.0.0.1:9",
        "3": "x" * 200,
    }
    root, out = tmp_path / "in", tmp_path / "out"
    digits.folders(root, digits.few(12, range(4)))
    for digit, name in names.items():
        (root / digit).rename(root / name)
        for n, image in enumerate(sorted((root / name).iterdir())):
            image.rename(
                image.with_name(f"<script>document.title = {n}<\u2215script>{'y' * 150}.png")
            )
    (root / names["0"] / "no image.png").write_bytes(b"<script>")
    few = {"label": "folder", "epochs": 2, "validation": 0.5, "batch_size": 4}
    finetune(TrainingConfig(**{**small, **few, "source": [str(root)], "out": str(out)}))
    for scheme in ("light", "dark"):
        asked = (
            "[...document.images].filter(i => i.complete && i.naturalWidth == 16).length",
            "document.scripts.length + document.querySelectorAll('[onload], [onerror]').length",
            # a table of all classes scrolls in a frame of its own
            f"[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide > *') && "
            f"{BEYOND}).length",
            "[...document.querySelectorAll('section')].filter(s => "
            "s.getBoundingClientRect().height < 40).length",
            "document.title",
            "[...document.querySelectorAll('section')].map(s => s.id).join()",
        )
        seen = chromium.visit(out / "report.html", width, asked, scheme)
        pictures, *nothing, title, sections = seen.values
        assert pictures >= 3 and nothing == [0, 0, 0] and title == "out: vitray finetune"
        assert sections == "curves,confusion,pairs,worst,skipped,config"
        assert (seen.requests, seen.said, seen.dialogs) == ([], [], []) and seen.width <= width


def test_repeating_the_command_does_nothing_and_another_config_is_refused(
    trained: str, small: dict[str, object]
) -> None:
    before = os.stat(f"{trained}/model.safetensors").st_mtime_ns
    again = finetune(
        TrainingConfig(**{**small, **TRAINED, "out": trained}),
        report=lambda record: pytest.fail("trained again"),
    )
    assert again.figures and os.stat(f"{trained}/model.safetensors").st_mtime_ns == before
    with pytest.raises(FingerprintError, match="begun with another epochs, seed"):
        finetune(TrainingConfig(**{**small, **TRAINED, "out": trained, "epochs": 13, "seed": 1}))


# ---------------------------------------------------------------- what is read


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
    from PIL import Image

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


# ---------------------------------------------------------------- what learns


@pytest.mark.parametrize("train", ["head", "last", "lora"])
def test_only_what_the_config_names_learns(
    train: str, trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    fields = {
        **small,
        "model": trained,
        "train": train,
        "init": "weights",
        "out": out,
        "epochs": 1,
        "classes": [str(n) for n in range(9, -1, -1)],
    }
    finetune(TrainingConfig(**fields))
    before, after = weights(trained), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    linear = {
        name
        for name in after
        if "layer." in name and name.endswith("weight") and "norm" not in name
    }
    expected = {
        "head": {"classifier.weight", "classifier.bias"},
        "last": {
            name
            for name in after
            if "layer.1." in name or "classifier" in name or name.startswith("vit.layernorm")
        },
        "lora": {"classifier.weight", "classifier.bias"} | linear,
    }[train]
    assert changed == expected
    assert json.loads(Path(out, "config.json").read_text())["id2label"]["0"] == "9"


@pytest.mark.parametrize("name", PREFIX)
def test_every_family_trains_every_way(name: str, small: dict[str, object], tmp_path: Path) -> None:
    found = checkpoint.locate(make_checkpoint(tmp_path / "model", name, headed=False), None)
    for train in ("head", "last", "lora", "full"):
        config = TrainingConfig(
            **{
                **small,
                "out": "x",
                "train": train,
                "init": "weights",
                "gradient_checkpointing": True,
            }
        )
        student = prepare(config, found, ("a", "b", "c"), 5)
        logits, own = student(torch.randn(2, 3, 32, 32))
        assert logits.shape == (2, 3) and own.shape == (2, 5)
        (logits.square().sum() + own.sum()).backward()
        assert student.learning() and all(p.grad is not None for p in student.learning().values())
        plain = student.eval()(pixels := torch.randn(1, 3, 32, 32))[0]
        torch.testing.assert_close(
            student.finished()(pixel_values=pixels).logits, plain, rtol=1e-4, atol=1e-5
        )


def test_lower_blocks_learn_more_slowly(trained: str, small: dict[str, object]) -> None:
    config = TrainingConfig(
        **{**small, "model": trained, "init": "weights", "out": "x", "layer_decay": 0.5}
    )
    student = prepare(config, checkpoint.locate(trained, None), tuple("0123456789"), None)
    names = {id(p): name for name, p in student.named_parameters()}
    scales = {
        names[id(p)]: (g["scale"], g["weight_decay"])
        for g in parameter_groups(student, config)
        for p in g["params"]
    }
    assert scales["module.classifier.weight"] == (1.0, 0.05) and scales[
        "module.classifier.bias"
    ] == (1.0, 0.0)
    assert scales["module.vit.layers.1.attention.q_proj.weight"][0] == 0.5
    assert scales["module.vit.layers.0.attention.q_proj.weight"][0] == 0.25
    assert scales["module.vit.embeddings.cls_token"][0] == 0.125


def test_the_rate_rises_and_falls() -> None:
    fields = {"source": "x", "model": "m", "out": "o", "lr": 1.0, "warmup": 0.1}
    rates = {
        name: [rate_at(n, 100, TrainingConfig(**fields, schedule=name)) for n in range(100)]
        for name in ("cosine", "linear", "constant")
    }
    assert [found[4] for found in rates.values()] == [0.5] * 3 and all(
        found[10] == 1 for found in rates.values()
    )
    assert (
        rates["cosine"][55] == pytest.approx(0.5)
        and rates["linear"][55] == pytest.approx(0.5)
        and rates["constant"][99] == 1
    )
    assert 0 < rates["cosine"][99] < rates["linear"][99] < 0.02


# ---------------------------------------------------------------- the same numbers again


def test_batches_follow_from_epoch_and_step_and_are_shared_out_whole(
    small: dict[str, object], tmp_path: Path
) -> None:
    config = TrainingConfig(
        **{**small, "out": "x", "workers": 2, "mixup": 0.4, "flip": True, "label_smoothing": 0.1}
    )
    training_data = gather(config, PIXELS, (), str(tmp_path))
    whole = Batches(config, training_data.train, PIXELS, 10, None)
    halves = Batches(config, training_data.train, PIXELS, 10, None, world=2)
    one, again, other = whole.batch(1, 2), whole.batch(1, 2), whole.batch(1, 3)
    assert torch.equal(one.pixels, again.pixels) and not torch.equal(one.pixels, other.pixels)
    for rank in (0, 1):
        half = halves.batch(1, 2, rank)
        assert torch.equal(half.pixels, one.pixels[rank::2]) and torch.equal(
            half.target, one.target[rank::2]
        )
    assert torch.allclose(one.target.sum(1), torch.ones(32)) and one.pixels.shape == (32, 3, 16, 16)
    plain = Batches(
        TrainingConfig(**{**small, "out": "x", "crop": 1.0, "flip": True}),
        replace(training_data.train, pixels=training_data.train.pixels[:, :16, :16]),
        PIXELS,
        10,
        None,
    )
    order = np.random.default_rng([0, 0]).permutation(len(training_data.train.ids))[:32]
    kept = (
        torch.from_numpy((plain.examples.pixels[order] / 255 - 0.5) / 0.5)
        .permute(0, 3, 1, 2)
        .float()
    )
    same = (torch.isclose(plain.batch(0, 0).pixels, kept, atol=1e-6)).flatten(1).all(1)
    mirrored = (torch.isclose(plain.batch(0, 0).pixels, kept.flip(3), atol=1e-6)).flatten(1).all(1)
    assert bool((same | mirrored).all()) and 0 < int(same.sum()) < 32


def test_parts_of_a_step_add_up_to_it(small: dict[str, object], tmp_path: Path) -> None:
    found = []
    for parts in (1, 4):
        out = str(tmp_path / str(parts))
        finetune(TrainingConfig(**{**small, "out": out, "accumulate": parts, "epochs": 2}))
        found.append(weights(out))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)


def start(config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "vitray", "finetune", str(config)],
        env=known,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_config(path: Path, fields: dict[str, object]) -> Path:
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    return path


def test_killed_training_ends_with_equal_weights(small: dict[str, object], tmp_path: Path) -> None:
    fields = {**small, "save_steps": 3, "mixup": 0.2, "flip": True}
    whole = finetune(TrainingConfig(**fields, out=str(tmp_path / "whole")))
    path = write_config(tmp_path / "killed.yaml", {**fields, "out": str(tmp_path / "killed")})
    # within an epoch, behind its last checkpoint; and between two objects of a checkpoint
    for point in ("train-step:8", "object-written"):
        done = start(path, VITRAY_CRASH_AT=point)
        assert done.returncode == -9, done.stderr[-2000:]
    done = start(path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert equal(weights(str(tmp_path / "whole")), weights(str(tmp_path / "killed")))
    both = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert re.search(r": going on from step \d+ of 12\n", done.stderr)
    assert (
        both[0] == both[1]
        and "epoch 3: loss" in done.stderr
        and f"{whole.figures['validation_accuracy']:.4g}" in done.stdout
    )
    left = [
        p.name
        for p in (tmp_path / "killed" / "_vitray" / "state").iterdir()
        if p.suffix == ".safetensors"
    ]
    assert sorted(name.partition("-")[0] for name in left) == ["best", "last"]


@pytest.mark.ray
def test_a_session_trains_on_several_workers_again_and_again(
    ray: None, small: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: os.path.relpath(str(small[name])) for name in ("source", "model")}
    for name in ("one", "two"):
        result = finetune(
            TrainingConfig(**{**small, **places, "workers": 2, "epochs": 2, "out": name})
        )
        assert result.epochs == 2 and sorted(os.listdir(f"{name}/_vitray")) == [
            "result.json",
            "state",
            "training.json",
        ]
    assert equal(weights("one"), weights("two"))
    with pytest.raises(
        ClusterError, match=r"8 workers need a CPU each, and the cluster has \d\. Set fewer"
    ):
        finetune(TrainingConfig(**{**small, "workers": 8, "out": "three"}))


def test_workers_that_never_begin_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "POLL_S", 0.01)
    monkeypatch.setattr(workers, "START_S", 0.2)
    never, mark = threading.Event(), tmp_path / "began"
    with pytest.raises(ClusterError, match=r"no worker has begun in 0\.2 s\. Look at `ray status`"):
        workers.run_watched(never.wait, str(mark))
    mark.touch()
    workers.run_watched(lambda: time.sleep(0.5), str(mark))  # who has begun may take his time
    with pytest.raises(ClusterError, match=r"the training failed: 'no such thing'\. Run again"):
        workers.run_watched(lambda: {}["no such thing"], str(mark))
    never.set()


@pytest.mark.s3
def test_everything_may_lie_on_s3_and_a_killed_training_goes_on_there(
    small: dict[str, object], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, labels = digits.load()
    (tmp_path / "labels.csv").write_text(
        "\n".join(["key,digit", *(f"{labels[n]}/{n:04d},{labels[n]}" for n in digits.few(20))])
    )
    files = {"in/digits.tar": small["source"], "labels.csv": tmp_path / "labels.csv"}
    files |= {f"model/{path.name}": path for path in Path(str(small["model"])).iterdir()}
    for name, path in files.items():
        store_for(s3).create(f"{s3}/{name}", Path(str(path)).read_bytes())
    joined = {"label": "digit", "label_table": str(tmp_path / "labels.csv"), "table_key": "key"}
    fields = {**small, **joined, "save_steps": 3, "mixup": 0.2, "validation": 0.2}
    whole = finetune(TrainingConfig(**fields, out=str(tmp_path / "whole")))
    there = {
        "source": f"{s3}/in/*.tar",
        "model": f"{s3}/model",
        "label_table": f"{s3}/labels.csv",
        "out": f"{s3}/out",
    }
    path = write_config(tmp_path / "killed.yaml", {**fields, **there})
    done = start(path, VITRAY_CRASH_AT="train-step:7")
    assert done.returncode == -9, done.stderr[-2000:]
    found = checkpoints.load(f"{s3}/out/_vitray/state", "last")
    assert found is not None and found[1]["step"] == 6
    again = finetune(TrainingConfig(**{**fields, **there}))
    assert again.figures == whole.figures and again.model
    kept = {info.url.removeprefix(f"{s3}/out/") for info in store_for(s3).find(f"{s3}/out")}
    assert {"config.json", "model.safetensors", "report.html", "_vitray/result.json"} <= kept
    state = [
        name for name in kept if name.startswith("_vitray/state/") and name.endswith(".safetensors")
    ]
    assert sorted(name.split("/")[-1].partition("-")[0] for name in state) == ["best", "last"]
    assert not any((tmp_path / "cache" / "vitray" / "finetune").rglob("*.u8"))
    # what was written there is a model, of a run and of the next training; and a probe's dataset
    assert equal(load(read(f"{s3}/out/model.safetensors")), weights(str(tmp_path / "whole")))
    dataset = embedded(f"{s3}/out", there["source"], f"{s3}/dataset")
    probe = finetune(
        TrainingConfig(
            dataset=dataset, train="probe", label="cls", validation=0.2, out=f"{s3}/probe"
        )
    )
    assert probe.images + probe.held_out == 200 and read_head(f"{s3}/probe").labels == tuple(
        "0123456789"
    )
    later = finetune(
        TrainingConfig(
            **{
                **fields,
                **there,
                "model": f"{s3}/out",
                "init": "weights",
                "train": "head",
                "out": f"{s3}/later",
            }
        )
    )
    assert (later.epochs, later.model) == (3, True)


def test_states_replace_each_other_and_damage_is_seen(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", 100)
    tensors = {name: torch.randn(20) for name in "abc"}
    assert checkpoints.load(root, "last") is None
    checkpoints.save(root, "last", {"a": torch.zeros(2)}, {"step": 1})
    checkpoints.save(root, "last", tensors, {"step": 2, "loss": 0.1 + 0.2})
    found, numbers = checkpoints.load(root, "last") or ({}, {})
    assert equal(found, tensors) and numbers == {"step": 2, "loss": 0.1 + 0.2}
    objects = [info.url for info in store_for(root).find(root)]
    assert len(objects) == 4  # three parts and their list; the first state is gone
    part = next(url for url in objects if url.endswith(".safetensors"))
    store_for(root).replace(part, b"x")
    with pytest.raises(StorageError, match="damaged"):
        checkpoints.load(root, "last")
    store_for(root).replace(f"{root}/last-orphan.safetensors", b"x")
    checkpoints.sweep(root)
    assert sorted(info.url for info in store_for(root).find(root)) == objects


def test_a_damaged_or_foreign_checkpoint_of_a_killed_training_is_one_error(
    small: dict[str, object], tmp_path: Path
) -> None:
    fields = {**small, "save_steps": 3, "out": str(tmp_path / "out")}
    state = tmp_path / "out" / "_vitray" / "state"
    with pytest.raises(InterruptedError):
        finetune(TrainingConfig(**fields), report=stop)
    pointer, (part,) = state / "last.json", state.glob("last-*")
    before = {path: path.read_bytes() for path in (pointer, part)}
    wide = {name: torch.zeros(99) for name in (checkpoints.load(str(state), "last") or ({},))[0]}

    def foreign() -> None:
        checkpoints.save(str(state), "last", wide, json.loads(before[pointer])["numbers"])

    for spoil, says in (
        (lambda: part.write_bytes(before[part][:-1]), f"is damaged ({part.name} changed)"),
        (lambda: part.unlink(), f"is damaged ({part} does not exist)"),
        (lambda: pointer.write_bytes(before[pointer][:-1]), "is damaged (last.json: "),
        (lambda: pointer.write_bytes(b"[]"), "is damaged (last.json: "),
        (foreign, "is of another training: module."),
    ):
        spoil()
        with pytest.raises(StorageError) as raised:
            finetune(TrainingConfig(**fields))
        said = str(raised.value)
        assert says in said and said.endswith("to train from the start.") and "\n" not in said
        for path, data in before.items():
            path.write_bytes(data)
    shutil.rmtree(state)
    assert finetune(TrainingConfig(**fields)).epochs == 3


def stop(_record: dict[str, float]) -> None:
    raise InterruptedError


def test_training_stops_when_it_gets_no_better(small: dict[str, object], tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    fields = {
        **small,
        "out": str(tmp_path / "out"),
        "epochs": 30,
        "patience": 2,
        "lr": 1e-9,
        "metric": "accuracy",
    }
    result = finetune(
        TrainingConfig(**fields),
        report=lambda record: reported.append(record) if "epoch" in record else None,
    )
    assert result.epochs == len(reported) < 30
    best = max(
        reported, key=lambda record: (record["validation_accuracy"], -record["validation_loss"])
    )
    assert result.epochs == best["epoch"] + 2
    assert result.figures["validation_loss"] == pytest.approx(best["validation_loss"], rel=1e-6)


def test_precision_bf16_and_class_weights_train(
    small: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (examples, fitting):
        monkeypatch.setattr(module, "PROGRESS_S", -1.0)
    fields = {
        **small,
        "out": str(tmp_path / "out"),
        "precision": "bf16",
        "class_weights": "balanced",
        "epochs": 8,
    }
    reported: list[dict[str, float]] = []
    finetune(TrainingConfig(**fields), report=reported.append)
    between = [record for record in reported if "epoch" not in record]
    reported = [record for record in reported if "epoch" in record]
    assert [record["step"] for record in between] == list(range(1, int(reported[-1]["step"]) + 1))
    assert {record["steps"] for record in between} == {reported[-1]["step"]}
    decoded = [
        int(record.message.split()[0])
        for record in caplog.records
        if record.message.endswith(" images read and decoded")
    ]
    assert len(decoded) == 4 and decoded == sorted(decoded) and decoded[-1] <= 200
    assert (
        reported[-1]["loss"] < reported[0]["loss"]
        and weights(fields["out"])["classifier.weight"].dtype == torch.float32
    )


# ---------------------------------------------------------------- probes and teachers


def embedded(
    model: str, source: object, out: Path | str, engine: str = "torch", **more: object
) -> str:
    fields = {"keep": ["cls"], "precision": "fp32", **more}
    job = vitray.Job(source=source, model=model, out=str(out), engine=engine, **fields)
    vitray.run(job)
    return job.out


def test_a_linear_probe_reads_no_image_and_is_a_checkpoint_and_a_head(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    source = tmp_path / "d.tar"
    shutil.copyfile(str(small["source"]), source)
    dataset = embedded(trained, str(source), tmp_path / "dataset")
    source.unlink()
    out = str(tmp_path / "out")
    result = finetune(
        TrainingConfig(dataset=dataset, train="probe", label="cls", validation=0.2, out=out)
    )
    assert result.model and result.images + result.held_out == 200
    head, rows = read_head(out), vitray.read(dataset)
    vectors = np.stack(rows["embedding"].to_numpy())
    said = [head.labels[n] for n in (vectors @ head.weight.T + head.bias).argmax(1)]
    held = [n for n, key in enumerate(rows["key"].to_pylist()) if is_held_out(key, 0.2)]
    truth = rows["cls"].to_pylist()
    assert np.mean([said[n] == truth[n] for n in held]) == pytest.approx(
        result.figures["validation_accuracy"]
    )
    again = embedded(out, small["source"], tmp_path / "again")
    assert vitray.read(again)["label"].to_pylist() == said
    with pytest.raises(ModelError, match="is not the model of"):
        other = make_checkpoint(tmp_path / "other", "vit", headed=True)
        finetune(
            TrainingConfig(
                dataset=dataset, model=other, train="probe", label="cls", out=str(tmp_path / "x")
            )
        )


def test_a_linear_probe_is_the_minimum_of_its_loss() -> None:
    from sklearn.linear_model import LogisticRegression

    images, labels = digits.load()
    rows = images[:900].reshape(900, -1).astype(np.float32)
    train = LabelledRows(rows, labels[:900].astype(np.int64))
    none = LabelledRows(np.zeros((0, 64), np.float32), np.zeros(0, np.int64))
    found = fit_linear_probe(train, none, torch.ones(10), 0.0)
    scaled = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
    known = LogisticRegression(C=1 / (900 * 1e-2), max_iter=2000, tol=1e-8).fit(
        scaled, labels[:900]
    )
    ours, theirs = rows @ found.weight.T + found.bias, known.decision_function(scaled)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=2e-2
    )


def test_a_teacher_is_joined_by_bytes_and_the_remainder_is_spread(
    trained: str, small: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = embedded(trained, small["source"], tmp_path / "dataset", top_k=3)
    fields = {
        **small,
        "source": [],
        "teacher": dataset,
        "out": str(tmp_path / "out"),
        "label": "cls",
        "epochs": 1,
    }
    training_run = TrainingRun.of(TrainingConfig(**fields))
    assert training_run.teacher is not None and training_run.training_data.classes == tuple(
        "0123456789"
    )
    teaching = StoredTeacher(
        training_run.config,
        training_run.teacher,
        training_run.training_data.train.hashes,
        training_run.training_data.classes,
    )
    dense = teaching.of(np.arange(len(training_run.training_data.train.ids)))
    rows = {row["content_hash"]: row for row in vitray.read(dataset).to_pylist()}
    for n in (0, 7, 50):
        row = rows[training_run.training_data.train.hashes[n]]
        np.testing.assert_allclose(dense[n, row["top_ids"]], row["top_scores"], rtol=1e-6)
        rest = np.delete(dense[n], row["top_ids"])
        np.testing.assert_allclose(rest, (1 - sum(row["top_scores"])) / 7, atol=1e-6)
    for distill, what in (("labels", "scores"), ("embedding", "embeddings")):
        result = finetune(
            TrainingConfig(**{**fields, "distill": distill, "out": str(tmp_path / distill)})
        )
        assert result.images + result.held_out == 200 and "projector" not in " ".join(
            weights(result.out)
        )
        card = Path(result.out, "README.md").read_text()
        assert f"It learnt the {what} of a teacher, with a weight of 0.5 beside the labels." in card
        assert "Its labels are another model's" not in card
    result = finetune(
        TrainingConfig(
            **{**{k: v for k, v in fields.items() if k != "label"}, "out": str(tmp_path / "own")}
        )
    )
    card = Path(result.out, "README.md").read_text()
    assert "Its labels are another model's: the figures are its agreement with that model." in card
    StoredTeacher(
        training_run.config,
        training_run.teacher,
        [*training_run.training_data.train.hashes[:3], b"unseen"],
        training_run.training_data.classes,
    )
    assert (
        f"teacher {dataset} does not have 1 of 4 images: only their labels are learnt"
        in caplog.text
    )
    other = digits.tar(tmp_path / "other.tar", digits.few(5, [0, 1], skip=60))
    with pytest.raises(JobError, match="has none of these images"):
        finetune(TrainingConfig(**{**fields, "source": other, "out": str(tmp_path / "y")}))


def test_a_teacher_model_sees_what_the_student_sees(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    """Crops and mixtures are its own, and so is its processor; its classes are found by name."""
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    teacher = tmp_path / "teacher"
    shutil.copytree(trained, teacher)
    (teacher / "processor_config.json").unlink(missing_ok=True)
    ViTImageProcessorPil(
        size={"height": 16, "width": 16},
        resample=2,
        image_mean=[0.2, 0.3, 0.4],
        image_std=[0.5, 0.7, 1],
    ).save_pretrained(teacher)
    classes = [str(n) for n in range(9, -1, -1)]
    fields = {
        **small,
        "teacher_model": str(teacher),
        "out": str(tmp_path / "out"),
        "mixup": 0.4,
        "classes": classes,
        "epochs": 1,
    }
    fitting = TrainingRun.of(TrainingConfig(**fields, teacher_weight=1.0)).fitting()
    batch, online_teacher = fitting.batches.batch(0, 0), fitting.batches.teacher
    assert isinstance(online_teacher, OnlineTeacher) and bool(batch.has_teacher.all())
    raw = (batch.pixels * 0.5 + 0.5) * 255
    own = normalised(raw, replace(PIXELS, mean=(0.2, 0.3, 0.4), std=(0.5, 0.7, 1.0)))
    model = AutoModelForImageClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        logits = model(pixel_values=own).logits.flip(1)
        torch.testing.assert_close(
            online_teacher(batch.pixels), logits.softmax(-1), rtol=1e-4, atol=1e-5
        )
        own_logits = fitting.student.train()(batch.pixels)[0]
        soft = (logits / 2).softmax(-1)
        expected = 4 * (soft * (soft.log() - (own_logits / 2).log_softmax(-1))).sum()
        torch.testing.assert_close(
            fitting.loss(fitting.student, batch, slice(None)), expected, rtol=1e-4, atol=1e-4
        )
    assert not any(
        p.requires_grad and p.grad is not None for p in online_teacher.network.module.parameters()
    )
    before = weights(str(teacher))
    for distill in ("labels", "embedding"):
        result = finetune(
            TrainingConfig(**{**fields, "distill": distill, "out": str(tmp_path / distill)})
        )
        assert (
            "projector" not in " ".join(weights(result.out))
            and str(tmp_path) not in Path(result.out, "README.md").read_text()
        )
    assert equal(before, weights(str(teacher)))
    # other weights under the same name are another teacher
    shutil.copyfile(tmp_path / "labels" / "model.safetensors", teacher / "model.safetensors")
    (tmp_path / "labels" / "_vitray" / "result.json").unlink()
    with pytest.raises(FingerprintError, match="begun with another teacher_weights"):
        finetune(TrainingConfig(**{**fields, "distill": "labels", "out": str(tmp_path / "labels")}))
    bare = make_checkpoint(tmp_path / "bare", "vit", headed=False)
    with pytest.raises(JobError, match=r"bare holds no labels\. Set distill: embedding"):
        finetune(TrainingConfig(**{**fields, "teacher_model": bare}))
    edit(str(teacher / "config.json"), problem_type="multi_label_classification")
    with pytest.raises(JobError, match="scores of independent classes, which are no distribution"):
        finetune(TrainingConfig(**fields))


def test_pseudo_labels_are_the_models_own(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    scores = vitray.read(dataset)["score"].to_numpy()
    least = float(np.median(scores))
    config = TrainingConfig(
        **{
            **small,
            "source": [],
            "label": None,
            "dataset": dataset,
            "min_score": least,
            "out": str(tmp_path / "out"),
            "epochs": 1,
        }
    )
    result = finetune(config)
    assert result.images + result.held_out == int((scores >= np.float32(least)).sum())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"epohcs": 3}, JobError, "unknown field `epohcs`; did you mean `epochs`"),
        ({"source": None}, JobError, r"not valid: `source`: null is no list; write \[a, b\]$"),
        (
            {"classes": [0, 1, 2]},
            JobError,
            "not valid: `classes.0`: 0 is not text; put it in quotes$",
        ),
        ({"classes": ["a", " a"]}, JobError, "`classes`: label a is there twice"),
        ({"dataset": "d"}, JobError, "source and dataset: give one of them"),
        ({"train": "probe", "init": "weights"}, JobError, "stored embeddings: give `dataset`"),
        ({"train": "head"}, JobError, "init: scratch needs train: full"),
        (
            {"batch_size": 10, "accumulate": 3},
            JobError,
            "batch_size 10 is not a multiple of 1 workers x 3 parts",
        ),
        ({"label": "txt"}, JobError, "200 images without a label .txt., such as"),
        (
            {"label": "json", "label_field": "digits"},
            JobError,
            "200 images without a label .json, field digits., such as",
        ),
        ({"classes": ["0", "1", "2"]}, JobError, "140 labels are not among the 3 classes, such as"),
        (
            {"label_table": "nowhere.csv", "label": "x"},
            JobError,
            r"label_table nowhere.csv does not exist\. Correct `label_table`\.",
        ),
        ({"rank": 16}, JobError, "rank is for train: lora, and train is full"),
        ({"last": 2}, JobError, "last is for train: last, and train is full"),
        (
            {"distill": "embedding", "temperature": 3},
            JobError,
            "distill, temperature: give `teacher` or `teacher_model`, too",
        ),
        (
            {"weight_decay": float("inf")},
            JobError,
            "`weight_decay`: Input should be a finite number",
        ),
        (
            {"workers": 64, "batch_size": 640, "accumulate": 10},
            JobError,
            "images are too few for 640 parts",
        ),
        ({"validation": 1e-9}, JobError, "no image fell into the held-out share"),
        ({"init": "weights"}, ModelError, "holds no model.safetensors"),
        ({"teacher": "nowhere"}, JobError, "holds no vitray dataset"),
        (
            {"teacher": "a", "teacher_model": "b"},
            JobError,
            "teacher and teacher_model: give one of them",
        ),
        ({"teacher_model": "/nowhere/model"}, ModelError, "/nowhere/model does not exist"),
        ({"lr": 1e30, "clip": 1e30, "warmup": 0.0}, vitray.VitrayError, "the loss is"),
    ],
)
def test_bad_input_is_one_line(
    fields: dict[str, object],
    error: type[Exception],
    says: str,
    small: dict[str, object],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says) as raised:
        finetune(TrainingConfig(**{**small, "out": str(tmp_path / "out"), **fields}))
    assert "\n" not in str(raised.value)
    assert (tmp_path / "out").exists() == (
        "lr" in fields
    )  # what is refused leaves nothing, no decoded image either


def test_a_missing_label_is_reported_with_the_place_of_its_lookup(
    small: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "labels.csv"
    fields = {
        **small,
        "label": "digit",
        "label_table": str(table),
        "table_key": "file",
        "out": str(tmp_path / "out"),
    }

    def said(text: str) -> str:
        table.write_text(text)
        with pytest.raises(JobError) as raised:
            finetune(TrainingConfig(**fields))
        return str(raised.value).replace(f"label_table {table} ", "")

    advice = "Correct `label_table` or `table_key`."
    images = "the images are 6/0000, 6/0001, 6/0002."
    assert (
        said("file,digit\n0/0001.jpg,0\n")
        == f"names none of 200 images: its file holds 0/0001.jpg, {images} {advice}"
    )
    assert (
        said("file,digit\n")
        == f"names none of 200 images: its file holds nothing, {images} {advice}"
    )
    assert (
        said("name,digit\n6/0000,6\n")
        == "has no column `file`; it has name, digit. Correct `label_table`, `table_key` or "
        "`label`."
    )
    fields["unlabelled"] = "skip"
    long = said(f"file,digit\n6/0000,{'x' * 501}\n6/0001,6\n")
    assert (
        long
        == f"a label of 501 characters is no class name: {'x' * 40}… Correct `label` (digit of "
        f"{table}, by its column file)."
    )
    del fields["unlabelled"]
    found = said("file,digit\n6/0000,6\n6/none,6\n")
    assert found.startswith(
        f"199 images without a label (digit of {table}, by its column file), such as 6/0001, "
        f"6/0002, "
    )
    assert found.endswith("Correct `label`, `label_table` or `table_key`, or set unlabelled: skip.")
    assert f"1 of 2 keys of label_table {table} name no image, such as 6/none" in caplog.text


def test_a_number_is_no_class_id_if_classes_are_called_numbers() -> None:
    assert class_ids([("a", "7"), ("b", "9")], ("5", "7", "9")).tolist() == [1, 2]
    assert class_ids([("a", "1"), ("b", "dog")], ("cat", "dog")).tolist() == [1, 1]
    with pytest.raises(JobError, match="1 labels are not among the 3 classes, such as 1 of a"):
        class_ids([("a", "1")], ("5", "7", "9"))


def test_a_table_of_bytes_and_numbers_and_nothing(tmp_path: Path, small: dict[str, object]) -> None:
    path = tmp_path / "t.PARQUET"
    config = TrainingConfig(**{**small, "out": "o", "label": "l", "label_table": str(path)})

    def labels(keys: list[object], values: list[object]) -> dict[str, str] | None:
        pq.write_table(pa.table({"key": keys, "l": values}), path)
        return labels_by_key(config)

    assert labels([b"a.png", b" b "], [b"cat", b" dog"]) == {"a.png": "cat", "b": "dog"}
    assert labels(["a", "b", None, "d"], [1.5, float("nan"), 2.0, None]) == {"a": "1.5"}
    with pytest.raises(JobError, match=r"\['cat'\] is no label \(l of .*, by its column key\)"):
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


def test_a_training_that_another_machine_took_over_ends_and_spoils_nothing(
    small: dict[str, object], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    epochs: list[float] = []
    states: dict[str, bytes] = {}

    def tell(record: dict[str, float]) -> None:
        epochs.append(record["epoch"])
        if record["epoch"] == 1:
            checkpoints.take_over(f"{out}/_vitray/state", "another")
            states.update(
                {
                    name: Path(out, "_vitray", "state", name).read_bytes()
                    for name in ("best.json", "last.json")
                }
            )

    with pytest.raises(
        StorageError, match=r"another command, on another machine, trains into .*/state now"
    ):
        finetune(TrainingConfig(**small, out=out), tell)  # the second epoch is the best so far
    assert epochs == [1] and not os.path.exists(f"{out}/config.json")
    assert states == {
        name: Path(out, "_vitray", "state", name).read_bytes() for name in states
    }  # what is the other's now
    finetune(TrainingConfig(**small, out=out))
    whole = finetune(TrainingConfig(**small, out=str(tmp_path / "whole")))
    assert whole.epochs == 3 and equal(weights(out), weights(str(tmp_path / "whole")))


def test_a_checkpoint_before_the_first_update_is_one(
    small: dict[str, object], tmp_path: Path
) -> None:
    """fp16 skips steps that overflow, and may begin with some."""
    training_run = TrainingRun.of(TrainingConfig(**small, out=str(tmp_path / "out")))
    fitting = training_run.fitting()
    fitting.save()
    again = training_run.fitting()
    again.scaler = torch.amp.GradScaler("cpu", enabled=True)  # begun in fp32, goes on in fp16
    again.restore()
    assert again.progress.step == 0 and not again.optimizer.state
    again.run(lambda record: None)
    assert again.progress.done


def test_a_directory_of_something_else_is_never_written_into(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    """Of a model the weights would be gone, of one's own folder the README."""
    shutil.copytree(trained, model := tmp_path / "model", ignore=shutil.ignore_patterns("_vitray"))
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    (tmp_path / "own" / "photos").mkdir(parents=True)
    (tmp_path / "own" / "photos" / "README.md").write_text("mine")
    for out, named in (
        (str(model), "README.md"),
        (dataset, "_SUCCESS.json"),
        (str(tmp_path / "own"), "photos/README.md"),
    ):
        before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
        with pytest.raises(
            FingerprintError,
            match=rf"{out} holds files that no training wrote, such as {named}\. Choose an empty",
        ):
            finetune(TrainingConfig(**{**small, "model": str(model), "out": out}))
        assert {
            path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()
        } == before
    begun = (
        tmp_path / "begun" / "_vitray" / "images"
    )  # what a training that was killed while it decoded leaves
    begun.mkdir(parents=True)
    (begun / "x.lock").touch()
    (begun.parent / "probe-1").touch()
    assert (
        finetune(TrainingConfig(**{**small, "epochs": 1, "out": str(tmp_path / "begun")})).epochs
        == 1
    )


def test_an_export_is_no_model_to_train_but_its_embeddings_are_enough_for_a_probe(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    export = str(tmp_path / "export")
    export_model(vitray.Job(source=small["source"], model=trained, out="o"), "onnx", "", export)
    for field in ("model", "teacher_model"):
        with pytest.raises(
            ModelError,
            match=rf"{export} is an export \(onnx\), which cannot be trained\. Give "
            rf"{Path(trained).name}",
        ):
            finetune(TrainingConfig(**{**small, field: export, "out": str(tmp_path / "out")}))
    dataset = embedded(export, small["source"], tmp_path / "dataset", engine="auto")
    result = finetune(
        TrainingConfig(
            train="probe", dataset=dataset, label="cls", validation=0.2, out=str(tmp_path / "probe")
        )
    )
    assert not result.model and result.figures["validation_accuracy"] > 0.3
    assert read_head(str(tmp_path / "probe")).weights_sha256 == hash_model(
        checkpoint.locate(export, None)
    )


def test_an_output_inside_its_source_or_dataset_is_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    """The next run would take its files for images; and a dataset's folders are vitray's."""
    root = digits.folders(tmp_path / "in", digits.few(5, [0, 1]))
    with pytest.raises(
        JobError, match=r"`out` .*/in/out lies inside `source` .*/in: it would read its own output"
    ):
        finetune(
            TrainingConfig(**{**small, "source": root, "label": "folder", "out": f"{root}/out"})
        )
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    for more in ({"train": "probe", "label": "cls"}, {"model": trained, "label": "cls"}):
        with pytest.raises(
            JobError, match=r"`out` .*/dataset/out lies inside the dataset: choose another path"
        ):
            finetune(TrainingConfig(dataset=dataset, **more, out=f"{dataset}/out"))
    assert not Path(root, "out").exists() and not Path(dataset, "out").exists()


def test_one_class_and_a_checkpoint_of_another_shape_are_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    alone = digits.tar(tmp_path / "alone.tar", digits.few(30, [4]))
    with pytest.raises(JobError, match=r"have 1 class \(4\); a classifier needs two"):
        finetune(TrainingConfig(**{**small, "source": alone, "out": str(tmp_path / "a")}))
    shutil.copytree(trained, tmp_path / "wide")
    edit(str(tmp_path / "wide" / "config.json"), intermediate_size=80)
    with pytest.raises(ModelError, match=r"weights of another shape than its config.json says"):
        finetune(
            TrainingConfig(
                **{
                    **small,
                    "model": str(tmp_path / "wide"),
                    "train": "head",
                    "init": "weights",
                    "out": str(tmp_path / "b"),
                }
            )
        )


def test_more_blocks_than_there_are_and_columns_of_loose_files_are_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    fields = {
        **small,
        "model": trained,
        "init": "weights",
        "train": "last",
        "out": str(tmp_path / "a"),
    }
    with pytest.raises(JobError, match=r"last: 99, and the model has \d+ blocks"):
        finetune(TrainingConfig(**fields, last=99))
    (tmp_path / "loose").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "loose" / "a.png")
    with pytest.raises(
        JobError,
        match=r"label: cls: loose files have no columns\. Set label: folder, or give a label_table",
    ):
        finetune(TrainingConfig(**{**fields, "source": str(tmp_path / "loose"), "label": "cls"}))


def test_a_linear_probe_chooses_its_strength_by_the_metric() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 120)
    vectors = (np.eye(3)[ids] @ rng.normal(size=(3, 40)) + 3 * rng.normal(size=(120, 40))).astype(
        np.float32
    )
    sides = LabelledRows(vectors[:80], ids[:80]), LabelledRows(vectors[80:], ids[80:])
    by_loss, by_accuracy = (
        fit_linear_probe(*sides, torch.ones(3), 0.0, metric) for metric in ("loss", "accuracy")
    )
    assert by_loss.best["validation_loss"] == min(
        record["validation_loss"] for record in by_loss.records
    )
    assert by_accuracy.best["validation_accuracy"] == max(
        record["validation_accuracy"] for record in by_accuracy.records
    )
    assert by_loss.best != by_accuracy.best  # else the test shows nothing


def test_no_space_is_one_clear_error(small: dict[str, object], tmp_path: Path) -> None:
    path = write_config(tmp_path / "job.yaml", {**small, "out": str(tmp_path / "out")})
    limit = 100_000  # bytes a file may have: less than the decoded images take
    load_decoders("exact")  # Numba keeps what it compiled in a file that is larger

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "vitray", "finetune", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=few_bytes,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("StorageError: ")
        and "free some" in done.stderr
    ), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list((tmp_path / "out").rglob("*.u8"))


def test_a_disk_that_is_full_when_the_checkpoint_is_written_is_one_error(
    small: dict[str, object], tmp_path: Path
) -> None:
    found = checkpoint.locate(str(small["model"]), None)
    config = TrainingConfig(**{**small, "out": str(tmp_path / "out")})
    outcome = Outcome(config, found, ("a", "b"), [], [], {}, None)
    module = prepare(config, found, outcome.classes, None).finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"File too large.*\. Free some space there, then run again"
        ) as raised:
            outputs.write(outcome, module, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_config_file_and_its_overrides(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "job.yaml", {"source": "in", "model": "m", "out": "o", "train": "lora"}
    )
    config = load_config(path, {"rank": 4})
    assert (config.train, config.rank, config.rate, config.label_column) == (
        "lora",
        4,
        1e-3,
        "folder",
    )
    assert all((field.description or "").strip() for field in TrainingConfig.model_fields.values())
