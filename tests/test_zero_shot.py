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
from small_models import drop_weights, edit, job_for, make_checkpoint, noise, open_job, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

import vitray
from vitray.dataset import open_dataset
from vitray.errors import FingerprintError, JobError, ModelError
from vitray.job import Embedding, Job, load_job
from vitray.model_export.export import export_model
from vitray.models import (
    Predictions,
    checkpoint,
    identify,
    open_model,
    vector_columns,
    with_label_names,
)
from vitray.operations.planning import status
from vitray.schema import ModelOutputs

LABELS = ["cat", "dog", "fire truck", "emu", "red square"]
PROMPTS = ["a photo of a {}, indoors.", "a drawing of the {}", "{}"]
WORDS = [
    "This is a photo of a cat.",
    "a drawing of the dog, indoors",
    "fire truck and emu",
    "red square, blue circle",
]
IMAGES = 12


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE trained on a few words."""
    plain, alphabet = CLIPTokenizer().backend_tokenizer, pre_tokenizers.ByteLevel.alphabet()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trained = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trained.train_from_iterator(
        WORDS * 5,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    said = json.loads(trained.to_str())["model"]
    return CLIPTokenizer(
        vocab=said["vocab"], merges=[tuple(m) for m in said["merges"]], model_max_length=77
    )


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram model of a few words and their letters, as a tokenizer.json; a trained one would be
    another in each process.
    """
    words = sorted({f"\u2581{word.lower()}" for line in WORDS for word in line.split()})
    letters = sorted({letter for word in words for letter in word} - set(words))
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((word, -3.0) for word in words),
        *((letter, -6.0) for letter in letters),
    ]
    trained = Tokenizer(models.Unigram(pieces, unk_id=0))
    trained.normalizer, trained.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    trained.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids"],
    )


def make_two_towers(directory: Path, stem: str) -> str:
    """A small CLIP or Siglip with random weights and a real tokenizer."""
    tokenizer = clip_tokenizer() if stem == "CLIP" else siglip_tokenizer()
    tower = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**tower, "image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**tower, **special, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 77 if stem == "CLIP" else 64}
    shared = {"projection_dim": 24, "logit_scale_init_value": 4.6} if stem == "CLIP" else {}
    torch.manual_seed(1)
    model = getattr(transformers, f"{stem}Model")(
        getattr(transformers, f"{stem}Config")(vision_config=vision, text_config=text, **shared)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.logit_scale.fill_(4.6 if stem == "CLIP" else 3.0)
        if stem == "Siglip":
            model.logit_bias.fill_(2.0)  # scores far from 0 and 1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    square = {"height": 32, "width": 32}
    sizes = (
        {"size": {"shortest_edge": 32}, "crop_size": square} if stem == "CLIP" else {"size": square}
    )
    getattr(transformers, f"{stem}ImageProcessorPil")(**sizes).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("towers")
    return {stem: make_two_towers(home / stem.lower(), stem) for stem in ("CLIP", "Siglip")}


@pytest.fixture
def clip(towers: dict[str, str], tmp_path: Path) -> str:
    """A copy that a test may spoil."""
    return str(shutil.copytree(towers["CLIP"], tmp_path / "clip"))


def by_label(found: Predictions) -> np.ndarray:
    """Scores [N, C] in the order of the labels."""
    assert found.ids is not None and found.scores is not None
    scores = np.empty_like(found.scores)
    np.put_along_axis(scores, found.ids.astype(np.int64), found.scores, 1)
    return scores


def pipeline_scores(directory: str, pixels: np.ndarray, prompt: str) -> np.ndarray:
    pipe = transformers.pipeline(
        "zero-shot-image-classification", model=directory, device="cpu", backend="pil"
    )
    said = pipe(
        [Image.fromarray(p) for p in pixels], candidate_labels=LABELS, hypothesis_template=prompt
    )
    return np.array(
        [
            [{item["label"]: item["score"] for item in one}[label] for label in LABELS]
            for one in said
        ],
        np.float32,
    )


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


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_other_engines_give_the_same_scores(towers: dict[str, str], stem: str, engine: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    wanted = [Embedding(pool="mean")]
    torch_says = run(job_for(towers[stem], LABELS, wanted), noise(IMAGES))
    found = run(job_for(towers[stem], LABELS, wanted, engine=engine), noise(IMAGES))
    np.testing.assert_allclose(by_label(found), by_label(torch_says), atol=1e-4)
    np.testing.assert_allclose(
        found.vectors["embedding"], torch_says.vectors["embedding"], atol=1e-4
    )


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_an_export_has_the_words_in_its_graph(
    towers: dict[str, str], tmp_path: Path, stem: str
) -> None:
    for n, image in enumerate(noise(20)):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    fields = {
        "labels": LABELS,
        "prompts": PROMPTS,
        "embeddings": [Embedding(pool="mean")],
        "precision": "fp32",
        "device": "cpu",
    }
    job = Job(source=str(tmp_path), out="o", model=towers[stem], **fields)
    made = export_model(job, "onnx", "", str(tmp_path / "x"))
    assert (
        made.judgement.agreement == 1.0
        and made.judgement.error is not None
        and made.judgement.error < 1e-3
    )
    pixels = noise(IMAGES, seed=1)
    found = run(job_for(str(tmp_path / "x"), top_k=9, engine="auto"), pixels)
    np.testing.assert_allclose(
        by_label(found),
        by_label(run(job_for(towers[stem], LABELS, prompts=PROMPTS, top_k=9), pixels)),
        atol=1e-4,
    )


@pytest.mark.nightly
@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_a_compiled_pass_gives_the_same_scores(towers: dict[str, str], stem: str) -> None:
    job = job_for(towers[stem], LABELS, batch_size=1)
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), "cpu", 1, compiled=True
    )
    assert len(model.compiled) == 1
    np.testing.assert_allclose(
        by_label(model.predict(noise(3))), by_label(run(job, noise(3))), atol=1e-4
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


# ---------------------------------------------------------------- where labels and tokenizers come
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["cat", "dog", " cat"]}, "`labels`: label cat is there twice"),
        ({"labels": ["cat", " "]}, "`labels`: label 2 is empty"),
        ({"labels": []}, "`labels`: no label; write at least one"),
        ({"labels": ["cat", False]}, "`labels`: False is not text; put it in quotes"),
        ({"labels": 7}, "`labels`: true, false, a list of labels, or a file with one label a line"),
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
        (b"cat\ndog\ncat\n", "label cat is there twice"),
        (b"cat\n\ndog", "label 2 is empty"),
        (b"\n", "no label"),
        (b"\xff\xfe", "write one label a line, in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(JobError, match=message):
            identify(job_for("m", str(file)))
    with pytest.raises(
        JobError,
        match=r"labels`: .*cat,dog cannot be read .* for labels in the job write \[cat, dog\]",
    ):
        identify(job_for("m", "cat,dog"))


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
    from conftest import new_bucket

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
    copied = set(os.listdir(checkpoint.locate(there, None).directory))
    assert {"merges.txt", "vocab.json", "spiece.model"} <= copied and not copied & {
        "tokenization.py",
        "rust_model.ot",
    }
    assert {"merges.txt", "spiece.model"} <= set(checkpoint.HUB_FILES)


# ---------------------------------------------------------------- the dataset


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
