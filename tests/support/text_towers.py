"""Small CLIP and SigLIP checkpoints with tokenizers, and transformers' own scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from vitray.models import Predictions

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
