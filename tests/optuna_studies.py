"""What the tests of the Optuna integration share."""

from __future__ import annotations

import time
from typing import Any

import optuna
from optuna.trial import TrialState

from nets import Linear

COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def a_study(seed: int = 1, pruner: Any = None, **kwargs: Any) -> optuna.Study:
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    return optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner(), **kwargs)


def linear(trial: optuna.Trial) -> Any:
    return Linear, {"lr": trial.suggest_float("lr", 1e-4, 1.0, log=True)}


class Slow(Linear):
    """Takes its time for each unit."""

    def run_unit(self, work: Any) -> dict[str, float]:
        time.sleep(self._config["sleep_s"])
        return super().run_unit(work)


def one_slow(trial: optuna.Trial) -> Any:
    return Slow, linear(trial)[1] | {"sleep_s": 0.0 if trial.number else 1.0}


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.trials]
