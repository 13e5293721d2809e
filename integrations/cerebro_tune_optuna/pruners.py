"""Pruners for trials that advance side by side.

Optuna's Median and Percentile pruners compare a trial with trials that are complete, of which there are none while all
advance together. Here its peers are all trials that have reported at this step, whatever has become of them: running,
complete or pruned. Everything else is Optuna's own: the rule, the arguments, the warm-up.

    study = optuna.create_study(pruner=pruners.MedianPruner(n_warmup_steps=cerebro.units(epochs=1)))
"""

from __future__ import annotations

import math
from collections.abc import Container
from copy import copy
from typing import cast

import optuna
from optuna import pruners as stock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cerebro_tune.arguments import at_least
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.executor import Cerebro


class _Peers:
    """The study as it looks to one trial at one step: complete are all others that have reported there."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.direction = study.direction
        self._study, self._trial = study, trial

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        step, mine = self._trial.last_step, self._trial.number
        others = self._study.get_trials(deepcopy=deepcopy)
        at_step = [(other, other.intermediate_values.get(step or 0, math.nan)) for other in others]
        return [other for other, value in at_step if other.number != mine and not math.isnan(value)]


def _peers(study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
    return cast(optuna.Study, _Peers(study, trial))


def _without_nan(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    """The trial with the worst of all values where it has NaN: what NumPy warns of says nothing to a user."""
    worst = -math.inf if study.direction is StudyDirection.MAXIMIZE else math.inf
    copied = copy(trial)
    reports = trial.intermediate_values.items()
    copied.intermediate_values = {step: worst if math.isnan(value) else value for step, value in reports}
    return copied


class PercentilePruner(stock.PercentilePruner):
    """Prunes a trial whose best report is worse than this percentile of its peers' at the step.

    The arguments are those of Optuna's PercentilePruner. `n_startup_trials` are peers: a trial is judged at a step that
    at least so many others have reported at.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:  # noqa: D102
        return super().prune(_peers(study, trial), _without_nan(study, trial))


class MedianPruner(stock.MedianPruner):
    """Prunes a trial whose best report is worse than the median of its peers' at the step.

    The arguments are those of Optuna's MedianPruner. `n_startup_trials` are peers: a trial is judged at a step that at
    least so many others have reported at.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:  # noqa: D102
        return super().prune(_peers(study, trial), _without_nan(study, trial))


class HyperbandPruner(stock.HyperbandPruner):
    """Optuna's, with the resource of the run: `max_resource` is how often a trial reports.

    Optuna's own "auto" prunes nothing until a trial is complete. Brackets are drawn from a hash of the study's name:
    name the study if runs are to repeat.
    """

    def __init__(
        self, executor: Cerebro, min_resource: int = 1, reduction_factor: int = 3, bootstrap_count: int = 0
    ) -> None:
        super().__init__(min_resource, _reports(executor), reduction_factor, bootstrap_count)


class SuccessiveHalvingPruner(stock.SuccessiveHalvingPruner):
    """Optuna's, with the resource of the run: `min_resource` is a hundredth of how often a trial reports, at least 1.

    Optuna's own "auto" prunes nothing until a trial is complete.
    """

    def __init__(
        self,
        executor: Cerebro,
        min_resource: int | None = None,
        reduction_factor: int = 4,
        min_early_stopping_rate: int = 0,
        bootstrap_count: int = 0,
    ) -> None:
        first = max(1, _reports(executor) // 100) if min_resource is None else min_resource
        super().__init__(first, reduction_factor, min_early_stopping_rate, bootstrap_count)


class PromotionPruner(stock.BasePruner):
    """Asynchronous successive halving with promotions, for `cerebro_tune_optuna.optimize`.

    A trial that has reported `min_resource` times waits, and goes on when it is among the best 1 / `reduction_factor`
    of those that have come so far; there it waits again, after `reduction_factor` times as many reports, and so on. A
    place among the live trials goes to one that waits before a new one is asked for. What waits when all else has ended
    is told PRUNED, except that the best of the highest rung goes on to the end. A waiting trial costs nothing but
    the memory of its state. Rungs are those of one call of `optimize`.
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3) -> None:
        self.min_resource = at_least(1, min_resource=min_resource)
        self.reduction_factor = at_least(2, reduction_factor=reduction_factor)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """There is no pause in Optuna's own loop."""
        raise ConfigurationError(
            "PromotionPruner lets trials wait, and only cerebro_tune_optuna.optimize can do that: "
            "call optimize(study, objective, executor=cerebro, ...), or take another pruner."
        )


def _reports(executor: Cerebro) -> int:
    return executor.units(executor.epochs) if executor.report_every == "unit" else executor.epochs
