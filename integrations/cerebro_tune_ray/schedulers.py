"""What Ray's own schedulers keep to themselves, read here alone: their arguments, and where they compare trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from cerebro_tune.errors import ConfigurationError

_KEPT: dict[type[TrialScheduler], tuple[str, ...]] = {
    AsyncHyperBandScheduler: ("_brackets", "_max_t", "_mode", "_time_attr", "_trial_info"),
    HyperBandScheduler: ("_max_t_attr", "_mode", "_time_attr", "_trial_info"),
    MedianStoppingRule: ("_grace_period", "_min_time_slice", "_mode", "_time_attr"),
    PopulationBasedTraining: ("_burn_in_period", "_mode", "_perturbation_interval", "_time_attr"),
}
"""Ray's schedulers that compare trials, and what is read of each; BOHB's and PB2 are subclasses."""

_ARGUMENTS = {
    "max_t": ("_max_t", "_max_t_attr"),
    "grace_period": ("_grace_period",),
    "min_time_slice": ("_min_time_slice",),
    "perturbation_interval": ("_perturbation_interval",),
    "burn_in_period": ("_burn_in_period",),
}
"""Arguments that are lengths of time, and the attributes that they may be kept as; 0 means that one is off."""


def compares(scheduler: TrialScheduler) -> bool:
    """Whether it is one of Ray's own that compare trials by their scores."""
    return isinstance(scheduler, tuple(_KEPT))


def lacking(scheduler: TrialScheduler) -> list[str]:
    """What is read here and is not there: another Ray than the ones that this was written for."""
    kept = {name for kind, names in _KEPT.items() if isinstance(scheduler, kind) for name in names}
    return sorted(name for name in kept if not hasattr(scheduler, name))


def clock(scheduler: TrialScheduler) -> str | None:
    """The name of what it takes for time; None when it takes none."""
    return getattr(scheduler, "_time_attr", None)


def mode(scheduler: TrialScheduler) -> str:
    """ "min" or "max", its own or the run's."""
    return str(getattr(scheduler, "_mode", None))


def lengths(scheduler: TrialScheduler) -> dict[str, float]:
    """Its arguments that are lengths of time."""
    found = {
        name: getattr(scheduler, attribute)
        for name, attributes in _ARGUMENTS.items()
        for attribute in attributes
        if getattr(scheduler, attribute, 0)
    }
    if isinstance(scheduler, AsyncHyperBandScheduler):  # keeps its grace period as the lowest rung
        found["grace_period"] = scheduler._brackets[0]._rungs[-1][0]
    return found


def check_lengths(scheduler: TrialScheduler) -> None:
    """HyperBand rounds its rungs down to whole numbers, and looks for one above 0 for ever."""
    max_t = lengths(scheduler).get("max_t", 1)
    if isinstance(scheduler, HyperBandScheduler) and max_t < 1:
        raise ConfigurationError(
            f"{type(scheduler).__name__} has max_t={max_t} of {clock(scheduler)!r}; it must be at least 1, because its "
            'rungs are whole numbers. For rungs within an epoch leave time_attr at "training_iteration".'
        )


def at_a_rung(scheduler: TrialScheduler, trial: Any, result: Mapping[str, Any]) -> bool:
    """Whether a scheduler that stops trials is about to compare this result with those of others."""
    time = result.get(str(clock(scheduler)))
    if time is None:
        return False
    if isinstance(scheduler, AsyncHyperBandScheduler):
        rungs = scheduler._trial_info[trial.trial_id]._rungs
        return any(time >= milestone and trial.trial_id not in recorded for milestone, recorded in rungs)
    if isinstance(scheduler, HyperBandScheduler):
        return bool(time >= scheduler._trial_info[trial][0]._cumul_r)
    return isinstance(scheduler, MedianStoppingRule) and bool(time >= scheduler._grace_period)
