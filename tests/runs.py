"""What tests of runs share: configs, a scripted tuner, a policy that sends a trial through given visits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cerebro_tune import Cerebro, Decision, Results, TrialResult
from cerebro_tune.policy import AutoPolicy, Board, Choice, Ready, Regime
from cerebro_tune.settings import Report


class InOrder(AutoPolicy):
    """One trial, sent through these visits."""

    def __init__(self, visits: Any) -> None:
        super().__init__(logical=True)
        self.shards = [shard for _, shard, _ in visits]

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        (entry,) = ready
        trial = entry[-1]
        return Choice((trial,), self.shards[len(self.shards) - trial.units_left])


CONFIGS = [{"lr": 0.001}, {"lr": 0.03}, {"lr": 0.3}]


def weights(result: TrialResult) -> bytes:
    return Path(str(result.last_checkpoint)).read_bytes()


def outcome(results: Results) -> list[Any]:
    """What must be equal between equal runs: all but the times."""
    times = ("unit_time_s", "hop_time_s", "validation_time_s")
    history = [[{k: v for k, v in report.items() if k not in times} for report in result.history] for result in results]
    return [[(r.status, r.visits) for r in results], history, [weights(result) for result in results]]


class Script:
    """A tuner that does what a function says."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.ended = answer, []

    def on_report(self, trial_id: str, report: Report) -> Decision | None:
        return self.answer(trial_id, report)

    def on_end(self, result: TrialResult) -> None:
        self.ended.append((result.trial_id, result.status))


def outliving(executor: Cerebro) -> Cerebro:
    """An executor that several tests share, for as long as this process has the modules that it has.

    It keeps its workers when a source file is edited meanwhile: started anew within a test, they would count as left by
    it, and would not have the code that the tests compare them with.
    """
    executor.start()
    executor._started_s = math.inf
    return executor
