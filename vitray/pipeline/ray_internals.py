"""All use of Ray's private interfaces, as read in Ray 2.60.0. Check them for another version.

- `BackpressurePolicy` and its configuration key (ray.data._internal)
- `Dataset._create_executor`, the executor's `_topology` and the counters of its operators
- `ray._private.state.actors` and `ActorHandle._actor_id`
- `ray._raylet.Config` and `AuthenticationTokenLoader`
- `ray.core.generated`, the protocol of Ray's head (GCS)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)

DEPTH_KEY = "vitray.queue_blocks"


class ShortQueues(BackpressurePolicy):  # type: ignore[misc]  # Ray's classes carry no types
    """Bounds the queue after each stage.

    A stage starts no task and hands on no block while `vitray.queue_blocks` of its blocks wait for
    the next stage. So a crash costs few images, and memory stays flat with a slow model.
    Ray Data's own back-pressure lets a fast stage fill half of the object store before it slows
    down: see docs/decisions/0006.
    """

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        self._topology = topology
        self._depth = data_context.get_config(DEPTH_KEY)

    @property
    def name(self) -> str:
        return "ShortQueues"

    def can_add_input(self, op: Any) -> bool:
        return self._free_blocks(op) > 0

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        return None if self._free_blocks(op) > 0 else 0

    def _free_blocks(self, op: Any) -> int:
        if not op.output_dependencies:
            return 1
        waiting = self._topology[op].total_enqueued_output_blocks()
        for consumer in op.output_dependencies:
            waiting += consumer.internal_input_queue_num_blocks()
        return int(self._depth - waiting)


def keep_queues_short(context: Any, blocks: int) -> None:
    """Bound every queue of the Ray datasets that are made with this DataContext."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, ShortQueues]
    context.set_config(DEPTH_KEY, blocks)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)


def capture_executor(ray_dataset: Any, captured: Callable[[Any], None]) -> None:
    """Call `captured` with the dataset's executor as soon as Ray creates it.

    Ray itself keeps a reference only after the first output.
    """
    create = ray_dataset._create_executor

    def create_and_capture() -> Any:
        executor = create()
        captured(executor)
        return executor

    ray_dataset._create_executor = create_and_capture


def describe_operators(executor: Any) -> str:
    """Running tasks and waiting blocks of each operator; "" before the executor has begun."""
    operators = getattr(executor, "_topology", None) or {}
    return "; ".join(
        f"{op.name}: {op.num_active_tasks()} tasks, {state.total_enqueued_input_blocks()} waiting"
        for op, state in operators.items()
    )


def are_all_unplaced(actor_names: Iterable[str]) -> bool:
    """Whether some of the actors exist, and none of them has a machine yet."""
    import ray
    from ray._private.state import actors

    exists = False
    for name in actor_names:
        # No actor has that name yet, or it is gone.
        with contextlib.suppress(ValueError, KeyError):
            if actors(ray.get_actor(name)._actor_id.hex())["Address"]["IPAddress"]:
                return False
            exists = True
    return exists


def reload_token() -> None:
    """Make an imported Ray read the authentication settings again: it reads them at import only."""
    raylet: Any = import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def answer_without_token(gcs: str) -> str:
    """Ask Ray's head (host:port) for its nodes without a token, like a stranger.

    "OK" when it answers, else the name of the gRPC status code.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2 as messages

    with grpc.insecure_channel(gcs, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
            request_serializer=messages.GetAllNodeInfoRequest.SerializeToString,
            response_deserializer=messages.GetAllNodeInfoReply.FromString,
        )
        try:
            ask(messages.GetAllNodeInfoRequest(), timeout=10)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
