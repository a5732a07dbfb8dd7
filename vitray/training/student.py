"""The student: which parameters of a network learn, how fast, and their loss."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.nn import functional

from vitray.errors import JobError, count
from vitray.models.checkpoint import Checkpoint, VisionConfig, read_config
from vitray.models.loading import Network, load_trainable
from vitray.training.config import TrainingConfig
from vitray.training.teachers import pooled

LORA_SCALE = 2  # alpha / r, as in Hu et al. 2021 and most configs since


class Student(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A network under training: images -> (logits, own vectors in the teacher's space or None).

    Parameters that learn have requires_grad. `depth` of a parameter, by its id, is 0 in the
    embeddings and 1..L in the blocks; parameters behind the blocks are not in it.
    """

    def __init__(
        self, network: Network, vision_config: VisionConfig, teacher_dimension: int | None
    ) -> None:
        super().__init__()
        self.module = network.module
        self.final_norm = network.final_norm
        self.has_cls = vision_config.prefix_tokens > 0
        self.adapters: Any = None
        self.depth = _depths(network)
        self.layers = len(network.blocks)
        self.blocks = tuple(network.blocks)  # a tuple, so that torch does not list them twice
        self.projector = None
        if teacher_dimension is not None:
            self.projector = torch.nn.Linear(vision_config.dimension, teacher_dimension)
            self.tokens = torch.empty(0)
            network.tower.register_forward_hook(self._store_tokens)

    def _store_tokens(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.tokens = output.last_hidden_state

    def forward(self, pixels: Any) -> tuple[Any, Any]:
        """Float [N, C] and [N, D] or None. pixels: float32 [N, 3, H, W], normalised."""
        logits = self.module(pixel_values=pixels).logits
        if self.projector is None:
            return logits, None
        return logits, self.projector(pooled(self.tokens, self.final_norm, self.has_cls))

    def learning(self) -> dict[str, Any]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def finished(self) -> Any:
        """The trained transformers module. Adapters are merged: nothing of peft is left."""
        return self.module if self.adapters is None else self.adapters.merge_and_unload()


def prepare(
    config: TrainingConfig,
    checkpoint: Checkpoint,
    classes: tuple[str, ...],
    teacher_dimension: int | None,
) -> Student:
    """The checkpoint as the config trains it. Random weights follow from the seed.

    teacher_dimension: of the teacher's vectors, if the student learns those.
    """
    network = load_trainable(checkpoint, classes, config.seed, config.init == "scratch")
    vision_config = read_config(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        student = Student(network, vision_config, teacher_dimension)
        if config.train == "lora":
            student.adapters = _adapters(network, config)
    if config.train != "full":
        _freeze(student, network, config)
    if config.gradient_checkpointing:
        network.module.gradient_checkpointing_enable({"use_reentrant": False})
    _freeze_unused(student, vision_config.image_size)
    return student


def _freeze(student: Student, network: Network, config: TrainingConfig) -> None:
    """Let the head and what `train` names learn, and nothing else.

    DDP hangs if a parameter that learns gets no gradient.
    """
    learning = [network.module.classifier]
    if config.train == "last":
        if config.last > len(network.blocks):
            raise JobError(
                f"last: {config.last}, and the model has {count(len(network.blocks), 'block')}. "
                "Set a smaller one, or train: full."
            )
        learning += network.blocks[-config.last :]
        learning += [
            module
            for name, module in network.tower.named_children()
            if "norm" in name or name == "pooler"
        ]
    if student.projector is not None:
        learning.append(student.projector)
    ids = {id(parameter) for module in learning for parameter in module.parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) in ids or "lora_" in name)


def _freeze_unused(student: Student, size: tuple[int, int]) -> None:
    """Freeze parameters without a gradient, such as masks of pretraining and an unused norm."""
    logits, own = student(torch.zeros(2, 3, *size))
    (logits.sum() + (own.sum() if own is not None else 0)).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _adapters(network: Network, config: TrainingConfig) -> Any:
    """peft's wrapper. It puts adapters into every linear layer of the network's own blocks."""
    from peft import LoraConfig, get_peft_model

    linear = {id(layer) for layer in network.blocks.modules() if isinstance(layer, torch.nn.Linear)}
    names = [name for name, layer in network.module.named_modules() if id(layer) in linear]
    lora_config = LoraConfig(
        r=config.rank, lora_alpha=LORA_SCALE * config.rank, target_modules=names
    )
    # peft uses names that transformers deprecates
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return get_peft_model(network.module, lora_config)


def _depths(network: Network) -> dict[int, int]:
    """Depth by id of a parameter; parameters behind the blocks have none."""
    depths = {id(p): 0 for name, p in network.tower.named_parameters() if "embeddings" in name}
    for depth, block in enumerate(network.blocks, start=1):
        depths |= {id(parameter): depth for parameter in block.parameters()}
    return depths


def parameter_groups(student: Student, config: TrainingConfig) -> list[dict[str, Any]]:
    """For AdamW: the parameters by their share of the learning rate and their weight decay."""
    by_settings: dict[tuple[float, float], list[Any]] = {}
    for parameter in student.learning().values():
        depth = student.depth.get(id(parameter), student.layers + 1)
        scale = config.layer_decay ** (student.layers + 1 - depth)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        by_settings.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in by_settings.items()
    ]


def rate_at(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step out of `steps`: a linear warm-up, then the schedule."""
    warmup_steps = int(config.warmup * steps)
    if step < warmup_steps:
        return config.rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match config.schedule:
        case "cosine":
            return config.rate * ((1 + math.cos(math.pi * progress)) / 2)
        case "linear":
            return config.rate * (1 - progress)
        case "constant":
            return config.rate


def label_loss(logits: Any, target: Any, weights: Any) -> Any:
    """float32 [N]: weighted cross-entropy of each image.

    target: float [N, C], rows of sum 1. weights: float [C].
    """
    return -(target * weights * functional.log_softmax(logits.float(), -1)).sum(-1)


def score_loss(logits: Any, scores: Any, temperature: float) -> Any:
    """float32 [N]: T^2 KL(teacher || student), both softened. Source: Hinton et al. 2015.

    scores: float [N, C], the teacher's.
    """
    soft = scores.clamp_min(1e-12) ** (1 / temperature)
    soft = soft / soft.sum(-1, keepdim=True)
    own = functional.log_softmax(logits.float() / temperature, -1)
    return temperature**2 * (soft * (soft.log() - own)).sum(-1)


def vector_loss(own: Any, vectors: Any) -> Any:
    """float32 [N]: 1 - cosine of the student's and the teacher's vectors, both float [N, D]."""
    return 1 - functional.cosine_similarity(own.float(), vectors, dim=-1)
