"""How much a benchmark does: `FULL=1` in the environment asks for more seeds and runs, `SMALL=1` for a trial of it."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

SIZE = "small" if os.environ.get("SMALL") == "1" else "full" if os.environ.get("FULL") == "1" else "normal"


def sized(small: T, normal: T, full: T | None = None) -> T:
    """The value for this size; what FULL does not change is given twice only."""
    return small if SIZE == "small" else full if SIZE == "full" and full is not None else normal
