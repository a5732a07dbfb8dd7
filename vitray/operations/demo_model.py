"""The model of `vitray demo` and of the tests: a tiny ViT, trained on drawn shapes.

Everything follows from the seed, and nothing is downloaded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vitray.models.checkpoint import quiet

NAMES = ("circle", "square", "triangle", "cross", "ring", "star")
SIDE_PX = 32  # the model's input
BATCH = 64


def draw(kind: int, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """One shape near the centre, in a random colour on a random ground; size and turn vary."""
    big = size * 2  # drawn at twice the size, so that reducing smooths the edges
    ground, ink = _two_colours(rng)
    image = Image.new("RGB", (big, big), ground)
    pen = ImageDraw.Draw(image)
    radius = big * rng.uniform(0.30, 0.40)
    x, y = big / 2 + rng.uniform(-0.06, 0.06, 2) * big
    turn = rng.uniform(-0.2, 0.2)
    box = (x - radius, y - radius, x + radius, y + radius)
    name = NAMES[kind]
    if name == "circle":
        pen.ellipse(box, fill=ink)
    elif name == "ring":
        pen.ellipse(box, outline=ink, width=round(radius * 0.35))
    elif name == "cross":
        for angle in (turn, turn + math.pi / 2):
            step = radius * np.array([math.cos(angle), math.sin(angle)])
            pen.line(
                (x - step[0], y - step[1], x + step[0], y + step[1]),
                fill=ink,
                width=round(radius * 0.45),
            )
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.4)}[name]
        start = turn - math.pi / (4 if name == "square" else 2)
        spokes = (
            [radius if i % 2 == 0 else radius * inner for i in range(corners * 2)]
            if inner < 1
            else [radius] * corners
        )
        angles = [start + 2 * math.pi * i / len(spokes) for i in range(len(spokes))]
        pen.polygon(
            [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(spokes, angles)], fill=ink
        )
    return image.resize((size, size), Image.Resampling.BOX)


def _two_colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours whose brightness differs enough to be seen."""
    while True:
        colours = rng.integers(0, 256, (2, 3))
        brightness = colours @ np.array([0.299, 0.587, 0.114])
        if abs(brightness[0] - brightness[1]) > 70:
            return tuple(map(int, colours[0])), tuple(map(int, colours[1]))


def pixels_of(images: list[Image.Image]) -> np.ndarray:
    """uint8 [N, 32, 32, 3]: what the model's image processor makes of them."""
    side = (SIDE_PX, SIDE_PX)
    return np.stack([np.asarray(i.resize(side, Image.Resampling.BILINEAR)) for i in images])


def train(directory: str, seed: int = 0, steps: int = 600, examples: int = 6000) -> float:
    """Train the tiny ViT, save it with its image processor, and return its validation accuracy.

    It takes about 14 s of one core. Two cores are little faster on a quiet machine, and twenty
    times slower on a busy one: the threads wait for each other at every small product. The same
    seed gives the same weights.
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    rng = np.random.default_rng(seed)
    pixels, kinds = draw_examples(rng, examples)
    unseen, truth = draw_examples(rng, 600)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=SIDE_PX,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(NAMES)),
            label2id={name: i for i, name in enumerate(NAMES)},
        )
        model = ViTForImageClassification(config)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _fit(model, pixels, kinds, steps)
        finally:
            torch.set_num_threads(threads)
    with torch.inference_mode():
        guesses = model(pixel_values=unseen).logits.argmax(-1)
    side = {"height": SIDE_PX, "width": SIDE_PX}
    with quiet():
        model.save_pretrained(directory)
    ViTImageProcessorPil(
        size=side, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(directory)
    return float((guesses == truth).float().mean())


def draw_examples(rng: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Normalised pixels float32 [N, 3, 32, 32] and their kinds, every kind equally often."""
    import torch

    kinds = np.arange(count) % len(NAMES)
    pixels = torch.from_numpy(pixels_of([draw(int(kind), rng) for kind in kinds]))
    normalised = ((pixels.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
    return normalised, torch.from_numpy(kinds)


def _fit(model: Any, pixels: Any, kinds: Any, steps: int) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(kinds), (BATCH,))
        logits = model(pixel_values=pixels[chosen]).logits
        loss = torch.nn.functional.cross_entropy(logits, kinds[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
