"""How often the tests of faults repeat, and what they have to tell: each prints a line at the end of the run."""

from __future__ import annotations

import os
from time import monotonic

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
"""For `make soak`: how long all of them go on together, beyond what `make test` asks of them."""
_LOOPS = 9
told: list[str] = []


def tell(line: str) -> None:
    """Have this printed at the end."""
    told.append(line)


class Loop:
    """Is true for as long as there is time left for one of the tests that repeat, from when it is asked first."""

    _ends: float | None = None

    def __bool__(self) -> bool:
        if self._ends is None:
            self._ends = monotonic() + SECONDS / _LOOPS
        return SECONDS > 0 and monotonic() < self._ends
