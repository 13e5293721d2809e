"""Lengths of a Ray run that count units and look as if epochs were meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import TrialScheduler
from ray.tune.stopper import MaximumIterationStopper

from cerebro_tune.horizon import told_in_epochs
from cerebro_tune.units import Units
from cerebro_tune_ray.schedulers import clock, lengths

_REPORTS = "training_iteration"  # Ray's count of reports


def horizon_warning(scheduler: TrialScheduler | None, stop: Any, *, shards: int, report_every: str) -> str | None:
    """One text about the scheduler's lengths and the stop condition, when one of them is below an epoch of units.

    Lengths in anything but `training_iteration` are what they say, and with a report per epoch so are those.
    """
    if report_every == "epoch":
        return None
    counted = lengths(scheduler) if scheduler is not None and clock(scheduler) == _REPORTS else {}
    if any(isinstance(length, Units) for length in counted.values()):
        counted = {}  # a scheduler may keep one of them as another number: its author knows what units are
    return told_in_epochs(_REPORTS, counted | _stop_length(stop), shards)


def _stop_length(stop: Any) -> dict[str, float]:
    if isinstance(stop, Mapping) and _REPORTS in stop:
        return {f'stop["{_REPORTS}"]': stop[_REPORTS]}
    if isinstance(stop, MaximumIterationStopper):
        return {"max_iter": stop._max_iter}
    return {}
