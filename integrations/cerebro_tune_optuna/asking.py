"""`optimize`: a study whose trials advance side by side, asked and told from one thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import optuna

from cerebro_tune.errors import CerebroError, ConfigurationError, RunBusyError
from cerebro_tune.executor import Cerebro
from cerebro_tune.results import TrialResult
from cerebro_tune.run import Run
from cerebro_tune.seeding import kept_streams, seed_build
from cerebro_tune.settings import Report
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision
from cerebro_tune_optuna import left_over, versions
from cerebro_tune_optuna.ladder import Ladder, LadderSeat
from cerebro_tune_optuna.pruners import PromotionPruner
from cerebro_tune_optuna.seat import Metric, TrialSeat, check_value, measured_by, mode_of
from cerebro_tune_optuna.telling import Callback, Teller

Objective = Callable[[optuna.Trial], Any]
_logger = optuna.logging.get_logger("optuna.cerebro")


def optimize(
    study: optuna.Study,
    objective: Objective,
    n_trials: int | None = None,
    timeout: float | None = None,
    *,
    executor: Cerebro,
    metric: Metric,
    value: str = "best",
    catch: Iterable[type[Exception]] | type[Exception] = (),
    callbacks: Iterable[Callback] | None = None,
    gc_after_trial: bool = False,
    show_progress_bar: bool = False,
) -> None:
    """Optimize an objective with `executor.live_trials` trials in flight; a new one is asked for when one ends.

    Args:
        study: Any study, with any sampler and storage. Trials report after every unit (or epoch, as the executor has
            it), and its pruner answers; `cerebro_tune_optuna.pruners` has some that work side by side.
        objective: Suggests, and returns what is to be trained: `(LitNet, params)`, or anything that `Cerebro.fit` takes
            without a config. It is called under the trial's seed, so that an instance that it makes repeats.
        n_trials: How many trials are asked for; None for no bound.
        timeout: Seconds after which no more are asked for; those in flight train on.
        executor: The `Cerebro` that trains.
        metric: What the study optimizes. A list of names for a study with several objectives, in which nothing is
            pruned, and each trial's last report counts.
        value: What a trial is worth, "best" (its best report on the whole validation set) or "last".
        catch: Exceptions, of the objective or in training, that fail their trial only; any other ends the search when
            the trials in flight have ended. A metric or training loss that is NaN fails its trial only.
        callbacks: Called as `callback(study, frozen_trial)` when a trial has been told; `study.stop()` works there.
        gc_after_trial: Collect garbage after every trial.
        show_progress_bar: Show Optuna's own.

    Each trial gets user attributes: trial_id, units, epochs, seconds (of training, hopping, validating, waiting),
    checkpoint, folder, process, pruned (the folder again, if stopped), and error if it failed. Trials that a killed
    process has left RUNNING, with the same run directory, go on first, from their last committed unit; where they
    cannot (the folder of their run is gone, the executor is another, or a PromotionPruner compared them), they are told
    FAIL with the reason. Ctrl-C ends the search, and fails the trials in flight.
    """
    check_value(value)
    measured_by(study, metric)
    with versions.optimizing(study):
        bar = versions.progress_bar(show_progress_bar, n_trials, timeout)
        kinds = tuple(catch) if isinstance(catch, Iterable) else (catch,)
        teller = Teller(study, kinds, callbacks, gc_after_trial, bar)
        try:
            Asking(study, objective, _Limits(n_trials, timeout), executor, metric, value, teller).run()
        finally:
            bar.close()
    if teller.error is not None:
        raise teller.error


@dataclass
class _Limits:
    n_trials: int | None
    timeout: float | None
    asked: int = 0
    began_s: float = field(default_factory=monotonic)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self.timeout is not None and monotonic() - self.began_s >= self.timeout

    @property
    def used_up(self) -> bool:
        """Whether as many trials as wanted have been asked for."""
        return self.n_trials is not None and self.asked >= self.n_trials


class Asking:
    """The tuner of `optimize`: keeps trials in flight, hands their reports on, and tells how they ended."""

    _run: Run | None = None

    def __init__(
        self,
        study: optuna.Study,
        objective: Objective,
        limits: _Limits,
        executor: Cerebro,
        metric: Metric,
        value: str,
        teller: Teller,
    ) -> None:
        self._study, self._objective, self._limits = study, objective, limits
        self._executor, self._metric, self._value, self._teller = executor, metric, value, teller
        self._seats: dict[str, TrialSeat] = {}
        """Of the trials that have not ended."""
        self._added = 0
        self._ended = False
        """Whether the run has been told that no more trials will come."""
        self._ladder: Ladder | None = None
        if len(study.directions) > 1:
            _logger.info("The study has several objectives, for which Optuna has no reports: nothing will be pruned.")
        elif isinstance(study.pruner, PromotionPruner):
            self._ladder = Ladder(study.pruner, mode_of(study))

    def run(self) -> None:
        """Ask and tell to the end."""
        reason = "cut short by an error in the search"
        try:
            self._go_on()
            self._fill()
            if self._run is not None and self._seats:
                self._executor.search(self._run)
                reason = "cut short: the search was interrupted, or the trial was left paused"
        finally:
            if self._run is not None and self._executor.current is self._run:
                self._executor.give_up(self._run)
            for seat in list(self._seats.values()):
                self._teller.cut_short(seat, reason)

    # What the run calls, on this very thread.

    def on_report(self, trial_id: str, report: Report) -> Decision | None:
        """Hand the report on; where the trial has come to a rung, see who takes its place."""
        seat = self._seats.get(trial_id)
        if seat is None:  # its end was told while nobody trained it
            return Decision.STOP
        decision = seat.decide(trial_id, report)
        if self._ladder is None or decision is Decision.STOP or not self._is_at_rung(trial_id, report):
            return decision
        value = report[seat.metrics[0]]
        if math.isnan(value):
            seat.pruned = True
            return Decision.STOP
        self._wait(trial_id, value)
        return None

    def on_end(self, result: TrialResult) -> None:
        """Tell the trial's end, and put another in its place."""
        seat = self._seats.pop(result.trial_id, None)
        if seat is None:  # somebody has told its end while nobody trained it
            return
        if self._ladder is not None:
            self._ladder.drop(result.trial_id)
        self._teller.ended(seat, result, self._value)
        self._fill()

    # Going on.

    def _go_on(self) -> None:
        """Take up the latest run of a killed process that has trials in flight, and tell FAIL for all others."""
        left = left_over.find(self._study, self._executor)
        runs = [folder for folder, _ in map(left_over.run_of, left) if folder is not None]
        latest = max(runs, default=None) if self._ladder is None and self._executor.resume != "never" else None
        mine = [trial for trial in left if latest is not None and left_over.run_of(trial)[0] == latest]
        for trial in left:
            if trial not in mine:
                left_over.tell(self._study, trial)
        if latest is None:
            return
        made = {}
        for trial in mine:
            trial_id = left_over.run_of(trial)[1]
            seat = TrialSeat(versions.again(self._study, trial), self._executor, self._metric)
            seat.reported = max(trial.intermediate_values, default=0)
            seat.pruned = left_over.was_pruned(trial)
            try:
                made[trial_id] = seat, *self._make(seat, int(trial_id.rpartition("-")[2]))
            except Exception as error:  # noqa: BLE001  # the user's code may raise anything; it is kept, or caught
                self._teller.raised(seat, error)
        if made:
            self._take_up(latest, made)

    def _take_up(self, folder: Path, made: dict[str, tuple[TrialSeat, Recipe, Config]]) -> None:
        seats = {trial_id: seat for trial_id, (seat, _, _) in made.items()}
        given = {trial_id: (config, recipe) for trial_id, (_, recipe, config) in made.items()}
        seat, recipe, _ = next(iter(made.values()))
        try:
            run = self._executor.run(recipe, self, metric=seat.metric, mode=seat.mode, given=given, folder=folder)
        except RunBusyError:  # another process has found them, too, and goes on with them
            return
        except CerebroError as error:
            for seat in seats.values():
                self._teller.cut_short(seat, f"its process was killed, and its run cannot be taken up: {error}")
            return
        self._run, self._added = run, run.taken_up
        self._seats |= seats
        for trial_id in run.unended - seats.keys():
            run.stop(trial_id)

    # Filling places.

    def _fill(self) -> None:
        """Let trials go on that wait to be promoted, and ask for new ones, while there is room."""
        while len(self._seats) - len(self._waiting) < self._executor.live_trials:
            if not self._promote() and not self._ask():
                break
        if self._run is not None and not self._ended and self._is_closed:
            self._ended = True
            self._run.end_search()
        self._end_waiting()

    @property
    def _is_stopped(self) -> bool:
        return self._limits.late or versions.is_stopped(self._study) or self._teller.error is not None

    @property
    def _is_closed(self) -> bool:
        """Whether no more trials are to be asked for."""
        return self._limits.used_up or self._is_stopped

    @property
    def _waiting(self) -> list[str]:
        return [] if self._ladder is None else self._ladder.waiting

    @property
    def _is_alone(self) -> bool:
        """Whether those that wait are all that there is, and will be."""
        return self._is_closed and len(self._seats) == len(self._waiting)

    def _is_at_rung(self, trial_id: str, report: Report) -> bool:
        """Whether the trial is to wait; one that is at its end is through."""
        assert self._run is not None, "a trial of it reports"
        assert self._ladder is not None, "there are rungs"
        return (
            self._seats[trial_id].metrics[0] in report
            and report["units"] < self._run.units_of(trial_id)
            and self._ladder.is_due(trial_id, report["training_iteration"])
        )

    def _wait(self, trial_id: str, value: float) -> None:
        """Let the trial stand at its rung; it may be the one that goes on from there."""
        assert self._run is not None, "a trial of it waits"
        assert self._ladder is not None, "there are rungs"
        self._run.decide(trial_id, Decision.PAUSE)
        if self._run.status(trial_id) == "paused":  # and was not stopped meanwhile, by itself or by the user
            self._ladder.wait(trial_id, value)
            self._fill()

    def _promote(self) -> bool:
        """Let a waiting trial go on, if one may."""
        if self._ladder is None or self._is_stopped:
            return False
        chosen = self._ladder.promote(least=1 if self._is_alone else 0)
        if chosen is None:
            return False
        assert self._run is not None, "a trial of it waits"
        self._run.resume(chosen)
        return True

    def _end_waiting(self) -> None:
        """Prune those that nobody will promote any more."""
        if self._run is not None and self._ladder is not None and self._is_alone:
            for trial_id in self._ladder.give_up():
                self._seats[trial_id].pruned = True
                self._run.stop(trial_id)

    def _ask(self) -> bool:
        """Begin a new trial; False when no more are to be asked for. Some end in the objective already."""
        while not self._is_closed:
            self._limits.asked += 1
            kind = TrialSeat if self._ladder is None else LadderSeat
            seat = kind(self._study.ask(), self._executor, self._metric)
            try:
                self._begin(seat)
            except Exception as error:  # noqa: BLE001  # the user's code may raise anything; it is kept, or caught
                self._teller.raised(seat, error)
            except BaseException as error:
                self._teller.cut_short(seat, repr(error))
                raise
            else:
                return True
        return False

    def _make(self, seat: TrialSeat, index: int) -> tuple[Recipe, Config]:
        """What the objective wants trained, called with the generators of the trial of this number."""
        with kept_streams():
            seed_build(self._executor.seed, index)
            made = self._objective(seat.trial)
        trainable, config = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
        if isinstance(trainable, int | float):
            raise ConfigurationError(
                f"The objective returned {made!r}; under cerebro_tune_optuna.optimize it returns what is to be "
                "trained, (LitNet, params). One that trains by itself and returns a value is for study.optimize."
            )
        return self._executor.recipe(trainable), config

    def _begin(self, seat: TrialSeat) -> None:
        recipe, config = self._make(seat, self._added)
        if self._run is None:
            self._run = self._executor.run(recipe, self, metric=seat.metric, mode=seat.mode, given={})
        trial_id = self._run.add(config, recipe)
        self._added += 1
        self._seats[trial_id] = seat
        seat.sit(trial_id)
