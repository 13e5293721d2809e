"""How many units per second the coordinator can schedule, and how that grows with the number of trials.

The run, the state machine, the store and the journal are those of every run, on a disk; the workers are not: each has
ended its unit as soon as it is asked what it says, by a clock of its own on which units of the trials differ 4x. So all
the time that passes is the coordinator's: choosing a unit, finding its buffers, making its task, taking in its end,
committing it, writing the journal, making its report, asking the tuner. Sending over a pipe is the backend's, and left
out. The workers have always something to say: `heard` says how many of them are heard at a time. A run that is short of
coordinator hears all of them, one that has plenty hears one: that has no bar, and one turn.

Growth: all trials live at once, 4 units each, from the first one added to the last one ended; per unit, and a run of n
trials that takes n log n in all takes log n per unit.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter

import cloudpickle

from _report import Report
from _sizes import sized
from cerebro_tune.journal import Journal
from cerebro_tune.progress import make_progress
from cerebro_tune.results import TrialResult
from cerebro_tune.run import Run
from cerebro_tune.settings import Report as TrialReport
from cerebro_tune.settings import RunSettings
from cerebro_tune.simulate import log_uniform_costs
from cerebro_tune.store import StateStore
from cerebro_tune.testing import CounterRecipe
from cerebro_tune.units import Decision, Trial, WorkerId
from cerebro_tune.workers.base import Grow, Workers
from cerebro_tune.workers.messages import Finished, Message, Order, Ready, RunSpec, Setup, Spans, Task

WORKERS, LIVE = 128, 1_000
UNITS, WARM_UP = sized((3_000, 1_000), (8_000, 4_000))
RUNS, GROWTH_RUNS = sized((1, 1), (5, 3), (9, 5))
GROWTH, GROWTH_SHARDS = sized((10, 100, 1_000), (10, 100, 1_000, 10_000)), 4
LEAST_TRIALS = 1_000  # smaller runs are repeated until they have had as many
STATE_BYTES = 4_096


class Prompt(Workers):
    """Workers that train nothing; `wait` hands out what `heard` of them say, those whose units end first."""

    def __init__(self, workers: int, heard: int) -> None:
        super().__init__(("cpu",) * workers, threads=1)
        self._heard = heard
        self._now = dict.fromkeys(self.ids, 0.0)
        self._said: list[tuple[float, int, Message]] = []
        self._tickets = count()
        self._costs = log_uniform_costs([Trial(f"trial-{index:04d}", index, 1) for index in range(2 * max(GROWTH))], 0)

    def start(self, grow: Grow) -> None:
        self._grow = grow

    def send(self, worker: WorkerId, order: Order) -> None:
        if isinstance(order, Task):
            self._train(worker, order)
        elif isinstance(order, Setup):
            self._say(0.0, Ready(worker))

    def _train(self, worker: WorkerId, task: Task) -> None:
        if task.working is None:
            self._grow(task.unit.trial, STATE_BYTES)
        took = self._costs[task.unit.trial]
        began = self._now[worker]
        ended = self._now[worker] = began + took
        spans = Spans(began, began + 0.01 * took, ended - 0.01 * took, ended, 0.05 * took)
        metrics = {"train_loss": 0.5, "val_loss": 0.5, "val_accuracy": 0.5}
        self._say(ended, Finished(worker, task.job, task.unit, metrics, STATE_BYTES, f"{task.job:032x}", spans))

    def _say(self, when: float, message: Message) -> None:
        heappush(self._said, (when, next(self._tickets), message))

    def wait(self, timeout_s: float | None = None) -> list[Message]:
        return [heappop(self._said)[-1] for _ in range(min(self._heard, len(self._said)))]

    def wake(self) -> None:
        return

    def restart(self, worker: WorkerId) -> None:
        return

    def close(self) -> None:
        return


class Tuner:
    """Lets everything go on; of a stream it adds a trial for each that has ended."""

    run: Run

    def __init__(self, stream: bool) -> None:
        self._stream, self.ended = stream, 0

    def on_report(self, trial_id: str, report: TrialReport) -> Decision:
        return Decision.CONTINUE

    def on_end(self, result: TrialResult) -> None:
        self.ended += 1
        if self._stream:
            self.run.add(result.config)


@contextmanager
def prepared(workers: Prompt, tuner: Tuner, shards: int, pinned: bool) -> Iterator[Run]:
    """A run in a folder of its own, with nothing in it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = CounterRecipe()
        spec = RunSpec(cloudpickle.dumps(recipe), b"", 256, "unit", 0, (1_000,) * shards)
        settings = RunSettings(
            epochs=1, batch_size=32, policy="auto", live_trials=None, max_failures=2, pinned=pinned, keep="none",
            metric="val_loss", mode="min", trace=False, spec=spec, run_dir=Path(folder),
        )  # fmt: skip
        store = StateStore(4 << 30, Path(folder) / "spill")
        run = Run(workers, store, recipe, settings, tuner, make_progress(False), Journal(Path(folder)))
        workers.start(run.grow)
        tuner.run = run
        try:
            yield run
        finally:
            run.close()


def steady_rate(shards: int, pinned: bool, heard: int) -> float:
    """Units per second in the midst of a stream of trials."""
    workers = Prompt(WORKERS, heard)
    with prepared(workers, Tuner(stream=True), shards, pinned) as run:
        for index in range(LIVE):
            run.add({"lr": 0.1 / (index + 1), "width": index % 3})
        run.begin()
        while run.units < WARM_UP:
            run.turn()
        before, began = run.units, perf_counter()
        while run.units < WARM_UP + UNITS:
            run.turn()
        return (run.units - before) / (perf_counter() - began)


def unit_us(trials: int) -> float:
    """Microseconds per unit of a run of so many trials, all of them live."""
    workers, tuner = Prompt(WORKERS, WORKERS), Tuner(stream=False)
    with prepared(workers, tuner, GROWTH_SHARDS, pinned=False) as run:
        run.begin()
        began = perf_counter()
        for index in range(trials):
            run.add({"lr": 0.1 / (index + 1), "width": index % 3})
        run.end_search()
        while tuner.ended < trials:
            run.turn()
        return (perf_counter() - began) / run.units * 1e6


def rates(report: Report) -> None:
    for shards, pinned in ((8, False), (128, True)):
        for heard in (WORKERS, 1):
            bar = 5_000 if heard == WORKERS else None
            found = [steady_rate(shards, pinned, heard) for _ in range(RUNS if bar else 1)]
            placed = f"{shards} {'pinned' if pinned else 'shared'} shards"
            case = f"{LIVE} live trials, {placed}, workers heard at a time: {heard}"
            report.add(case, median(found), bar, "units/s", at_most=False, row=12, runs=found)


def growth(report: Report) -> None:
    rounds = [{trials: one_size(trials) for trials in GROWTH} for _ in range(GROWTH_RUNS)]
    by_size = {trials: median(one[trials] for one in rounds) for trials in GROWTH}
    for trials, us in by_size.items():
        report.add(f"{trials} trials: time per unit", us, None, "us", row=12, runs=[one[trials] for one in rounds])
    fewest, most = GROWTH[0], GROWTH[-1]
    grown = by_size[most] / by_size[fewest] / (math.log(most) / math.log(fewest))
    report.add(f"from {fewest} to {most} trials: growth / that of n log n", grown, 1.0, row=12)
    before = GROWTH[-2]
    last = by_size[most] / by_size[before] / (math.log(most) / math.log(before))
    report.add(f"from {before} to {most} trials: growth / that of n log n", last, row=12)


def one_size(trials: int) -> float:
    """Microseconds per unit, of small runs the median of many."""
    return median(unit_us(trials) for _ in range(max(1, LEAST_TRIALS // trials)))


def main() -> int:
    report = Report(f"The coordinator: {WORKERS} simulated workers, journal on")
    rates(report)
    growth(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
