"""One Optuna trial that trains by hops: its reports, what its pruner says to them, and how it ended.

`optimize` has one of these for every trial that it asks for; `fit` and `HopStrategy` make one inside an objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState

from cerebro_tune.errors import ConfigurationError, NonFiniteLossError, TrialFailedError, UnknownMetricError
from cerebro_tune.executor import Cerebro
from cerebro_tune.results import TrialResult
from cerebro_tune.seat import Seat
from cerebro_tune.settings import Report
from cerebro_tune.sharedrun import Caller
from cerebro_tune.units import Decision
from cerebro_tune_optuna import habits, left_over

Metric = str | Sequence[str]
_DIVERGED = f"{NonFiniteLossError.__module__}.{NonFiniteLossError.__qualname__}"


@dataclass(frozen=True)
class Outcome:
    """What a study is told of a trial that has ended; `reason` is why it failed."""

    state: TrialState
    values: Sequence[float] | None = None
    reason: str = ""


class TrialSeat(Seat):
    """The seat of an Optuna trial, see `cerebro_tune.seat`.

    `metric` is the name of what the study optimizes, or a list of them for one that has several objectives. Those are
    not pruned: Optuna has no reports there.
    """

    def __init__(self, trial: optuna.Trial, executor: Cerebro, metric: Metric) -> None:
        self.trial, self.executor = trial, executor
        self.metrics = measured_by(trial.study, metric)
        self.metric = self.metrics[0] if len(self.metrics) == 1 else None
        self.mode = mode_of(trial.study)
        self.pruned = False
        """Whether its pruner has ended the trial, in this process or in one that was killed then."""
        self.reported = 0
        """The last step that Optuna has of it from a process that was killed."""
        self._began_s, self._folder = monotonic(), ""
        trial.set_user_attr(left_over.PROCESS, left_over.this_process(executor))

    def sit(self, trial_id: str) -> None:
        """Note, once, which trial of which run this is, by the folder of its checkpoints."""
        if not self._folder and self.executor.current is not None:
            self._folder = str(self.executor.current.settings.run_dir / trial_id)
            self.trial.set_user_attr(left_over.FOLDER, self._folder)

    def decide(self, trial_id: str, report: Report) -> Decision:
        """Hand a report to the trial, and its pruner's answer back."""
        self.sit(trial_id)
        if not self._report(report):
            return Decision.STOP
        habits.check(self.trial, self.executor)
        if not self.pruned and self.metric in report and self._should_prune():
            self.pruned = True
            self._note({left_over.PRUNED: self._folder})  # the study is told when its checkpoints are written
        return Decision.STOP if self.pruned else Decision.CONTINUE

    def _should_prune(self) -> bool:
        return self.trial.should_prune()

    def _report(self, report: Report) -> bool:
        """Hand a report on; False when somebody else has told the trial's end: a pruner of stale trials, a user."""
        if self.metric is None or self.metric not in report or report["training_iteration"] <= self.reported:
            return True
        try:
            self.trial.report(report[self.metric], report["training_iteration"])
        except UpdateFinishedTrialError:
            return False
        return True

    def conclude(self, result: TrialResult) -> None:
        """Note how the trial went; TrialPruned if it was cut short."""
        self.note(result)
        if self.pruned:
            raise optuna.TrialPruned(f"{result.trial_id} was pruned after {len(result.visits)} units.")

    def note(self, result: TrialResult) -> None:
        """Write down, as user attributes of the trial, what it took and where its checkpoint is.

        There are few of them, since a storage may take 10 ms for each.
        """
        spent = result.seconds
        waited = max(0.0, monotonic() - self._began_s - sum(spent.values()))
        self._note({
            "trial_id": result.trial_id,
            "units": len(result.visits),
            "epochs": result.last_metrics.get("epoch", 0.0),
            "seconds": {
                "training": spent["compute"],
                "hopping": spent["hop"],
                "validating": spent["validate"],
                "waiting": waited,
            },
            "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        })  # fmt: skip

    def _note(self, attributes: Mapping[str, Any]) -> None:
        with suppress(UpdateFinishedTrialError):  # somebody else has told the trial's end
            for key, value in attributes.items():
                self.trial.set_user_attr(key, value)

    def outcome(self, result: TrialResult, value: str) -> Outcome:
        """What to tell of a trial that has ended thus; `value` says whether its best or its last report counts."""
        if self.pruned:
            return Outcome(TrialState.PRUNED)
        if result.error is not None:
            return Outcome(TrialState.FAIL, reason=result.error.strip().rpartition("\n")[2])
        if not result.history:
            return Outcome(TrialState.FAIL, reason=f"{result.trial_id} was {result.status} before its first report")
        metrics = result.metrics if value == "best" else result.last_metrics
        values = [_value(result, metrics, name) for name in self.metrics]
        if nan := [name for name, number in zip(self.metrics, values, strict=True) if math.isnan(number)]:
            return Outcome(TrialState.FAIL, reason=f"{', '.join(nan)} of {result.trial_id} is NaN")
        return Outcome(TrialState.COMPLETE, values)


def fit(
    trial: optuna.Trial,
    trainable: Any,
    params: Mapping[str, Any] | None = None,
    *,
    executor: Cerebro,
    metric: Metric,
    value: str = "best",
) -> float | Sequence[float]:
    """Train inside an objective by hops, and return what it is to return.

    Args:
        trial: What Optuna calls the objective with.
        trainable: What is to be trained: a LightningModule class, or another of the things that `Cerebro.fit` takes.
        params: Its config. `epochs` and `batch_size` in it are the executor's, unless the model takes them itself.
        executor: The `Cerebro` that trains. Objectives in several threads, `study.optimize(..., n_jobs=8)`, share it,
            and their trials advance side by side.
        metric: What the study optimizes; a list of names for one with several objectives, which is not pruned.
        value: "best" (the best report on the whole validation set) or "last".

    TrialPruned is raised where the study's pruner ends the trial; `cerebro_tune_optuna.pruners` has some that work side
    by side. NaN, in the metric or in the training loss, is returned as such: Optuna counts the trial as failed. Which
    of several threads comes first is chance: a study that is to repeat is one for `optimize`, or has one thread.
    """
    check_value(value)
    seat = TrialSeat(trial, executor, metric)
    result = executor.train_one(trainable, params, caller=Caller(seat.decide), metric=seat.metric, mode=seat.mode)
    seat.conclude(result)
    if result.error is not None and not diverged(result):
        raise TrialFailedError(f"{result.trial_id} failed:\n{result.error}")
    outcome = seat.outcome(result, value)
    if outcome.values is None:
        trial.set_user_attr("error", outcome.reason)
    values = outcome.values or [math.nan] * len(seat.metrics)
    return values if len(values) > 1 else values[0]


def check_value(value: str) -> None:
    """ConfigurationError for what a trial's value cannot be."""
    if value not in ("best", "last"):
        raise ConfigurationError(f"value is {value!r}; valid: 'best', 'last'.")


def diverged(result: TrialResult) -> bool:
    """Whether the trial failed because its loss was not finite: no error of the program, but a bad config."""
    return _DIVERGED in result.raised


def measured_by(study: optuna.Study, metric: Metric) -> list[str]:
    """The names of what the study optimizes; ConfigurationError if they are not as many as its directions."""
    names = [metric] if isinstance(metric, str) else list(metric)
    if len(names) != len(study.directions):
        raise ConfigurationError(
            f"metric is {metric!r}, but the study has {len(study.directions)} directions: give one name for each."
        )
    return names


def mode_of(study: optuna.Study) -> str:
    """Whether more or less of the metric is better, of the first one in a study with several objectives."""
    return "max" if study.directions[0] is StudyDirection.MAXIMIZE else "min"


def _value(result: TrialResult, metrics: Mapping[str, Any], name: str) -> float:
    if name not in metrics:
        has = ", ".join(sorted(metrics))
        raise UnknownMetricError(f"No report of {result.trial_id} has a metric {name!r}; its last one has {has}.")
    return float(metrics[name])
