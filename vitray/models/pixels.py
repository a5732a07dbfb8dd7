"""The checkpoint's own image processor as a PixelSpec, or an error if it cannot be expressed."""

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

# the classes whose pipeline is only resize, centre crop, rescale and normalise
PLAIN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip")
FILES = ("preprocessor_config.json", "processor_config.json")
# these interpolate their position embeddings: facebook/dinov2-base is trained at 518 and used at
# 224
ANY_SIZE = ("dinov2", "dinov2_with_registers")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's number
FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
SAMPLE = (48, 64)  # height, width of an image on which the processor is tried


def read_pixels(checkpoint: Checkpoint, config: VisionConfig) -> PixelSpec:
    """What the processor does before the model.

    Raises ModelError when its file is not valid, when transformers cannot use it, when a PixelSpec
    cannot express it, and when its result does not fit the model.
    """
    file, declared = declared_processor(checkpoint)
    _check_declared(f"{checkpoint.model}: {file}", declared)
    processor = _load_processor(checkpoint, config, file, declared)
    spec = _pixel_spec(checkpoint, file, processor)
    _check_shape(checkpoint, config, spec)
    _try(checkpoint, file, processor, spec)
    return spec


def _pixel_spec(checkpoint: Checkpoint, file: str, processor: Any) -> PixelSpec:
    kind = type(processor).__name__

    def refuse(what: str) -> ModelError:
        return ModelError(
            f"{checkpoint.model}: its image processor ({kind}) {what}; vitray cannot do that."
        )

    if kind not in {f"{name}ImageProcessorPil" for name in PLAIN}:
        raise refuse("does more than resize, crop and normalise")
    fields = _Fields(f"{checkpoint.model}: {file}", processor)
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
        hint = " without a crop, so its result has no fixed size" if crop is None else ""
        raise refuse(f"resizes to {size}{hint}")
    if crop is not None and (crop["height"] > resized[0] or crop["width"] > resized[-1]):
        raise refuse(f"crops to {crop} out of {size}, which pads")
    normalizes = flags["do_normalize"]
    return PixelSpec(
        size=resized,
        resample=fields.resample(),
        crop=(crop["height"], crop["width"]) if crop is not None else None,
        rescale=fields.rescale_factor() if flags["do_rescale"] else 1.0,
        mean=fields.channels("image_mean") if normalizes else (0.0, 0.0, 0.0),
        std=fields.channels("image_std") if normalizes else (1.0, 1.0, 1.0),
    )


def declared_processor(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The file that describes the image processor, and the description. Raises ModelError.

    `image_processor` of processor_config.json comes first, as in transformers 5.23
    (get_image_processor_dict).
    """
    separate, combined = FILES
    if os.path.isfile(os.path.join(checkpoint.directory, combined)):
        nested = read_json(checkpoint, combined).get("image_processor")
        if nested is not None and not isinstance(nested, dict):
            raise ModelError(
                f"{checkpoint.model}: `image_processor` in {combined} is not a JSON object. "
                "Fetch the checkpoint again."
            )
        if nested is not None:
            return combined, nested
    if os.path.isfile(os.path.join(checkpoint.directory, separate)):
        return separate, read_json(checkpoint, separate)
    raise ModelError(
        f"{checkpoint.model} holds no {separate}, so the pixels it was trained on are unknown. "
        "Copy that file from the checkpoint it was fine-tuned from."
    )


def _check_declared(where: str, declared: dict[str, Any]) -> None:
    """Raise ModelError for values that make transformers fail without a clear message."""
    for name in ("image_processor_type", "feature_extractor_type"):
        if not isinstance(declared.get(name), (str, type(None))):
            raise ModelError(
                f"{where} says {_field_text(name, declared[name])}. Write the name of a class, "
                'such as "ViTImageProcessor".'
            )
    for name in ("size", "crop_size"):
        value = declared.get(name)
        is_pair = isinstance(value, list) and len(value) == 2
        if not is_pair and (
            isinstance(value, bool) or not isinstance(value, (int, dict, type(None)))
        ):
            raise ModelError(
                f'{where} says {_field_text(name, value)}. Write {{"height": 224, "width": 224}}, '
                "with the right numbers."
            )


def _field_text(name: str, value: Any) -> str:
    return f'"{name}": {shortened(json.dumps(value), 80)}'


def _load_processor(
    checkpoint: Checkpoint, config: VisionConfig, file: str, declared: dict[str, Any]
) -> Any:
    from transformers import AutoImageProcessor

    try:
        with quiet():
            # "pil" explicitly: with torchvision installed the default silently changes pixels
            processor = AutoImageProcessor.from_pretrained(
                checkpoint.directory,
                backend="pil",
                trust_remote_code=False,
                local_files_only=True,
                config=config.hf,
            )
    except Exception as error:  # transformers raises many kinds for a broken or foreign file
        raise ModelError(
            f"{checkpoint.model}: {file} is not one that transformers can read "
            f"({shortened(one_line(error), 300)}). "
            "Correct it, or copy that file from the checkpoint it was fine-tuned from."
        ) from error
    loaded_kind = type(processor).__name__
    kind = str(
        declared.get("image_processor_type")
        or declared.get("feature_extractor_type")
        or loaded_kind
    )
    suffix = "(ImageProcessor(Fast|Pil)?|FeatureExtractor)$"
    if loaded_kind != re.sub(suffix, "ImageProcessorPil", kind):
        # transformers silently uses the family's default, with other pixels, for an unknown name
        raise ModelError(
            f"{checkpoint.model}: its image processor is a {kind}, "
            "which transformers does not know without custom code."
        )
    return processor


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a loaded image processor, each checked as it is read.

    where: the model and the file, for messages. transformers does not replace null by the default
    of the class, and fails in a step that needs the field.
    """

    where: str
    processor: Any

    def flag(self, name: str) -> bool:
        value = getattr(self.processor, name, None)
        if value is not None and value not in (True, False):  # 0 and 1 are equal to those
            raise self._field_error(name, "Write true or false.")
        return bool(value)

    def size(self, name: str, step: str) -> dict[str, int]:
        """The sides that are not null, by their names."""
        value = self._required(name, step)
        sides = {side: length for side, length in dict(value).items() if length is not None}
        if not all(type(length) is int and length > 0 for length in sides.values()):
            raise self._field_error(name, "Write sides as whole numbers above 0.")
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
            raise self._field_error(
                "resample",
                f"Write {FILTERS.index(name)} for {name}: transformers reads numbers, "
                "and resizes bilinear for any name.",
            )
        choices = ", ".join(f"{number} {name}" for number, name in enumerate(FILTERS))
        raise self._field_error("resample", f"Write the number of one of PIL's filters: {choices}.")

    def rescale_factor(self) -> float:
        factor = _number(self._required("rescale_factor", "do_rescale"))
        if factor is None or factor == 0:
            raise self._field_error(
                "rescale_factor", f"Write a number other than 0, such as {1 / 255} (1/255)."
            )
        return factor

    def channels(self, name: str) -> tuple[float, float, float]:
        """One number for each of red, green and blue; a single number is for all of them."""
        value = self._required(name, "do_normalize")
        values = value if isinstance(value, (list, tuple)) else [value] * 3
        numbers = [_number(one) for one in values]
        if len(numbers) != 3 or None in numbers:
            raise self._field_error(name, "Write three numbers, for red, green and blue.")
        if name == "image_std" and not all(np.float32(number) for number in numbers):
            raise self._field_error(
                name, "Pixels are divided by these: write numbers other than 0."
            )
        red, green, blue = (float(number) for number in numbers if number is not None)
        return (red, green, blue)

    def _required(self, name: str, step: str) -> Any:
        value = getattr(self.processor, name, None)
        if value is None:
            hint = ""
            if step != "do_resize":
                hint = f', or write "{step}": false if the model was trained without'
            raise ModelError(f"{self.where} gives no `{name}`, which `{step}` needs. Add it{hint}.")
        return value

    def _field_error(self, name: str, step: str) -> ModelError:
        value = getattr(self.processor, name)
        if not isinstance(value, (bool, int, float, str, list, tuple, dict)):
            value = dict(value)
        return ModelError(f"{self.where} says {_field_text(name, value)}. {step}")


def _number(value: Any) -> float | None:
    """The number as a float; None for anything else and for a number that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _try(checkpoint: Checkpoint, file: str, processor: Any, spec: PixelSpec) -> None:
    """Raise ModelError when transformers cannot use the processor, or gets another shape."""
    image = np.zeros((*SAMPLE, 3), np.uint8)
    try:
        with quiet():
            pixels = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    except Exception as error:  # a field that vitray does not read may stop it
        raise ModelError(
            f"{checkpoint.model}: transformers cannot process an image as {file} says "
            f"({shortened(one_line(error), 300)}). "
            "Correct it, or copy that file from the checkpoint it was fine-tuned from."
        ) from error
    if pixels.shape != (1, 3, *spec.shape):
        raise ModelError(
            f"{checkpoint.model}: {file} gives pixels of shape {list(pixels.shape[1:])} in "
            f"transformers, and vitray would make {[3, *spec.shape]}. "
            "Copy that file from the checkpoint it was fine-tuned from."
        )


def _check_shape(checkpoint: Checkpoint, config: VisionConfig, spec: PixelSpec) -> None:
    """Raise ModelError when the model takes another size than the processor makes."""
    if spec.shape == config.image_size:
        return
    if config.family in ANY_SIZE and not any(side % config.patch_size for side in spec.shape):
        return
    processed = "x".join(map(str, spec.shape))
    expected = "x".join(map(str, config.image_size))
    raise ModelError(
        f"{checkpoint.model}: its image processor makes {processed}, the model takes {expected}. "
        "Correct either."
    )
