"""What a study's loop does for the executor when a trial has ended: drop what nobody wants, stop at the budget."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree

import optuna
from optuna.trial import FrozenTrial, TrialState

from cerebro_tune.arguments import at_least
from cerebro_tune.executor import Cerebro
from cerebro_tune_optuna import left_over
from cerebro_tune_optuna.seat import mode_of


class CerebroCallback:
    """A callback of `study.optimize`, or of `cerebro_tune_optuna.optimize`.

    Args:
        executor: The `Cerebro` that trains.
        keep_best: The checkpoints of this many complete trials, the best of the study, are kept; those of the others
            are deleted when they have ended. In a study with several objectives those of the Pareto front are kept.
        max_units: The study is stopped when its trials have run this many units, `cerebro.units(epochs)` says how many
            are in an epoch. Trials in flight end.
    """

    def __init__(self, executor: Cerebro, keep_best: int = 3, max_units: int | None = None) -> None:
        self._executor = executor
        self._keep_best = at_least(0, keep_best=keep_best)
        self._max_units = None if max_units is None else at_least(1, max_units=max_units)
        self._dropped: set[int] = set()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A trial has been told."""
        trials = study.get_trials(deepcopy=False)
        if self._max_units is not None and _units(trials) >= self._max_units:
            study.stop()
        spared = self._dropped | {best.number for best in self._best(study, trials)}
        for ended in trials:
            if ended.state.is_finished() and ended.number not in spared:
                self._drop(ended)

    def _best(self, study: optuna.Study, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        if len(study.directions) > 1:
            return study.best_trials
        complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=mode_of(study) == "max")[
            : self._keep_best
        ]

    def _drop(self, trial: FrozenTrial) -> None:
        """Delete the trial's folder, if it is of a run of this executor's."""
        self._dropped.add(trial.number)
        folder = Path(trial.user_attrs.get("folder", "")).resolve()
        if folder.parent.parent == left_over.runs_of(self._executor).resolve():
            rmtree(folder, ignore_errors=True)


def _units(trials: list[FrozenTrial]) -> int:
    return sum(trial.user_attrs.get("units", 0) for trial in trials)
