"""What a result is worth: a loss, and infinite where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isnan
from typing import Any


def loss_of(result: Mapping[str, Any], metric: str, mode: str) -> float:
    """The metric as something to be minimized; infinite when it is missing, None, NaN or infinitely bad."""
    value = result.get(metric)
    if value is None:
        return inf
    loss = float(value) if mode == "min" else -float(value)
    return inf if isnan(loss) else loss
