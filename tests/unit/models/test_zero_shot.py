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
import torch
import transformers
from PIL import Image

import vitray
from factories.small_models import (
    drop_weights,
    edit,
    job_for,
    make_checkpoint,
    noise,
    open_job,
    run,
)
from support.text_towers import IMAGES, LABELS, PROMPTS, by_label, pipeline_scores
from vitray.dataset import open_dataset
from vitray.errors import FingerprintError, JobError, ModelError
from vitray.job import Embedding, Job
from vitray.models import identify, open_model
from vitray.operations.planning import status
from vitray.schema import ModelOutputs


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
@pytest.mark.parametrize("prompt", [None, "a drawing of the {}"])
def test_scores_equal_transformers_own_zero_shot_pipeline(
    towers: dict[str, str], stem: str, prompt: str | None
) -> None:
    job = job_for(towers[stem], LABELS, top_k=9, **({"prompts": prompt} if prompt else {}))
    expected = pipeline_scores(towers[stem], noise(IMAGES), prompt or "This is a photo of {}.")
    assert (
        np.ptp(expected, axis=0).max() > 0.05 and np.ptp(expected, axis=1).max() > 0.05
    )  # they tell images and labels apart
    spec = identify(job)
    assert (spec.labels, spec.multi_label) == (tuple(LABELS), stem == "Siglip")
    found = run(job, noise(IMAGES), spec)
    np.testing.assert_allclose(by_label(found), expected, atol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert (by_label(found).sum(1).round(4) == 1).all() == (stem == "CLIP")


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_several_prompts_are_the_mean_of_unit_vectors_of_unit_length_again(
    towers: dict[str, str], stem: str
) -> None:
    model = transformers.AutoModel.from_pretrained(towers[stem]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(towers[stem])
    processor = transformers.AutoImageProcessor.from_pretrained(towers[stem], backend="pil")
    padding = {"padding": True} if stem == "CLIP" else {"padding": "max_length", "max_length": 64}
    with torch.inference_mode():
        classes = []
        for label in LABELS:
            texts = tokenizer(
                [prompt.format(label) for prompt in PROMPTS], return_tensors="pt", **padding
            )
            each = model.get_text_features(**texts).pooler_output
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            classes.append(mean / mean.norm())
        pixels = processor([Image.fromarray(p) for p in noise(IMAGES)], return_tensors="pt")
        image = model.get_image_features(**pixels).pooler_output
        image = image / image.norm(dim=-1, keepdim=True)
        logits = image @ torch.stack(classes).T * model.logit_scale.exp()
        expected = logits.softmax(-1) if stem == "CLIP" else (logits + model.logit_bias).sigmoid()
    found = by_label(run(job_for(towers[stem], LABELS, prompts=PROMPTS), noise(IMAGES)))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_embeddings_of_the_same_pass_are_those_without_labels(
    towers: dict[str, str], stem: str
) -> None:
    wanted = [Embedding(pool="mean"), Embedding(layer=2, pool="mean")] + [Embedding()] * (
        stem == "CLIP"
    )
    alone = run(job_for(towers[stem], False, wanted), noise(IMAGES))
    both = run(job_for(towers[stem], LABELS, wanted), noise(IMAGES))
    for name, vectors in alone.vectors.items():
        np.testing.assert_allclose(both.vectors[name], vectors, atol=1e-5)
    np.testing.assert_allclose(
        by_label(both), by_label(run(job_for(towers[stem], LABELS), noise(IMAGES))), atol=1e-5
    )


# A clear margin: a step of bf16 (2**-8) in a cosine, times the logit scale of 100 or 20. How many
# labels of closer images turn over depends on the CPU and on CLIP's tokenizer, which its training
# makes anew in each process.
@pytest.mark.parametrize(("stem", "margin"), [("CLIP", 0.4), ("Siglip", 0.1)])
def test_bf16_labels_are_those_of_fp32_where_its_margin_is_clear(
    towers: dict[str, str], stem: str, margin: float
) -> None:
    pixels = noise(400)
    exact = run(job_for(towers[stem], LABELS), pixels)
    logits = np.log(exact.scores) - (
        np.log1p(-exact.scores) if stem == "Siglip" else 0
    )  # CLIP's but for a constant
    clear = logits[:, 0] - logits[:, 1] > margin
    print(f"{stem}: {clear.mean():.2f} of the images are clear")
    assert clear.mean() > 0.5
    found = run(job_for(towers[stem], LABELS, precision="bf16"), pixels)
    assert (found.ids[clear, 0] == exact.ids[clear, 0]).mean() >= 0.995
    model = open_job(job_for(towers[stem], LABELS, precision="bf16"))
    assert model.forward.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["cat", "dog", " cat"]}, "`labels`: label cat appears twice"),
        ({"labels": ["cat", " "]}, "`labels`: label 2 is empty"),
        ({"labels": []}, "`labels`: no label; write at least one"),
        ({"labels": ["cat", False]}, "`labels`: False is not text; put it in quotes"),
        (
            {"labels": 7},
            "`labels`: true, false, a list of labels, or a file with one label per line",
        ),
        (
            {"labels": ["cat"], "prompts": ["a photo"]},
            "`prompts`: 'a photo' has no {} for the label",
        ),
        ({"prompts": ["a {}"]}, "prompts are for labels of your own, such as labels: [cat, dog]"),
        ({"labels": ["cat"], "head": "h"}, "head has labels of its own"),
    ],
)
def test_labels_and_prompts_that_cannot_be_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(JobError) as raised:
        Job(source="in", model="m", out="o", **fields)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_hold_no_labels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    for content, message in (
        (b"cat\ndog\ncat\n", "label cat appears twice"),
        (b"cat\n\ndog", "label 2 is empty"),
        (b"\n", "no label"),
        (b"\xff\xfe", "write one label per line, in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(JobError, match=message):
            identify(job_for("m", str(file)))
    with pytest.raises(
        JobError,
        match=r"labels`: .*cat-dog cannot be read .* for labels in the job write \[cat, dog\]",
    ):
        identify(job_for("m", "cat-dog"))


def test_models_that_cannot_read_say_so_in_one_line(
    towers: dict[str, str], clip: str, tmp_path: Path
) -> None:
    def refused(job: Job) -> str:
        with pytest.raises(ModelError) as raised:
            identify(job)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    vit = make_checkpoint(tmp_path / "vit", "vit", True)
    assert "is a vit model without a text tower" in refused(job_for(vit, LABELS))
    headed = make_checkpoint(tmp_path / "headed", "clip", True)
    assert "is a clip model without a text tower" in refused(job_for(headed, LABELS))
    assert "labels: [cat, dog]" in refused(
        job_for(towers["CLIP"])
    ) and "labels: [cat, dog]" not in refused(
        job_for(make_checkpoint(tmp_path / "bare", "vit", False))
    )
    long = ["cat", "a very long label " * 20]
    assert "reads 77 tokens of a text, and one has" in refused(job_for(clip, long))
    os.unlink(f"{clip}/tokenizer.json")
    assert (
        "holds no tokenizer (tokenizer.json, or vocab.json and merges.txt, or spiece.model)"
        in refused(job_for(clip, LABELS))
    )
    Path(f"{clip}/tokenizer.json").write_text("{}")
    assert "its tokenizer does not work" in refused(job_for(clip, LABELS))
    shutil.copy(f"{towers['CLIP']}/tokenizer.json", clip)
    drop_weights(clip, "text_model.encoder")
    job = job_for(clip, LABELS)
    with pytest.raises(ModelError, match="weights that CLIPModel needs"):
        run(job, noise(1))


def test_a_tokenizers_code_never_runs_and_one_that_changed_is_refused(
    clip: str, tmp_path: Path
) -> None:
    trap, job = tmp_path / "trap", job_for(clip, LABELS)
    Path(f"{clip}/tokenization.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass A: pass\n")
    before = run(job, noise(2))
    edit(
        f"{clip}/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization.A", "tokenization.A"]},
    )
    spec = identify(job)
    np.testing.assert_array_equal(run(job, noise(2), spec).scores, before.scores)
    assert not trap.exists()
    saved = json.loads(Path(f"{clip}/tokenizer.json").read_text())
    saved["model"]["merges"] = saved["model"]["merges"][:-5]
    Path(f"{clip}/tokenizer.json").write_text(json.dumps(saved))
    assert identify(job).text_sha256 != spec.text_sha256
    from vitray.models.labels import text_weights

    text_weights.cache_clear()
    with pytest.raises(ModelError, match="its tokenizer changed since it was planned"):
        open_model(spec, ModelOutputs((), 1), "cpu", 1)


def test_a_dataset_keeps_its_labels_and_refuses_others(
    towers: dict[str, str], tmp_path: Path
) -> None:
    pixels, labels = noise(IMAGES), tmp_path / "labels.txt"
    (tmp_path / "in").mkdir()
    for n, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{n:02d}.png")
    labels.write_text("\n".join(LABELS))
    base = {
        "source": f"{tmp_path}/in",
        "model": towers["CLIP"],
        "out": f"{tmp_path}/out",
        "precision": "fp32",
        "engine": "torch",
    }
    job = Job(**base, device="cpu", labels=str(labels), group_size=5, limit=1)
    assert (first := vitray.run(job)).rows == 5 and first.pending == 0
    dataset = open_dataset(job.out)
    assert (
        dataset is not None
        and dataset.spec.labels == tuple(LABELS)
        and dataset.job.labels == LABELS
    )
    assert vitray.run(job.model_copy(update={"limit": None, "labels": LABELS})).rows == IMAGES
    table = vitray.read(job.out)
    scores = pipeline_scores(towers["CLIP"], pixels, "This is a photo of {}.")
    assert table["label_id"].to_pylist() == scores.argmax(1).tolist()
    assert table["label"].to_pylist() == [LABELS[n] for n in scores.argmax(1)]
    np.testing.assert_allclose(table["score"], scores.max(1), atol=1e-4)
    assert table["top_labels"][0].as_py() == [LABELS[n] for n in (-scores[0]).argsort()]
    assert vitray.validate(job.out, content=True).ok
    assert f"prompts    'This is a photo of {{}}.' for {len(LABELS)} labels\n" in str(
        status(job.out)
    )
    labels.write_text("\n".join([*LABELS, "horse"]))
    with pytest.raises(FingerprintError, match="labels differs"):
        vitray.run(job)
    with pytest.raises(FingerprintError, match="prompts differs"):
        vitray.run(Job(**base, device="cpu", labels=LABELS, group_size=5, prompts=["a {}"]))
    with pytest.raises(FingerprintError, match="labels differs"):
        vitray.run(Job(**base, device="cpu", labels=False, group_size=5))
