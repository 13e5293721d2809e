"""What a run is made with, and who decides in it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cerebro_tune.errors import ConfigurationError
from cerebro_tune.policy import Policy
from cerebro_tune.results import TrialResult
from cerebro_tune.units import Decision
from cerebro_tune.workers.messages import RunSpec

Report = Mapping[str, Any]


class Tuner(Protocol):
    """Who decides. Called on the loop's thread; may call the run's commands from there."""

    def on_report(self, trial_id: str, report: Report) -> Decision | None:
        """Answer a report, or None and answer later, from any thread, with `Run.decide`."""

    def on_end(self, result: TrialResult) -> None:
        """A trial has ended; its checkpoints are written."""


class TrainAll:
    """The tuner of `fit`: everything goes on to its end."""

    def on_report(self, trial_id: str, report: Report) -> Decision:  # noqa: D102
        return Decision.CONTINUE

    def on_end(self, result: TrialResult) -> None:  # noqa: D102
        return


def whole_number(name: str, value: Any, least: int) -> int:
    """The value as an int, NumPy's included; ConfigurationError names it when it is none, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
    return number


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The arguments of `Cerebro` and of `fit`, resolved; `spec` is what the workers hear of them."""

    epochs: int
    batch_size: int
    policy: str | Policy
    live_trials: int | None
    max_failures: int
    pinned: bool
    keep: str
    metric: str | None
    mode: str
    trace: bool
    spec: RunSpec
    run_dir: Path
    unit_deadline_s: float | None = None
    """After which a unit hangs; None for what the units so far tell."""
    durable_every: int | None = None
    """Units between two states on disk; None for a run that nobody takes up."""

    @property
    def shards(self) -> int:
        """How many shards the training set has."""
        return len(self.spec.shard_rows)
