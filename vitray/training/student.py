"""What of a network learns, how fast each part of it does, and what a mistake costs. The loop is in
fitting.py.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.nn import functional

from vitray.errors import JobError
from vitray.models.checkpoint import Checkpoint, VisionConfig, read_config
from vitray.models.loading import Network, load_trainable
from vitray.training.config import TrainingConfig
from vitray.training.teachers import pooled

LORA_SCALE = 2  # alpha / r, as in Hu et al. 2021 and most configs since


class Student(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A network under training: images -> (logits, own vectors in the teacher's space or None).

    What learns has requires_grad; `depth` of a parameter is 0 in the embeddings, 1..L in the
    blocks, L + 1 behind them.
    """

    def __init__(
        self, network: Network, vision_config: VisionConfig, dimension: int | None
    ) -> None:
        super().__init__()
        self.module, self.has_cls, self.final_norm = (
            network.module,
            vision_config.prefix_tokens > 0,
            network.final_norm,
        )
        self.adapters: Any = None
        self.depth = _depths(network)
        self.layers = len(network.blocks)
        self.projector = None
        if dimension is not None:
            self.projector = torch.nn.Linear(vision_config.dimension, dimension)
            self.tokens = torch.empty(0)
            network.tower.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, answer: Any) -> None:
        self.tokens = answer.last_hidden_state

    def forward(self, pixels: Any) -> tuple[Any, Any]:
        """pixels: float32 [N, 3, H, W], normalised. Returns float [N, C] and [N, D] or None."""
        logits = self.module(pixel_values=pixels).logits
        if self.projector is None:
            return logits, None
        return logits, self.projector(pooled(self.tokens, self.final_norm, self.has_cls))

    def learning(self) -> dict[str, Any]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def finished(self) -> Any:
        """The transformers module with what was learnt in it; adapters are merged, so that nothing
        of peft is left.
        """
        return self.module if self.adapters is None else self.adapters.merge_and_unload()


def prepare(
    config: TrainingConfig, found: Checkpoint, classes: tuple[str, ...], dimension: int | None
) -> Student:
    """The checkpoint as the config trains it. dimension: of a teacher's vectors, which it learns.
    Random weights follow from the seed.
    """
    network = load_trainable(found, classes, config.seed, config.init == "scratch")
    vision_config = read_config(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        student = Student(network, vision_config, dimension)
        if config.train == "lora":
            student.adapters = _adapters(network, config)
    if config.train != "full":
        _freeze(student, network, config)
    if config.gradient_checkpointing:
        network.module.gradient_checkpointing_enable({"use_reentrant": False})
    _freeze_idle(student, vision_config.image_size)
    return student


def _freeze(student: Student, network: Network, config: TrainingConfig) -> None:
    """All but the head, and what else `train` says; DDP waits for ever for a gradient that never
    comes.
    """
    awake = [network.module.classifier]
    if config.train == "last":
        if config.last > len(network.blocks):
            raise JobError(
                f"last: {config.last}, and the model has {len(network.blocks)} blocks. Set a "
                f"smaller one, or train: full."
            )
        norms = [
            part
            for name, part in network.tower.named_children()
            if "norm" in name or name == "pooler"
        ]
        awake += [*network.blocks[-config.last :], *norms]
    kept = {id(p) for part in awake for p in part.parameters()} | {
        id(p) for p in (student.projector or torch.nn.Identity()).parameters()
    }
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) in kept or "lora_" in name)


def _freeze_idle(student: Student, size: tuple[int, int]) -> None:
    """Parameters that no loss reaches: masks of pretraining, a norm behind the tokens that a
    family's head reads.
    """
    logits, own = student(torch.zeros(2, 3, *size))
    (logits.sum() + (own.sum() if own is not None else 0)).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _adapters(network: Network, config: TrainingConfig) -> Any:
    """peft's wrapper; network.module itself has the adapters in every linear layer of its
    blocks.
    """
    from peft import LoraConfig, get_peft_model

    inside = {id(layer) for layer in network.blocks.modules() if isinstance(layer, torch.nn.Linear)}
    names = [name for name, layer in network.module.named_modules() if id(layer) in inside]
    vision_config = LoraConfig(
        r=config.rank, lora_alpha=LORA_SCALE * config.rank, target_modules=names
    )
    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # peft calls what transformers renames
        return get_peft_model(network.module, vision_config)


def _depths(network: Network) -> dict[int, int]:
    """By id of a parameter; what has none is behind the blocks."""
    depths = {id(p): 0 for name, p in network.tower.named_parameters() if "embeddings" in name}
    return depths | {
        id(p): n + 1 for n, block in enumerate(network.blocks) for p in block.parameters()
    }


def groups(student: Student, config: TrainingConfig) -> list[dict[str, Any]]:
    """For AdamW: each parameter's share of the learning rate and its weight decay."""
    found: dict[tuple[float, float], list[Any]] = {}
    for parameter in student.learning().values():
        depth = student.depth.get(id(parameter), student.layers + 1)
        scale = config.layer_decay ** (student.layers + 1 - depth)
        found.setdefault((scale, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(
            parameter
        )
    return [
        {"params": ps, "scale": scale, "weight_decay": decay}
        for (scale, decay), ps in found.items()
    ]


def rate_at(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step out of `steps`: linear warm-up, then the schedule."""
    warm = int(config.warmup * steps)
    if step < warm:
        return config.rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    falling = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return config.rate * falling[config.schedule]


def cost(logits: Any, target: Any, weights: Any) -> Any:
    """float32 [N]: cross-entropy of each image. target: float [N, C], rows of sum 1; weights: float
    [C].
    """
    return -(target * weights * functional.log_softmax(logits.float(), -1)).sum(-1)


def divergence(logits: Any, taught: Any, temperature: float) -> Any:
    """float32 [N]: T^2 KL(teacher || student), both softened. taught: float [N, C]. Source: Hinton
    et al. 2015.
    """
    soft = taught.clamp_min(1e-12) ** (1 / temperature)
    soft = soft / soft.sum(-1, keepdim=True)
    own = functional.log_softmax(logits.float() / temperature, -1)
    return temperature**2 * (soft * (soft.log() - own)).sum(-1)


def distance(own: Any, taught: Any) -> Any:
    """float32 [N]: 1 - cosine. own, taught: float [N, D]."""
    return 1 - functional.cosine_similarity(own.float(), taught, dim=-1)
