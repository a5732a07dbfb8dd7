"""The checkpoint's own image processor, said as a PixelSpec, or refused when it does more than a PixelSpec can say."""

from __future__ import annotations

import os
import re
from typing import Any

from vitray.errors import ModelError
from vitray.models.checkpoint import Checkpoint, VisionConfig, quiet
from vitray.schema import PixelSpec

# the classes whose pipeline is resize, centre crop, rescale, normalise and no more
PLAIN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip")
FILES = ("preprocessor_config.json", "processor_config.json")
# these interpolate their position embeddings: facebook/dinov2-base is trained at 518 and used at 224
ANY_SIZE = ("dinov2", "dinov2_with_registers")


def read_pixels(found: Checkpoint, config: VisionConfig) -> PixelSpec:
    """What the processor does before the model. Raises ModelError when that is not expressible or does not fit the model."""
    processor = _load_processor(found, config)

    def refuse(what: str) -> ModelError:
        return ModelError(f"{found.model}: its image processor ({type(processor).__name__}) {what}; vitray cannot do that.")

    if type(processor).__name__ not in {f"{name}ImageProcessorPil" for name in PLAIN}:
        raise refuse("does more than resize, crop and normalise")
    if getattr(processor, "do_pad", None):
        raise refuse("pads")
    if not processor.do_resize:
        raise refuse("does not resize, so its result has no fixed size")
    crop = _size_of(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    if crop is not None and set(crop) != {"height", "width"}:
        raise refuse(f"crops to {crop}")
    size = _size_of(processor.size)
    if set(size) == {"height", "width"}:
        resized: tuple[int, ...] = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"} and crop is not None:
        resized = (size["shortest_edge"],)
    else:
        raise refuse(f"resizes to {size}" + (" without a crop, so its result has no fixed size" if crop is None else ""))
    if crop is not None and (crop["height"] > resized[0] or crop["width"] > resized[-1]):
        raise refuse(f"crops to {crop} out of {size}, which pads")
    spec = PixelSpec(
        size=resized,
        resample=int(processor.resample if processor.resample is not None else 2),
        crop=(crop["height"], crop["width"]) if crop is not None else None,
        rescale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=_channels(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=_channels(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )
    _check_shape(found, config, spec)
    return spec


def _load_processor(found: Checkpoint, config: VisionConfig) -> Any:
    if not any(os.path.isfile(os.path.join(found.directory, name)) for name in FILES):
        raise ModelError(
            f"{found.model} holds no preprocessor_config.json, so the pixels it was trained on are unknown. "
            "Copy that file from the checkpoint it was fine-tuned from."
        )
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        with quiet():
            declared = get_image_processor_config(found.directory, local_files_only=True)
            # "pil" explicitly: with torchvision installed the default silently changes pixels
            processor = AutoImageProcessor.from_pretrained(
                found.directory, backend="pil", trust_remote_code=False, local_files_only=True, config=config.hf
            )
    except Exception as error:  # whatever a broken or foreign file makes transformers raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{found.model}: preprocessor_config.json does not give a known image processor ({reason}).") from error
    kind = str(declared.get("image_processor_type") or declared.get("feature_extractor_type") or type(processor).__name__)
    if type(processor).__name__ != re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "ImageProcessorPil", kind):
        # transformers falls back to the family's default for a name that it does not know: other pixels, silently
        raise ModelError(f"{found.model}: its image processor is a {kind}, which transformers does not know without custom code.")
    return processor


def _size_of(size: Any) -> dict[str, int]:
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in (values if isinstance(values, (list, tuple)) else [values] * 3))
    return (red, green, blue)


def _check_shape(found: Checkpoint, config: VisionConfig, spec: PixelSpec) -> None:
    if spec.shape == config.image_size:
        return
    if config.family in ANY_SIZE and not any(side % config.patch_size for side in spec.shape):
        return
    made, wanted = ("x".join(map(str, shape)) for shape in (spec.shape, config.image_size))
    raise ModelError(f"{found.model}: its image processor makes {made}, the model takes {wanted}. Correct either.")
