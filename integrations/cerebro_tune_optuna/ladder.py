"""Successive halving with promotions, as `optimize` does it: which trials wait, and which of them goes on."""

from __future__ import annotations

from cerebro_tune.rungs import Rungs
from cerebro_tune_optuna.pruners import PromotionPruner
from cerebro_tune_optuna.seat import TrialSeat


class LadderSeat(TrialSeat):
    """A trial whose fate the ladder decides."""

    def _should_prune(self) -> bool:
        return False


class Ladder:
    """The trials that wait at the rungs of a `PromotionPruner`."""

    def __init__(self, pruner: PromotionPruner, mode: str) -> None:
        self._rungs = Rungs(pruner.min_resource, pruner.reduction_factor, mode)
        self.waiting: list[str] = []

    def is_due(self, trial_id: str, step: int) -> bool:
        """Whether the trial has come to its next rung."""
        return self._rungs.is_due(trial_id, step)

    def wait(self, trial_id: str, value: float) -> None:
        """The trial stands at its next rung."""
        self._rungs.record(trial_id, value)
        self.waiting.append(trial_id)

    def promote(self, least: int) -> str | None:
        """The trial that is to go on; from a rung with few trials, as many as `least` may."""
        chosen = self._rungs.promotable(least)
        if chosen is not None:
            self._rungs.promote(chosen)
            self.waiting.remove(chosen)
        return chosen

    def give_up(self) -> list[str]:
        """Those that wait, none of which will go on any more."""
        waited, self.waiting = self.waiting, []
        for trial_id in waited:
            self._rungs.drop(trial_id)
        return waited

    def drop(self, trial_id: str) -> None:
        """The trial has ended."""
        self._rungs.drop(trial_id)
        if trial_id in self.waiting:
            self.waiting.remove(trial_id)
