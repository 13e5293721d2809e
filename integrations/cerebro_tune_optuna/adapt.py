"""What of the things that a tuner calls a trial is Optuna's. Importing this module imports no Optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import ConfigurationError

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro
    from cerebro_tune.seat import Seat


def adapt(trial: Any, executor: Cerebro | None, metric: str | None) -> Seat | None:
    """The seat of an Optuna trial; None for anything else."""
    if not any(base.__module__.startswith("optuna.trial") for base in type(trial).__mro__):
        return None
    if executor is None or metric is None:
        raise ConfigurationError(
            "An Optuna trial knows neither what trains it nor what it is measured by: give both, as in "
            'HopStrategy(cerebro, trial, metric="val_loss").'
        )
    from cerebro_tune_optuna.seat import TrialSeat

    return TrialSeat(trial, executor, metric)
