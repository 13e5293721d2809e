"""One run that several threads put trials into, each waiting for its own.

A script that trains one model per call (an Optuna objective, a function that makes a Trainer and fits) becomes a search
by hops when its calls are made from threads: the first call begins a run, those that come while it lasts join it, and
the last one to leave ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread, current_thread
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import ConfigurationError, TrialFailedError
from cerebro_tune.results import TrialResult
from cerebro_tune.settings import Report, TrainAll
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro
    from cerebro_tune.run import Run

Decide = Callable[[str, Report], Decision | None]
"""Answers a report of (trial id, report), as a `Tuner` does."""

TakeState = Callable[[Any], None]
"""Called with the state that a trial has at its end, as a tree."""


@dataclass
class Caller:
    """What a call that waits for its trial wants.

    decide: answers the trial's reports.
    take_state: called with the trial's last state, as a tree, when the trial has ended otherwise than failed.
    """

    decide: Decide
    take_state: TakeState | None = None
    result: Future[TrialResult] = field(default_factory=Future)


class SharedRun:
    """The tuner of such a run: every trial has its caller's own."""

    def __init__(self) -> None:
        self._door, self._seating = Condition(), Lock()
        self._run: Run | None = None
        self._kind: tuple[Any, ...] = ()
        self._callers = 0
        self._seats: dict[str, Future[Caller]] = {}
        self._over = False
        """Whether nobody is left in the run who could sit down."""

    def interrupt(self) -> None:
        """End the run that is on, if one is, with an error for every caller; returns when it has ended."""
        run = self._run
        if run is not None and self._thread is not current_thread():
            run.interrupt()
            self._thread.join()

    def train(
        self, executor: Cerebro, recipe: Recipe, config: Config, caller: Caller, metric: str | None, mode: str
    ) -> TrialResult:
        """Train a trial to its end, next to those of other threads; see `Cerebro.train_one`."""
        run = self._enter(executor, recipe, metric, mode)
        try:
            self._seat(run.add(config, recipe)).set_result(caller)
            return caller.result.result()
        except KeyboardInterrupt:
            run.interrupt()
            raise
        finally:
            self._leave()

    # What the run calls, on its own thread.

    def on_report(self, trial_id: str, report: Report) -> Decision | None:
        """Hand the report to the trial's caller."""
        return self._seat(trial_id).result().decide(trial_id, report)

    def on_end(self, result: TrialResult) -> None:
        """Let the trial's caller go on."""
        caller = self._seat(result.trial_id).result()
        if caller.take_state is not None and result.status != "failed" and result.visits:
            assert self._run is not None, "a trial of it has ended"
            caller.take_state(self._run.state(result.trial_id))
        caller.result.set_result(result)

    def _seat(self, trial_id: str) -> Future[Caller]:
        # The run may have a first report before the caller, who has just been told the trial's id, sits down.
        with self._seating:
            seat = self._seats.setdefault(trial_id, Future())
            if self._over and not seat.done():  # its caller was interrupted between adding the trial and sitting down
                seat.set_result(Caller(TrainAll().on_report))
            return seat

    def _enter(self, executor: Cerebro, recipe: Recipe, metric: str | None, mode: str) -> Run:
        kind = (metric, mode)
        with self._door:
            # One that broke, or was interrupted, takes nobody in: whoever comes waits until all have left it.
            self._door.wait_for(lambda: self._run is None or self._thread.is_alive())
            if self._run is None:
                self._run = executor.run(recipe, self, metric=metric, mode=mode)
                self._kind, self._seats, self._over = kind, {}, False
                self._thread = Thread(target=self._drive, args=(executor, self._run), name="cerebro-run")
                self._thread.start()
            elif kind != self._kind:
                raise ConfigurationError(
                    f"Trials that share a run must agree in what they are measured by: this one has {kind}, the run "
                    f"{self._kind} (metric, mode). Use one metric, or an executor for each."
                )
            self._callers += 1
            return self._run

    def _leave(self) -> None:
        with self._door:  # whoever comes meanwhile begins a run of its own afterwards
            self._callers -= 1
            if self._callers or self._run is None:
                return
            self._over = True
            for trial_id in list(self._seats):
                self._seat(trial_id)
            with suppress(ConfigurationError):  # it has ended by itself: interrupted, or broken
                self._run.end_search()
            self._thread.join()
            self._run = None
            self._door.notify_all()

    def _drive(self, executor: Cerebro, run: Run) -> None:
        try:
            executor.drive(run)
        except BaseException as error:  # noqa: BLE001  # it is the callers' to raise
            for waiting in self._unanswered():
                waiting.set_exception(error)
        for waiting, trial_id in self._unanswered().items():
            waiting.set_exception(TrialFailedError(f"{trial_id} was cut short: the run was interrupted."))

    def _unanswered(self) -> dict[Future[TrialResult], str]:
        """The results that callers still wait for, and of which trials."""
        with self._seating:
            seats = {trial_id: seat for trial_id, seat in self._seats.items() if seat.done()}
        return {seat.result().result: trial_id for trial_id, seat in seats.items() if not seat.result().result.done()}
