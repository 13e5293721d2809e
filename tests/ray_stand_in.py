"""A stand-in for Ray's TuneController: slots, statuses and a search, without processes, as schedulers see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
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


@dataclass(eq=False)
class Member(StandInTrial):
    """What PBT wants of a trial: its config tells which member's state it has."""

    config: dict[str, Any] = field(default_factory=dict)
    evaluated_params: dict[str, Any] = field(default_factory=dict)
    last_result: dict[str, Any] = field(default_factory=dict)
    experiment_tag = ""
    run_metadata: Any = None

    def __post_init__(self) -> None:
        self.config = {"member": self.trial_id, "lr": 0.1 + int(self.trial_id) / 10}
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        )

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


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
        stop: float = float("inf"),
        report: Callable[[int, Any], dict[str, Any]] = lambda unit, score: {"training_iteration": unit, "loss": score},
    ) -> None:
        self.scheduler = scheduler
        self.slots = slots
        self.stop = stop
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
            self.scheduler.on_trial_complete(self, trial, self.last_result(trial))
        else:
            self.scheduler.on_trial_remove(self, trial)
        self.search_alg.live -= 1
        trial.status = Trial.TERMINATED

    def ask(self, trial: StandInTrial, result: dict[str, Any]) -> str:
        return str(self.scheduler.on_trial_result(self, trial, result))

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
        ends = trial.units >= self.stop  # a stop condition: the scheduler is not asked
        decision = TrialScheduler.STOP if ends else self.ask(trial, self.last_result(trial))
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        elif decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        return True

    def end(self, picks: Sequence[int] = (0,), slots: Sequence[int] = ()) -> None:
        """Go on to the end of the search, with picks, and numbers of slots, that are taken round and round."""
        for step in range(100_000):
            self.slots = slots[step % len(slots)] if slots else self.slots
            if not self.step(picks[step % len(picks)]):
                return
        raise AssertionError("the search does not end")
