"""Workers on a Ray cluster, each a process that an actor of its own starts and watches.

    coordinator -- obey(order, state) --> actor -- order --> worker
    coordinator <-- stream of (message, state) -- actor <-- message -- worker

Everything that a worker says comes in one stream per actor, in order; a thread per stream listens, and rings. Committed
states are the coordinator's: its store holds them, they travel as arguments and items of the stream, which the object
store keeps no longer than that, and a node that dies takes only the unit that it ran.
"""

from __future__ import annotations

import selectors
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock, Thread
from time import monotonic, sleep
from typing import Any

import cloudpickle
import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cerebro_tune import state
from cerebro_tune.arguments import at_least, devices_of
from cerebro_tune.buffers import BufferCache, Mapped
from cerebro_tune.errors import ConfigurationError, StateMemoryError
from cerebro_tune.trainable import Recipe
from cerebro_tune.units import WorkerId
from cerebro_tune.wholefile import LOOK_AGAIN_S, told
from cerebro_tune.workers.base import Grow, WakePipe, Workers
from cerebro_tune.workers.messages import (
    Exit,
    Finished,
    Forget,
    Joined,
    Late,
    Lost,
    Message,
    Order,
    Raised,
    Ready,
    Rest,
    RunSpec,
    Setup,
    Task,
    Waiting,
    kinds_of,
)
from cerebro_tune_ray.cluster import Cluster, Resources, as_options, checked, node_of, room
from cerebro_tune_ray.copies import Copies
from cerebro_tune_ray.post import Bytes, PostActor

_LATE_S = 10.0
"""How long a worker may take to come up before the others are not to wait for it."""
_END_S = 3.0
"""How long a worker may take to end by itself before it is killed."""


@dataclass(eq=False)
class _Seat:
    """A worker as the coordinator sees it."""

    worker: WorkerId
    place: PlacementGroup
    post: Any
    stream: Any
    copies: Copies = field(default_factory=Copies)
    node: str = ""
    """The host name of where it is, once it is up."""
    task: Task | None = None
    sent_s: float = 0.0
    """When the task was sent, by this machine's clock."""
    recipe: bytes = b""
    brought: dict[str, bytes] = field(default_factory=dict)
    """The recipes of trials that bring their own."""
    leaving: bool = False
    """Whether nobody is to wait for room on the disk for it."""
    exporting: Lock = field(default_factory=Lock)
    empty: bool = False
    """Whether another has taken its place, or none: what is still said here is nobody's any more."""


class RayWorkers(Workers):
    """An actor per worker, each in a place of its own on the cluster. `resources` is what each needs."""

    def __init__(
        self, devices: Sequence[str], threads: int, first: int = 0, resources: Resources | None = None
    ) -> None:
        super().__init__(devices, threads, first)
        self._resources = checked(resources)
        self._seats: dict[WorkerId, _Seat] = {}
        self._listeners: list[Thread] = []
        self._heard: deque[tuple[_Seat, Message, Any]] = deque()
        self._buffers = BufferCache()
        self._cluster: Cluster | None = None
        self._pipe: WakePipe | None = None
        self._spec: tuple[RunSpec | None, Any] = (None, None)

    @classmethod
    def plan(
        cls, workers: int | None, devices: str | Sequence[str], per_device: int, resources: Resources | None
    ) -> tuple[tuple[str, ...], Callable[[], Workers]]:
        """As many workers as there is room for, if it is not said how many."""
        needed = checked(resources)
        if devices != "auto" or per_device != 1:
            raise ConfigurationError(
                f'devices={devices!r}, workers_per_device={per_device}: with backend="ray" the resources say where a '
                'worker computes, as in resources_per_worker={"GPU": 1}, or {"GPU": 0.5} for two to a device.'
            )
        if workers is None:
            workers = room(needed) if ray.is_initialized() else len(devices_of(None, "auto", 1))
        kind = "cuda:0" if needed.get("GPU") else "cpu"  # Ray shows each actor its own devices only
        seats = (kind,) * at_least(1, workers=workers)
        return seats, partial(cls, seats, max(1, int(needed.get("CPU", 0))), resources=needed)

    def start(self, grow: Grow) -> None:  # noqa: D102
        self._grow = grow
        self._cluster = Cluster(self._resources)
        self._pipe = WakePipe()
        places = self._cluster.places(len(self.ids))
        self.apart = len({node_of(place) for place in places}) > 1  # and so it stays, or runs would not repeat
        for worker, place in zip(self.ids, places, strict=True):
            self._seat(worker, place)

    def restart(self, worker: WorkerId) -> None:  # noqa: D102
        assert self._cluster is not None, "restart before start"
        self._unseat(self._seats.pop(worker))
        self._seat(worker, self._cluster.place())

    def send(self, worker: WorkerId, order: Order) -> None:  # noqa: D102
        seat = self._seats[worker]
        match order:
            case Setup():
                self._clear(seat)
                seat.recipe = order.spec.recipe
                seat.post.set_up.remote(self._shipped(order.spec), order.check, order.check_validation)
                return
            case Task():
                self._begin(seat, order)
                return
            case Forget():
                self._buffers.forget(order.buffers)
                for trial in order.trials:
                    seat.copies.discard(trial)
                    seat.brought.pop(trial, None)
            case Rest():
                self._clear(seat)
        seat.post.obey.remote(order)

    def wait(self, timeout_s: float | None = None) -> list[Message]:  # noqa: D102
        assert self._pipe is not None, "wait before start"
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe.reader, selectors.EVENT_READ)
            selector.select(timeout_s)
        self._pipe.silence()
        said = []
        while self._heard:
            seat, message, attached = self._heard.popleft()
            if not seat.empty:
                said.append(self._taken(seat, message, attached))
        return said

    def wake(self) -> None:  # noqa: D102
        if self._pipe is not None:
            self._pipe.ring()

    def close(self) -> None:  # noqa: D102
        if self._cluster is None or self._pipe is None:
            return
        for seat in self._seats.values():
            if seat.node and ray.is_initialized():
                seat.post.obey.remote(Exit())
            else:
                self._unseat(seat)
        self._await_listeners()
        for seat in self._seats.values():
            self._unseat(seat)
        self._await_listeners()
        self._seats.clear()
        self._heard.clear()
        self._spec = (None, None)
        self._buffers.close()
        self._cluster.leave()
        self._cluster = None
        self._pipe.close()
        self._pipe = None

    # Seats

    def _seat(self, worker: WorkerId, place: PlacementGroup) -> None:
        options = as_options(self._resources)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0)
        post = PostActor.options(**options).remote(worker.number, self.device(worker), self.threads, sys.path)
        seat = self._seats[worker] = _Seat(worker, place, post, post.listen.remote())
        self._listeners = [thread for thread in self._listeners if thread.is_alive()]
        self._listeners.append(Thread(target=self._listen, args=(seat,), name=f"cerebro-{worker}", daemon=True))
        self._listeners[-1].start()

    def _unseat(self, seat: _Seat) -> None:
        """End a worker, busy or not."""
        seat.leaving = True
        with seat.exporting:  # what it writes is whole, or not begun
            seat.empty = True
        if ray.is_initialized():
            ray.kill(seat.post)
        if self._cluster is not None:
            self._cluster.give_back(seat.place)

    def _await_listeners(self) -> None:
        deadline = monotonic() + _END_S
        for thread in self._listeners:
            thread.join(max(0.0, deadline - monotonic()))

    # Out

    def _shipped(self, spec: RunSpec) -> Any:
        """The spec in Ray's object store: once, and not for each worker."""
        if self._spec[0] is not spec:
            self._spec = spec, ray.put(spec)
        return self._spec[1]

    def _clear(self, seat: _Seat) -> None:
        """The last run is over, whose buffers are gone and whose states the worker drops by itself."""
        self._buffers.close()
        seat.copies.clear()
        seat.brought.clear()

    def _begin(self, seat: _Seat, task: Task) -> None:
        """Send a task, with the state that it begins with where the worker has not kept that."""
        trial = task.unit.trial
        for other in self._seats.values():
            if other is not seat or not other.copies.has(trial, task.digest):
                other.copies.discard(trial)
        array = None
        if task.committed is not None and not seat.copies.has(trial, task.digest):
            memory = self._buffers.open(task.committed).memory
            array = np.frombuffer(memory, np.uint8, task.committed_bytes)
        stale = [other for other in seat.copies.take_stale() if other != trial]
        if task.recipe is not None:
            seat.brought[trial] = task.recipe
        seat.task, seat.sent_s = task, monotonic()
        seat.post.obey.remote(task, array, stale)

    # In: on a listener's thread

    def _listen(self, seat: _Seat) -> None:
        try:
            if not ray.wait([seat.stream], timeout=_LATE_S)[0]:
                wants = "it is slow to start" if node_of(seat.place) else f"no node has {self._resources} for it"
                self._tell(seat, Late(seat.worker, f"{wants}, for {_LATE_S:.0f} s now"))
            while self._hear(seat):
                pass
        except Exception as error:  # noqa: BLE001  # the actor, its node or all of Ray is gone
            reason = _reason(error)
            self._tell(seat, Lost(seat.worker, reason, with_node="its node has died" in reason))

    def _hear(self, seat: _Seat) -> bool:
        """Take the next item of a stream; false at its end. Who still names an item keeps the copy in the store."""
        try:
            message, attached = ray.get(next(seat.stream))
        except StopIteration:
            return False
        if isinstance(message, Finished):
            message = self._exported(seat, message, attached)
        self._tell(seat, message, attached)
        return True

    def _tell(self, seat: _Seat, message: Message, attached: Any = None) -> None:
        self._heard.append((seat, message, attached))
        self.wake()

    def _exported(self, seat: _Seat, finished: Finished, array: Bytes) -> Message:
        """Write the checkpoint that is due: here, because the folder of the run need not be on the worker's node."""
        task = seat.task
        if task is None or task.export is None:
            return finished
        path, best = task.export.place(finished.metrics)
        with seat.exporting:
            if path is None or seat.empty:
                return finished
            try:
                mine = Mapped.private(len(array))  # the array is read only, which tensors may not be
                np.frombuffer(mine.memory, np.uint8)[:] = array
                recipe: Recipe = cloudpickle.loads(seat.brought.get(finished.unit.trial, seat.recipe))
                exported = recipe.keep(state.read(mine), path, partial(self._stand_still, seat), task.export.durable)
            except Exception as error:  # noqa: BLE001  # as it would be in the unit
                return Raised(finished.worker, finished.job, finished.unit, traceback.format_exc(), kinds_of(error))
        return replace(finished, best_written=best, exported=exported)

    def _stand_still(self, seat: _Seat, error: OSError) -> None:
        if seat.leaving:
            raise error
        self._tell(seat, Waiting(seat.worker, told(error)))
        sleep(LOOK_AGAIN_S)

    # In: inside `wait`

    def _taken(self, seat: _Seat, message: Message, attached: Any) -> Message:
        match message:
            case Joined():
                seat.node = attached
            case Ready() if message.error is not None:
                message.error.add_note(
                    f"{seat.worker} is on the node {seat.node}. Each node must have the data at the same path, or be "
                    "able to fetch it from a URI."
                )
            case Finished():
                return self._finished(seat, message, attached)
        return message

    def _finished(self, seat: _Seat, finished: Finished, array: Bytes) -> Message:
        """Bring the state into the trial's working buffer."""
        trial = finished.unit.trial
        try:
            working = self._grow(trial, finished.used)
        except StateMemoryError as error:
            return Raised(finished.worker, finished.job, finished.unit, str(error), kinds_of(error))
        np.frombuffer(self._buffers.open(working).memory, np.uint8)[: finished.used] = array
        seat.copies.add(trial, finished.digest, finished.used)
        # Clocks of nodes differ: the unit has ended now by ours, and what is not the worker's time is the hop's.
        spans = finished.spans.ended_at(monotonic(), sent=seat.sent_s)
        return replace(finished, spans=spans)


def _reason(error: Exception) -> str:
    """What Ray knows of an actor's end, without the list of its attributes."""
    text = " ".join(str(error).split())
    return text[max(0, text.rfind("The actor ")) :]
