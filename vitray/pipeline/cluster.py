"""Ray: starting or joining it, and how its machines are shared out between the steps."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vitray.dataset import scratch
from vitray.errors import ClusterError, VitrayError, one_line
from vitray.storage import exists, is_local, store_for

log = logging.getLogger(__name__)

RETRIES = 3  # of a task or an actor; Ray's own defaults are endless
SEEN_S = 20.0
SAID_S = 30.0  # between two words about waiting
# for a machine that has room for the model: others may have taken them, or an autoscaler may bring
# one
PLACE_S = 3600.0
START_S = 120  # Ray's own waits inside ray.init are shorter


@dataclass(frozen=True, slots=True)
class Shares:
    """What each step gets. Fractions are of one CPU; every step has its own number, or Ray would
    fuse decode into the actor.

    A whole CPU always stays beside the actors: with all CPUs taken, readers starve and nothing
    moves.
    """

    actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int
    readers: int
    reader_cpus: float
    decoder_cpus: float
    stagers: int
    queue_blocks: int
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of a cluster. alike: how many have its size, with it; others: machines of other
    sizes.
    """

    node: str
    host: str
    cpus: int
    gpus: int
    alike: int
    others: int


def share_out(nodes: list[dict[str, float]], device: str) -> Shares:
    """Shares for the alive nodes, each {"CPU": n, "GPU": n}. Raises ClusterError with the sizes it
    needs.
    """
    cpus = sum(node.get("CPU", 0) for node in nodes)
    gpus = sum(node.get("GPU", 0) for node in nodes) if device in ("auto", "cuda") else 0
    if cpus < 2:
        raise ClusterError(
            f"the cluster has {cpus:g} CPUs; the line needs 2: one for the model, one for the rest"
        )
    if gpus >= 1:
        actors, actor_cpus, actor_gpus, threads = int(gpus), 1.0, 1.0, 4
        free = cpus - actors
        if free < 1:
            raise ClusterError(
                f"the cluster has {cpus:g} CPUs for {gpus:g} GPUs; it needs one a GPU and at "
                f"least one more"
            )
    else:
        hosts = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 2]
        if not hosts:
            raise ClusterError(
                "no machine of the cluster has 2 CPUs, which the model needs on one machine"
            )
        smallest = min(hosts)
        actors, actor_cpus, actor_gpus, threads = len(hosts), smallest - 1, 0.0, int(smallest)
        free = cpus - actors * actor_cpus
    readers = max(2, int(free // 4)) if free < 64 else int(free // 8)
    decoder = 1.0 if free >= 3 else 0.5
    return Shares(
        actors=actors,
        actor_cpus=actor_cpus,
        actor_gpus=actor_gpus,
        threads=threads,
        readers=readers,
        reader_cpus=0.25,
        decoder_cpus=decoder,
        stagers=max(2, min(32, int(cpus // 2))),
        queue_blocks=2 * actors
        + max(1, int(free // 2)),  # the actors' next blocks, and what decoders finish meanwhile
    )


def own_cpus() -> int:
    """Cores that this process may use; two shares even of one."""
    return max(2, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def ray_session(address: str | None, allow_open: bool = False) -> Iterator[None]:
    """Ray for the length of a block: the one at `address` (or RAY_ADDRESS), else one of our own
    that ends with it.

    Our own has token auth with a token that is written nowhere, no dashboard and no usage reports.
    Raises ClusterError at one that asks for no token, unless `allow_open`.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    if where == "local":
        _set_up_token()
        # idle workers beyond it are killed, and started again: 2 s each
        os.environ.setdefault("RAY_num_workers_soft_limit", "64")
        os.environ.setdefault(
            "RAY_task_oom_retries", str(RETRIES)
        )  # of a task that was killed for lack of memory; else endless
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if where == "local":
        options |= {
            "include_dashboard": False,
            "num_cpus": own_cpus(),
            "object_store_memory": _object_store_bytes(),
        }
    with _without_native_noise(), _started(where, options):
        if where != "local" and not allow_open:
            _require_token(where, ray.get_runtime_context().gcs_address)
        yield


def _require_token(where: str, gcs: str) -> None:
    """Ask Ray's head something without a token, as a stranger would."""
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
            if error.code() in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAVAILABLE,
            ):
                return  # unavailable without TLS, where Ray has it
            raise ClusterError(
                f"Ray at {where} does not say whether it asks for a token ({error.code().name}). "
                f"Run again, or say --allow-open-cluster."
            ) from error
    raise ClusterError(
        f"Ray at {where} answers without a token: whoever reaches it can run code there. Start it "
        f"with RAY_AUTH_MODE=token, "
        "or say --allow-open-cluster."
    )


@contextlib.contextmanager
def _started(where: str, options: dict[str, Any]) -> Iterator[None]:
    """ray.init in a thread of its own, so that a signal cannot raise inside its C++ (which aborts)
    and Ray leaves SIGTERM alone.

    The thread lives as long as the session: Ray's processes ask to be killed when the thread that
    made them ends.
    """
    import ray

    failed: list[Exception] = []
    is_up, is_over = threading.Event(), threading.Event()

    def live() -> None:
        try:
            logging.getLogger("ray").setLevel(
                logging.ERROR
            )  # it would warn that it leaves SIGTERM alone
            host, _, port = where.rpartition(":")
            if "://" not in where and port.isdecimal():  # Ray itself would try for two minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=where, **options)
        except Exception as error:
            failed.append(error)
        is_up.set()
        is_over.wait()

    threading.Thread(target=live, name="vitray-ray", daemon=True).start()
    try:
        if not is_up.wait(START_S) or failed:
            why = one_line(failed[0], 300) if failed else f"nothing came in {START_S} s"
            raise ClusterError(
                f"Ray at {where} does not answer: {why}. Check the address, that the cluster runs "
                f"this version of Ray, and "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN."
            ) from (failed[0] if failed else None)
        context = ray.get_runtime_context()
        logs = os.path.join(context.get_temp_dir(), context.get_session_name())
        yield
        if where == "local":
            ray.shutdown()
            shutil.rmtree(logs, ignore_errors=True)  # 0.4 MB a run; those of a run that failed stay
    finally:
        is_up.wait(
            START_S
        )  # a signal may have ended the first wait: what is half up cannot be shut down
        ray.shutdown()
        is_over.set()


@contextlib.contextmanager
def _without_native_noise() -> Iterator[None]:
    """What Ray's C++ writes to file descriptor 2 goes nowhere (it has log files); Python's
    sys.stderr stays.

    It warns in red of every actor with bounded restarts. With --debug nothing is hidden.
    """
    python = sys.__stderr__
    if (
        python is None
        or sys.stderr is not python
        or logging.getLogger().isEnabledFor(logging.DEBUG)
    ):
        yield
        return
    python.flush()
    real = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    sys.stderr = open(
        real, "w", buffering=1, encoding=python.encoding, errors="backslashreplace", closefd=False
    )
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python
        os.dup2(real, 2)
        os.close(real)
        os.close(nowhere)


def _set_up_token() -> None:
    """Token auth for a Ray that we start, unless RAY_AUTH_MODE says otherwise. Ray reads it once,
    when it is imported.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        raylet: Any = import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def alive_nodes() -> list[dict[str, Any]]:
    """Alive nodes with NodeID and Resources."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def typical_machine(nodes: list[dict[str, Any]], device: str) -> Machine:
    """Of the alive nodes: where the model would run, the commonest size. Raises ClusterError where
    nothing could run.
    """
    share_out([node["Resources"] for node in nodes], device)
    sizes = [
        (int(r.get("GPU", 0)) if device != "cpu" else 0, int(r["CPU"]))
        for r in (node["Resources"] for node in nodes)
    ]
    computing = [size for size in sizes if size[0]] or [size for size in sizes if size[1] >= 2]
    size = max(sorted(set(computing)), key=computing.count)  # the smaller of equally many
    node = nodes[sizes.index(size)]
    alike = sizes.count(size)
    return Machine(
        node["NodeID"], node["NodeManagerAddress"], size[1], size[0], alike, len(sizes) - alike
    )


@contextlib.contextmanager
def joined(address: str, allow_open: bool, device: str) -> Iterator[Machine]:
    """As `ray_session`, and the machine to measure on."""
    with ray_session(address, allow_open):
        yield typical_machine(alive_nodes(), device)


def on_machine(machine: Machine, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns there, while nothing else of Ray runs on that machine; it waits for
    that.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(machine.node, soft=False)
    # max_calls: a process of its own, so that what comes after starts as cold as a run does
    task = ray.remote(max_calls=1)(outcome).options(
        num_cpus=machine.cpus, num_gpus=machine.gpus, scheduling_strategy=there, max_retries=RETRIES
    )
    return answer(
        task.remote(work, *arguments), 900, f"all of {machine.host} to be free, and measured"
    )


def on_worker(shares: Shares, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns on the class of machine that will run the model."""
    import ray

    task = ray.remote(outcome).options(
        num_cpus=shares.actor_cpus, num_gpus=shares.actor_gpus, max_retries=RETRIES
    )
    return answer(
        task.remote(work, *arguments),
        PLACE_S,
        "a machine that has room for the model, and fetches and reads it",
    )


def require_shared(out: str, named: list[str], nodes: list[dict[str, Any]]) -> None:
    """With more than one machine, local paths must be the same disk everywhere: a nonce in `out`
    says so.
    """
    paths = [name for name in named if name and is_local(name) and sees(name)]
    if len(nodes) < 2 or not (paths or is_local(out)):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with scratch(out) as nonce:
        store_for(nonce).create(nonce, b"nonce")
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        tasks = [
            ray.remote(outcome).options(num_cpus=0, scheduling_strategy=node, max_retries=RETRIES)
            for node in there
        ]
        asked = [task.remote(require_seen, nonce, *paths) for task in tasks]
        for ref, node in zip(asked, nodes):
            answer(ref, 120, f"node {node['NodeManagerAddress']} to answer")


def require_seen(*paths: str) -> None:
    """Raises ClusterError where this machine does not see all of these, SEEN_S after it was asked:
    disks come later than Ray does.
    """
    deadline = time.monotonic() + SEEN_S
    while unseen := [path for path in paths if is_local(path) and not sees(path)]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{unseen[0]} cannot be seen from {socket.gethostname()}: with several machines, "
                f"source, model and out must be "
                "s3:// or on a disk that all of them share. Mount it there or take that machine "
                "away, then run again."
            )
        time.sleep(1)


def sees(path: str) -> bool:
    return exists(path) or os.path.isdir(path)


def outcome(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a task does: its exceptions of ours come back as values, which Ray would wrap in text of
    its own.
    """
    try:
        return work(*arguments)
    except VitrayError as error:
        return error


def answer(ref: Any, timeout_s: float, what: str) -> Any:
    """The value of a task; says every SAID_S that it waits for `what`.

    Raises what `outcome` returned, and ClusterError for a task that failed or did not answer in
    time.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while not ray.wait([ref], timeout=max(0.0, min(SAID_S, left := deadline - time.monotonic())))[
        0
    ]:
        if left < SAID_S:
            raise ClusterError(
                f"waited {timeout_s:g} s for {what}. Look at `ray status`, then run again."
            )
        log.warning("waiting for %s", what)
    try:
        found = ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"{what} failed: {one_line(error)}. Look at Ray's logs, then run again."
        ) from error
    if isinstance(found, VitrayError):
        raise found
    return found


def _object_store_bytes() -> int:
    """A quarter of the memory, within 256 MB and 8 GB: the line is bounded by fragments, not by
    this.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(256 << 20, min(8 << 30, total // 4))
