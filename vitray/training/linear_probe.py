"""A linear head on stored embeddings: multinomial logistic regression by L-BFGS.

It takes seconds, and no image is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from vitray.training.activity import Activity, Phase, Watch, unwatched
from vitray.training.outcome import Evaluation, merit

# of the L2 penalty on standardised features; the held-out images choose
STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 2))
STRENGTH = 1e-2  # if no image is held out
# With fewer values, threads wait for each other longer than they multiply: 24 s instead of 6 s on
# two busy cores
ONE_THREAD = 10_000_000
STEPS = 200  # of L-BFGS for each strength, from the solution of the stronger one


@dataclass(frozen=True)
class LinearProbe:
    """A fitted head.

    weight: float32 [C, D], bias: float32 [C], for vectors as they are stored. records: figures of
    each strength. best: those of the chosen one.
    """

    weight: np.ndarray
    bias: np.ndarray
    records: list[dict[str, float]]
    best: dict[str, float]


@dataclass(frozen=True)
class LabelledRows:
    """vectors: float [N, D]. ids: int64 [N]."""

    vectors: np.ndarray
    ids: np.ndarray


def fit_linear_probe(
    train: LabelledRows,
    held_out: LabelledRows,
    weights: torch.Tensor,
    smoothing: float,
    metric: str = "accuracy",
    watch: Watch = unwatched,
) -> LinearProbe:
    """The head of the best strength. weights: float32 [C], of the classes.

    metric: of the held-out rows, chooses the strength: accuracy (of equal ones the smaller loss)
    or loss. watch: gets how many strengths are done.
    """
    problem = _Problem.of(train, weights, smoothing)
    weight = torch.zeros(problem.target.shape[1], problem.rows.shape[1], requires_grad=True)
    bias = torch.zeros(problem.target.shape[1], requires_grad=True)
    has_held_out = len(held_out.ids) > 0
    solutions: list[_Solution] = []
    with _one_thread_if_small(problem.rows.numel()):
        strengths = sorted(STRENGTHS if has_held_out else [STRENGTH], reverse=True)
        for strength in strengths:
            at = f"regularisation {strength:g}"
            watch(Activity(Phase.FITTING_HEAD, len(solutions), len(strengths), detail=at))
            objective = functools.partial(problem.loss, weight, bias, strength)
            record = {"strength": strength, "loss": _minimise(objective, [weight, bias])}
            solution = problem.solution(weight, bias, record)
            if has_held_out:
                evaluation = evaluate_head(solution.weight, solution.bias, held_out)
                record.update(evaluation.figures(held_out.ids))
            solutions.append(solution)
    best = solutions[0]
    if has_held_out:
        best = max(solutions, key=lambda solution: merit(solution.record, metric))
    records = [solution.record for solution in solutions]
    return LinearProbe(best.weight, best.bias, records, best.record)


@dataclass(frozen=True)
class _Solution:
    """The head of one strength, for vectors as they are stored, and its figures."""

    weight: np.ndarray
    bias: np.ndarray
    record: dict[str, float]


@dataclass(frozen=True)
class _Problem:
    """rows: float32 [N, D], standardised by mean and scale, float64 [D].

    target: float32 [N, C]. weights: float32 [C].
    """

    rows: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, train: LabelledRows, weights: torch.Tensor, smoothing: float) -> _Problem:
        mean = train.vectors.mean(0, dtype=np.float64)
        scale = train.vectors.std(0, dtype=np.float64) + 1e-6
        rows = torch.from_numpy(((train.vectors - mean) / scale).astype(np.float32))
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(train.ids), len(weights)).float()
        target = one_hot * (1 - smoothing) + smoothing / len(weights)
        return cls(rows, target, weights, mean, scale)

    def loss(self, weight: torch.Tensor, bias: torch.Tensor, strength: float) -> torch.Tensor:
        """Mean cross-entropy, and the L2 penalty."""
        logs = torch.log_softmax(self.rows @ weight.T + bias, -1)
        cross_entropy = -(self.target * self.weights * logs).sum(1).mean()
        return cross_entropy + strength / 2 * weight.square().sum()

    def solution(
        self, weight: torch.Tensor, bias: torch.Tensor, record: dict[str, float]
    ) -> _Solution:
        """The head for vectors that are not standardised."""
        raw_weight = weight.detach().numpy() / self.scale
        raw_bias = bias.detach().numpy() - raw_weight @ self.mean
        return _Solution(raw_weight.astype(np.float32), raw_bias.astype(np.float32), record)


@contextmanager
def _one_thread_if_small(values: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    if values < ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def evaluate_head(weight: np.ndarray, bias: np.ndarray, rows: LabelledRows) -> Evaluation:
    """A linear head's labels and losses for labelled rows."""
    logits = torch.from_numpy(rows.vectors @ weight.T + bias)
    scores, ids = logits.softmax(1).max(1)
    truth = torch.from_numpy(rows.ids)
    losses = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
    return Evaluation(ids.numpy(), scores.numpy(), losses.numpy())


def _minimise(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> float:
    """Change the parameters to a minimum of the loss; returns the loss there."""
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
