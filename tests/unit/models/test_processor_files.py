"""Processor files and directories of other libraries: the pixels of transformers, or one ModelError
that says what to do.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from factories.small_models import edit, job_for, make_checkpoint
from vitray.decoding.decode import decode
from vitray.errors import ModelError
from vitray.job import Embedding, Job
from vitray.models import engines, identify
from vitray.models.checkpoint_store import locate
from vitray.models.loading import Network
from vitray.models.torch_engine import TorchModel
from vitray.models.types import Placement
from vitray.schema import DecodeSpec, Encoded, ModelOutputs, ModelSpec, VectorColumn

SIDE = 32  # of the small checkpoints
SIZES = ((32, 32), (97, 61), (40, 300), (7, 9))  # width, height
SEPARATE, WHOLE = "preprocessor_config.json", "processor_config.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("originals")
    return {
        name: make_checkpoint(folder / name, name, name == "vit")
        for name in ("vit", "clip", "siglip", "beit")
    }


@pytest.fixture
def checkpoint(originals: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A copy of a small checkpoint, of a ViT unless the test says another."""
    return str(shutil.copytree(originals[getattr(request, "param", "vit")], tmp_path / "model"))


def job_of(model: str) -> Job:
    return job_for(model, False, [Embedding(pool="mean")])


def write(model: str, name: str, changes: dict[str, Any]) -> None:
    """The file with these fields changed, null among them."""
    path = Path(model, name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# transformers
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def resized(spec: ModelSpec, images: list[Image.Image]) -> np.ndarray:
    """uint8 [N, H, W, 3], as a run decodes them."""
    encoded = []
    for n, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(Encoded(n, str(n), f"file:{n}", buffer.getvalue()))
    pixels, outcomes = decode(encoded, DecodeSpec(spec.pixels, ("png",), 1_000_000, None))
    assert [outcome.reason for outcome in outcomes] == [None] * len(images)
    return np.asarray(pixels)


class Recorder(torch.nn.Module):
    """A model that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.seen.append(pixel_values.numpy().copy())
        return SimpleNamespace(last_hidden_state=torch.ones(len(pixel_values), 4, 32))


def fed(spec: ModelSpec, pixels: np.ndarray) -> np.ndarray:
    """float32 [N, 3, H, W]: what the network gets of these pixels."""
    recorder = Recorder()
    column = VectorColumn("embedding", 32, None, "mean", False, "float32")
    outputs = ModelOutputs((column,), 0)
    network = Network(recorder, recorder, [], None)
    TorchModel(network, spec, outputs, Placement("cpu")).predict(pixels)
    return np.concatenate(recorder.seen)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    *[("vit", {"resample": number}) for number in range(6)],
    ("vit", {"resample": "bilinear"}),
    ("vit", {"size": SIDE}),
    ("vit", {"size": [SIDE, SIDE]}),
    ("vit", {"size": 40, "do_center_crop": True, "crop_size": SIDE}),
    ("vit", {"crop_size": SIDE}),  # not used without do_center_crop
    ("vit", {"do_rescale": None}),
    ("vit", {"do_rescale": None, "rescale_factor": None}),
    ("vit", {"do_normalize": None}),
    ("vit", {"do_normalize": False, "image_mean": None, "image_std": None}),
    ("vit", {"do_normalize": False, "image_std": 0}),
    ("vit", {"do_normalize": 0}),
    ("vit", {"do_center_crop": None, "crop_size": None}),
    ("vit", {"image_mean": 0.25, "image_std": 2}),
    ("vit", {"image_std": -0.5}),
    ("vit", {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]}),
    ("vit", {"image_processor_type": None}),
    ("vit", {"do_convert_rgb": None}),
    ("clip", {"size": 40, "crop_size": SIDE}),
    ("clip", {"size": 40, "crop_size": [SIDE, SIDE]}),
    ("clip", {"size": SIDE, "default_to_square": True, "do_center_crop": False}),
    ("siglip", {"size": [SIDE, SIDE]}),
    ("beit", {"do_reduce_labels": True}),
]


@pytest.mark.parametrize(
    ("checkpoint", "changes"),
    TAKEN,
    indirect=["checkpoint"],
    ids=[f"{name} {json.dumps(fields)}" for name, fields in TAKEN],
)
def test_fields_that_are_taken_give_the_pixels_of_transformers(
    checkpoint: str, changes: dict[str, Any]
) -> None:
    write(checkpoint, SEPARATE, changes)
    spec, images = identify(job_of(checkpoint)), photos()
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    expected = [
        processor(image, do_rescale=False, do_normalize=False).pixel_values[0] for image in images
    ]
    pixels = resized(spec, images)
    np.testing.assert_array_equal(pixels, np.moveaxis(np.stack(expected), 1, -1))
    whole = np.stack([processor(image).pixel_values[0] for image in images]).astype(np.float32)
    np.testing.assert_allclose(fed(spec, pixels), whole, rtol=1e-6, atol=1e-6)


def test_fields_that_a_file_leaves_out_are_those_of_its_class(checkpoint: str) -> None:
    Path(checkpoint, SEPARATE).write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": SIDE})
    )
    spec = identify(job_of(checkpoint)).pixels
    assert (spec.resample, spec.rescale, spec.mean, spec.std) == (
        2,
        1 / 255,
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
    )


def test_the_processor_inside_processor_config_json_comes_first(checkpoint: str) -> None:
    inner = {"image_processor_type": "ViTImageProcessor", "size": SIDE, "resample": 3}
    Path(checkpoint, WHOLE).write_text(
        json.dumps({"processor_class": "X", "image_processor": inner})
    )
    assert identify(job_of(checkpoint)).pixels.resample == 3
    for other in ({}, {"image_processor": None}):
        Path(checkpoint, WHOLE).write_text(json.dumps(other))
        assert identify(job_of(checkpoint)).pixels.resample == 2
    os.unlink(f"{checkpoint}/{SEPARATE}")
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json"):
        identify(job_of(checkpoint))


# ModelError
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"resample": "bicubic"},
        r'says "resample": "bicubic"\. Write 3 for bicubic: transformers reads numbers',
    ),
    ({"resample": "LANCZOS"}, r'says "resample": "LANCZOS"\. Write 1 for lanczos'),
    (
        {"resample": "sinc"},
        r"Write the number of one of PIL's filters: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, "
        r"4 box",
    ),
    ({"resample": 6}, r'says "resample": 6\. Write the number of one of PIL\'s filters'),
    ({"resample": -1}, r'says "resample": -1\. '),
    ({"resample": 3.0}, r'says "resample": 3\.0\. '),
    ({"resample": True}, r'says "resample": true\. '),
    ({"resample": [3]}, r'says "resample": \[3\]\. '),
    ({"resample": None}, "gives no `resample`, which `do_resize` needs. Add it."),
    (
        {"image_mean": None},
        r'gives no `image_mean`, which `do_normalize` needs\. Add it, or write "do_normalize": '
        r"false",
    ),
    ({"image_std": None}, "gives no `image_std`, which `do_normalize` needs"),
    (
        {"image_mean": [0.5]},
        r'says "image_mean": \[0\.5\]\. Write three numbers, for red, green and blue',
    ),
    ({"image_mean": [0.5] * 4}, "Write three numbers"),
    ({"image_mean": []}, "Write three numbers"),
    ({"image_mean": "0.5"}, "Write three numbers"),
    ({"image_mean": {"r": 0.5}}, "Write three numbers"),
    ({"image_mean": [None] * 3}, "Write three numbers"),
    ({"image_mean": True}, "Write three numbers"),
    ({"image_mean": [10**400] * 3}, "Write three numbers"),
    ({"image_mean": [float("inf")] * 3}, "Write three numbers"),
    ({"image_std": float("nan")}, "Write three numbers"),
    (
        {"image_std": [0.5, 0, 0.5]},
        r'says "image_std": \[0\.5, 0, 0\.5\]\. Pixels are divided by these: write numbers other '
        r"than 0",
    ),
    ({"image_std": 0}, "Pixels are divided by these"),
    ({"image_std": 1e-60}, "Pixels are divided by these"),  # 0 in float32
    ({"rescale_factor": None}, "gives no `rescale_factor`, which `do_rescale` needs"),
    ({"rescale_factor": "1/255"}, r'says "rescale_factor": "1/255"\. Write a number other than 0'),
    ({"rescale_factor": "0.5"}, "Write a number other than 0"),
    ({"rescale_factor": 0}, "Write a number other than 0"),
    ({"rescale_factor": [1]}, "Write a number other than 0"),
    ({"rescale_factor": float("inf")}, "Write a number other than 0"),
    ({"size": None}, "gives no `size`, which `do_resize` needs. Add it."),
    ({"size": "32"}, r'says "size": "32"\. Write \{"height": 224, "width": 224\}'),
    ({"size": [32]}, r'says "size": \[32\]\. Write \{"height"'),
    ({"size": 32.5}, r'says "size": 32\.5\. Write \{"height"'),
    ({"size": True}, r'says "size": true\. Write \{"height"'),
    (
        {"size": {}},
        "is not one that transformers can read .size must have one of the following set of keys",
    ),
    ({"size": {"height": 32}}, "is not one that transformers can read"),
    ({"size": {"height": "32", "width": "32"}}, "Write sides as whole numbers above 0"),
    ({"size": {"height": 32.0, "width": 32}}, "Write sides as whole numbers above 0"),
    ({"size": {"height": True, "width": 32}}, "Write sides as whole numbers above 0"),
    ({"size": 0}, "Write sides as whole numbers above 0"),
    ({"size": -32}, "Write sides as whole numbers above 0"),
    ({"do_center_crop": True}, "gives no `crop_size`, which `do_center_crop` needs"),
    ({"do_center_crop": True, "crop_size": "x"}, r'says "crop_size": "x"\. Write \{"height"'),
    (
        {"do_center_crop": True, "crop_size": {"height": "32", "width": 32}},
        "Write sides as whole numbers above 0",
    ),
    ({"do_rescale": "false"}, r'says "do_rescale": "false"\. Write true or false'),
    ({"do_normalize": [False]}, r'says "do_normalize": \[false\]\. Write true or false'),
    ({"do_resize": 2}, r'says "do_resize": 2\. Write true or false'),
    ({"do_resize": None}, "does not resize, so its result has no fixed size"),
    ({"image_processor_type": 3}, r'says "image_processor_type": 3\. Write the name of a class'),
    ({"image_processor_type": ["ViTImageProcessor"]}, "Write the name of a class"),
    ({"auto_map": 3}, "is not one that transformers can read"),
    ({"pad_size": "x"}, "is not one that transformers can read"),
    (
        {"preprocess": 1},
        r"transformers cannot process an image as preprocessor_config\.json says .'int' object is "
        r"not callable",
    ),
    ({"resize": 224}, r"transformers cannot process an image as preprocessor_config\.json says"),
]


def message_of(model: str, job: Job | None = None) -> str:
    """What identify refuses the model with: one line, which names it."""
    with pytest.raises(ModelError) as raised:
        identify(job or job_of(model))
    message = str(raised.value)
    assert (
        raised.value.exit_code == 2
        and message.startswith(model)
        and "\n" not in message
        and message.endswith(".")
    )
    return message


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[json.dumps(fields)[:60] for fields, _ in REFUSED]
)
def test_fields_that_cannot_be_used_are_named_with_the_file_and_the_next_step(
    checkpoint: str, changes: dict[str, Any], message: str
) -> None:
    write(checkpoint, SEPARATE, changes)
    found = message_of(checkpoint)
    assert re.search(message, found), found
    assert SEPARATE in found or "does not resize" in found


TEXTS = [
    (b"[]", "is not a JSON object"),
    (b"null", "is not a JSON object"),
    (b'"bicubic"', "is not a JSON object"),
    (b"", "cannot be read"),
    (b"{", "cannot be read"),
    (b"\xff\xfe{}", "cannot be read"),
    (b"[" * 100_000, "cannot be read"),
]


@pytest.mark.parametrize("name", [SEPARATE, WHOLE, "config.json"])
@pytest.mark.parametrize(
    ("text", "message"), TEXTS, ids=[text[:9].decode("latin-1") for text, _ in TEXTS]
)
def test_files_that_are_no_json_object_are_named(
    checkpoint: str, name: str, text: bytes, message: str
) -> None:
    Path(checkpoint, name).write_bytes(text)
    assert f": {name} {message}" in message_of(checkpoint)


@pytest.mark.parametrize("inner", [[], 3, "x", True])
def test_a_processor_inside_processor_config_json_that_is_no_object_is_named(
    checkpoint: str, inner: object
) -> None:
    Path(checkpoint, WHOLE).write_text(json.dumps({"image_processor": inner}))
    assert "`image_processor` in processor_config.json is not a JSON object" in message_of(
        checkpoint
    )


def test_the_file_that_was_read_is_the_one_that_is_named(checkpoint: str) -> None:
    inner = {"image_processor_type": "ViTImageProcessor", "size": SIDE, "resample": "bicubic"}
    Path(checkpoint, WHOLE).write_text(json.dumps({"image_processor": inner}))
    assert 'processor_config.json says "resample": "bicubic"' in message_of(checkpoint)
    assert SEPARATE not in message_of(checkpoint)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, "x"])
def test_an_index_of_weights_that_names_no_files_is_refused(
    checkpoint: str, weight_map: object
) -> None:
    os.unlink(f"{checkpoint}/model.safetensors")
    Path(checkpoint, "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    assert "model.safetensors.index.json names no files in its weight_map" in message_of(checkpoint)


@pytest.mark.parametrize("decode_on", ["gpu", "hybrid"])
def test_filters_that_a_gpu_does_not_resize_with_are_refused_before_a_run(
    checkpoint: str, decode_on: str
) -> None:
    edit(f"{checkpoint}/{SEPARATE}", resample=1)
    spec = identify(job_of(checkpoint))
    with pytest.raises(
        ModelError,
        match=r"resizes bilinear or bicubic, and .* needs lanczos\. Set decode: exact or fast",
    ):
        engines.require_filter(spec, decode_on)
    engines.require_filter(spec, "exact")


TIMM = {
    "architecture": "vit_base_patch16_224",
    "num_classes": 1000,
    "pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"},
}
MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "0_CLIPModel",
        "type": "sentence_transformers.models.CLIPModel",
    },
]
FOREIGN: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"config.json": TIMM, "model.safetensors": b""},
        ["is a timm checkpoint (vit_base_patch16_224)", "transformers version"],
    ),
    (
        {"config.json": {**TIMM, "model_type": "timm_wrapper"}},
        ["is a timm checkpoint (vit_base_patch16_224)", "or convert it"],
    ),
    (
        {"config.json": {"pretrained_cfg": {}}},
        ["is a timm checkpoint, and vitray reads checkpoints of transformers"],
    ),
    (
        {
            "open_clip_config.json": {"model_cfg": {"embed_dim": 512}},
            "open_clip_pytorch_model.bin": b"",
        },
        ["is an OpenCLIP checkpoint", "transformers version of the same weights", "or convert it"],
    ),
    ({"open_clip_config.json": {}, "config.json": {}}, ["is an OpenCLIP checkpoint"]),
    (
        {"modules.json": MODULES},
        [
            "is a sentence-transformers model",
            "the checkpoint that it wraps: its folder 0_CLIPModel",
        ],
    ),
    (
        {"modules.json": {}, "config_sentence_transformers.json": {}},
        ["is a sentence-transformers model"],
    ),
    (
        {
            "adapter_config.json": {"base_model_name_or_path": "google/vit-base-patch16-224"},
            "adapter_model.safetensors": b"",
        },
        ["is a PEFT adapter for google/vit-base-patch16-224", "merge_and_unload"],
    ),
    ({"adapter_config.json": []}, ["is a PEFT adapter, not a whole model"]),
    (
        {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
        ["is a diffusers pipeline (StableDiffusionPipeline)", "Choose a vision transformer"],
    ),
    (
        {"model-Q4_K_M.gguf": b"GGUF"},
        ["holds GGUF weights (model-Q4_K_M.gguf)", "Give the checkpoint of transformers"],
    ),
    (
        {"pytorch_model.bin": b"PK"},
        ["holds pytorch_model.bin and no config.json", "can run code", "save_pretrained"],
    ),
    ({"best.pth": b"PK", "notes.txt": b""}, ["holds best.pth and no config.json"]),
    ({"model.onnx": b""}, ["holds model.onnx, a graph that vitray export-model did not write"]),
    (
        {"model.safetensors": b""},
        ["holds no config.json. Give the directory of a whole checkpoint of transformers"],
    ),
    (
        {"config.json": {"hidden_size": 768}},
        ["config.json names no model_type", "Known: vit, deit"],
    ),
    (
        {"config.json": {"model_type": ["vit"]}},
        ["is of model type ['vit'], which vitray does not know"],
    ),
    (
        {"config.json": {"model_type": "bert"}, "modules.json": MODULES},
        ["is of model type bert, which vitray does not know"],
    ),
]


def write_directory(folder: Path, files: dict[str, Any]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    return str(folder)


@pytest.mark.parametrize(("files", "parts"), FOREIGN, ids=[" ".join(files) for files, _ in FOREIGN])
def test_directories_of_other_libraries_are_recognised(
    tmp_path: Path, files: dict[str, Any], parts: list[str]
) -> None:
    message = message_of(write_directory(tmp_path / "m", files))
    assert [part for part in parts if part not in message] == [], message


def test_an_adapter_beside_the_config_of_its_base_is_recognised(checkpoint: str) -> None:
    os.rename(f"{checkpoint}/model.safetensors", f"{checkpoint}/adapter_model.safetensors")
    Path(checkpoint, "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "base"})
    )
    assert "is a PEFT adapter for base, not a whole model" in message_of(checkpoint)


def test_text_of_other_libraries_stays_short_and_on_one_line(tmp_path: Path) -> None:
    config = {"architecture": "vit\n\x1b[31m" + "x" * 5000, "pretrained_cfg": {}}
    message = message_of(write_directory(tmp_path / "m", {"config.json": config}))
    assert message.isprintable() and len(message) < 600


def test_a_whole_checkpoint_beside_files_of_other_libraries_is_a_checkpoint(
    checkpoint: str,
) -> None:
    for name in (
        "open_clip_config.json",
        "modules.json",
        "pytorch_model.bin",
        "model.onnx",
        "x.gguf",
    ):
        Path(checkpoint, name).write_text("{}")
    assert identify(job_of(checkpoint)).family == "vit"
    assert locate(checkpoint, None).directory == checkpoint
