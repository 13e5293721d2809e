"""The units since each trial's last state on disk, trained again after a coordinator's death and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cerebro_tune.crew import Crew
from cerebro_tune.errors import WorkerError
from cerebro_tune.recovery import Arrears
from cerebro_tune.store import StateStore
from cerebro_tune.units import Unit, WorkerId
from cerebro_tune.workers.messages import Finished, Lost, Message, Raised, Ready, Task

MakeTask = Callable[[Unit, int], Task]
"""The task of a unit, which is number `done` of its trial."""


class CatchUp:
    """Brings the states of trials to where the journal ends; each trial's units one after the other, trials abreast."""

    def __init__(self, crew: Crew, store: StateStore, make_task: MakeTask, say: Callable[[str], object]) -> None:
        self._crew, self._store, self._make_task, self._say = crew, store, make_task, say
        self.differing: list[Unit] = []
        """Those whose digest was another than the journal's."""

    def run(self, arrears: Sequence[Arrears], interrupted: Callable[[], bool]) -> None:
        """Train all of it; WorkerError where a unit raises that did not before."""
        waiting = [each for each in arrears if each.units]
        running: dict[WorkerId, Arrears] = {}
        while (waiting or running) and not interrupted():
            for worker in self._crew.ids:
                if worker not in running and worker not in self._crew.unready:
                    mine = self._crew.holdings(worker)
                    if (each := next((each for each in waiting if each.units[0].shard in mine), None)) is not None:
                        waiting.remove(each)
                        running[worker] = each
                        self._crew.give(worker, [self._make_task(each.units[0], each.done)])
            for message in [*self._crew.wait(self._crew.patience_s), *self._crew.silent()]:
                self._hear(message, running, waiting)

    def _hear(self, message: Message, running: dict[WorkerId, Arrears], waiting: list[Arrears]) -> None:
        match message:
            case Ready():
                self._crew.became_ready(message)
            case Finished():
                each = running.pop(message.worker)
                self._crew.ended(message.worker)
                self._commit(each, message)
                if each.units:
                    waiting.append(each)
            case Raised():
                raise WorkerError(
                    f"{message.unit.trial} raised in epoch {message.unit.epoch}, shard {message.unit.shard}, which it "
                    f"had trained before the run was taken up: what it does is not a function of its seeds.\n"
                    f"{message.error}"
                )
            case Lost():
                if message.worker in running:
                    each = running.pop(message.worker)
                    self._store.abandon(each.page.trial.id)
                    waiting.append(each)
                self._crew.ended(message.worker, whole=False)
                self._crew.replace(message, check=False)
            case _:
                pass  # what it prints was printed before

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
