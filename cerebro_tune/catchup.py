"""The units since each trial's last state on disk, trained again after a coordinator's death and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from cerebro_tune.book import TrialBook, TrialPage
from cerebro_tune.crew import Crew
from cerebro_tune.durable import DurableStates
from cerebro_tune.errors import DamagedStateError, WorkerError
from cerebro_tune.hopper import Hopper
from cerebro_tune.recovery import Arrears, Past, Replayed
from cerebro_tune.store import StateStore
from cerebro_tune.units import Unit, WorkerId
from cerebro_tune.workers.messages import Finished, Late, Lost, Message, Raised, Ready, Task

MakeTask = Callable[[int, Unit, int], Task]
"""The task of a unit, which is number `done` of its trial, as a job of this number."""


class CatchUp:
    """Brings the states of trials to where the journal ends; each trial's units one after the other, trials abreast."""

    def __init__(
        self,
        crew: Crew,
        store: StateStore,
        hopper: Hopper,
        book: TrialBook,
        make_task: MakeTask,
        say: Callable[[str], object],
        interrupted: Callable[[], bool],
    ) -> None:
        self._crew, self._store, self._hopper, self._book = crew, store, hopper, book
        self._make_task, self._say, self._interrupted = make_task, say, interrupted
        self._running: dict[WorkerId, tuple[int, Arrears]] = {}
        """What each worker does, and as which job."""
        self._jobs = count(-1, -1)  # those of the state machine are positive: a late answer to one is none to the other
        self.differing: list[Unit] = []
        """Those whose digest was another than the journal's."""

    def bring_back(self, past: Past, durable: DurableStates | None, due: Callable[[TrialPage], bool]) -> None:
        """Have the states that are still needed in the store, and the latest on disk; what is `due` is exported."""
        wanted = [page for page in self._book if self._is_wanted(page, past, due)]
        self._train([self._arrears(page, past, durable) for page in wanted])
        if self._interrupted():
            return
        for page in self._book:
            unended = not self._hopper.status(page.trial.id).ended
            if page.source is not None and page.trial.id not in past.saved and unended:
                self._store.clone(page.trial.id, page.source)  # its row is the last: the source stands where it stood
                if durable is not None:
                    durable.write_now(page.trial.id, page.units)
        if durable is not None:
            durable.clear_strays()

    def train_again(self, page: TrialPage, past: Past) -> Replayed:
        """Train a trial from its beginning, or that of the trial that it goes back to, and compare its own units."""
        pages = [page]
        while pages[0].source is not None:
            pages.insert(0, self._book[pages[0].source])
        ends = [*(page.inherited for page in pages[1:]), pages[-1].units]
        for before, each, end in zip([None, *pages], pages, ends, strict=False):
            if before is not None:
                self._store.clone(each.trial.id, before.trial.id)
            again = Arrears.of(each, each.inherited, past)
            own = slice(end - each.inherited)
            self._train([replace(again, units=again.units[own], digests=again.digests[own], early=False)])
        differing = [(unit.epoch, unit.shard) for unit in self.differing if unit.trial == page.trial.id]
        return Replayed(page.trial.id, page.units - page.inherited, tuple(differing))

    def _is_wanted(self, page: TrialPage, past: Past, due: Callable[[TrialPage], bool]) -> bool:
        trial = page.trial.id
        if not page.shipped:  # nobody says what it was made of
            return False
        if self._hopper.status(trial).ended:
            return trial not in past.released and due(page)
        if page.source is not None and trial not in past.saved:
            return False
        return page.units > 0 or trial in past.early

    def _arrears(self, page: TrialPage, past: Past, durable: DurableStates | None) -> Arrears:
        """Take a trial's last state from the disk; returns the units since."""
        trial, units = page.trial.id, 0
        if (saved := past.saved.get(trial)) is not None and durable is not None:
            path = durable.found(trial, saved.file)
            try:
                self._store.restore(trial, path)
                units = saved.units
            except (OSError, DamagedStateError) as error:
                if page.inherited:
                    raise
                self._say(f"{trial} is trained again from its beginning: {error}")
        return Arrears.of(page, units, past)

    def _train(self, arrears: Sequence[Arrears]) -> None:
        """Train all of it; WorkerError where a unit raises that did not before."""
        waiting = [each for each in arrears if each.units]
        while (waiting or self._running) and not self._interrupted():
            for worker in self._crew.ids:
                busy = worker in self._running or worker in self._crew.unready
                if not busy and (each := self._next_for(worker, waiting)) is not None:
                    waiting.remove(each)
                    self._running[worker] = job, _ = next(self._jobs), each
                    self._crew.give(worker, [self._make_task(job, each.units[0], each.done)])
            for message in [*self._crew.wait(self._crew.patience_s), *self._crew.silent()]:
                self._hear(message, waiting)

    def _next_for(self, worker: WorkerId, waiting: Sequence[Arrears]) -> Arrears | None:
        """The first whose next shard the worker holds, or nobody does who will be there soon."""
        held = {
            shard for other in self._crew.ids if other not in self._crew.late for shard in self._crew.holdings(other)
        }
        mine = self._crew.holdings(worker)
        return next((e for e in waiting if e.units[0].shard in mine or e.units[0].shard not in held), None)

    def _is_of(self, message: Finished | Raised) -> bool:
        return message.worker in self._running and self._running[message.worker][0] == message.job

    def _hear(self, message: Message, waiting: list[Arrears]) -> None:
        match message:
            case Ready():
                self._crew.became_ready(message)
            case Late():
                self._crew.late.add(message.worker)
            case Finished() if self._is_of(message):
                _, each = self._running.pop(message.worker)
                self._crew.ended(message.worker)
                self._commit(each, message)
                if each.units:
                    waiting.append(each)
            case Raised() if self._is_of(message):
                raise WorkerError(
                    f"{message.unit.trial} raised in epoch {message.unit.epoch}, shard {message.unit.shard}, which it "
                    f"had trained before the run was taken up: what it does is not a function of its seeds.\n"
                    f"{message.error}"
                )
            case Lost():
                if message.worker in self._running:
                    _, each = self._running.pop(message.worker)
                    self._store.abandon(each.page.trial.id)
                    waiting.append(each)
                self._crew.ended(message.worker, whole=False)
                self._crew.replace(message, check=False)
            case _:
                pass  # what it prints was printed before, and who answers late or twice was heard

    def _commit(self, each: Arrears, message: Finished) -> None:
        unit, expected = each.units.pop(0), each.digests.pop(0)
        each.done += 1
        if each.units or not each.early:
            self._store.commit(unit.trial, message.used, message.digest)
        if message.digest != expected:
            self.differing.append(unit)
            self._say(
                f"{unit.trial} was trained again on epoch {unit.epoch}, shard {unit.shard}, and its state differs from "
                f"what it was (digest {message.digest}, before {expected}): what it does is not a function of its "
                "seeds, or the machine is another. It goes on from the new state."
            )
