"""How a study is told of trials that have ended, and all that Optuna's own loop does then."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from cerebro_tune.errors import TrialFailedError
from cerebro_tune.results import TrialResult
from cerebro_tune_optuna.seat import Outcome, TrialSeat, diverged

Callback = Callable[[optuna.Study, FrozenTrial], None]
_logger = optuna.logging.get_logger("optuna.cerebro")


class Teller:
    """Tells a study how trials went; `error` is the first failure that `catch` does not cover."""

    error: BaseException | None = None

    def __init__(
        self,
        study: optuna.Study,
        catch: tuple[type[Exception], ...],
        callbacks: Iterable[Callback] | None,
        gc_after_trial: bool,
        bar: Any,
    ) -> None:
        self._study, self._catch, self._callbacks = study, catch, list(callbacks or ())
        self._gc_after_trial, self._bar, self._began_s = gc_after_trial, bar, monotonic()

    def ended(self, seat: TrialSeat, result: TrialResult, value: str) -> None:
        """A trial has ended in the run."""
        seat.note(result)
        outcome = seat.outcome(result, value)
        if result.error is not None and not seat.pruned and not diverged(result) and not self._caught(result):
            self._keep(TrialFailedError(f"Trial {seat.trial.number}, {result.trial_id}, failed:\n{result.error}"))
        self.tell(seat, outcome)

    def raised(self, seat: TrialSeat, error: Exception) -> None:
        """The objective has raised."""
        if isinstance(error, optuna.TrialPruned):
            self.tell(seat, Outcome(TrialState.PRUNED))
            return
        if not isinstance(error, self._catch):
            self._keep(error)
        self.tell(seat, Outcome(TrialState.FAIL, reason=repr(error)))

    def cut_short(self, seat: TrialSeat, reason: str) -> None:
        """The trial will not end, since the search does: none of ours is left RUNNING. No callback hears of it."""
        self._tell(seat, Outcome(TrialState.PRUNED) if seat.pruned else Outcome(TrialState.FAIL, reason=reason))

    def tell(self, seat: TrialSeat, outcome: Outcome) -> None:
        """Tell the study, then the callbacks."""
        frozen = self._tell(seat, outcome)
        if self._gc_after_trial:
            gc.collect()
        for callback in self._callbacks:
            callback(self._study, frozen)
        self._bar.update(monotonic() - self._began_s, self._study)

    def _tell(self, seat: TrialSeat, outcome: Outcome) -> FrozenTrial:
        study, trial = self._study, seat.trial
        try:
            if outcome.reason:
                trial.set_user_attr("error", outcome.reason)
            frozen = study.tell(trial, outcome.values, outcome.state, skip_if_finished=True)
        except UpdateFinishedTrialError:  # somebody else has told its end
            frozen = study.get_trials()[trial.number]
        _log(frozen, outcome.reason)
        return frozen

    def _keep(self, error: BaseException) -> None:
        self.error = self.error or error

    def _caught(self, result: TrialResult) -> bool:
        """Whether `catch` covers what has failed the trial: its class is known by name, it was raised in a worker."""
        if not result.raised:  # workers died in its units
            return issubclass(TrialFailedError, self._catch)
        names = {f"{kind.__module__}.{kind.__qualname__}" for kind in self._catch}
        return TrialFailedError in self._catch or not names.isdisjoint(result.raised)


def _log(trial: FrozenTrial, reason: str) -> None:
    if trial.state is TrialState.COMPLETE:
        of = f"value: {trial.value}" if len(trial.values) == 1 else f"values: {trial.values}"
        _logger.info(f"Trial {trial.number} finished with {of} and parameters: {trial.params}.")
    elif trial.state is TrialState.PRUNED:
        _logger.info(f"Trial {trial.number} pruned.")
    else:
        _logger.warning(
            f"Trial {trial.number} failed with parameters: {trial.params} because of the following error: {reason}"
        )
