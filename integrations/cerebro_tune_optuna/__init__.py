"""Optuna on model hopping: `optimize` asks and tells, `fit` trains inside an objective, `pruners` work side by side.

The names are looked up when they are first used, because the core asks `adapt` about whatever it is given as a trial,
with or without Optuna installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cerebro_tune.hosts import require_host

if TYPE_CHECKING:
    from cerebro_tune_optuna import pruners as pruners
    from cerebro_tune_optuna.asking import optimize as optimize
    from cerebro_tune_optuna.callback import CerebroCallback as CerebroCallback
    from cerebro_tune_optuna.pruners import PromotionPruner as PromotionPruner
    from cerebro_tune_optuna.seat import fit as fit

_HOMES = {
    "CerebroCallback": "callback",
    "PromotionPruner": "pruners",
    "fit": "seat",
    "optimize": "asking",
    "pruners": "pruners",
}

__all__ = ["CerebroCallback", "PromotionPruner", "fit", "optimize", "pruners"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_host("optuna", extra="optuna")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return module if name == "pruners" else getattr(module, name)
