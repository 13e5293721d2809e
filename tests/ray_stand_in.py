"""A stand-in for Ray's TuneController: slots, statuses and a search, without processes, as schedulers see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

_ENDED = {Trial.TERMINATED, Trial.ERROR}


@dataclass(eq=False)
class StandInTrial:
    trial_id: str
    curve: Sequence[Any]  # the score after each unit
    status: str = Trial.PENDING
    units: int = 0
    is_saving: bool = False

    def is_finished(self) -> bool:
        return self.status in _ENDED


class StandInSearch:
    """Gives the trials one after another; with a limit, only while fewer are live, as ConcurrencyLimiter does."""

    def __init__(self, trials: list[StandInTrial], limit: float) -> None:
        self.left = list(reversed(trials))
        self.limit = limit
        self.live = 0

    def is_finished(self) -> bool:
        return not self.left

    def next_trial(self) -> StandInTrial | None:
        if not self.left or self.live >= self.limit:
            return None
        self.live += 1
        return self.left.pop()


class StandInController:
    """Drives a scheduler in Ray's order of calls, one event per `step`; `log` has what was started from which unit."""

    make: type[StandInTrial] = StandInTrial

    def __init__(
        self,
        scheduler: TrialScheduler,
        curves: Sequence[Sequence[Any]],
        slots: int,
        *,
        limit: float = float("inf"),
        ask: Callable[..., str] = lambda scheduler, *result: scheduler.on_trial_result(*result),
        report: Callable[[int, Any], dict[str, Any]] = lambda unit, score: {"training_iteration": unit, "loss": score},
    ) -> None:
        self.scheduler = scheduler
        self.slots = slots
        self.ask = ask
        self.report = report
        self.search_alg = StandInSearch([self.make(str(n), curve) for n, curve in enumerate(curves)], limit)
        self.trials: list[StandInTrial] = []
        self.log: list[tuple[str, int]] = []

    def get_trials(self) -> list[StandInTrial]:
        return self.trials

    def get_live_trials(self) -> set[StandInTrial]:
        return {trial for trial in self.trials if not trial.is_finished()}

    def of(self, status: str) -> list[StandInTrial]:
        return [trial for trial in self.trials if trial.status == status]

    def stop_trial(self, trial: StandInTrial) -> None:
        if trial.status == Trial.RUNNING:
            self.complete(trial, self.last_result(trial))
        else:
            self.scheduler.on_trial_remove(self, trial)
        self.search_alg.live -= 1
        trial.status = Trial.TERMINATED

    def complete(self, trial: StandInTrial, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(self, trial, result)

    def last_result(self, trial: StandInTrial) -> dict[str, Any]:
        return self.report(trial.units, trial.curve[trial.units - 1])

    def fill(self) -> None:
        """Start trials until no slot is free or the scheduler has none; the searcher keeps one trial ready."""
        while len(self.of(Trial.RUNNING)) < self.slots:
            if not self.of(Trial.PENDING) and (new := self.search_alg.next_trial()):
                self.trials.append(new)
                self.scheduler.on_trial_add(self, new)
            live = len(self.get_live_trials())
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                self.log.append((chosen.trial_id, chosen.units))
                chosen.status = Trial.RUNNING
            elif len(self.get_live_trials()) == live:
                return

    def step(self, pick: int) -> bool:
        """One unit of one of the running trials; False at the end of the search."""
        self.fill()
        running = self.of(Trial.RUNNING)
        if not running:
            return False
        trial = running[pick % len(running)]
        trial.units += 1
        decision = self.ask(self.scheduler, self, trial, self.last_result(trial))
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        elif decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        return True

    def end(self, picks: Sequence[int] = (0,)) -> None:
        """Go on to the end of the search, taking the picks round and round."""
        step = 0
        while self.step(picks[step % len(picks)]):
            step += 1
            assert step < 100_000, "the search does not end"
