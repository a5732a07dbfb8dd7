"""The executor on a Ray cluster: an actor for each worker, and few messages.

Shards go to an actor, events come back; rows and pixels stay on its machine. Ray's own retries are
switched off: schedule.py decides what is tried again, because it knows which shards an actor had.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vitray.dataset import Dataset, dataset_url
from vitray.errors import ClusterError, VitrayError, one_line
from vitray.job import Job
from vitray.models import identify
from vitray.pipeline.cluster import (
    PLACEMENT_TIMEOUT_S,
    alive_nodes,
    is_visible,
    require_shared,
    require_visible,
    result_or_error,
    wait_for,
    wait_for_first,
)
from vitray.pipeline.events import (
    Event,
    ShardBroken,
    ShardChanged,
    ShardCommitted,
    WorkerLost,
)
from vitray.pipeline.machines import (
    Slot,
    WorkerShare,
    decoding_machines,
    further_machine,
    share_out,
)
from vitray.pipeline.remote_decoders import DecoderActor, RemoteDecoders, pair_up
from vitray.pipeline.worker import Worker
from vitray.schema import ModelSpec, Shard
from vitray.storage import is_local

DESCRIBED = 3  # workers in a description
ANSWER_S = 10.0  # an actor answers within this time, also when nothing happened
CALLS_AT_ONCE = 4  # of an actor: events, give, and what is rare
# An actor waits for further events, so that the driver gets few answers: each of them costs it
# 0.7 ms of CPU in Ray's client.
GATHER_S = 0.1
ANSWERS_PER_S = 500  # of all actors together
MACHINES_WANTED_S = 60.0  # after shards were given: then there are more, or the end is near
SLOT_DEATHS = 16  # of workers in one slot, without a commit between them, until it gets no more
SETTLE_S = 30.0  # in which Ray notices that a machine is gone
MACHINES_S = 5.0  # between two looks for machines that came or went


@dataclass(frozen=True, slots=True)
class Answer:
    """What an actor tells the driver. waiting: text, how much waits for each stage."""

    events: list[Event]
    waiting: str


class WorkerActor:
    """A worker in a process of its own. Several threads call it at once."""

    def __init__(self, name: str, share: WorkerShare) -> None:
        self._name = name
        self._share = share
        self._changing = threading.Lock()  # for what follows
        self._has_begun = False
        self._is_stopping = False
        self._worker: Worker | None = None
        self._error: Exception | None = None
        self._feeds: list[tuple[Any, int]] = []  # that wait for the worker
        self._witnesses: Sequence[Shard] = ()
        self._begun = threading.Event()  # _worker or _error is set

    def is_up(self) -> bool:
        return True

    def identify(self, job: Job, images: int) -> ModelSpec | VitrayError:
        spec: ModelSpec | VitrayError = result_or_error(identify, job, True, images)
        return spec

    def begin(self, dataset: Dataset, witnesses: Sequence[Shard], compiled: bool) -> None:
        """witnesses: shards that are looked at, to tell a broken shard from an absent disk."""
        with self._changing:
            self._witnesses = witnesses
            if self._has_begun:
                return
            self._has_begun = True
        worker: Worker | None = None
        try:
            require_visible(dataset_url(dataset.out))
            worker = Worker(self._name, dataset, replace(self._share, compiled=compiled))
            worker.start()
        except Exception as error:
            worker, self._error = None, error
        with self._changing:
            self._worker = worker
            feeds, self._feeds = self._feeds, []
            is_stopping = self._is_stopping
        self._begun.set()
        if worker is not None:
            for actor, streams in feeds:
                _feed(worker, actor, streams)
            if is_stopping:
                worker.stop()

    def decode_also_by(self, actor: Any, streams: int) -> None:
        """Have a DecoderActor decode for this worker, so many blocks at a time."""
        with self._changing:
            worker = self._worker
            if worker is None:
                self._feeds.append((actor, streams))
        if worker is not None:
            _feed(worker, actor, streams)

    def give(self, shards: Sequence[Shard]) -> None:
        if self._worker is not None:
            self._worker.give(shards)

    def stop(self) -> None:
        with self._changing:
            self._is_stopping = True
            worker = self._worker
        if worker is not None:
            worker.stop()

    def answer(self, wait_s: float, gather_s: float) -> Answer:
        """What has happened since the last answer; waits for something at most wait_s.

        Where something happened, waits gather_s for more.
        """
        events = self._events(wait_s, gather_s)
        waiting = "the worker begins" if self._worker is None else self._worker.describe()
        return Answer([_portable(event) for event in events], waiting)

    def _events(self, wait_s: float, gather_s: float) -> list[Event]:
        if not self._begun.wait(wait_s):
            return []
        if self._worker is None:
            assert self._error is not None
            return [WorkerLost(self._name, self._error)]
        events = self._worker.events(wait_s)
        if events:
            time.sleep(gather_s)
            events += self._worker.events(0)
        if any(isinstance(event, (ShardBroken, ShardChanged)) for event in events):
            error = result_or_error(require_source, self._witnesses)
            if error is not None:
                return [WorkerLost(self._name, error)]
        return events


def _feed(worker: Worker, actor: Any, streams: int) -> None:
    # One shard is decoded, the next one waits.
    worker.decode_also_by(partial(RemoteDecoders, actor, streams), shards=2 * streams)


def _portable(event: Event) -> Event:
    """The event with an error that another process can read."""
    if isinstance(event, WorkerLost) and not isinstance(event.error, VitrayError):
        kind = type(event.error).__name__
        return replace(event, error=RuntimeError(f"{kind}: {event.error}"))
    return event


def require_source(witnesses: Sequence[Shard]) -> None:
    """Raise ClusterError where this machine sees none of these shards: then it is at fault."""
    if all(is_local(shard.url) and not is_visible(shard.url) for shard in witnesses):
        require_visible(witnesses[0].url)


@dataclass(frozen=True)
class _Actor:
    """An actor in its place. answer: the reference of its next one. waiting: of the last one."""

    name: str
    slot: Slot
    handle: Any
    answer: Any
    waiting: str = "the worker begins"


@dataclass(frozen=True)
class _DecodingActor:
    """A DecoderActor on a node, which decodes for one worker.

    streams: calls at a time. is_up: the reference of its answer to the last question.
    """

    node: str
    worker: str
    streams: int
    handle: Any
    is_up: Any


@dataclass(frozen=True)
class _UnsettledLoss:
    """A worker whose process is gone, while it is not known whether its machine is.

    Ray notices a lost machine seconds after its processes. pong: the reference of a task there.
    """

    loss: WorkerLost
    slot: Slot
    pong: Any
    deadline: float


@dataclass
class _SlotHealth:
    """The deaths in a slot since its last commit, and when it may have a worker again."""

    deaths: int = 0
    not_before: float = float("-inf")


class Scout:
    """Asks for a further machine, by waiting for one.

    Ray's autoscaler starts machines for actors that have no room. An actor that is bound to a
    machine is no such request. This one ends with its driver, unlike a request to the autoscaler.
    """

    def is_up(self) -> bool:
        return True


class RayExecutor:
    """An actor for each GPU, or for each machine where there is none. Machines come and go.

    Actors start with this object, so that their processes are there when the model is known.
    Raises ClusterError for a cluster that is too small.
    """

    def __init__(self, device: str) -> None:
        self._actors: dict[str, _Actor] = {}
        self._unsettled: list[_UnsettledLoss] = []
        self._health: dict[tuple[str, int], _SlotHealth] = {}
        self._decoders: list[_DecodingActor] = []
        self._decoding_nodes: set[str] = set()  # all that decode, or did
        self._is_stopping = False
        self._begin_arguments: tuple[Any, ...] | None = None
        self._scout: Any = None
        self._scout_is_up: Any = None
        self._given_at = float("-inf")
        nodes = alive_nodes()
        self.machines = len(nodes)
        slots = share_out(nodes, device)
        self.share = slots[0].share
        self.workers = len(slots)
        # The kind stays: a model that was resolved for GPUs does not go on without them.
        self._device = device if self.share.gpus else "cpu"
        self._last_error = ""
        self._start_actors()

    @property
    def _gather_s(self) -> float:
        return max(GATHER_S, len(self._actors) / ANSWERS_PER_S)

    def identify(self, job: Job, images: int, before_timing: Callable[[], None]) -> ModelSpec:
        by_answer = {actor.handle.is_up.remote(): actor for actor in self._actors.values()}
        what = "reading the model on a machine with room for it"
        while True:
            first = by_answer.pop(wait_for_first(list(by_answer), PLACEMENT_TIMEOUT_S, what))
            try:
                answer = first.handle.identify.remote(job, images)
                spec: ModelSpec = wait_for(answer, PLACEMENT_TIMEOUT_S, what)
                return spec
            except ClusterError:  # of that machine
                if not by_answer:
                    raise

    def require_shared(self, out: str, inputs: list[str]) -> None:
        require_shared(out, inputs, alive_nodes())

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        import ray

        witnesses = [shards[0], shards[-1]]
        self._begin_arguments = (ray.put(dataset), witnesses, compiled)
        for actor in self._actors.values():
            actor.handle.begin.remote(*self._begin_arguments)
        self._start_decoders()

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        if self._given_at == float("-inf"):
            self._next_look = time.monotonic()  # ask for machines now
        self._given_at = time.monotonic()
        if worker in self._actors:
            self._actors[worker].handle.give.remote(list(shards))

    def events(self, wait_s: float) -> list[Event]:
        import ray

        if time.monotonic() >= self._next_look:
            self._start_actors()
        events = self._settle_losses()
        by_answer = {actor.answer: actor for actor in self._actors.values()}
        if not by_answer:
            self._require_slots()
            if not events:
                time.sleep(wait_s)
            return events
        ready, waiting = ray.wait(list(by_answer), num_returns=1, timeout=0 if events else wait_s)
        if ready and waiting:
            ready += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for answer in ready:
            events += self._events_of(by_answer[answer])
        return events

    def stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            for actor in self._actors.values():
                actor.handle.stop.remote()

    def is_waiting_for_machine(self) -> bool:
        from vitray.pipeline.ray_internals import are_all_unplaced

        return not self._actors or are_all_unplaced(self._actors)

    def describe(self) -> str:
        texts = [actor.waiting for actor in self._actors.values()]
        if len(texts) > DESCRIBED:
            texts = [*texts[:DESCRIBED], f"and {len(texts) - DESCRIBED} more workers"]
        return "; ".join(texts) or "no machine has room for a worker"

    def close(self) -> None:
        import ray

        handles = [actor.handle for actor in self._actors.values()]
        handles += [decoder.handle for decoder in self._decoders]
        for handle in (*handles, self._scout):
            if handle is not None:
                ray.kill(handle)
        self._scout = None
        self._decoders.clear()
        self._actors.clear()

    def _start_actors(self) -> None:
        """Start an actor in every slot that has none and may have one."""
        moment = time.monotonic()
        self._next_look = moment + MACHINES_S
        if self._is_stopping:
            return
        nodes = alive_nodes()
        self.machines = len(nodes)
        try:
            slots = share_out(nodes, self._device)
        except ClusterError:  # machines went, and others may come
            slots = []
        taken = {actor.slot.place for actor in self._actors.values()}
        taken |= {unsettled.slot.place for unsettled in self._unsettled}
        for slot in slots:
            is_of_kind = bool(slot.share.gpus) == bool(self.share.gpus)
            health = self._health.setdefault(slot.place, _SlotHealth())
            is_healthy = health.deaths < SLOT_DEATHS and health.not_before <= moment
            if is_of_kind and is_healthy and slot.place not in taken:
                self._start_actor(slot)
        if self._begin_arguments is not None:
            self._start_decoders()
            self._look_for_machine()

    def _require_slots(self) -> None:
        """Raise ClusterError where workers fail in every slot, however often they start."""
        if self._unsettled or not self._health:
            return
        if all(health.deaths >= SLOT_DEATHS for health in self._health.values()):
            raise ClusterError(
                f"the workers of all machines fail again and again: {self._last_error}. Look at "
                "Ray's logs, then run again."
            )

    def _look_for_machine(self) -> None:
        """Ask for a further machine while there are shards for it."""
        import ray

        if self._scout is not None:
            has_arrived = bool(ray.wait([self._scout_is_up], timeout=0)[0])
            is_wanted = time.monotonic() - self._given_at < MACHINES_WANTED_S
            if is_wanted and not has_arrived:
                return
            ray.kill(self._scout)
            self._scout = None
        cpus = further_machine(alive_nodes(), self._device)
        if cpus and time.monotonic() - self._given_at < MACHINES_WANTED_S:
            kind = ray.remote(Scout).options(num_cpus=cpus, max_restarts=0, max_task_retries=0)
            self._scout = kind.remote()
            self._scout_is_up = self._scout.is_up.remote()

    def _start_actor(self, slot: Slot) -> None:
        import ray

        name = f"vitray-{slot.node[:8]}-{slot.number}-{uuid.uuid4().hex[:8]}"
        kind = ray.remote(WorkerActor).options(
            name=name,
            num_cpus=slot.share.cpus,
            num_gpus=slot.share.gpus,
            **_on_node(slot.node, CALLS_AT_ONCE),
        )
        handle = kind.remote(name, slot.share)
        if self._begin_arguments is not None:
            handle.begin.remote(*self._begin_arguments)
        self._actors[name] = _Actor(
            name, slot, handle, handle.answer.remote(ANSWER_S, self._gather_s)
        )

    def _start_decoders(self) -> None:
        """Have machines without a GPU decode for the workers.

        A machine that is new is divided between all of them. What decoded for a lost worker goes to
        the one in its place, or else to the others.
        """
        machines = dict(decoding_machines(alive_nodes(), self._device))
        self._decoders = [self._watched(decoder) for decoder in self._decoders]
        fed = {decoder.worker for decoder in self._decoders if decoder.is_up is not None}
        unfed = [worker for worker in self._actors if worker not in fed] or list(self._actors)
        for decoder in [d for d in self._decoders if not self._is_useful(d)]:
            self._decoders.remove(decoder)
            worker = decoder.worker if decoder.worker in self._actors else next(iter(unfed), None)
            if decoder.node in machines and worker is not None:
                unfed = [*unfed[1:], *unfed[:1]]
                self._start_decoder(decoder.node, machines[decoder.node], worker, decoder.streams)
        new = [node for node in machines if node not in self._decoding_nodes]
        workers = list(self._actors)
        if not workers:
            return
        self._decoding_nodes.update(new)
        for pair in pair_up([machines[node] for node in new], len(workers)):
            node = new[pair.decoder]
            self._start_decoder(node, machines[node], workers[pair.worker], pair.streams)

    def _is_useful(self, decoder: _DecodingActor) -> bool:
        return decoder.is_up is not None and decoder.worker in self._actors

    def _watched(self, decoder: _DecodingActor) -> _DecodingActor:
        """The actor with a new question, or without one where it is gone."""
        import ray

        if decoder.is_up is None or not ray.wait([decoder.is_up], timeout=0)[0]:
            return decoder
        try:
            ray.get(decoder.is_up)
        except ray.exceptions.RayError:
            return replace(decoder, is_up=None)
        return replace(decoder, is_up=decoder.handle.is_up.remote())

    def _start_decoder(self, node: str, cpus: int, worker: str, streams: int) -> None:
        import ray

        assert self._begin_arguments is not None
        kind = ray.remote(DecoderActor).options(
            num_cpus=(cpus - 1) * min(1.0, streams / cpus),
            **_on_node(node, streams + CALLS_AT_ONCE),
        )
        handle = kind.remote(self._begin_arguments[0])
        is_up = handle.is_up.remote()
        self._decoders.append(_DecodingActor(node, worker, streams, handle, is_up))
        self._actors[worker].handle.decode_also_by.remote(handle, streams)

    def _events_of(self, actor: _Actor) -> list[Event]:
        """What an actor answered, and the next question; or its loss."""
        import ray

        try:
            answer: Answer = ray.get(actor.answer)
        except ray.exceptions.RayError as error:
            self._remove(actor)
            self._take_loss(actor, error)
            return []
        losses = [event for event in answer.events if isinstance(event, WorkerLost)]
        if any(isinstance(event, ShardCommitted) for event in answer.events):
            self._health[actor.slot.place] = _SlotHealth()
        if not losses:
            next_answer = actor.handle.answer.remote(ANSWER_S, self._gather_s)
            self._actors[actor.name] = replace(actor, answer=next_answer, waiting=answer.waiting)
            return answer.events
        self._remove(actor)
        self._count_death(actor.slot, losses[0])
        return [event for event in answer.events if not isinstance(event, WorkerLost)] + losses[:1]

    def _remove(self, actor: _Actor) -> None:
        """Forget an actor, and end what decoded for it."""
        import ray

        ray.kill(actor.handle)
        del self._actors[actor.name]
        for decoder in self._decoders:
            if decoder.worker == actor.name:
                ray.kill(decoder.handle)

    def _take_loss(self, actor: _Actor, error: Exception) -> None:
        """Ask the machine of an actor that is gone whether it is still there."""
        import ray

        # The rest of Ray's text are ids, and advice about Ray.
        first_line = str(error).partition("\n")[0]
        loss = WorkerLost(actor.name, RuntimeError(one_line(first_line, 300)))
        is_preempted = bool(getattr(error, "preempted", False))
        pong = ray.remote(_pong).options(num_cpus=0, max_retries=0, **_at_node(actor.slot.node))
        deadline = time.monotonic() + (0.0 if is_preempted else SETTLE_S)
        self._unsettled.append(_UnsettledLoss(loss, actor.slot, pong.remote(), deadline))

    def _settle_losses(self) -> list[Event]:
        """The losses of which it is known by now whether their machines are gone."""
        import ray

        if not self._unsettled:
            return []
        nodes = {node["NodeID"] for node in alive_nodes()}
        settled = list[Event]()
        for unsettled in list(self._unsettled):
            is_machine = unsettled.slot.node not in nodes or time.monotonic() >= unsettled.deadline
            if not is_machine:
                if not ray.wait([unsettled.pong], timeout=0)[0]:
                    continue
                try:
                    ray.get(unsettled.pong)
                except ray.exceptions.RayError:
                    is_machine = True
            self._unsettled.remove(unsettled)
            settled.append(replace(unsettled.loss, is_machine=is_machine))
            if is_machine:
                self._next_look = time.monotonic()
            else:
                self._count_death(unsettled.slot, unsettled.loss)
        return settled

    def _count_death(self, slot: Slot, loss: WorkerLost) -> None:
        """A slot in which workers die again and again gets them at longer intervals."""
        health = self._health.setdefault(slot.place, _SlotHealth())
        health.deaths += 1
        health.not_before = time.monotonic() + min(MACHINES_S, health.deaths - 1)
        self._next_look = min(self._next_look, health.not_before)
        self._last_error = one_line(loss.error, 300)


def _pong() -> bool:
    return True


def _on_node(node: str, calls_at_once: int) -> dict[str, Any]:
    """Ray's options of an actor on a certain machine, which Ray never starts again."""
    return {
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": calls_at_once,
        **_at_node(node),
    }


def _at_node(node: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
