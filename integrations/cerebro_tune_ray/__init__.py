"""Ray Tune on model hopping. The executor for it is not in this release; `PromotionASHA` is a scheduler for any Ray.

The names are looked up when they are first used: the package can be imported, and asked what it has, without Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cerebro_tune.hosts import require_host

if TYPE_CHECKING:
    from cerebro_tune_ray.promotion import PromotionASHA as PromotionASHA

_HOMES = {"PromotionASHA": "promotion"}

__all__ = ["PromotionASHA"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_host("ray", extra="ray")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
