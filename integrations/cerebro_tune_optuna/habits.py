"""What people write for trials that run one after another, and what it does to trials that advance side by side."""

from __future__ import annotations

from weakref import WeakSet

import optuna
from optuna import pruners as stock
from optuna.trial import TrialState

from cerebro_tune.executor import Cerebro
from cerebro_tune.horizon import told_in_epochs
from cerebro_tune.warn import warn_user
from cerebro_tune_optuna import versions

_INERT: dict[type[stock.BasePruner], str] = {
    stock.MedianPruner: "MedianPruner()",
    stock.PercentilePruner: "PercentilePruner(...)",
    stock.HyperbandPruner: "HyperbandPruner(cerebro)",
    stock.SuccessiveHalvingPruner: "SuccessiveHalvingPruner(cerebro)",
}
"""Optuna's pruners that know COMPLETE trials only, two of them where they are to find their resource by themselves."""

_STEPS = ("n_warmup_steps", "min_resource", "max_resource")
"""Settings of pruners that count reports."""

_told: WeakSet[stock.BasePruner] = WeakSet()
_looked_at: WeakSet[stock.BasePruner] = WeakSet()


def check(trial: optuna.Trial, executor: Cerebro) -> None:
    """Warn, once for each pruner, of one that is inert here, and of steps that seem to be meant as epochs."""
    pruner = trial.study.pruner
    if pruner not in _looked_at:
        _looked_at.add(pruner)
        _check_steps(pruner, executor)
    if pruner not in _told and _is_inert(pruner) and _has_company(trial):
        _told.add(pruner)
        name = type(pruner).__name__
        warn_user(
            f"Optuna's {name} compares a trial with those that are complete, and these advance side by side: it prunes "
            "none of them before some are. Use create_study(pruner=cerebro_tune_optuna.pruners."
            f"{_INERT[type(pruner)]}), which compares all that have reported at the same step."
        )


def _is_inert(pruner: stock.BasePruner) -> bool:
    kind = type(pruner)
    if kind is stock.HyperbandPruner:
        return bool(versions.setting(pruner, "max_resource") == "auto")
    if kind is stock.SuccessiveHalvingPruner:
        return versions.setting(pruner, "min_resource") is None
    return kind in _INERT


def _has_company(trial: optuna.Trial) -> bool:
    running = trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(other.number != trial.number and other.intermediate_values for other in running)


def _check_steps(pruner: stock.BasePruner, executor: Cerebro) -> None:
    if executor.report_every == "epoch":
        return
    settings = {name: versions.setting(pruner, name) for name in _STEPS}
    written = {name: steps for name, steps in settings.items() if isinstance(steps, int) and steps > 1}
    if told := told_in_epochs("A step", written, executor.train.num_shards):
        warn_user(f"{type(pruner).__name__}: {told}")
