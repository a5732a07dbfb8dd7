"""Progress within a step: the blocks of the network report as they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitray.training.activity import Activity, Phase, Watch, unwatched

BACKWARD = 2  # units of a block's backward pass; its forward pass is one


class WorkMeter:
    """Counts the images of a phase; those in work count by the share of blocks that are computed.

    It changes no number: its hooks read nothing and return nothing.
    """

    def __init__(self, blocks: Sequence[Any], learning: set[int]) -> None:
        """blocks: of the network, in order. learning: ids of the parameters that learn."""
        self.watch: Watch = unwatched
        self._activity = Activity(Phase.TRAINING)
        self._images = 0
        self._units = 1
        self._units_done = 0
        first = next((n for n, block in enumerate(blocks) if _learns(block, learning)), len(blocks))
        self.forward_units = len(blocks)
        self.step_units = len(blocks) + BACKWARD * (len(blocks) - first)
        for block in blocks:
            block.register_forward_hook(self._on_forward)

    def start(self, phase: Phase, done: int, total: int) -> None:
        """A phase begins, with `done` of `total` images done."""
        self._images = 0
        self._activity = Activity(phase, done, total, done)
        self.watch(self._activity)

    def begin(self, images: int, units: int, detail: str = "") -> None:
        """The next images are in work. units: of their blocks' passes."""
        at = self._activity
        self._images = images
        self._units = max(1, units)
        self._units_done = 0
        self._activity = Activity(at.phase, at.done, at.total, at.images, detail)
        self.watch(self._activity)

    def end(self) -> None:
        """The images in work are done."""
        at = self._activity
        images = at.images + self._images
        self._images = 0
        self._activity = Activity(at.phase, images, at.total, images, at.detail)
        self.watch(self._activity)

    def _on_forward(self, _block: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(self._on_backward)
        self._add(1)

    def _on_backward(self, _gradient: Any) -> None:
        self._add(BACKWARD)

    def _add(self, units: int) -> None:
        if not self._images:
            return
        at = self._activity
        # gradient checkpointing computes blocks twice
        self._units_done = min(self._units, self._units_done + units)
        done = at.images + self._images * self._units_done / self._units
        self.watch(Activity(at.phase, done, at.total, at.images, at.detail))


def _learns(block: Any, learning: set[int]) -> bool:
    return any(id(parameter) in learning for parameter in block.parameters())
