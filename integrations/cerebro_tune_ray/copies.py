"""Which states a worker has kept, as the coordinator knows it: they change by its own orders only."""

from __future__ import annotations

_KEPT_BYTES = 1 << 30
"""Beside the state of its last unit, which it trains in place anyway."""


class Copies:
    """The states that one worker has left from units that it ran, by trial; the last one is the newest."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, int]] = {}
        self._stale: list[str] = []

    def has(self, trial: str, digest: str) -> bool:
        """Whether the worker has this very state."""
        return trial in self._kept and self._kept[trial][0] == digest

    def add(self, trial: str, digest: str, nbytes: int) -> None:
        """The worker has run a unit; what it ran longest ago gives way."""
        self._kept.pop(trial, None)
        older = sum(size for _, size in self._kept.values())
        while older > _KEPT_BYTES:
            oldest = next(iter(self._kept))
            older -= self._kept[oldest][1]
            self.discard(oldest)
        self._kept[trial] = digest, nbytes

    def discard(self, trial: str) -> None:
        """The trial's state is another by now, or not needed here."""
        if self._kept.pop(trial, None):
            self._stale.append(trial)

    def take_stale(self) -> tuple[str, ...]:
        """The trials whose states the worker is to drop, once."""
        stale, self._stale = tuple(self._stale), []
        return stale

    def clear(self) -> None:
        """The run is over, and the worker drops everything by itself."""
        self._kept.clear()
        self._stale.clear()
