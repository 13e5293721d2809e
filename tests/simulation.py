"""Whole runs under a virtual clock: the real executor, state machine, store and journal on workers that are not there.

All that may go wrong does so by one seed: workers die, hang and are stopped; orders and answers are lost, come
late or twice; the disk is slow, or full; users stop, pause, resume and clone; the coordinator dies at any moment, by
a kill or by a loss of power, which takes what the disk had not got yet. Another then goes on in what is left of the
folder. Nothing waits, no process is started, and one seed gives one journal, row for row.

(Above 400 lines: clock, workers and world of one simulation, each of which knows the others.)
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from threading import Event
from typing import Any
from unittest.mock import patch

import cloudpickle

from cerebro_tune import Cerebro, Decision, Results, state, store
from cerebro_tune.buffers import BufferCache
from cerebro_tune.clock import Clock
from cerebro_tune.journal import MANIFEST, NAME, Journal
from cerebro_tune.run import Run
from cerebro_tune.trainable import Recipe, Trainable
from cerebro_tune.units import WorkerId
from cerebro_tune.wholefile import whole_file
from cerebro_tune.workers.base import Grow, Workers
from cerebro_tune.workers.messages import Finished, Lost, Message, Order, Raised, Ready, Setup, Spans, Task

EPOCHS, SHARDS = 2, 4
DEATHS = 4
"""Of the coordinator, in one run at most."""


class Died(BaseException):
    """The coordinator is dead: nothing of it may go on."""


class VirtualClock(Clock):
    """Time passes when somebody waits for it: then what was planned for that time happens."""

    def __init__(self, world: World) -> None:
        self._world, self._now, self._numbers = world, 0.0, count()
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []
        self._inside = False

    def now(self) -> float:
        return self._now

    def at(self, seconds: float, call: Callable[[], object]) -> None:
        """Plan a call for so many seconds from now."""
        heappush(self._agenda, (self._now + seconds, next(self._numbers), call))

    def step(self, until: float) -> bool:
        """Let the next planned thing happen, if that is before `until`; time is at it, or at `until`, then."""
        if not self._agenda or self._agenda[0][0] > until:
            self._now = max(self._now, until) if until < float("inf") else self._now
            return False
        self._world.tick()
        self._now, _, call = heappop(self._agenda)
        self._inside = True
        try:
            call()
        finally:
            self._inside = False
        return True

    def sleep(self, seconds: float, unless: Event | None = None) -> None:
        """Of the loop; a thread beside it sleeps in its own time."""
        if not self._inside:
            until = self._now + seconds
            while self.step(until):
                pass

    def beside(self, name: str) -> Executor:
        return _Thread(self, self._world)


class _Thread(Executor):
    """Makes its calls one after the other, each when a slow disk lets it."""

    def __init__(self, clock: VirtualClock, world: World) -> None:
        self._clock, self._world, self._free_s = clock, world, 0.0
        self._due: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._due.append((future, partial(call, *args, **kwargs)))
        slow = self._world.chance.expovariate(1 / self._world.disk_s)
        self._free_s = max(self._free_s, self._clock.now()) + slow
        self._clock.at(self._free_s - self._clock.now(), self._next)
        return future

    def _next(self) -> None:
        if self._due:
            future, call = self._due.popleft()
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001  # as a thread has it
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while self._due:
            self._next()


class Chain(Recipe):
    """A state is a hash over all that was trained, in order; the worst that can go wrong with one is to see."""

    name, suffix = "Chain", ".txt"

    def create(self) -> Trainable:
        raise AssertionError("simulated workers train nothing")

    def export(self, state: dict[str, Any], path: Path) -> None:
        world = World.current
        world.need_room()
        with whole_file(path) as file:
            file.write(state["chain"].encode())


def linked(chain: str, index: int, epoch: int, shard: int) -> str:
    """The state after one more unit."""
    return hashlib.blake2b(f"{chain} {index} {epoch} {shard}".encode(), digest_size=8).hexdigest()


@dataclass
class _Seat:
    """One worker's process, or what stands for it; `number` counts those that had this place."""

    number: int = 0
    free_s: float = 0.0
    hung: bool = False
    stopped: bool = False
    configs: dict[str, Any] = field(default_factory=dict)


class SimulatedWorkers(Workers):
    """Workers that finish, raise, die, hang or are not heard, as chance has it."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(("cpu",) * number, 1)
        self._world = world
        self.clock: VirtualClock = VirtualClock(world)
        self._seats = {worker: _Seat() for worker in self.ids}
        self._inbox: deque[tuple[WorkerId, int | None, Callable[[], Message | None]]] = deque()
        self._woken = False
        self._buffers = BufferCache()

    def start(self, grow: Grow) -> None:
        self._grow = grow

    def send(self, worker: WorkerId, order: Order) -> None:
        seat, chance = self._seats[worker], self._world.chance
        number = seat.number
        match order:
            case Setup():
                self._plan(worker, chance.uniform(0, 1), partial(self._say, worker, number, lambda: Ready(worker)))
                if chance.random() < self._world.trouble / 4:
                    self._lose(worker, chance.uniform(0, 2))
            case Task():
                if order.config is not None:
                    seat.configs[order.unit.trial] = cloudpickle.loads(order.config)
                self._take(worker, seat, order)

    def _take(self, worker: WorkerId, seat: _Seat, task: Task) -> None:
        world, chance = self._world, self._world.chance
        fate = chance.random() / world.trouble if world.trouble else 1.0
        takes = chance.uniform(0.5, 2.0) * (1 + 3 * (task.trial_index % 2))
        began = self.clock.now()
        answer = partial(self._finish, worker, task, began, takes)
        if fate < 0.2:
            self._lose(worker, chance.uniform(0, takes))
            self._plan(worker, chance.uniform(0, takes / 2), partial(self._scribble, worker, seat.number, task))
        elif fate < 0.4:  # the order was lost, or it hangs in the unit, or a signal has stopped it
            seat.hung, seat.stopped = True, fate < 0.25
        elif fate < 0.5:  # the answer is lost
            self._plan(worker, takes, partial(self._say, worker, seat.number, lambda: answer() and None))
        else:
            self._plan(worker, takes, partial(self._say, worker, seat.number, answer))
            if fate < 0.8:  # it comes twice, perhaps when the worker has gone
                again = partial(self._say, worker, None, lambda: self._said_before(task))
                self.clock.at(takes + chance.uniform(0, 40), again)

    def _plan(self, worker: WorkerId, seconds: float, call: Callable[[], object]) -> None:
        """What one worker says comes in order."""
        seat = self._seats[worker]
        seat.free_s = max(seat.free_s, self.clock.now() + seconds)
        self.clock.at(seat.free_s - self.clock.now(), call)

    def _say(self, worker: WorkerId, number: int | None, make: Callable[[], Message | None]) -> None:
        self._inbox.append((worker, number, make))

    def _lose(self, worker: WorkerId, seconds: float) -> None:
        number, with_node = self._seats[worker].number, self._world.chance.random() < 0.2

        def die() -> None:
            if self._seats[worker].number == number:
                self._say(worker, number, lambda: Lost(worker, "it was killed", with_node))

        self.clock.at(seconds, die)

    def _scribble(self, worker: WorkerId, number: int, task: Task) -> None:
        """What a worker has written before it dies; when it is dead it writes no more."""
        if task.working is not None and not self._world.dead and self._seats[worker].number == number:
            self._buffers.open(task.working).memory[:] = b"\xff" * task.working.nbytes
            self._buffers.forget([task.working.key])

    def _said_before(self, task: Task) -> Message | None:
        return self._world.answers.get((task.job, task.unit))

    def _finish(self, worker: WorkerId, task: Task, began: float, takes: float) -> Message:
        """Train the unit: all that a real worker does to buffers and files, at once."""
        unit, world = task.unit, self._world
        config = self._seats[worker].configs[unit.trial]
        if config.get("raise_in") == [unit.epoch, unit.shard]:
            return Raised(worker, task.job, unit, "RuntimeError: told to raise", ("builtins.RuntimeError",))
        before = ""
        if task.committed is not None:
            tree = state.read(self._buffers.open(task.committed))
            before = tree["chain"]
            assert state.digest(self._buffers.open(task.committed), task.committed_bytes) == task.digest
        chain = linked(before, task.trial_index, unit.epoch, unit.shard)
        layout = state.plan({"chain": chain, "more": [0] * config.get("size", 0) * task.position})
        working = task.working
        if working is None or working.nbytes < layout.nbytes:
            working = self._grow(unit.trial, layout.nbytes)
        buffer = self._buffers.open(working)
        used = state.write(layout, buffer)
        metrics = {"train_loss": int(chain[:4], 16) / 65536}
        best, exported = False, ""
        if task.export is not None:
            path, best = task.export.place(metrics)
            if path is not None:
                exported = Chain().keep({"chain": chain}, path, lambda _: None, task.export.durable)
        spans = Spans(began, began, began + takes, began + takes)
        digest = state.digest(buffer, used)
        finished = Finished(worker, task.job, unit, metrics, used, digest, spans, best, exported)
        world.answers[task.job, unit] = finished
        self._buffers.close()
        return finished

    def wait(self, timeout_s: float | None = None) -> list[Message]:
        until = float("inf") if timeout_s is None else self.clock.now() + timeout_s
        while True:
            said = []
            while self._inbox:
                worker, number, make = self._inbox.popleft()
                if number in (None, self._seats[worker].number) and (message := make()) is not None:
                    said.append(message)
            if said or self._woken:
                self._woken = False
                return said
            if not self.clock.step(until):
                assert timeout_s is not None, f"seed {self._world.seed}: the run waits for what will never come"
                return []

    def wake(self) -> None:
        self._woken = True

    def stopped(self) -> list[WorkerId]:
        return [worker for worker, seat in self._seats.items() if seat.stopped]

    def restart(self, worker: WorkerId) -> None:
        self._seats[worker] = _Seat(self._seats[worker].number + 1, self.clock.now())

    def close(self) -> None:
        self._buffers.close()


class World:
    """All that happens to one run, by a seed: what it is of, who dies when, and what users do."""

    current: World

    def __init__(self, seed: int, folder: Path, train: Any, undisturbed: bool = False) -> None:
        World.current = self
        self.seed, self.folder, self._train = seed, folder / "0", train
        plan = Random(f"plan {seed}")
        self.policy = plan.choice(["auto", "fixed", "random", "fixed"])
        self.commands = plan.random() < 0.5
        self.configs = [
            {"raise_in": [plan.randrange(EPOCHS), plan.randrange(SHARDS)]}
            if plan.random() < 0.15
            else {"number": number}
            for number in range(plan.randint(1, 5))
        ]
        self._settings = {
            "workers": plan.randint(1, 3),
            "live_trials": plan.choice([None, 1, 3]),
            "durable_every": plan.choice([1, 2, 3, None]),
            "report_every": plan.choice(["unit", "unit", "epoch"]),
            "keep": plan.choice(["best", "last"]),
            "max_failures": 1000 if self.policy == "fixed" or undisturbed else plan.choice([1, 1000]),
        }
        self._metric = plan.choice([None, "train_loss"])
        self.chance = Random(f"chance {seed}")
        self.trouble = 0.0 if undisturbed else plan.choice([0.0, 0.05, 0.2])
        self.disk_s = plan.choice([0.001, 1.0, 20.0])
        self._full = 0.0 if undisturbed else plan.choice([0.0, 0.0, 0.02])
        self._deaths_left = 0 if undisturbed else plan.choice([0, 1, 2, DEATHS])
        self._attempts_that_fail = 0
        self._ticks = 0
        self._dies_at = 0
        self.dead = False
        self._journal: Journal | None = None
        self.answers: dict[Any, Finished] = {}
        self.asked: list[tuple[str, str]] = []
        """What users have asked for: (what, trial)."""
        self.acknowledged: list[tuple[str, str, int, int]] = []
        """What they were told is done: (what, trial, its units then, how much was asked before); of a clone its own."""
        self.deaths = 0

    @property
    def repeats(self) -> bool:
        """Whether the run must end as an undisturbed one, bit for bit."""
        return self.policy == "fixed" and not self.commands

    def run(self) -> Results:
        """From the beginning to the end, with as many coordinators as that takes."""
        while True:
            self.dead, self._ticks, self.answers = False, 0, {}
            self._dies_at = self._deaths_left and self.chance.choice(
                [self.chance.randint(1, 60), self.chance.randint(1, 400)]
            )
            try:
                with self._faults():
                    return self._live()
            except Died:
                self.deaths += 1
                self._deaths_left -= 1
                self.folder = self._left_behind

    def _live(self) -> Results:
        """One coordinator's life."""
        settings = {name: value for name, value in self._settings.items() if value is not None}
        cerebro = Cerebro(
            self._train, epochs=EPOCHS, backend="inline", policy=self.policy, run_dir=self.folder, progress=False,
            unit_deadline_s=30.0, **settings,
        )  # fmt: skip
        cerebro._make_workers = lambda: SimulatedWorkers(self, len(cerebro.devices))
        tuner = Answers(self)
        try:
            run = cerebro.run(Chain(), tuner, metric=self._metric, given=self.configs)
            tuner.run = run
            try:
                for config in self.configs[run.taken_up :]:
                    run.add(config)
                run.end_search()
                if self.commands:
                    self._plan_commands(run)
            except BaseException:
                cerebro.give_up(run)
                raise
            return cerebro.drive(run)
        finally:
            cerebro.close()

    def _plan_commands(self, run: Run) -> None:
        clock = run._workers.clock
        assert isinstance(clock, VirtualClock)
        for _ in range(self.chance.randrange(6)):
            clock.at(self.chance.uniform(0, 30), partial(self._command, run))

    def _command(self, run: Run) -> None:
        """A user speaks of some trial, from a thread of his own."""
        pages = list(run._book)
        trial = self.chance.choice(pages).trial.id
        what = self.chance.choice(["stop", "pause", "resume", "clone"])
        self.asked.append((what, trial))
        before = len(self.asked)
        done = run._commands.post(lambda: self._carry_out(run, what, trial, before))
        done.add_done_callback(lambda done: done.exception() or self.acknowledged.append(done.result()))

    @staticmethod
    def _carry_out(run: Run, what: str, trial: str, before: int) -> tuple[str, str, int, int]:
        if what == "clone":
            trial = run.clone(trial)
        else:
            getattr(run, what)(trial)
        return what, trial, run._book[trial].units, before

    # Faults.

    def tick(self) -> None:
        """One more moment at which the coordinator may die."""
        self._ticks += 1
        if not self.dead and self._ticks == self._dies_at:
            self.dead = True
            self._left_behind = self.folder.with_name(str(self.deaths + 1))
            self._leave_behind()
            raise Died

    def _leave_behind(self) -> None:
        """What another process finds; of a loss of power less."""
        power = self.chance.random() < 0.5
        if self.folder.exists():
            shutil.copytree(self.folder, self._left_behind, ignore=shutil.ignore_patterns("*-shm"))
        copied = self._left_behind / "run-0000" / NAME
        if power and self._journal is not None and copied.exists():
            kept = self.chance.randint(self._journal.synced, self._journal.count)
            with closing(sqlite3.connect(copied)) as database, database:
                if database.execute("select count(*) from sqlite_master").fetchone() != (0,):
                    database.execute("delete from rows where number > ?", (kept,))

    def need_room(self) -> None:
        """Raise OSError while the disk is full."""
        if self._attempts_that_fail == 0 and self.chance.random() < self._full:
            self._attempts_that_fail = self.chance.randint(1, 5)
        if self._attempts_that_fail and not self.dead:
            self._attempts_that_fail -= 1
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        append, save = Journal.append, store.save
        world = self

        def appended(self: Journal, kind: str, **body: Any) -> None:
            world._journal = self
            world.tick()
            if kind != MANIFEST:  # on a full disk a run does not begin
                world.need_room()
            append(self, kind, **body)
            world.tick()

        def saved(*args: Any, **kwargs: Any) -> str:
            world.tick()
            world.need_room()
            digest = save(*args, **kwargs)
            world.tick()
            return digest

        with patch.object(Journal, "append", appended), patch.object(store, "save", saved):
            yield


class Answers:
    """The tuner: its answers are a function of the trial and how far it is."""

    run: Run

    def __init__(self, world: World) -> None:
        self._world = world

    def on_report(self, trial_id: str, report: Any) -> Decision | None:
        draw = Random(f"{self._world.seed} {trial_id} {report['units']}").random()
        decision = Decision.STOP if draw < 0.03 else Decision.PAUSE if draw < 0.06 else Decision.CONTINUE
        if draw < 0.9 or self._world.policy == "fixed":
            return decision
        clock = self.run._workers.clock
        assert isinstance(clock, VirtualClock)
        run = self.run
        clock.at(self._world.chance.uniform(0, 5), lambda: run._commands.post(lambda: run.decide(trial_id, decision)))
        return None

    def on_end(self, result: Any) -> None:
        return
