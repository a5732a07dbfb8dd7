"""What a training writes: the checkpoint, metrics, the model card and the page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from factories import digits
from support import browser
from support.training_runs import TRAINED, embedded
from vitray.errors import FingerprintError, JobError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.labels import class_ids

pytestmark = pytest.mark.usefixtures("one_thread")

BEYOND = "e.getBoundingClientRect().right > innerWidth + 1"


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
        assert sections == "curves,confusion,pairs,worst,right,skipped,config"
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
        == f"a label of 501 characters cannot be a class name: {'x' * 40}… Correct `label` (digit of "
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
    with pytest.raises(JobError, match="not among the 3 classes: 1 label, such as 1 of a"):
        class_ids([("a", "1")], ("5", "7", "9"))


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
