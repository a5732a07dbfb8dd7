"""A linear head on stored embeddings: multinomial logistic regression by L-BFGS. Seconds, and no
image is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vitray.training.fitting import Judged, merit

STRENGTHS = tuple(
    10.0**n for n in range(-5, 2)
)  # of the L2 penalty on standardised features; the held-out share chooses
STRENGTH = 1e-2  # where nothing is held out
# values; with fewer, threads wait for each other more than they multiply: 24 s, not 6, on two busy
# cores
ONE_THREAD = 10_000_000
STEPS = 200  # of L-BFGS for each strength, from where the stronger one ended


@dataclass(frozen=True)
class Probe:
    """weight float32 [C, D], bias float32 [C] over the vectors as they are stored. records: what
    each strength reached.
    """

    weight: np.ndarray
    bias: np.ndarray
    records: list[dict[str, float]]
    best: dict[str, float]


def fit_probe(
    vectors: np.ndarray,
    ids: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    weights: torch.Tensor,
    smoothing: float,
    metric: str = "accuracy",
) -> Probe:
    """vectors float [N, D], ids int64 [N]; held_out: the same of the rows that choose the strength.
    weights: float32 [C].

    metric: what the strength is chosen by, accuracy (of equal ones the smaller loss) or loss.
    """
    classes = len(weights)
    mean, scale = vectors.mean(0, dtype=np.float64), vectors.std(0, dtype=np.float64) + 1e-6
    rows = torch.from_numpy(((vectors - mean) / scale).astype(np.float32))
    target = (
        torch.nn.functional.one_hot(torch.from_numpy(ids), classes).float() * (1 - smoothing)
        + smoothing / classes
    )
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    judged, records = len(held_out[1]) > 0, list[dict[str, float]]()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    threads = torch.get_num_threads()
    if rows.numel() < ONE_THREAD:
        torch.set_num_threads(1)
    for strength in sorted(STRENGTHS if judged else [STRENGTH], reverse=True):
        loss = _minimise(
            functools.partial(_loss, rows, target, weight, bias, weights, strength), [weight, bias]
        )
        plain = weight.detach().numpy() / scale
        found.append(
            (plain.astype(np.float32), (bias.detach().numpy() - plain @ mean).astype(np.float32))
        )
        record = {"strength": strength, "loss": loss}
        records.append(
            record | (judge_probe(*found[-1], *held_out).figures(held_out[1]) if judged else {})
        )
    torch.set_num_threads(threads)
    best = max(range(len(records)), key=lambda n: merit(records[n], metric) if judged else (0.0,))
    return Probe(*found[best], records, records[best])


def judge_probe(
    weight: np.ndarray, bias: np.ndarray, vectors: np.ndarray, ids: np.ndarray
) -> Judged:
    logits = torch.from_numpy(vectors @ weight.T + bias)
    scores, said = logits.softmax(1).max(1)
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids), reduction="none")
    return Judged(said.numpy(), scores.numpy(), losses.numpy())


def _loss(
    rows: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    logs = torch.log_softmax(rows @ weight.T + bias, -1)
    return -(target * weights * logs).sum(1).mean() + strength / 2 * weight.square().sum()


def _minimise(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> float:
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=STEPS,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return float(loss().detach())
