"""Short queues between the steps, so that a crash costs few images and memory stays flat however
slow the model is.

Ray Data's own back-pressure lets a fast step fill half of the object store before it slows down:
see docs/decisions/0006.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)

DEPTH_KEY = "vitray.queue_blocks"


class ShortQueues(BackpressurePolicy):  # type: ignore[misc]  # Ray's classes carry no types
    """A step starts no task and hands on no block while `vitray.queue_blocks` of its blocks wait
    for the next step.
    """

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        self._topology = topology
        self._depth = data_context.get_config(DEPTH_KEY)

    @property
    def name(self) -> str:
        return "ShortQueues"

    def can_add_input(self, op: Any) -> bool:
        return self._room(op) > 0

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        return None if self._room(op) > 0 else 0

    def _room(self, op: Any) -> int:
        if not op.output_dependencies:
            return 1
        waiting = self._topology[op].total_enqueued_output_blocks()
        waiting += sum(step.internal_input_queue_num_blocks() for step in op.output_dependencies)
        return int(self._depth - waiting)


def keep_queues_short(context: Any, blocks: int) -> None:
    """Bound every queue of the Ray datasets made with this DataContext."""
    context.set_config(DEPTH_KEY, blocks)
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ShortQueues]
    )
