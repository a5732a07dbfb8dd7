"""Checkpoints: where they come from, and that nothing which was not trained, or which could run
code, ever predicts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from factories.small_models import drop_weights, edit, job_for, make_checkpoint, noise, pooled, run
from vitray.errors import JobError, ModelError
from vitray.job import Embedding, Job
from vitray.models import identify, open_model, vector_columns
from vitray.schema import ModelOutputs


@pytest.mark.parametrize("name", ["vit", "clip", "siglip"])
def test_labels_without_a_trained_head_are_refused(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path, name, False)
    with pytest.raises(
        ModelError,
        match=r"has no trained classification head, so it cannot label\. Set labels: false",
    ) as raised:
        identify(job_for(directory))
    assert ("labels: [cat, dog]" in str(raised.value)) == (name != "vit")


def test_a_checkpoint_without_pooler_embeds_and_a_needed_pooler_is_never_made_up(
    tmp_path: Path,
) -> None:
    vit = make_checkpoint(tmp_path / "vit", "vit", False)
    job = job_for(vit, False, [Embedding()])
    before = run(job, noise(2)).vectors["embedding"]
    drop_weights(vit, "pooler")
    np.testing.assert_array_equal(run(job, noise(2)).vectors["embedding"], before)
    siglip = make_checkpoint(tmp_path / "siglip", "siglip", False)
    drop_weights(siglip, "vision_model.head", "text_model")
    assert run(job_for(siglip, False, [Embedding(pool="mean")]), noise(2)).vectors[
        "embedding"
    ].shape == (2, 32)
    beit = make_checkpoint(tmp_path / "beit", "beit_mean", True)
    drop_weights(beit, "pooler")
    with pytest.raises(
        ModelError,
        match=r"lacks 2 weights that BeitForImageClassification needs \(beit.pooler.layernorm",
    ):
        run(job_for(beit), noise(2))


def test_missing_blocks_and_half_a_distilled_head_are_refused(tmp_path: Path) -> None:
    vit = make_checkpoint(tmp_path / "vit", "vit", True)
    drop_weights(vit, "layer.1.")
    with pytest.raises(ModelError, match="vitray does not make them up"):
        run(job_for(vit), noise(1))
    deit = make_checkpoint(tmp_path / "deit", "distilled", True)
    drop_weights(deit, "distillation_classifier.weight")
    with pytest.raises(ModelError, match="no trained classification head"):
        identify(job_for(deit))


def test_layers_and_tokens_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "siglip", False)
    spec = identify(job_for(directory, False, [Embedding(pool="mean")]))
    with pytest.raises(ModelError, match=r"no layer 4: layers are 1\.\.3 or last"):
        vector_columns(job_for(directory, False, [Embedding(layer=4, pool="mean")]), spec)
    with pytest.raises(
        JobError, match=r"`embeddings\.0\.layer`: a whole number from 1 to 999, or last"
    ):
        Job(source="s", model=directory, out="o", embeddings=[{"layer": 0}])
    with pytest.raises(ModelError, match="no CLS token; use pool: mean"):
        vector_columns(job_for(directory, False, [Embedding()]), spec)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    os.rename(f"{directory}/model.safetensors", f"{directory}/pytorch_model.bin")
    with pytest.raises(ModelError, match="Convert to safetensors"):
        identify(job_for(directory))


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    directory, trap = make_checkpoint(tmp_path / "m", "vit", True), tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w').close()\nclass A: pass\n"
    for name in ("configuration", "modeling", "processing"):
        Path(f"{directory}/{name}.py").write_text(code)
    config, processor = f"{directory}/config.json", f"{directory}/preprocessor_config.json"
    edit(
        config,
        auto_map={
            "AutoConfig": "configuration.A",
            "AutoModelForImageClassification": "modeling.A",
            "AutoModel": "modeling.A",
        },
    )
    edit(processor, auto_map={"AutoImageProcessor": "processing.A"})
    assert run(job_for(directory), noise(1)).ids.shape == (
        1,
        5,
    )  # the known class, without its code
    edit(processor, image_processor_type="CustomImageProcessor")
    with pytest.raises(
        ModelError,
        match="is a CustomImageProcessor, which transformers does not know without custom code",
    ):
        identify(job_for(directory))
    edit(config, model_type="custom_vit")
    with pytest.raises(
        ModelError,
        match=r"model type custom_vit, which vitray does not know\. Known: vit, deit, dinov2",
    ):
        identify(job_for(directory))
    assert not trap.exists()


def test_weights_that_changed_since_they_were_identified_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    job = job_for(directory)
    spec = identify(job)
    assert (
        spec.weights_sha256
        == hashlib.sha256(Path(f"{directory}/model.safetensors").read_bytes()).hexdigest()
    )
    drop_weights(directory, "pooler", "classifier.bias")
    with pytest.raises(ModelError, match="the weights changed"):
        open_model(spec, ModelOutputs((), 1), "cpu", 1)


def test_sharded_weights_load_and_all_shards_are_hashed(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    whole = run(job_for(directory), noise(2))
    model = AutoModelForImageClassification.from_pretrained(directory)
    os.unlink(f"{directory}/model.safetensors")
    model.save_pretrained(directory, max_shard_size="40KB")
    shards = sorted(Path(directory).glob("model-*.safetensors"))
    assert len(shards) > 1
    spec = identify(job_for(directory))
    assert (
        spec.weights_sha256 == hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()
    )
    np.testing.assert_array_equal(run(job_for(directory), noise(2), spec).scores, whole.scores)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name}, which its index names, is missing"):
        identify(job_for(directory))


PROCESSORS = [
    ({"size": {"shortest_edge": 32}}, "without a crop, so its result has no fixed size"),
    ({"size": {"height": 48, "width": 48}}, "makes 48x48, the model takes 32x32"),
    ({"do_resize": False}, "does not resize"),
    ({"do_pad": True}, "pads"),
    ({"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}, "which pads"),
    ({"image_processor_type": "ConvNextImageProcessor"}, "does more than resize, crop"),
]


@pytest.mark.parametrize(("changes", "message"), PROCESSORS)
def test_processors_that_cannot_be_reproduced_are_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    edit(f"{directory}/preprocessor_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        identify(job_for(directory))


def test_pixel_specs_say_what_the_processor_says(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "clip", False)
    spec = identify(job_for(directory, False, [Embedding()])).pixels
    assert (spec.size, spec.crop, spec.resample, spec.rescale) == ((32,), (32, 32), 3, 1 / 255)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073) and spec.std == (
        0.26862954,
        0.26130258,
        0.27577711,
    )
    edit(f"{directory}/preprocessor_config.json", do_rescale=False, do_normalize=False)
    spec = identify(job_for(directory, False, [Embedding()])).pixels
    assert (spec.rescale, spec.mean, spec.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    legacy = {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}
    edit(f"{directory}/preprocessor_config.json", size=40, crop_size=32, **legacy)
    spec = identify(job_for(directory, False, [Embedding()])).pixels
    assert (spec.size, spec.crop) == ((40,), (32, 32))
    os.unlink(f"{directory}/preprocessor_config.json")
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json"):
        identify(job_for(directory, False, [Embedding()]))


def test_dinov2_may_be_used_below_the_size_it_was_trained_at(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "dinov2", False)
    side = {"height": 16, "width": 16}
    edit(f"{directory}/preprocessor_config.json", size={"shortest_edge": 18}, crop_size=side)
    job = job_for(directory, False, [Embedding(pool="patches_mean")])
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    assert dict(processor.crop_size) == side
    pixels = noise(2, 16)
    with torch.inference_mode():
        x = torch.tensor(
            (pixels / 255 - processor.image_mean) / processor.image_std, dtype=torch.float32
        ).permute(0, 3, 1, 2)
        tokens = AutoModel.from_pretrained(directory)(x).last_hidden_state
    np.testing.assert_allclose(
        run(job, pixels).vectors["embedding"],
        pooled(tokens, "patches_mean", 1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_models_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"/nowhere does not exist\. Give a local directory"):
        identify(job_for(f"{tmp_path}/nowhere"))
    with pytest.raises(ModelError, match="which has no revisions"):
        identify(job_for(make_checkpoint(tmp_path / "m", "vit", True), revision="main"))
    with pytest.raises(ModelError, match="is a file"):
        identify(job_for(f"{tmp_path}/m/config.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        identify(job_for(f"{tmp_path}/empty"))
    with pytest.raises(ModelError, match="device xpu is not available here"):
        identify(job_for(f"{tmp_path}/m", device="xpu"))
