"""The torch engine: loads a checkpoint with transformers and gives labels and embeddings out of one forward pass.

Imported only when a model is opened. Embeddings are caught by forward hooks on the vision tower and its blocks, so that
the head's class computes what it always computes and nothing runs twice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitray.errors import ModelError
from vitray.models import Predictions
from vitray.models.checkpoint import Checkpoint, head_shapes, quiet, read_config
from vitray.schema import ModelFacts, VectorColumn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "beit": "Beit",
    "clip": "CLIP",
    "siglip": "Siglip",
}
VISION_TEXT = ("clip", "siglip")
WITH_POOLER = ("vit", "deit", "beit")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module and where its inner results appear.

    module: called as module(pixel_values=float [N, 3, H, W]); with a head its answer has .logits.
    tower: the submodule (or module itself) whose answer has .last_hidden_state [N, T, D].
    blocks: the transformer's blocks in order. final_norm: what `last` still needs after the tower, None for most families.
    """

    module: Any
    tower: Any
    blocks: list[Any]
    final_norm: Any | None


def load(found: Checkpoint, facts: ModelFacts, vectors: list[VectorColumn], top_k: int, device: str) -> TorchModel:
    """The checkpoint on the device in facts.precision; top_k 0 loads the tower without its head."""
    if facts.precision == "fp32" and device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution: 10 bits of mantissa otherwise
    return TorchModel(_load_network(found, headed=top_k > 0), facts, vectors, top_k, device)


class TorchModel:
    """Model over a Network. Halves its batch, for good, when the device's memory is too small."""

    def __init__(self, network: Network, facts: ModelFacts, vectors: list[VectorColumn], top_k: int, device: str) -> None:
        self._facts, self._vectors, self._device = facts, vectors, torch.device(device)
        self._dtype = DTYPES[facts.precision]
        self._network = network
        self._module = network.module.eval().to(self._device, self._dtype)
        self._k = min(top_k, len(facts.labels))
        self._batch = facts.batch_size
        spec = facts.pixels
        self._mean, self._std = (torch.tensor(v, dtype=torch.float32, device=self._device) for v in (spec.mean, spec.std))
        self._tokens: dict[int | None, Any] = {}
        for layer in {v.layer for v in vectors}:
            self._catch(layer)

    def _catch(self, layer: int | None) -> None:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            if layer is None:
                self._tokens[None] = output.last_hidden_state
            else:
                self._tokens[layer] = output[0] if isinstance(output, tuple) else output

        (self._network.tower if layer is None else self._network.blocks[layer - 1]).register_forward_hook(keep)

    def predict(self, pixels: np.ndarray) -> Predictions:
        """Labels and embeddings, batch by batch.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. Raises ModelError for another shape, for results that
        are not finite in this precision, and when not even one image fits the device.
        """
        height, width = self._facts.pixels.shape
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3):
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise ModelError(f"{self._facts.model} takes pixels as uint8 [N, {height}, {width}, 3], not {got}.")
        parts = []
        start = 0
        while start < len(pixels):
            part = self._forward_if_it_fits(pixels[start : start + self._batch])
            if part is None:
                self._step_down()
            else:
                parts.append(part)
                start += len(part[0])
        return self._gather(parts)

    def _forward_if_it_fits(self, batch: np.ndarray) -> list[Any] | None:
        """Scores, ids, then one tensor a vector column, all on the device; None when the memory does not suffice."""
        try:
            with torch.inference_mode():
                return self._forward(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU and MPS raise plain ones
            known = ("out of memory", "can't allocate memory")
            if isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in known):
                return None
            raise
        finally:
            self._tokens.clear()

    def _step_down(self) -> None:
        if self._batch == 1:
            raise ModelError(
                f"{self._facts.model} does not fit {self._device}: one image is too much for it. Use a larger device."
            )
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()
        if self._batch == self._facts.batch_size:
            log.warning("%s: out of memory with %d images at once, halving; set batch_size lower", self._facts.model, self._batch)
        self._batch //= 2

    def _forward(self, batch: np.ndarray) -> list[Any]:
        answer = self._module(pixel_values=self._normalise(batch))
        empty = torch.empty(len(batch), 0)
        scores, ids = (empty, empty) if not self._k else self._rank(answer.logits.float())
        return [scores, ids] + [self._vector(column) for column in self._vectors]

    def _normalise(self, batch: np.ndarray) -> Any:
        """(x/255 - mean)/std in float32, in that order, then the precision; uint8 until the device."""
        rescale = self._facts.pixels.rescale
        x = torch.from_numpy(np.require(batch, requirements=["C", "W"])).to(self._device).float()
        x = x / 255 if rescale == 1 / 255 else x * rescale
        x = (x - self._mean) / self._std
        return x.permute(0, 3, 1, 2).to(self._dtype).contiguous()

    def _rank(self, logits: Any) -> tuple[Any, Any]:
        chances = logits.sigmoid() if self._facts.multi_label else logits.softmax(-1)
        scores, ids = chances.topk(self._k, dim=-1)
        return scores, ids

    def _vector(self, column: VectorColumn) -> Any:
        """One column's [n, D], pooled and normalised in float32."""
        tokens = self._tokens[column.layer]
        if column.layer is None and self._network.final_norm is not None:
            tokens = self._network.final_norm(tokens)
        if column.pool == "cls":
            vector = tokens[:, 0].float()
        else:
            skipped = self._facts.prefix_tokens if column.pool == "patches_mean" else 0
            vector = tokens[:, skipped:].mean(1, dtype=torch.float32)
        if column.normalize:
            vector = torch.nn.functional.normalize(vector, dim=-1)
        return vector.to(torch.float16 if column.dtype == "float16" else torch.float32)

    def _gather(self, parts: list[list[Any]]) -> Predictions:
        if not parts:  # shapes and types without a forward pass
            widths = [(self._k, torch.float32), (self._k, torch.int64)]
            widths += [(v.dimension, torch.float16 if v.dtype == "float16" else torch.float32) for v in self._vectors]
            parts = [[torch.empty(0, width, dtype=dtype) for width, dtype in widths]]
        scores, ids, *vectors = (torch.cat(column).cpu().numpy() for column in zip(*parts))
        for name, values in [("score", scores)] + [(v.column, x) for v, x in zip(self._vectors, vectors)]:
            if not np.isfinite(values).all():
                raise ModelError(
                    f"{self._facts.model}: `{name}` is not finite in precision {self._facts.precision}. "
                    "Set precision: fp32 (or bf16), and dtype: float32 if the embedding is float16."
                )
        named = {column.column: values for column, values in zip(self._vectors, vectors)}
        return Predictions(ids.astype(np.int32) if self._k else None, scores if self._k else None, named)


# ---------------------------------------------------------------- loading


def _load_network(found: Checkpoint, headed: bool) -> Network:
    import transformers

    config = read_config(found)
    family = config.family.removesuffix("_vision_model")
    hf = config.hf if headed else getattr(config.hf, "vision_config", config.hf)
    name = CLASSES[family] + ("ForImageClassification" if headed else "VisionModel" if family in VISION_TEXT else "Model")
    if headed and "distillation_classifier.weight" in head_shapes(found):
        name += "WithTeacher"
    options = {"add_pooling_layer": False} if not headed and family in WITH_POOLER else {}
    if family == "siglip":  # its attention pooler is used by none of our outputs, and not every checkpoint has it
        getattr(hf, "vision_config", hf).vision_use_head = False
    module = _from_pretrained(found, getattr(transformers, name), hf, options)
    tower = getattr(module, "vision_model" if family in VISION_TEXT else family, module)
    blocks = next(list(m) for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.layers)
    # CLIP gives its tokens before the norm that its pooler_output has seen
    return Network(module, tower, blocks, tower.post_layernorm if family == "clip" else None)


def _from_pretrained(found: Checkpoint, kind: Any, config: Any, options: dict[str, Any]) -> Any:
    """The module with every weight out of the checkpoint: a random head, pooler or block raises ModelError."""
    try:
        with quiet():
            module, report = kind.from_pretrained(
                found.directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers raises many kinds for a checkpoint that does not fit its config
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{found.model} cannot be loaded as {kind.__name__}: {reason}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("mask_token"))  # masks belong to training
    if missing or report["mismatched_keys"]:
        lacks = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ModelError(
            f"{found.model} lacks {len(lacks)} weights that {kind.__name__} needs ({', '.join(lacks[:3])}); vitray does not make "
            "them up. Choose a whole checkpoint" + (", or labels: false." if "ForImage" in kind.__name__ else ".")
        )
    return module
