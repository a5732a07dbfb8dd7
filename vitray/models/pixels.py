"""The checkpoint's own image processor as a PixelSpec; refused where a PixelSpec cannot express
it.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitray.errors import ModelError, one_line, shortened
from vitray.models.checkpoint import Checkpoint, VisionConfig, quiet, read_json
from vitray.schema import PixelSpec

# the classes whose pipeline is resize, centre crop, rescale, normalise and no more
PLAIN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip")
FILES = ("preprocessor_config.json", "processor_config.json")
# these interpolate their position embeddings: facebook/dinov2-base is trained at 518 and used at
# 224
ANY_SIZE = ("dinov2", "dinov2_with_registers")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's number
GPU_FILTERS = {2: "bilinear", 3: "bicubic"}  # that a GPU resizes with: PIL's number, torch's name
FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
SAMPLE = (48, 64)  # height, width of an image on which the processor is tried


def read_pixels(found: Checkpoint, config: VisionConfig) -> PixelSpec:
    """What the processor does before the model.

    Raises ModelError when a file is not valid, when transformers cannot use it, when a PixelSpec
    cannot express it, and when its result does not fit the model.
    """
    file, declared = _declared(found)
    _check_declared(f"{found.model}: {file}", declared)
    processor = _load_processor(found, config, file, declared)

    def refuse(what: str) -> ModelError:
        return ModelError(
            f"{found.model}: its image processor ({type(processor).__name__}) {what}; vitray "
            f"cannot do that."
        )

    if type(processor).__name__ not in {f"{name}ImageProcessorPil" for name in PLAIN}:
        raise refuse("does more than resize, crop and normalise")
    fields = _Fields(f"{found.model}: {file}", processor)
    flags = {name: fields.flag(name) for name in FLAGS}
    if flags["do_pad"]:
        raise refuse("pads")
    if not flags["do_resize"]:
        raise refuse("does not resize, so its result has no fixed size")
    crop = fields.size("crop_size", "do_center_crop") if flags["do_center_crop"] else None
    if crop is not None and set(crop) != {"height", "width"}:
        raise refuse(f"crops to {crop}")
    size = fields.size("size", "do_resize")
    if set(size) == {"height", "width"}:
        resized: tuple[int, ...] = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"} and crop is not None:
        resized = (size["shortest_edge"],)
    else:
        raise refuse(
            f"resizes to {size}"
            + (" without a crop, so its result has no fixed size" if crop is None else "")
        )
    if crop is not None and (crop["height"] > resized[0] or crop["width"] > resized[-1]):
        raise refuse(f"crops to {crop} out of {size}, which pads")
    spec = PixelSpec(
        size=resized,
        resample=fields.resample(),
        crop=(crop["height"], crop["width"]) if crop is not None else None,
        rescale=fields.rescale_factor() if flags["do_rescale"] else 1.0,
        mean=fields.channels("image_mean") if flags["do_normalize"] else (0.0, 0.0, 0.0),
        std=fields.channels("image_std") if flags["do_normalize"] else (1.0, 1.0, 1.0),
    )
    _check_shape(found, config, spec)
    _try(found, file, processor, spec)
    return spec


def _declared(found: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The file that describes the image processor, and what it says of it.

    `image_processor` of processor_config.json comes first, as in transformers 5.23
    (get_image_processor_dict).
    """
    separate, whole = FILES
    if os.path.isfile(os.path.join(found.directory, whole)):
        nested = read_json(found, whole).get("image_processor")
        if nested is not None and not isinstance(nested, dict):
            raise ModelError(
                f"{found.model}: `image_processor` in {whole} is not a JSON object. Fetch the "
                f"checkpoint again."
            )
        if nested is not None:
            return whole, nested
    if os.path.isfile(os.path.join(found.directory, separate)):
        return separate, read_json(found, separate)
    raise ModelError(
        f"{found.model} holds no {separate}, so the pixels it was trained on are unknown. "
        "Copy that file from the checkpoint it was fine-tuned from."
    )


def _check_declared(where: str, declared: dict[str, Any]) -> None:
    """Raises ModelError for values on which transformers stumbles without saying why."""
    for name in ("image_processor_type", "feature_extractor_type"):
        if not isinstance(declared.get(name), (str, type(None))):
            raise ModelError(
                f"{where} says {_said(name, declared[name])}. Write the name of a class, such as "
                f'"ViTImageProcessor".'
            )
    for name in ("size", "crop_size"):
        value = declared.get(name)
        is_pair = isinstance(value, list) and len(value) == 2
        if not is_pair and (
            isinstance(value, bool) or not isinstance(value, (int, dict, type(None)))
        ):
            raise ModelError(
                f'{where} says {_said(name, value)}. Write {{"height": 224, "width": 224}}, with '
                f"the sides that are meant."
            )


def _said(name: str, value: Any) -> str:
    return f'"{name}": {shortened(json.dumps(value), 80)}'


def _load_processor(
    found: Checkpoint, config: VisionConfig, file: str, declared: dict[str, Any]
) -> Any:
    from transformers import AutoImageProcessor

    try:
        with quiet():
            # "pil" explicitly: with torchvision installed the default silently changes pixels
            processor = AutoImageProcessor.from_pretrained(
                found.directory,
                backend="pil",
                trust_remote_code=False,
                local_files_only=True,
                config=config.hf,
            )
    except Exception as error:  # whatever a broken or foreign file makes transformers raise
        raise ModelError(
            f"{found.model}: {file} is not one that transformers can read "
            f"({shortened(one_line(error), 300)}). "
            "Correct it, or copy that file from the checkpoint it was fine-tuned from."
        ) from error
    kind = str(
        declared.get("image_processor_type")
        or declared.get("feature_extractor_type")
        or type(processor).__name__
    )
    if type(processor).__name__ != re.sub(
        "(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "ImageProcessorPil", kind
    ):
        # transformers falls back to the family's default for a name that it does not know: other
        # pixels, silently
        raise ModelError(
            f"{found.model}: its image processor is a {kind}, which transformers does not know "
            f"without custom code."
        )
    return processor


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a loaded image processor, each checked as it is read.

    where: the model and the file, for messages. transformers takes null for itself, not for the
    default of the class, and fails in a step that needs the field.
    """

    where: str
    processor: Any

    def flag(self, name: str) -> bool:
        value = getattr(self.processor, name, None)
        if value is not None and value not in (True, False):  # 0 and 1 are equal to those
            raise self._refuse(name, "Write true or false.")
        return bool(value)

    def size(self, name: str, step: str) -> dict[str, int]:
        """Sides by their names, those that are null left out."""
        value = self._required(name, step)
        sides = {side: length for side, length in dict(value).items() if length is not None}
        if not all(type(length) is int and length > 0 for length in sides.values()):
            raise self._refuse(name, "Write sides as whole numbers above 0.")
        return sides

    def resample(self) -> int:
        """PIL's number. transformers resizes bilinear for any name, so no other name is allowed."""
        value = self._required("resample", "do_resize")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(FILTERS):
            return int(value)
        name = str(value).lower()
        if name == "bilinear":
            return FILTERS.index(name)
        if name in FILTERS:
            raise self._refuse(
                "resample",
                f"Write {FILTERS.index(name)} for {name}: transformers reads numbers, and resizes "
                f"bilinear for any name.",
            )
        known = ", ".join(f"{number} {name}" for number, name in enumerate(FILTERS))
        raise self._refuse("resample", f"Write the number of one of PIL's filters: {known}.")

    def rescale_factor(self) -> float:
        factor = _number(self._required("rescale_factor", "do_rescale"))
        if factor is None or factor == 0:
            raise self._refuse(
                "rescale_factor", f"Write a number other than 0, such as {1 / 255} (1/255)."
            )
        return factor

    def channels(self, name: str) -> tuple[float, float, float]:
        """One number for each of red, green and blue; a single number is for all of them."""
        value = self._required(name, "do_normalize")
        numbers = [
            _number(one) for one in (value if isinstance(value, (list, tuple)) else [value] * 3)
        ]
        if len(numbers) != 3 or None in numbers:
            raise self._refuse(name, "Write three numbers, for red, green and blue.")
        if name == "image_std" and not all(np.float32(number) for number in numbers):
            raise self._refuse(name, "Pixels are divided by these: write numbers other than 0.")
        red, green, blue = (float(number) for number in numbers if number is not None)
        return (red, green, blue)

    def _required(self, name: str, step: str) -> Any:
        value = getattr(self.processor, name, None)
        if value is None:
            without = (
                ""
                if step == "do_resize"
                else f', or write "{step}": false if the model was trained without'
            )
            raise ModelError(
                f"{self.where} gives no `{name}`, which `{step}` needs. Add it{without}."
            )
        return value

    def _refuse(self, name: str, step: str) -> ModelError:
        value = getattr(self.processor, name)
        plain = (
            value if isinstance(value, (bool, int, float, str, list, tuple, dict)) else dict(value)
        )
        return ModelError(f"{self.where} says {_said(name, plain)}. {step}")


def _number(value: Any) -> float | None:
    """The number as a float; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _try(found: Checkpoint, file: str, processor: Any, spec: PixelSpec) -> None:
    """Raises ModelError when transformers cannot use the processor, or makes another shape with
    it.
    """
    image = np.zeros((*SAMPLE, 3), np.uint8)
    try:
        with quiet():
            made = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    except Exception as error:  # a field that vitray does not read may stop it
        raise ModelError(
            f"{found.model}: transformers cannot process an image as {file} says "
            f"({shortened(one_line(error), 300)}). "
            "Correct it, or copy that file from the checkpoint it was fine-tuned from."
        ) from error
    if made.shape != (1, 3, *spec.shape):
        raise ModelError(
            f"{found.model}: {file} gives pixels of shape {list(made.shape[1:])} in transformers, "
            f"and "
            f"vitray would make {[3, *spec.shape]}. Copy that file from the checkpoint it was "
            "fine-tuned from."
        )


def _check_shape(found: Checkpoint, config: VisionConfig, spec: PixelSpec) -> None:
    if spec.shape == config.image_size:
        return
    if config.family in ANY_SIZE and not any(side % config.patch_size for side in spec.shape):
        return
    made, wanted = ("x".join(map(str, shape)) for shape in (spec.shape, config.image_size))
    raise ModelError(
        f"{found.model}: its image processor makes {made}, the model takes {wanted}. Correct "
        f"either."
    )
