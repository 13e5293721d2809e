"""Ray Tune on model hopping: `tune` is `ray.tune` with one more argument, `PromotionASHA` a scheduler for any Ray.

`RayWorkers` is what `Cerebro(backend="ray")` runs units on.

The names are looked up when they are first used: the package can be imported, and asked what it has, without Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cerebro_tune.hosts import require_host

if TYPE_CHECKING:
    from cerebro_tune_ray import tune as tune
    from cerebro_tune_ray.promotion import PromotionASHA as PromotionASHA
    from cerebro_tune_ray.workers import RayWorkers as RayWorkers

_HOMES = {"PromotionASHA": "promotion", "RayWorkers": "workers"}

__all__ = ["PromotionASHA", "RayWorkers", "tune"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_host("ray", extra="ray")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return import_module(f"{__name__}.{name}")
