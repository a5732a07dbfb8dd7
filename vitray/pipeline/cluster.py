"""Ray: start or join it, and call functions on its machines."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vitray.cpus import cores
from vitray.dataset import scratch
from vitray.errors import ClusterError, Interrupted, VitrayError, one_line
from vitray.pipeline.machines import share_out
from vitray.storage import exists, is_local, store_for

log = logging.getLogger(__name__)

RETRIES = 3  # of a task or an actor; Ray's own defaults are endless
DISK_TIMEOUT_S = 20.0
NOTICE_S = 30.0  # between two messages about waiting
# For a machine with room for the model: other jobs may use all machines.
PLACEMENT_TIMEOUT_S = 3600.0
MEASURE_TIMEOUT_S = 900.0
NODE_TIMEOUT_S = 120.0
START_TIMEOUT_S = 120  # Ray's own timeouts inside ray.init are shorter


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of a cluster.

    same_size: the number of machines of its size, including it. other_sizes: the number of other
    machines.
    """

    node: str
    host: str
    cpus: int
    gpus: int
    same_size: int
    other_sizes: int


def own_cpus() -> int:
    """The number of cores that this process may use, at least 2: the stages share a single core."""
    return max(2, cores())


@contextlib.contextmanager
def ray_session(address: str | None, allow_open: bool = False) -> Iterator[None]:
    """Ray during a `with` block: the one at `address` (or RAY_ADDRESS), else a new local one.

    A local Ray ends with the block. It has token authentication with a token that is written
    nowhere, no dashboard and no usage reports.

    Raises ClusterError for a Ray that requires no token, unless `allow_open`.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    if where == "local":
        _set_up_token()
        # Ray kills idle workers beyond this limit. Starting one again takes 2 s.
        os.environ.setdefault("RAY_num_workers_soft_limit", "64")
        # Of a task that was killed for lack of memory; Ray's default is endless.
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
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
    with _signal_handlers_kept(), _native_stderr_hidden(), _started(where, options):
        if where != "local" and not allow_open:
            _require_token(where, ray.get_runtime_context().gcs_address)
        yield


def _require_token(where: str, gcs: str) -> None:
    """Raise ClusterError unless Ray's head refuses a request without a token."""
    from vitray.pipeline.ray_internals import answer_without_token

    answer = answer_without_token(gcs)
    # A Ray with TLS is UNAVAILABLE for a request without TLS.
    if answer in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE"):
        return
    if answer != "OK":
        raise ClusterError(
            f"cannot find out whether Ray at {where} requires a token ({answer}). Run again, or "
            "add --allow-open-cluster."
        )
    raise ClusterError(
        f"Ray at {where} answers without a token: everybody who reaches it can run code there. "
        "Start it with RAY_AUTH_MODE=token, or add --allow-open-cluster."
    )


@contextlib.contextmanager
def _started(where: str, options: dict[str, Any]) -> Iterator[None]:
    """Ray during a `with` block, started by a thread of its own. Raises ClusterError.

    In the main thread, a signal could raise inside Ray's C++, which aborts, and Ray would take over
    SIGTERM. The thread lives as long as the session, because Ray's processes are killed when the
    thread that started them ends.
    """
    import ray

    errors: list[Exception] = []
    is_up = threading.Event()
    is_over = threading.Event()

    def run() -> None:
        try:
            _connect(where, options)
        except Exception as error:
            errors.append(error)
        is_up.set()
        is_over.wait()

    threading.Thread(target=run, name="vitray-ray", daemon=True).start()
    try:
        if not is_up.wait(START_TIMEOUT_S) or errors:
            why = one_line(errors[0], 300) if errors else f"no answer in {START_TIMEOUT_S} s"
            raise ClusterError(
                f"Ray at {where} does not answer: {why}. Check the address, that the cluster runs "
                "this version of Ray, and RAY_AUTH_MODE and RAY_AUTH_TOKEN."
            ) from (errors[0] if errors else None)
        context = ray.get_runtime_context()
        logs = os.path.join(context.get_temp_dir(), context.get_session_name())
        has_failed = True
        try:
            yield
            has_failed = False
        except (Interrupted, KeyboardInterrupt, SystemExit):
            has_failed = False
            raise
        finally:
            if where == "local" and not has_failed:
                ray.shutdown()
                # 0.4 MB per run. The logs of a failed run stay.
                shutil.rmtree(logs, ignore_errors=True)
    finally:
        # A signal may have ended the first wait, and a Ray that is still starting cannot be shut
        # down.
        is_up.wait(START_TIMEOUT_S)
        ray.shutdown()
        is_over.set()


def _connect(where: str, options: dict[str, Any]) -> None:
    import ray

    from vitray.pipeline.ray_internals import few_processes, hide_raylet_messages

    # Ray would warn that it does not handle SIGTERM in this thread.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        hide_raylet_messages()
    host, _, port = where.rpartition(":")
    if "://" not in where and port.isdecimal():  # Ray itself would try for two minutes
        socket.create_connection((host, int(port)), timeout=10).close()
    with few_processes() if where == "local" else contextlib.nullcontext():
        ray.init(address=where, **options)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Install the handlers again afterwards: when Ray ends, its C++ sets those of the system."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _native_stderr_hidden() -> Iterator[None]:
    """Discard what Ray's C++ writes to file descriptor 2; Python's sys.stderr still works.

    Ray's C++ has log files, and warns in red about every actor with bounded restarts. With --debug
    nothing is hidden.
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
    """Token authentication for a local Ray, unless RAY_AUTH_MODE is set."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        from vitray.pipeline.ray_internals import reload_token

        reload_token()


def alive_nodes() -> list[dict[str, Any]]:
    """Alive nodes with NodeID and Resources."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def typical_machine(nodes: list[dict[str, Any]], device: str) -> Machine:
    """A machine of the most frequent size, of those on which the model would run.

    Raises ClusterError where nothing could run.
    """
    share_out(nodes, device)
    sizes = [_size_of(node["Resources"], device) for node in nodes]
    suitable = [size for size in sizes if size[0]] or [size for size in sizes if size[1] >= 2]
    size = max(sorted(set(suitable)), key=suitable.count)  # the smaller of equally frequent ones
    node = nodes[sizes.index(size)]
    same_size = sizes.count(size)
    return Machine(
        node["NodeID"],
        node["NodeManagerAddress"],
        size[1],
        size[0],
        same_size,
        len(sizes) - same_size,
    )


def _size_of(resources: dict[str, float], device: str) -> tuple[int, int]:
    """(GPUs that the model may use, CPUs)."""
    gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
    return gpus, int(resources["CPU"])


@contextlib.contextmanager
def joined_cluster(address: str, allow_open: bool, device: str) -> Iterator[Machine]:
    """Like `ray_session`; gives the machine to measure on."""
    with ray_session(address, allow_open):
        yield typical_machine(alive_nodes(), device)


def on_machine(machine: Machine, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns on this machine, while no other Ray task runs there.

    Waits until the machine is free. Raises like `wait_for`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # max_calls=1: in a process that ends, so that what follows starts as cold as a run does.
    task = ray.remote(max_calls=1)(result_or_error).options(
        num_cpus=machine.cpus,
        num_gpus=machine.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(machine.node, soft=False),
        max_retries=RETRIES,
    )
    what = f"the benchmark on {machine.host}"
    return wait_for(task.remote(work, *arguments), MEASURE_TIMEOUT_S, what)


def require_shared(out: str, inputs: list[str], nodes: list[dict[str, Any]]) -> None:
    """Check that all machines see the same disks, with a file in `out` and the local inputs.

    Does nothing for one machine, or without local paths. Raises ClusterError.
    """
    paths = [path for path in inputs if path and is_local(path) and is_visible(path)]
    if len(nodes) < 2 or not (paths or is_local(out)):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with scratch(out) as nonce:
        store_for(nonce).create(nonce, b"nonce")
        refs = []
        for node in nodes:
            task = ray.remote(result_or_error).options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                max_retries=RETRIES,
            )
            refs.append(task.remote(require_visible, nonce, *paths))
        for ref, node in zip(refs, nodes):
            what = f"the check of shared paths on {node['NodeManagerAddress']}"
            wait_for(ref, NODE_TIMEOUT_S, what)


def require_visible(*paths: str) -> None:
    """Raise ClusterError where this machine does not see all of these local paths.

    Waits up to DISK_TIMEOUT_S, because a machine's disks may be mounted after its Ray starts.
    """
    deadline = time.monotonic() + DISK_TIMEOUT_S
    while unseen := [path for path in paths if is_local(path) and not is_visible(path)]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{unseen[0]} cannot be seen from {socket.gethostname()}: with several machines, "
                "source, model and out must be s3:// or on a disk that all of them share. Mount "
                "it there or take that machine away, then run again."
            )
        time.sleep(1)


def is_visible(path: str) -> bool:
    """Whether this machine has a file, an object or a directory of this name."""
    return exists(path) or os.path.isdir(path)


def result_or_error(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the VitrayError that it raised.

    Ray would wrap a raised error in text of its own.
    """
    try:
        return work(*arguments)
    except VitrayError as error:
        return error


def wait_for(ref: Any, timeout_s: float, what: str) -> Any:
    """The value of a Ray task. what: a noun phrase for messages, such as "the benchmark on host1".

    Raises the error that `result_or_error` returned. Raises ClusterError for a task that failed or
    did not end in time.
    """
    import ray

    wait_for_first([ref], timeout_s, what)
    try:
        result = ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"{what} failed: {one_line(error)}. Look at Ray's logs, then run again."
        ) from error
    if isinstance(result, VitrayError):
        raise result
    return result


def wait_for_first(refs: list[Any], timeout_s: float, what: str) -> Any:
    """The first of these references that has a value or an error.

    Raises ClusterError after timeout_s.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        remaining_s = deadline - time.monotonic()
        ready, _ = ray.wait(refs, timeout=max(0.0, min(NOTICE_S, remaining_s)))
        if ready:
            return ready[0]
        if remaining_s < NOTICE_S:
            raise ClusterError(
                f"{what} did not finish in {timeout_s:g} s. Look at `ray status`, then run again."
            )
        report_waiting(what)


def root_error(error: BaseException) -> VitrayError | None:
    """The VitrayError at the root of what Ray or Ray Train raised; None if there is none."""
    current: BaseException | None = error
    while current is not None:
        # Looked at first: what Ray raises is a VitrayError too, with a traceback as its text.
        cause = getattr(current, "cause", None)
        if isinstance(cause, BaseException):
            current = cause
            continue
        if isinstance(current, VitrayError):
            return current
        worker_failures = getattr(current, "worker_failures", {}).values()
        current = current.__cause__ or next(iter(worker_failures), None)
    return None


def report_waiting(what: str) -> None:
    """Log that the run waits for cluster resources. what: a noun phrase, what needs them."""
    log.warning("waiting for cluster resources: %s", what)


def _object_store_bytes() -> int:
    """A quarter of the memory, within 256 MB and 8 GB. Short queues bound what a run needs."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(256 << 20, min(8 << 30, total // 4))
