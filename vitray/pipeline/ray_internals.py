"""All use of Ray's private interfaces, as read in Ray 2.60.0. Check them for another version.

- `ray._private.node.Node`, its `start_api_server`, `start_monitor` and `start_log_monitor`
- `ray._private.worker.print_to_stdstream`
- `_generator_backpressure_num_objects` of a method's options
- `ray._private.state.actors` and `ActorHandle._actor_id`
- `ray._raylet.Config` and `AuthenticationTokenLoader`
- `ray.core.generated`, the protocol of Ray's head (GCS)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Ray instances that are started meanwhile have no dashboard, autoscaler or log monitor.

    Each of these takes 0.6 to 1 s of CPU at the start, the dashboard also where it is switched off.
    One machine cannot grow, and nobody follows its logs.
    """
    from ray._private.node import Node

    names = ("start_api_server", "start_monitor", "start_log_monitor")
    started = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda self, **_: None)
    try:
        yield
    finally:
        for name, function in started.items():
            setattr(Node, name, function)


def hide_raylet_messages() -> None:
    """Do not let Ray print what happens to workers: it goes to stdout, where results are.

    vitray says in one line that a worker was lost.
    """
    worker: Any = import_module("ray._private.worker")
    worker.print_to_stdstream = lambda *_, **__: None


def streaming_call(method: Any, ahead: int, *arguments: Any) -> Any:
    """The generator of a call whose results come one by one, `ahead` of them before they are taken.

    Ray's name of that option is private.
    """
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": ahead}
    return method.options(**options).remote(*arguments)


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
