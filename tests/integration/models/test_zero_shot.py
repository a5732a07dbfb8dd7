"""Labels that a text tower reads: equal to transformers' own zero-shot pipeline, on every engine,
frozen with the dataset.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from factories.small_models import edit, job_for, noise, run
from support.text_towers import IMAGES, LABELS, WORDS, by_label, pipeline_scores
from vitray.errors import ModelError
from vitray.job import load_job
from vitray.models import checkpoint_store, identify, with_label_names


# from
def test_labels_come_from_a_list_or_from_a_file(tmp_path: Path, root: str) -> None:
    from vitray.storage import join, store_for

    url = join(root, "labels.txt")
    store_for(url).create(url, "\ufeffcat\r\n  fire truck \nKöter\n\n".encode())
    file = tmp_path / "job.yaml"
    file.write_text(f"source: in\nmodel: m\nout: o\nlabels: {url}\n")
    assert with_label_names(load_job(file)).labels == ["cat", "fire truck", "Köter"]
    for value, labels in (
        ("[cat, dog]", ["cat", "dog"]),
        ("true", True),
        ("false", False),
        ("no", False),
        ("['no']", ["no"]),
    ):
        file.write_text(f"source: in\nmodel: m\nout: o\nlabels: {value}\n")
        assert with_label_names(load_job(file)).labels == labels


def test_siglips_own_tokenizer_needs_sentencepiece(towers: dict[str, str], tmp_path: Path) -> None:
    directory = str(shutil.copytree(towers["Siglip"], tmp_path / "siglip"))
    os.unlink(f"{directory}/tokenizer.json")
    edit(f"{directory}/tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    Path(f"{directory}/spiece.model").write_bytes(b"")
    try:
        import sentencepiece
    except ImportError:
        with pytest.raises(
            ModelError, match=r"needs SentencePiece: pip install 'vitray\[siglip\]'"
        ):
            identify(job_for(directory, LABELS))
        return
    (tmp_path / "words.txt").write_text("\n".join(word.lower() for word in WORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=f"{tmp_path}/words.txt",
        model_prefix=f"{directory}/spiece",
        vocab_size=80,
        pad_id=-1,
        bos_id=-1,
        hard_vocab_limit=False,
    )
    found = by_label(run(job_for(directory, LABELS), noise(IMAGES)))
    np.testing.assert_allclose(
        found, pipeline_scores(directory, noise(IMAGES), "This is a photo of {}."), atol=1e-4
    )


def test_the_tokenizers_files_come_with_a_checkpoint_from_s3(
    mock_s3: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.s3 import new_bucket
    from vitray.storage import join, store_for

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = join(new_bucket(mock_s3, monkeypatch), "clip")
    said = json.loads(Path(f"{clip}/tokenizer.json").read_text())["model"]
    Path(f"{clip}/vocab.json").write_text(json.dumps(said["vocab"]))
    Path(f"{clip}/merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in said["merges"])
    )
    expected = run(job_for(clip, LABELS), noise(2)).scores
    os.unlink(f"{clip}/tokenizer.json")
    for path in [*Path(clip).iterdir()]:
        store_for(there).replace(join(there, path.name), path.read_bytes())
    for name in ("spiece.model", "tokenization.py", "rust_model.ot"):
        store_for(there).replace(join(there, name), b"-")
    np.testing.assert_allclose(run(job_for(there, LABELS), noise(2)).scores, expected, atol=1e-6)
    copied = set(os.listdir(checkpoint_store.locate(there, None).directory))
    assert {"merges.txt", "vocab.json", "spiece.model"} <= copied and not copied & {
        "tokenization.py",
        "rust_model.ot",
    }
    assert {"merges.txt", "spiece.model"} <= set(checkpoint_store.HUB_FILES)
