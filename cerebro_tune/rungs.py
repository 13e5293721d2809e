"""The rungs of asynchronous successive halving with promotions.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, Algorithm 2: a trial that has come to
a rung waits there; whoever has a place to give looks down from the highest rung for a trial that is among the best
1 / factor of those recorded there and has not been promoted yet. Pure: no tuner, no clock.
"""

from __future__ import annotations

import math


class Rungs:
    """Who has come to which rung with which value.

    Rung k is reached after `first * factor**k` steps. Ties go to whoever came first; NaN is never promoted, but counts
    among those that have come.
    """

    def __init__(self, first: float, factor: int, mode: str) -> None:
        self._first, self._factor, self._sign = first, factor, 1.0 if mode == "min" else -1.0
        self._values: list[dict[str, float]] = []
        """By rung: of each trial that has come, in order."""
        self._promoted: list[set[str]] = []
        self._height: dict[str, int] = {}
        """By trial: the rungs it has come to."""

    def is_due(self, trial: str, step: int) -> bool:
        """Whether the trial has come to its next rung."""
        level: float = self._first * self._factor ** self._height.get(trial, 0)
        return step >= level

    def record(self, trial: str, value: float) -> None:
        """Note that the trial has come to its next rung."""
        rung = self._height.get(trial, 0)
        self._height[trial] = rung + 1
        if rung == len(self._values):
            self._values.append({})
            self._promoted.append(set())
        self._values[rung][trial] = self._sign * value

    def promotable(self, least: int = 0) -> str | None:
        """The trial that is to go on next; of a rung with few trials, as many as `least` may do so."""
        for rung in reversed(range(len(self._values))):
            values, promoted = self._values[rung], self._promoted[rung]
            places = max(least, len(values) // self._factor)
            ranked = sorted((trial for trial in values if not math.isnan(values[trial])), key=values.__getitem__)
            for trial in ranked[:places]:
                if trial not in promoted:
                    return trial
        return None

    def promote(self, trial: str) -> None:
        """The trial goes on from the rung where it stands."""
        self._promoted[self._height[trial] - 1].add(trial)

    def drop(self, trial: str) -> None:
        """The trial has ended, and will not be promoted any more; what it has reached still counts."""
        if rung := self._height.get(trial, 0):
            self._promoted[rung - 1].add(trial)
