"""What a result is worth to a scheduler, and what becomes of one that has no score: no metric, NaN, or infinitely bad.

Ray's own schedulers take a NaN in different ways. ASHA lets it pass every rung, because no comparison with it holds;
HyperBand sorts by it, which puts the others into a wrong order too; PBT leaves the trial out, and it never exploits a
better one. Here it counts as worse than any score, and a trial without one does not survive where trials are compared,
be it the first or the only one there. PBT stops nobody: its trial exploits a better one, as the worst ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isnan
from typing import Any

from ray.tune.schedulers import TrialScheduler

from cerebro_tune_ray.schedulers import at_a_rung, compares, mode

# Not infinite: percentiles and the standardized scores of PB2 would come out as inf - inf.
_WORST_LOSS = 1e30


def loss_of(result: Mapping[str, Any], metric: str, mode: str) -> float:
    """The metric as something to be minimized; infinite when it is missing, None, NaN or infinitely bad."""
    value = result.get(metric)
    if value is None:
        return inf
    loss = float(value) if mode == "min" else -float(value)
    return inf if isnan(loss) else loss


def fill_score(scheduler: TrialScheduler, result: dict[str, Any]) -> bool:
    """Put the worst score into a result that has none, for one of Ray's schedulers; say whether it was so.

    In place, because schedulers keep the result, and BOHB's adds to it what its searcher reads.
    """
    metric = scheduler.metric
    if not compares(scheduler) or metric is None or loss_of(result, metric, mode(scheduler)) < inf:
        return False
    result[metric] = _WORST_LOSS if mode(scheduler) == "min" else -_WORST_LOSS
    return True


class Judged:
    """One of Ray's schedulers, or any other, of which no trial without a score survives a rung."""

    def __init__(self, scheduler: TrialScheduler) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """The scheduler's answer; STOP when the trial is at a rung without a score.

        The scheduler is asked all the same: others may wait for this result, and it counts among theirs.
        """
        ends = fill_score(self.scheduler, result) and at_a_rung(self.scheduler, trial, result)
        answer = self.scheduler.on_trial_result(controller, trial, result)
        return TrialScheduler.STOP if ends else answer

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """ASHA records a trial's last result, and the median rule reads it when others report."""
        fill_score(self.scheduler, result)
        self.scheduler.on_trial_complete(controller, trial, result)
