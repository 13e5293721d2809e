"""ASHA with promotions on the real state machine under a virtual clock, over curves that were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

from cerebro_tune.events import TrialAdded, TrialDecided, UnitFinished, WorkerJoined
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import ReportUnit, StartJob
from cerebro_tune.policy import Policy
from cerebro_tune.rungs import Rungs
from cerebro_tune.simulate import holdings
from cerebro_tune.units import Decision, Shard, Trial, WorkerId

FACTOR = 3
FROM_ONE_SHARD = 8 / 9
"""The lowest rung, in units, of the ladder that has its rungs at 1 and 3 epochs of 8 units: 1, 3, 8, 24 units."""


class Executor(Protocol):
    """What ASHA asks of whoever trains: a `Run` has it all."""

    def add(self, config: Any) -> str:
        """Add a trial and return its id."""

    def decide(self, trial_id: str, decision: Decision) -> None:
        """Answer a report."""

    def resume(self, trial_id: str) -> None:
        """Let a paused trial go on."""


class Asha:
    """Trials wait at their rungs; a place that gets free goes to one that may be promoted, else to a new one.

    `first` is the lowest rung, in reports: of one between two of them the later counts. The largest value is best.
    """

    def __init__(self, executor: Executor, configs: Iterator[Any], live: int, first: float) -> None:
        self._executor, self._configs, self._live = executor, configs, live
        self._rungs = Rungs(first, FACTOR, "max")
        self._active: set[str] = set()
        self.started = 0
        self.values: list[dict[str, float]] = []
        """By rung: of each trial that has come to it."""
        self.promotions: list[tuple[int, str]] = []
        """(rung, trial), in order."""
        self._height: dict[str, int] = {}

    def fill(self) -> None:
        """Give the free places away; there may be no config left."""
        while len(self._active) < self._live:
            if (chosen := self._rungs.promotable()) is not None:
                self._rungs.promote(chosen)
                self.promotions.append((self._height[chosen] - 1, chosen))
                self._active.add(chosen)
                self._executor.resume(chosen)
            elif (config := next(self._configs, None)) is not None:
                self.started += 1
                self._active.add(self._executor.add(config))
            else:
                return

    def heard(self, trial_id: str, step: int, value: float, last: bool) -> Decision | None:
        """A report of the trial, number `step`; the answer, or None when it has been given."""
        if last or not self._rungs.is_due(trial_id, step):
            return Decision.CONTINUE
        height = self._height.setdefault(trial_id, 0)
        self._height[trial_id] = height + 1
        self.values += [{}] if height == len(self.values) else []
        self.values[height][trial_id] = value
        self._executor.decide(trial_id, Decision.PAUSE)
        self._rungs.record(trial_id, value)
        self._active.remove(trial_id)
        self.fill()
        return None

    def ended(self, trial_id: str) -> None:
        """The trial has trained to its end."""
        self._active.discard(trial_id)
        self._rungs.drop(trial_id)
        self.fill()

    def wrong_promotions(self) -> int:
        """Promoted trials that are not among the best 1/eta of all that have come to their rung in the end."""
        best = [set(sorted(v, key=v.__getitem__, reverse=True)[: len(v) // FACTOR]) for v in self.values]
        return sum(trial not in best[rung] for rung, trial in self.promotions)


# Recorded curves.


@dataclass(frozen=True)
class Curve:
    """One config as it was trained: accuracies after each unit, and what they cost in seconds."""

    whole: tuple[float, ...]
    subset: tuple[float, ...]
    unit_s: float
    whole_s: float
    subset_s: float


@dataclass(frozen=True)
class Curves:
    epochs: int
    shards: int
    all: tuple[Curve, ...]

    def shuffled(self, seed: int) -> Iterator[Curve]:
        """Each of them once."""
        return iter(Random(seed).sample(self.all, len(self.all)))


@cache
def recorded() -> Curves:
    """The curves that record_curves.py has recorded."""
    content = json.loads((Path(__file__).parent / "recorded_curves.json").read_text())
    about = content["about"]
    curves = [
        Curve(
            tuple(right / about["whole_rows"] for right in trial["whole"]),
            tuple(right / about["subset_rows"] for right in trial["subset"]),
            trial["unit_s"], trial["whole_s"], trial["subset_s"],
        )
        for trial in content["trials"]
    ]  # fmt: skip
    return Curves(about["epochs"], about["shards"], tuple(curves))


@dataclass
class Search:
    """One search in virtual seconds, on workers that hold all shards or (pinned) their own.

    Reports come after every unit, measured on the subset in mid-epoch, or after every epoch.
    """

    curves: Curves
    workers: int
    live: int
    placement: str
    by_unit: bool
    first: float
    seed: int
    policy: str | Policy = "auto"
    now: float = 0.0
    units: int = 0
    best: list[tuple[float, float]] = field(default_factory=list)
    """(when, accuracy) on the whole validation set, each better than the one before."""

    def __post_init__(self) -> None:
        self.hopper = Hopper(
            [Shard(index, 1) for index in range(self.curves.shards)],
            policy=self.policy,
            live_trials=self.live,
            report_every="unit" if self.by_unit else "epoch",
        )
        self.asha = Asha(self, self.curves.shuffled(self.seed), self.live, self.first)
        self._curve: dict[str, Curve] = {}
        self._agenda: list[tuple[float, int, UnitFinished]] = []
        self._tickets = count()

    def run(self, over: Callable[[Search], bool]) -> Search:
        """Go on until it is over, or no config is left."""
        for number, held in enumerate(holdings(self.curves.shards, self.workers, self.placement)):
            self.hopper.apply(WorkerJoined(WorkerId(number), held))
        self.asha.fill()
        self._dispatch()
        while self._agenda and not over(self):
            self.now, _, event = heappop(self._agenda)
            self.units += 1
            for order in self.hopper.apply(event):
                if isinstance(order, ReportUnit):
                    self._report(order)
            self._dispatch()
        return self

    @property
    def next_s(self) -> float:
        """When the next unit ends."""
        return self._agenda[0][0]

    def add(self, config: Curve) -> str:
        trial = Trial(f"t{len(self._curve)}", len(self._curve), self.curves.epochs)
        self._curve[trial.id] = config
        self.hopper.apply(TrialAdded(trial))
        return trial.id

    def decide(self, trial_id: str, decision: Decision) -> None:
        self.hopper.apply(TrialDecided(trial_id, decision))

    def resume(self, trial_id: str) -> None:
        self.decide(trial_id, Decision.CONTINUE)

    def _report(self, due: ReportUnit) -> None:
        trial, curve = due.unit.trial, self._curve[due.unit.trial]
        value = (curve.whole if due.epoch_done else curve.subset)[due.units_done - 1]
        if due.epoch_done and (not self.best or value > self.best[-1][1]):
            self.best.append((self.now, value))
        step = due.units_done if self.by_unit else due.units_done // self.curves.shards
        decision = self.asha.heard(trial, step, value, due.last)
        if decision is not None:
            self.decide(trial, decision)
        if due.last:
            self.asha.ended(trial)

    def _dispatch(self) -> None:
        for order in self.hopper.dispatch():
            took = self._cost(order)
            event = UnitFinished(order.job, order.units[0], took)
            heappush(self._agenda, (self.now + took, next(self._tickets), event))

    def _cost(self, order: StartJob) -> float:
        curve = self._curve[order.units[0].trial]
        ends_epoch = order.versions[0] % self.curves.shards == self.curves.shards - 1
        return curve.unit_s + (curve.whole_s if ends_epoch else curve.subset_s if self.by_unit else 0.0)


def interval(values: np.ndarray, statistic: Callable[..., Any], draws: int = 2_000) -> tuple[float, float]:
    """The 95 % interval of a statistic over the rows of `values`, by the bootstrap (percentiles, seeded)."""
    rng = np.random.default_rng(0)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
