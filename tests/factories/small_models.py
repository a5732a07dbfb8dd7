"""Small checkpoints of every family with random weights, and the plain transformers loop to hold
them against.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from vitray.job import Embedding, Job
from vitray.models import Model, Predictions, identify, open_model, vector_columns
from vitray.schema import ModelOutputs, ModelSpec

POOLS = ("cls", "mean", "patches_mean")
CLASSES = 7
PREFIX = {
    "vit": 1,
    "deit": 2,
    "distilled": 2,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "beit": 1,
    "beit_mean": 1,
    "clip": 1,
    "siglip": 0,
}
STEM = {
    "vit": "ViT",
    "deit": "DeiT",
    "distilled": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}
STEM |= {"beit": "Beit", "beit_mean": "Beit", "clip": "CLIP", "siglip": "Siglip"}
PROCESSOR = {
    "DeiT": "DeiT",
    "Dinov2": "Bit",
    "Dinov2WithRegisters": "Bit",
    "Beit": "Beit",
    "CLIP": "CLIP",
    "Siglip": "Siglip",
    "ViT": "ViT",
}


def make_checkpoint(
    directory: Path, name: str, headed: bool, side: int = 32, layers: int = 3, **more: object
) -> str:
    """A small checkpoint of one family with random weights, none of them zero."""
    stem = STEM[name]
    tower = {
        "image_size": side,
        "patch_size": side // 4,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    tower |= {"mlp_ratio": 2} if stem.startswith("Dinov2") else {"intermediate_size": 64}
    if stem == "Beit":
        tower |= {"use_relative_position_bias": True, "use_mean_pooling": name == "beit_mean"}
    head = {"num_labels": CLASSES, **more}
    if stem in ("CLIP", "Siglip"):
        text = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": 99,
        }
        config = getattr(transformers, f"{stem}Config")(
            vision_config=tower, text_config=text, **head
        )
    else:
        config = getattr(transformers, f"{stem}Config")(**tower, **head)
    kind = (
        stem
        + ("ForImageClassification" if headed else "Model")
        + ("WithTeacher" if headed and name == "distilled" else "")
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    square = {"height": side, "width": side}
    sizes = (
        {"size": {"shortest_edge": side}, "crop_size": square}
        if stem in ("CLIP", "Dinov2", "Dinov2WithRegisters")
        else {"size": square}
    )
    if stem == "DeiT":
        sizes["crop_size"] = square
    getattr(transformers, f"{PROCESSOR[stem]}ImageProcessorPil")(**sizes).save_pretrained(directory)
    return str(directory)


def job_for(
    model: str, labels: bool = True, embeddings: list[Embedding] | None = None, **more: object
) -> Job:
    fields = {"precision": "fp32", "device": "cpu", "engine": "torch", **more}
    return Job(
        source=["in"], out="out", model=model, labels=labels, embeddings=embeddings or [], **fields
    )


def noise(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def every_vector(has_cls: bool) -> list[Embedding]:
    return [
        Embedding(layer=layer, pool=pool)
        for layer in (1, 2, 3, "last")
        for pool in POOLS
        if has_cls or pool != "cls"
    ]


def open_job(job: Job, spec: ModelSpec | None = None, threads: int = 2) -> Model:
    spec = spec or identify(job)
    return open_model(
        spec,
        ModelOutputs(tuple(vector_columns(job, spec)), job.top_k if job.labels else 0),
        "cpu",
        threads,
    )


def run(job: Job, pixels: np.ndarray, spec: ModelSpec | None = None) -> Predictions:
    return open_job(job, spec).predict(pixels)


def require_plain(found: Predictions, job: Job, name: str, pixels: np.ndarray, atol: float) -> None:
    """`found` are the vectors and labels, with their types, of a plain loop over the job's
    checkpoint.
    """
    logits, tokens = plain_loop(job.model, name, job.labels, pixels)
    for embedding in job.embeddings:
        vectors = found.vectors[job.column(embedding)]
        expected = pooled(tokens[embedding.layer], embedding.pool, PREFIX[name])
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=atol, err_msg=str(embedding))
    if job.labels:
        scores, ids = logits.softmax(-1).topk(job.top_k)
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-6)
        assert (found.ids.dtype, found.scores.dtype) == (np.int32, np.float32)
    else:
        assert found.ids is None and found.scores is None


def plain_loop(
    directory: str, name: str, headed: bool, pixels: np.ndarray
) -> tuple[torch.Tensor | None, dict[int | str, torch.Tensor]]:
    """What transformers alone gives: logits and tokens [N, T, D] by layer."""
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    model = (
        (AutoModelForImageClassification if headed else AutoModel).from_pretrained(directory).eval()
    )
    inputs = processor([Image.fromarray(p) for p in pixels], return_tensors="pt")
    two_towers = name in ("clip", "siglip")
    tower = model.vision_model if two_towers else getattr(model, model.base_model_prefix, model)
    with torch.inference_mode():
        output = tower(inputs["pixel_values"], output_hidden_states=True)
        logits = model(**inputs).logits if headed else None
        last = (
            tower.post_layernorm(output.last_hidden_state)
            if name == "clip"
            else output.last_hidden_state
        )
        if name == "clip":
            torch.testing.assert_close(last[:, 0], output.pooler_output)
    return logits, {**dict(enumerate(output.hidden_states)), "last": last}


def pooled(tokens: torch.Tensor, pool: str, prefix: int) -> np.ndarray:
    return {
        "cls": tokens[:, 0],
        "mean": tokens.mean(1),
        "patches_mean": tokens[:, prefix:].mean(1),
    }[pool].numpy()


def drop_weights(directory: str, *parts: str) -> None:
    from safetensors.torch import load_file, save_file

    path = f"{directory}/model.safetensors"
    weights = load_file(path)
    kept = {
        name: value for name, value in weights.items() if not any(part in name for part in parts)
    }
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})


def edit(path: str, **changes: object) -> None:
    fields = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )
