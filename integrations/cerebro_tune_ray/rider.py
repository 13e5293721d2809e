"""One of Ray's trials, what its results are filled with, and who hears of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from time import time
from typing import Any, Protocol

import ray.util
from ray.tune.experiment import Trial

from cerebro_tune.trainable import Config
from cerebro_tune_ray.rows import Standing

Result = dict[str, Any]
TIMES = ("unit_time_s", "hop_time_s", "validation_time_s")


class Controller(Protocol):
    """What hears of the trials: Ray's loop."""

    compares: bool
    """Whether its scheduler compares trials, which are to advance side by side then."""

    def begun(self, shards: int, report_every: str) -> None:
        """The run has begun, and the data is known."""

    def reported(self, trial: Trial, result: Result) -> None:
        """The trial, which is running, reports; its state stands still until one of the orders is given."""

    def failed(self, trial: Trial, error: str) -> None:
        """The trial cannot go on; it may be started again, from its last good state."""

    def diverged(self, trial: Trial, result: Result) -> None:
        """The trial's loss is NaN or infinite; `result` is what it had last."""

    def ended(self, trial: Trial) -> None:
        """The trial has ended by itself after its last report."""


@dataclass
class Rider:
    """What is known of one of Ray's trials."""

    trial: Trial
    hop: str | None = None
    """Its trial of the run: None before its first start, and after it failed without a unit behind it."""
    index: int | None = None
    """Its number among the trials that were started, which its random numbers come from, whatever takes its place."""
    config: Config = field(default_factory=dict)
    """What `hop` was given."""
    iteration: int = 0
    time_s: float = 0.0
    parked: bool = False
    """Whether Ray has paused it between two reports: the next one waits until it is started again."""
    waiting: Callable[[], Result] | None = None
    """Makes the result that waits."""
    fit: int = 0
    """Which of a function's fits `hop` is of, from 1."""
    file: str | None = None
    """Where its state lies on disk, as of its last report."""
    back: Standing | None = None
    """Where it stood in a run that is over, from which its next start brings it back."""
    known: int = 0
    """Reports to come that Ray has heard already, before the death of a driver: they are not told again."""


def filled(rider: Rider, result: Result, elapsed_s: float) -> Result:
    """A result with all that Ray's own trainables fill in, where it is not there already."""
    rider.time_s += elapsed_s
    now = time()
    own = {
        "training_iteration": rider.iteration,
        "trial_id": rider.trial.trial_id,
        "date": f"{datetime.fromtimestamp(now):%Y-%m-%d_%H-%M-%S}",
        "timestamp": int(now),
        "time_this_iter_s": elapsed_s,
        "time_total_s": rider.time_s,
        "time_since_restore": rider.time_s,
        "iterations_since_restore": rider.iteration,
        "pid": os.getpid(),
        "hostname": platform.node(),
        "node_ip": _address(),
        "config": rider.trial.config,
        "done": False,
    }
    return own | result | {"training_iteration": rider.iteration}


@cache
def _address() -> str:
    return str(ray.util.get_node_ip_address())
