"""One run: events from the workers into the state machine, its instructions back out, and the tuner in between.

Whoever calls `drive` runs the loop; there is no thread of the executor's own. Everything else may be called from any
thread: a command is carried out by the loop between two events, and its caller gets its answer, or its error.

The file is long for one reason: `Run` is where state machine, store, workers, book and tuner meet, and each of its
short methods needs several of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cerebro_tune import state
from cerebro_tune.book import TrialBook, TrialPage
from cerebro_tune.buffers import Mapped, copy
from cerebro_tune.catchup import CatchUp
from cerebro_tune.commands import CommandQueue
from cerebro_tune.configtext import config_text, plain_config
from cerebro_tune.crew import Crew
from cerebro_tune.durable import DurableStates
from cerebro_tune.errors import ConfigurationError, StateMemoryError, StateTooLargeError
from cerebro_tune.events import (
    Event,
    RunResumed,
    SearchEnded,
    TrialAdded,
    TrialCloned,
    TrialDecided,
    TrialRestored,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
    WorkerStayedAway,
)
from cerebro_tune.exporter import Exporter
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import DropState, Instruction, ReportUnit, StartJob
from cerebro_tune.journal import Journal, Row
from cerebro_tune.ledger import FullDisk, Ledger
from cerebro_tune.policy import make_policy
from cerebro_tune.progress import Progress, Snapshot, take_snapshot
from cerebro_tune.recovery import (
    DISPATCHED,
    RELEASED,
    SAVED,
    WISHED,
    Given,
    Past,
    Replayed,
    finished_facts,
    retell,
    starts_plain,
)
from cerebro_tune.results import Results
from cerebro_tune.settings import RunSettings, Tuner
from cerebro_tune.store import BufferRef, StateStore
from cerebro_tune.timeline import Timeline
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision, Shard, Status, Unit, WorkerId
from cerebro_tune.wholefile import give_up
from cerebro_tune.workers.base import Workers
from cerebro_tune.workers.messages import (
    Export,
    Finished,
    Late,
    Lost,
    Message,
    Output,
    Raised,
    Ready,
    Task,
    Waiting,
)

T = TypeVar("T")


class Run:
    """Trials on workers, from the first unit to the results."""

    def __init__(
        self,
        workers: Workers,
        store: StateStore,
        recipe: Recipe,
        settings: RunSettings,
        tuner: Tuner,
        progress: Progress,
        journal: Journal | None = None,
    ) -> None:
        self.settings = settings
        clock = workers.clock
        self._disk = FullDisk(clock, self._trouble, self._stopped)
        self._ledger = Ledger(journal, self._disk)
        self._undispatched = False
        self._workers, self._store = workers, store
        store.stand_still = workers.stand_still = self._disk.stand_still
        self._crew = Crew(workers, settings)
        self._tuner, self._progress = tuner, progress
        spec = settings.spec
        self._hopper = Hopper(
            [Shard(index, rows) for index, rows in enumerate(spec.shard_rows)],
            policy=settings.policy,
            live_trials=settings.live_trials,
            report_every=spec.report_every,
            max_failures=settings.max_failures,
            seed=spec.seed,
        )
        self._logical = make_policy(settings.policy, spec.seed).logical
        self._book = TrialBook(settings, recipe)
        self._timeline = Timeline(workers.ids, settings.trace)
        self._commands = CommandQueue(workers.wake)
        self._exporter = Exporter(self._book, clock, self._disk, self._ledger.kept)
        self._inbox: deque[Message] = deque()
        self._orders: deque[Instruction] = deque()
        self._results: dict[str, Finished] = {}
        """Of units that ended and are not committed."""
        self._past: Past | None = None
        """What came before, of a run that was taken up."""
        self._durable: DurableStates | None = None
        if journal is not None and settings.durable_every is not None:
            self._durable = DurableStates(
                settings.run_dir, settings.durable_every, store, self._commands.post, self._saved, self._trouble,
                self._ledger.when_safe, clock, self._disk,
            )  # fmt: skip
        self._is_where_it_was = True
        """Whether the states of trials are those that the book tells of."""
        self._search_ended = self._interrupted = self._shown = False
        self._fatal: Exception | None = None

    # Commands: from any thread.

    def add(self, config: Config, recipe: Recipe | None = None, index: int | None = None) -> str:
        """Add a trial, of the run's recipe or one of its own. Returns its id.

        With the `index` of a trial whose place it takes it draws the random numbers that that one would have drawn.
        ConfigurationError for a config that cannot be trained.
        """
        return self._commands.ask(lambda: self._add(config, None, recipe, index))

    def clone(self, trial_id: str, config: Config | None = None, index: int | None = None) -> str:
        """Add a trial that goes on from another's last committed unit, with a changed config if given."""
        return self._commands.ask(lambda: self._add(config, trial_id, index=index))

    def restore(self, config: Config, path: Path, units: int, visited: Iterable[int], index: int) -> str:
        """Add a trial that goes on, paused, from a state that `save` has written: with what `progress` was then."""
        return self._commands.ask(lambda: self._restore(config, path, units, frozenset(visited), index))

    def save(self, trial_id: str, path: Path) -> str:
        """Write the state that the trial's last unit committed, so that it outlives this process; returns its digest.

        Not before `statefile.sync` has had the file does it survive a loss of power.
        """
        return self._commands.ask(lambda: self._store.save(self._page(trial_id).trial.id, path, durable=False))

    def progress(self, trial_id: str) -> tuple[int, list[int]]:
        """Units committed, and the shards visited in the epoch that the trial is in."""
        return self._commands.ask(lambda: (self._hopper.progress(trial_id)[1], sorted(self._hopper.visited(trial_id))))

    def decide(self, trial_id: str, decision: Decision) -> None:
        """Answer a report of the trial. What was asked out of turn meanwhile is joined with it: the firmer wins."""
        self._commands.ask(lambda: self._decide(trial_id, decision))

    def pause(self, trial_id: str) -> None:
        """Let the trial stand after the unit it runs."""
        self._commands.ask(lambda: self._wish(trial_id, Decision.PAUSE))

    def resume(self, trial_id: str) -> None:
        """Let a paused trial go on as soon as there is room among the live ones."""
        self._commands.ask(lambda: self._wish(trial_id, Decision.CONTINUE))

    def stop(self, trial_id: str) -> None:
        """End the trial after the unit it runs."""
        self._commands.ask(lambda: self._wish(trial_id, Decision.STOP))

    def end_search(self) -> None:
        """No more trials will come: `drive` returns when those that were added have ended or stand paused."""
        self._commands.ask(self._end_search)

    def units_of(self, trial_id: str) -> int:
        """How many units the trial trains in all, unless something ends it before."""
        return self._commands.ask(lambda: self._page(trial_id).trial.epochs * self.settings.shards)

    def status(self, trial_id: str) -> str:
        """The trial's status now."""
        return self._commands.ask(lambda: self._hopper.status(trial_id).value)

    def index(self, trial_id: str) -> int:
        """The trial's number, which its random numbers come from."""
        return self._page(trial_id).trial.index

    def units_left(self, trial_id: str) -> int:
        """Units that the trial has still before it."""
        _, done, total = self.ask(lambda: self._hopper.progress(trial_id))
        return total - done

    def state(self, trial_id: str) -> Any:
        """A copy of the state that the trial's last unit committed, as a tree; in `Tuner.on_end` at the latest."""
        return self._commands.ask(lambda: self._state(trial_id))

    def wake(self) -> None:
        """Make `turn` return, from any thread."""
        self._workers.wake()

    def interrupt(self) -> None:
        """Give up at once, with the results so far; safe in a signal handler."""
        self._interrupted = True
        self._workers.wake()

    def take_up(self, given: Given) -> None:
        """Before the loop: bring the run to where its journal ends.

        `given` is what its trials are now; see `recovery.retell`.
        """
        self._is_where_it_was = False
        self._past = retell(self._ledger.rows, self._hopper, self._book, self.settings.shards, given)

    @property
    def unended(self) -> set[str]:
        """Ids of the trials that have not ended."""
        return {page.trial.id for page in self._book if not self._hopper.status(page.trial.id).ended}

    @property
    def taken_up(self) -> int:
        """How many trials there were when the run was taken up; 0 of a new one."""
        return 0 if self._past is None else self._past.trials

    # The loop.

    def drive(self) -> Results:
        """Run until the search has ended and every trial with it; raise what makes the run impossible."""
        try:
            if self._past is None or self.unended or not self._over():
                self.begin()
            else:  # all of it was done by the one that died, but for what it has left lying about
                self._book.clear_staged(self._past.early)
                if self._durable is not None:
                    self._durable.clear_strays()
            while not self._over():
                self.turn()
            self._ledger.write()
            self._export_unended()
        finally:
            self.close()
        return self.results()

    def begin(self) -> None:
        """Set the workers up; the calling thread is the loop from now on. For a host with a loop of its own."""
        self._commands.take_over()
        self._progress.start(self.snapshot)
        self._shown = True
        self._assemble()
        if self._past is None:
            if self._durable is not None:
                self._durable.clear_strays()  # of a time that a loss of power has undone to the first row
            self._let_join()
        else:
            self._go_on_from(self._past)
        self._carry_out_commands()

    def turn(self, timeout_s: float | None = None) -> None:
        """Start what can be started, then wait for what the workers say, or for the time to pass, and see to it."""
        starts = self._hopper.dispatch()
        if starts or self._undispatched:  # one that gives no order changes what the next one looks at
            self._ledger.note(DISPATCHED, soon=True, starts=starts_plain(starts))
            self._undispatched = False
        for start in starts:
            self._start(start)
        self._ledger.write()  # while the workers train: what dies before it is done has lost no unit by that
        self._progress.update()
        patience_s = self._crew.patience_s
        if patience_s is not None and (timeout_s is None or patience_s < timeout_s):
            timeout_s = patience_s
        self._inbox.extend(self._crew.wait(timeout_s))
        self._hear_all()
        self._inbox.extend(self._crew.silent())
        self._hear_all()
        self._carry_out_commands()

    def ask(self, call: Callable[[], T]) -> T:
        """Have a call made on the loop's thread, and return its answer or raise its error; from any thread."""
        return self._commands.ask(call)

    @property
    def units(self) -> int:
        """Units committed so far."""
        return self._timeline.units

    def results(self) -> Results:
        """The results so far."""
        results = [self._book.result(page, self._hopper.status(page.trial.id), cut_short=True) for page in self._book]
        settings, shares = self.settings, self._timeline.shares
        return Results(results, settings.metric, settings.mode, settings.run_dir, shares, self._interrupted)

    def snapshot(self) -> Snapshot:
        """What a display shows."""
        return take_snapshot(self._book, self._hopper, self._crew, self._timeline)

    def _carry_out_commands(self) -> None:
        self._commands.carry_out()
        self._obey()

    def _over(self) -> bool:
        return self._interrupted or (
            self._search_ended
            and self._hopper.settled
            and not self._exporter.pending
            and not self._commands
            and not (self._durable and self._durable.pending)
        )

    def _assemble(self) -> None:
        """Every worker opens and checks its data before any of them trains."""
        for worker in self._crew.ids:
            self._crew.set_up(worker, check=True)
        while self._crew.awaited and not self._interrupted:
            self._inbox.extend(self._crew.wait())
            while self._inbox:
                match self._inbox.popleft():
                    case Ready() as ready:
                        self._crew.became_ready(ready)
                    case Lost() as lost:
                        self._crew.replace(lost, check=True)
                    case Late() as late:
                        self._note_late(late)
                    case Output() as output:
                        self._print(output)
                    case Waiting() as waiting:
                        self._note_waiting(waiting)

    def _let_join(self) -> None:
        """Workers join in order, so that runs repeat.

        Who is not ready joins as well, and is lost at once: it has its place, and the others do its part while it is
        late.
        """
        for worker in self._crew.ids:
            self._apply(WorkerJoined(worker, self._crew.holdings(worker)))
        for worker in sorted(self._crew.unready):
            self._apply(WorkerLost(worker))
            if worker in self._crew.late:
                self._apply(WorkerStayedAway(worker))

    # Workers to state machine.

    def _hear_all(self) -> None:
        while self._inbox:
            self._raise_if(self._fatal)  # before what the unit makes of it, which another time has more memory
            self._hear(self._inbox.popleft())
            self._obey()

    def _hear(self, message: Message) -> None:
        match message:
            case Finished() if self._hopper.job_of(message.worker) == message.job:
                self._finished(message)
            case Raised() if self._hopper.job_of(message.worker) == message.job:
                self._raised(message)
            case Output():
                self._print(message)
            case Ready():
                self._crew.became_ready(message)
                self._apply(WorkerJoined(message.worker, self._crew.holdings(message.worker)))
            case Lost():
                self._lost(message)
            case Late():
                self._note_late(message)
                self._apply(WorkerStayedAway(message.worker))
            case Waiting():
                self._note_waiting(message)

    def _finished(self, message: Finished) -> None:
        unit = message.unit
        self._crew.ended(message.worker)
        self._timeline.add(message)
        self._results[unit.trial] = message
        elapsed_s = message.spans.ended - message.spans.began
        self._apply(UnitFinished(message.job, unit, elapsed_s), finished=finished_facts(message))

    def _raised(self, message: Raised) -> None:
        unit = message.unit
        self._crew.ended(message.worker)
        page = self._book[unit.trial]
        page.error, page.raised = message.error, message.kinds
        reason = message.error.strip().rpartition("\n")[2]
        where = f"{unit.trial} failed in epoch {unit.epoch}, shard {unit.shard}"
        self._progress.say(f"{where}: {reason} (its result's .error has the traceback)", "stderr")
        self._apply(UnitFailed(message.job, unit, reason), error=message.error, raised=list(message.kinds))

    def _lost(self, message: Lost) -> None:
        unit = self._crew.ended(message.worker, whole=False)
        if unit is not None:
            self._store.abandon(unit.trial)
            # Kept only if this death is one too many.
            self._book[unit.trial].error = (
                f"{message.worker} was lost while it ran epoch {unit.epoch}, shard {unit.shard}: {message.reason}. "
                f"That happened to this trial more than max_failures={self.settings.max_failures} times."
            )
        if message.worker not in self._crew.unready:  # it had joined
            error = None if unit is None else self._book[unit.trial].error
            self._apply(WorkerLost(message.worker, message.with_node), error=error)
        what = ""
        if unit is not None and self._hopper.status(unit.trial) is not Status.FAILED:
            self._book[unit.trial].error = None
            what = f"; {unit.trial} is to run epoch {unit.epoch}, shard {unit.shard} again"
        self._progress.say(f"{message.worker} is lost: {message.reason}{what}", "stderr")
        self._crew.replace(message, check=False)

    def _note_late(self, message: Late) -> None:
        self._crew.late.add(message.worker)
        what = f"{message.worker} is not up: {message.reason}. The others do its part until it is"
        self._progress.say(what, "stderr")

    def _note_waiting(self, message: Waiting) -> None:
        self._disk.tell(f"{message.worker} stands still: {message.reason}")

    def _print(self, output: Output) -> None:
        for line in output.text.splitlines():
            self._progress.say(f"[{output.trial or output.worker}] {line}", output.stream)

    @staticmethod
    def _raise_if(error: Exception | None) -> None:
        if error is not None:
            raise error

    # State machine to workers and tuner.

    def _apply(self, event: Event, *, soon: bool = False, **facts: Any) -> None:
        """Tell the state machine; what it orders is carried out by `_obey`, never from inside another order.

        With `soon` the row may wait until the worker has its next unit, if nothing is ordered.
        """
        orders = self._hopper.apply(event)
        self._ledger.event(event, facts, soon=soon and not orders)
        self._undispatched = True
        self._orders.extend(orders)
        for trial, finished in list(self._results.items()):
            # Policy "fixed" holds a result back until its turn: not before that is it the state that others start from.
            _, done, total = self._hopper.progress(trial)
            if done > self._book[trial].units:
                del self._results[trial]
                page = self._book[trial]
                page.committed(finished)
                if not page.shipped:  # nobody goes on with it, so that its state was not trained again
                    continue
                self._store.commit(trial, finished.used, finished.digest)
                if finished.logged is not None:
                    self._book.recipe_of(page).log(trial, page.config, finished.logged)
                if self._durable is not None and done < total and self._durable.due(done):
                    self._durable.begin(trial, done)
                if finished.should_stop and done < total:
                    self._wish(trial, Decision.STOP)  # joined with what the tuner answers to the report, if one is due
                self._cool_if_paused(trial)

    def _save_now(self, page: TrialPage) -> None:
        if self._durable is not None:
            self._durable.write_now(page.trial.id, page.units)

    def _saved(self, trial: str, units: int, file: str) -> None:
        self._ledger.note(SAVED, trial=trial, units=units, file=file)

    def _trouble(self, what: str) -> None:
        self._progress.say(what, "stderr")

    def _cool_if_paused(self, trial: str) -> None:
        if self._hopper.status(trial) is Status.PAUSED:
            self._store.cool(trial)

    def _obey(self) -> None:
        while self._orders:
            match self._orders.popleft():
                case ReportUnit() as due:
                    self._report(due)
                case DropState(trial, status):
                    self._end(trial, status)

    def _start(self, start: StartJob) -> None:
        tasks = [self._task(start.job, unit) for unit in start.units]
        self._crew.forget((), self._store.freed())
        self._crew.give(start.worker, tasks)

    def _task(self, job: int, unit: Unit) -> Task:
        _, done, total = self._hopper.progress(unit.trial)
        epoch_done = done % self.settings.shards == self.settings.shards - 1
        return self._task_of(job, unit, done, self._book.export(unit, epoch_done, done + 1 == total, self._ledger.kept))

    def _task_of(self, job: int, unit: Unit, done: int, export: Export | None) -> Task:
        """The order to run a unit, which is number `done` of its trial."""
        page = self._book[unit.trial]
        shards = self.settings.shards
        position = done % shards
        committed, committed_bytes, working = self._store.buffers(unit.trial)
        return Task(
            job=job,
            unit=unit,
            trial_index=page.trial.index,
            config=page.shipped,
            epochs=page.trial.epochs,
            batch_size=page.batch_size,
            position=position,
            last=position == shards - 1,
            committed=committed,
            committed_bytes=committed_bytes,
            working=working,
            digest="" if committed is None else self._store.digest_of(unit.trial),
            trained_under=page.born_under if done == page.inherited else None,
            export=export,
            recipe=None if page.brought is None else page.brought.shipped,
        )

    def grow(self, trial: str, nbytes: int) -> BufferRef:
        """A working buffer for the unit that a worker runs; called inside `Workers.wait`."""
        try:
            return self._store.grow(trial, nbytes)
        except StateTooLargeError:
            raise  # which fails this trial
        except StateMemoryError as error:
            self._fatal = error
            raise

    def _report(self, due: ReportUnit) -> None:
        trial_id = due.unit.trial
        page = self._book[trial_id]
        report = page.report(due, self.settings.shards)
        if warning := self._book.check_metric(page, due):
            self._progress.say(warning, "stderr")
        self._book.note(page, report, due, self._ledger.when_safe)
        if due.epoch_done:
            self._progress.reported(trial_id, report)
        decision = self._tuner.on_report(trial_id, report)
        if decision is not None:
            self._commands.carry_out()  # what the tuner added while it decided comes before its decision
            self._decide(trial_id, decision, soon=True)  # if the row is lost, the tuner is asked again

    def _end(self, trial: str, status: Status) -> None:
        """Export the state of a trial that was stopped, then let go of it."""
        page = self._book[trial]
        if status is Status.STOPPED and self._exporter.due(page) and self._store.holds(trial):
            self._store.warm(trial)  # one that was paused must not go to disk while it is read
            if self._logical:  # when the tuner hears of the end is part of what repeats
                self._exporter.write(page, self._store.mapped(trial))
                self._release(trial)
                return
            self._exporter.begin(
                page,
                self._store.mapped(trial),
                then=lambda done: self._commands.post(partial(self._exported, trial, done)),
            )
        else:
            self._release(trial)

    def _exported(self, trial: str, done: Future[None]) -> None:
        if wrong := self._exporter.conclude(done):
            self._progress.say(f"{trial}: {wrong}", "stderr")
        self._release(trial)

    def _release(self, trial: str) -> None:
        page, status = self._book[trial], self._hopper.status(trial)
        self._book.recipe_of(page).end_log(trial, status.value)
        page.brought = None
        if page.checkpoint is not None:
            self._ledger.sync()  # the best is in its place
        # The tuner before the memory: it may want the state. And before the row: what it has not heard it hears again.
        self._tuner.on_end(self._book.result(page, status, cut_short=False))
        last = page.last_checkpoint
        self._ledger.note(RELEASED, trial=trial, last=None if last is None else last.stem, digests=page.digests)
        if self._durable is not None:
            self._durable.forget(trial)
        self._crew.forget((trial,), self._store.drop(trial))

    # Commands, on the loop's thread.

    def _add(
        self, config: Config | None, source: str | None, recipe: Recipe | None = None, index: int | None = None
    ) -> str:
        parent = None if source is None else self._page(source)
        brought = None if recipe is None else self._book.bring(recipe)
        if parent is not None:
            config, brought = parent.config if config is None else config, parent.brought
        page = self._book.new_page(config, brought, index)
        trial = page.trial
        facts = _facts_of(page) if self._ledger.kept else {}  # a config may hold weights, which take a while to digest
        if parent is None:
            self._apply(TrialAdded(trial), **facts)
        else:
            if not parent.units or not self._store.holds(parent.trial.id):
                raise ConfigurationError(
                    f"{source} has no state to go on from (no unit is behind it, or it has ended): add a trial with "
                    "its config."
                )
            self._apply(TrialCloned(trial, parent.trial.id), **facts)
            self._book.inherit(page, parent)
            self._store.clone(trial.id, parent.trial.id)
            self._save_now(page)
            self._ledger.sync()
        self._book.add(page)
        return trial.id

    def _restore(self, config: Config, path: Path, units: int, visited: frozenset[int], index: int) -> str:
        page = self._book.new_page(config, None, index)
        self._apply(TrialRestored(page.trial, units, visited))
        page.inherited = units
        self._store.restore(page.trial.id, path)
        self._book.add(page)
        self._decide(page.trial.id, Decision.PAUSE)
        return page.trial.id

    def _state(self, trial_id: str) -> Any:
        mapped = self._store.mapped(self._page(trial_id).trial.id)
        mine = Mapped.private(mapped.nbytes)
        copy(mapped, mine, mapped.nbytes)
        return state.read(mine)

    def _page(self, trial_id: str) -> TrialPage:
        try:
            return self._book[trial_id]
        except KeyError:
            known = ", ".join(page.trial.id for page in self._book) or "none"
            raise ConfigurationError(f"There is no trial {trial_id!r}; there are: {known}.") from None

    def _wish(self, trial_id: str, decision: Decision) -> None:
        """Pause, resume or stop out of turn; a trial whose report is not answered yet waits for the answer."""
        page = self._page(trial_id)
        if self._hopper.status(trial_id) is not Status.DECIDING:
            self._decide(trial_id, decision)
        elif page.wish is not Decision.STOP:
            page.wish = decision
            self._ledger.note(WISHED, trial=trial_id, decision=decision.value)
        self._ledger.sync()

    def _decide(self, trial_id: str, decision: Decision, *, soon: bool = False) -> None:
        page = self._page(trial_id)
        if page.wish is not None:
            decision, page.wish = decision.joined(page.wish), None
        self._apply(TrialDecided(trial_id, decision), soon=soon)
        self._cool_if_paused(trial_id)

    def _end_search(self) -> None:
        self._search_ended = True
        if self._past is None or not self._past.search_ended:
            self._apply(SearchEnded())

    # What came before.

    def _go_on_from(self, past: Past) -> None:
        """Bring back the states of trials, and do what was decided and not done when the coordinator died."""
        self._catch_up(self._trouble).bring_back(past, self._durable, self._exporter.due)
        if self._interrupted:
            return
        self._is_where_it_was = True
        self._results |= past.early
        before = [(page, self._hopper.status(page.trial.id)) for page in self._book]
        # From here on results are committed and reported, also those that came early, to which the tuner answers then.
        self._apply(RunResumed())
        for away in self._hopper.lost - {worker.number for worker in self._crew.ids}:
            self._apply(WorkerStayedAway(WorkerId(away)))
        self._let_join()
        for trial, status in past.ended.items():
            if trial not in past.released:
                self._orders.append(DropState(trial, status))
        for page, status in before:
            trial = page.trial.id
            stops = page.latest is not None and page.latest.should_stop and page.wish is None
            if (
                stops
                and not self._hopper.status(trial).ended
                and self._hopper.progress(trial)[1] < page.trial.epochs * self.settings.shards
            ):
                self._wish(trial, Decision.STOP)
            self._cool_if_paused(trial)
            if status is Status.DECIDING:
                decision = self._tuner.on_report(trial, page.last)
                if decision is not None:
                    self._decide(trial, decision)

    def replay(self, rows: Sequence[Row], trial: str) -> Replayed:
        """Instead of the loop: train a trial of another run's journal again, and compare."""
        self._past = past = retell(rows, self._hopper, self._book, self.settings.shards, ())
        self._commands.take_over()
        self._assemble()
        return self._catch_up(lambda _: None).train_again(self._page(trial), past)

    def _catch_up(self, say: Callable[[str], object]) -> CatchUp:
        task = lambda job, unit, done: self._task_of(job, unit, done, None)  # noqa: E731
        return CatchUp(self._crew, self._store, self._hopper, self._book, task, say, self._stopped)

    def _stopped(self) -> bool:
        return self._interrupted

    # The end.

    def _export_unended(self) -> None:
        """Write the last checkpoint of what stands paused, or was cut short by an interrupt."""
        unended = self.unended
        for page in self._book:
            trial = page.trial.id
            if trial in unended and self._store.holds(trial) and self._is_where_it_was and self._exporter.due(page):
                self._exporter.write(page, self._store.mapped(trial))

    def close(self) -> None:
        """Let go of everything: workers still busy with units are replaced. May be called twice."""
        if not self._commands.close():
            return
        self._disk.give_up()
        self._exporter.close()
        try:
            self._ledger.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._workers.stand_still = give_up  # they outlive the run, and must not keep it, its tuner and the executor
        if self._durable is not None:
            self._durable.close()
        self._crew.dismiss(lost={message.worker for message in self._inbox if isinstance(message, Lost)})
        for page in self._book:
            if not (status := self._hopper.status(page.trial.id)).ended:
                self._book.recipe_of(page).end_log(page.trial.id, status.value)
        if self._is_where_it_was:
            self._book.clear_staged(self._results.keys())
        self._store.close()
        if self.settings.trace:
            self._timeline.write(self.settings.run_dir / "trace.json")
        if self._shown:
            self._progress.stop()


def _facts_of(page: TrialPage) -> dict[str, Any]:
    return {"config": plain_config(page.config), "text": config_text(page.config), "batch_size": page.batch_size}
