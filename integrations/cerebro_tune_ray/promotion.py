"""ASHA as its paper has it (Li et al., MLSys 2020, Algorithm 2): trials are paused at rungs and promoted from them.

Ray's own ASHA only stops: a trial that arrives early at a rung goes on because it was early, and one that was stopped
there cannot return when later ones turn out worse. Here a trial waits at its rung, and goes on when it is in the best
1/eta of all results recorded there. Where a pause costs a checkpoint and a process, waiting is dear; between two units
it is free.

A trial's place is the highest rung it has a result at; a paused trial is thus one that was not promoted from its place
yet, and a promotion needs no book of its own. Results of trials that have ended still count in their rungs.

What ends a search: trials that can no longer be promoted. As long as a trial runs or waits, or the searcher has more,
any rung may grow and any place in it may come to be among the best 1/eta; when none of these is left, all that are
paused are stopped. A searcher that is not finished, and gives nothing while all trials are paused, waits for a trial to
end (a ConcurrencyLimiter counts paused trials as live): then the least promising one is stopped to make room.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.result import DEFAULT_METRIC
from ray.tune.schedulers import TrialScheduler

from cerebro_tune.errors import ConfigurationError
from cerebro_tune_ray.score import loss_of

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

_NOWHERE = -1  # the place of a trial that has reached no rung


@dataclass(slots=True)
class _Rung:
    """The results recorded at one milestone, best first; equal ones in their order of arrival."""

    milestone: float
    ranking: list[tuple[float, int, str]] = field(default_factory=list)  # (loss, order of arrival, trial)

    def record(self, trial_id: str, loss: float) -> None:
        insort(self.ranking, (loss, len(self.ranking), trial_id))

    def best(self, share: float) -> Iterator[str]:
        """The trials in the best floor(n / share)."""
        return (trial for _, _, trial in islice(self.ranking, int(len(self.ranking) / share)))


class PromotionASHA(TrialScheduler):
    """Asynchronous successive halving that pauses trials at its rungs and promotes the best 1/eta of each.

    The rungs are at grace_period, grace_period * reduction_factor, ... below max_t, where a trial ends. A result that
    has passed several rungs counts at the highest. A trial without a score at a rung (missing, NaN or infinitely bad)
    is stopped there.

    A plain Ray scheduler, for stock Ray too: there give `reuse_actors=True` and a class trainable, and mind that Ray
    starts pending trials by itself, before promotions (`TUNE_MAX_PENDING_TRIALS_PG=1` keeps them few).

    Args:
        time_attr: what counts time in a result: "training_iteration", "epoch" or any other that only grows.
        metric: what is compared; None takes the run's.
        mode: "min" or "max"; None takes the run's.
        max_t: where a trial ends.
        grace_period: the lowest rung.
        reduction_factor: eta, the paper's name for it.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: str | None = None,
        max_t: float = 100,
        grace_period: float = 1,
        reduction_factor: float = 4,
    ) -> None:
        super().__init__()
        if not 0 < grace_period <= max_t:
            raise ConfigurationError(
                f"grace_period is {grace_period!r}; it must be above 0, and at most max_t={max_t!r}."
            )
        if not reduction_factor > 1:
            raise ConfigurationError(f"reduction_factor is {reduction_factor!r}; it must be above 1.")
        if mode not in (None, "min", "max"):
            raise ConfigurationError(f'mode is {mode!r}; valid: "min", "max".')
        self._time_attr = time_attr
        self._metric = metric
        self._mode = mode
        self._max_t = max_t
        self._grace_period = grace_period
        self._eta = reduction_factor
        self._rungs = [_Rung(milestone) for milestone in _milestones(grace_period, max_t, reduction_factor)]
        self._places: dict[str, int] = {}  # trial -> index of the highest rung that it has a result at

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take the run's metric and mode; False when the scheduler was given its own."""
        if (self._metric and metric) or (self._mode and mode):
            return False
        self._mode = mode or self._mode
        self._metric = metric or self._metric or (DEFAULT_METRIC if self._mode else None)
        return True

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial that comes back after an error keeps its place."""
        if not self._metric or not self._mode:
            raise ConfigurationError(
                f"PromotionASHA has metric={self._metric!r} and mode={self._mode!r}: give both, to it or to the run, "
                'such as metric="val_loss", mode="min".'
            )

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Mapping[str, Any]) -> str:
        """PAUSE at a rung, STOP at the last one or without a score."""
        rung = self._arrive(trial.trial_id, result)
        if rung is None:
            return TrialScheduler.CONTINUE
        ends = rung is self._rungs[-1] or self._loss(result) == inf
        return TrialScheduler.STOP if ends else TrialScheduler.PAUSE

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Mapping[str, Any]) -> None:
        """A trial that a stop condition ended at a rung still counts there."""
        self._arrive(trial.trial_id, result)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """What it has reached still counts."""

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """What it has reached still counts."""

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """The paper's get_job: the best promotable trial of the highest rung that has one, otherwise a new trial."""
        trials = tune_controller.get_trials()
        parked = {t.trial_id: t for t in trials if t.status == Trial.PAUSED and t.trial_id in self._places}
        waiting = [t for t in trials if t.status in (Trial.PENDING, Trial.PAUSED) and t.trial_id not in parked]
        # Stock Ray asks in every step, with no slot free too: one that was promoted and did not start yet comes first.
        promoted = next((trial for trial in waiting if trial.trial_id in self._places), None)
        chosen = promoted or self._promotable(parked) or next(iter(waiting), None)
        if chosen is None and not any(trial.status == Trial.RUNNING for trial in trials):
            self._let_go(tune_controller, parked)
        return chosen

    def debug_string(self) -> str:
        """How many results each rung has, and how many of them went on."""
        above = [sum(place > index for place in self._places.values()) for index in range(len(self._rungs))]
        rungs = (
            f"{rung.milestone:g}: {len(rung.ranking)} ({promoted} went on)"
            for rung, promoted in zip(self._rungs, above, strict=True)
        )
        return f"Using PromotionASHA: {' | '.join(rungs)}"

    def _loss(self, result: Mapping[str, Any]) -> float:
        return loss_of(result, str(self._metric), str(self._mode))

    def _arrive(self, trial_id: str, result: Mapping[str, Any]) -> _Rung | None:
        """Record the result at the highest rung that it has reached, and return that; None when it is no new one."""
        if self._time_attr not in result:
            return None
        reached = bisect_right(self._rungs, result[self._time_attr], key=lambda rung: rung.milestone) - 1
        if reached <= self._places.get(trial_id, _NOWHERE):
            return None
        self._places[trial_id] = reached
        self._rungs[reached].record(trial_id, self._loss(result))
        return self._rungs[reached]

    def _promotable(self, parked: Mapping[str, Trial]) -> Trial | None:
        for place, rung in reversed(list(enumerate(self._rungs))):
            for trial_id in rung.best(self._eta):
                if trial_id in parked and self._places[trial_id] == place:
                    return parked[trial_id]
        return None

    def _let_go(self, tune_controller: TuneController, parked: Mapping[str, Trial]) -> None:
        """Stop what is parked: all of it at the end of the search, one trial where the searcher waits for an end."""
        hopeless = [
            parked[trial_id]
            for place, rung in enumerate(self._rungs)
            for _, _, trial_id in reversed(rung.ranking)
            if trial_id in parked and self._places[trial_id] == place
        ]
        over = tune_controller.search_alg.is_finished()
        for trial in hopeless if over else hopeless[:1]:
            tune_controller.stop_trial(trial)


def _milestones(grace_period: float, max_t: float, factor: float) -> list[float]:
    """By products, not logarithms: those miss the last rung of (1, 1000, 10) by rounding."""
    milestones = []
    milestone = grace_period
    while milestone < max_t:
        milestones.append(milestone)
        milestone *= factor
    return [*milestones, max_t]
