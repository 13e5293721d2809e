"""Where a user's own code meets the tuner that runs it: who asked for this call, and who decides in it.

A tuner's integration that calls a user's function (a Ray function trainable, an Optuna objective) sits down first,
`with seated(seat)`, on the thread that makes the call; whatever trains by hops in there finds the seat with `current`.
Where a tuner hands its own trial to the user's function instead, `as_seat` makes the seat of it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import ConfigurationError
from cerebro_tune.results import TrialResult
from cerebro_tune.settings import Report
from cerebro_tune.sharedrun import Caller, TakeState
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro


class Seat(ABC):
    """One call that a tuner makes: on which executor, measured by what, and who answers."""

    executor: Cerebro
    metric: str | None
    mode: str

    @abstractmethod
    def decide(self, trial_id: str, report: Report) -> Decision | None:
        """Answer a report, or None and answer later with `Run.decide`; on the thread of the run."""

    @abstractmethod
    def conclude(self, result: TrialResult) -> None:
        """The trial has ended; raise here what the tuner expects of a call that it has cut short."""

    def train(
        self, recipe: Recipe, config: Config, take_state: TakeState, *, metric: str | None, mode: str
    ) -> TrialResult:
        """Train one trial to its end, next to those of other calls; `take_state` is called with its last state."""
        caller = Caller(self.decide, take_state)
        return self.executor.train_one(recipe, config, caller=caller, metric=metric, mode=mode)

    def takes_over(self, callback: Any) -> bool:
        """Whether a Trainer's callback only tells this tuner what the seat tells it anyway, and is to be left out."""
        return False


class _Current(threading.local):
    seat: Seat | None = None


_current = _Current()


def current() -> Seat | None:
    """The seat of this thread, if a tuner made the call that is on."""
    return _current.seat


def as_seat(trial: Any, executor: Cerebro | None, metric: str | None) -> Seat:
    """The seat of whatever a tuner calls its trial, found through the entry point group `cerebro_tune.seats`."""
    if isinstance(trial, Seat):
        return trial
    for entry in entry_points(group="cerebro_tune.seats"):
        seat: Seat | None = entry.load()(trial, executor, metric)
        if seat is not None:
            return seat
    raise ConfigurationError(
        f"trial is {trial!r}, which is no trial of a tuner: give the one that Optuna calls the objective with "
        '(it needs: pip install "cerebro-tune[optuna]"), or leave it out.'
    )


@contextmanager
def seated(seat: Seat) -> Iterator[None]:
    """Sit down on this thread."""
    before, _current.seat = _current.seat, seat
    try:
        yield
    finally:
        _current.seat = before
