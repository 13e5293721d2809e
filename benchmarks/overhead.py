"""What a unit costs beyond its training: 2,000 empty units of 8 trials on 2 local workers.

Each trial carries 1 MB of state, and a policy that likes it so makes it hop each time; every report is decided by a
second thread, as a tuner with a loop of its own does it. The figure is wall clock per unit in steady state, median of
five runs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from _report import Report
from _sizes import sized
from cerebro_tune import Cerebro, Decision, ShardedDataset, TrialResult
from cerebro_tune.policy import AutoPolicy, Board, Choice, Ready, Regime
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable, UnitWork

TRIALS, UNITS, WARM_UP, RUNS = 8, 2000, 200, sized(1, 5, 15)
STATE_FLOATS = 250_000  # 1 MB


class Empty(Trainable):
    def start(self, config: Config, plan: Plan) -> None:
        self.weights = torch.zeros(STATE_FLOATS)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]

    def run_unit(self, work: UnitWork) -> dict[str, float]:
        return {"train_loss": 0.0}


class EmptyRecipe(Recipe):
    name, suffix = "Empty", ".none"

    def create(self) -> Empty:
        return Empty()

    def export(self, state: dict[str, Any], path: Path) -> None:
        raise AssertionError("keep='none' exports nothing")


class Restless(AutoPolicy):
    """Gives a worker only trials whose state is not there."""

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        return super().choose(regime, board, worker, held, [entry for entry in ready if entry[-1].home != worker])


class SecondThread:
    """Hands reports to a thread that decides."""

    def __init__(self) -> None:
        self.reports: SimpleQueue[str | None] = SimpleQueue()
        self.times: list[float] = []

    def on_report(self, trial_id: str, report: Any) -> None:
        self.times.append(perf_counter())
        self.reports.put(trial_id)

    def on_end(self, result: TrialResult) -> None:
        return

    def decide(self, run: Any) -> None:
        while (trial_id := self.reports.get()) is not None:
            run.decide(trial_id, Decision.CONTINUE)


def one_run(cerebro: Cerebro, recipe: Recipe, configs: list[Config], units: int, warm_up: int) -> tuple[float, float]:
    """Milliseconds per unit once so many are over, and the share of units that hopped."""
    tuner = SecondThread()
    run = cerebro.run(recipe, tuner)
    for config in configs:
        run.add(config)
    run.end_search()
    thread = threading.Thread(target=tuner.decide, args=(run,))
    thread.start()
    results = cerebro.drive(run)
    tuner.reports.put(None)
    thread.join()
    visits = [[worker for *_, worker in result.visits] for result in results]
    moves = sum(before != after for workers in visits for before, after in pairwise(workers))
    assert sum(map(len, visits)) == len(tuner.times) == units
    return (tuner.times[-1] - tuner.times[warm_up]) / (units - warm_up - 1) * 1e3, moves / (units - len(configs))


def main() -> int:
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        data = ShardedDataset.write(pa.table({"x": np.zeros(4, "float32")}), f"{folder}/data", num_shards=2)
        with Cerebro(
            data, epochs=UNITS // TRIALS // 2, workers=2, live_trials=TRIALS, keep="none", run_dir=f"{folder}/runs",
            progress=False, policy=Restless(),
        ) as cerebro:  # fmt: skip
            runs = [one_run(cerebro, EmptyRecipe(), [{}] * TRIALS, UNITS, WARM_UP) for _ in range(1 + RUNS)][1:]
    report.add(
        "empty unit, 1 MB of state, 2 workers",
        statistics.median(ms for ms, _ in runs),
        0.5,
        "ms",
        row=5,
        runs=[ms for ms, _ in runs],
    )
    report.add("units that hopped", statistics.median(hops for _, hops in runs) * 100, None, "%", row=5)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
