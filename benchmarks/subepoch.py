"""ASHA that compares configs from one shard on, against ASHA that compares them from one epoch on, both by hops.

A config trains for at most 9 epochs of 8 units, eta is 3. The second has its rungs at 8 and 24 units, the first goes on
with this ladder downwards: 1, 3, 8 and 24. Trials are promoted, not only stopped (Li et al., MLSys 2020), 4 of them are
live on 2 workers. Both get the same configs in the same order. The first validates after every unit, in mid-epoch on
the default subset, by which it also decides there; the second only at an epoch's end, on the whole set.

The second ends when it has used its budget of units up. What is to be reached is the accuracy on the whole set that it
has found until then, at an epoch's end; judged is when the first has found it, over the time that the second was given,
as in optuna_study.py. Beside it, over the moment at which the second had found it: where in its time that is is its own
luck. The first may go on for longer; where it does not find it before the configs run out (recorded) or within
three budgets (real) it counts as infinitely late, in a median. Intervals of 95 % by the bootstrap over seeds.

Recorded: 320 curves of perceptrons on Fashion-MNIST (see record_curves.py), virtual clock; the intervals take the
curves as given. Real: other perceptrons of that space on half of the images, local workers that are up, wall clock from
the call, with what a run has by default: journal, states on disk, validation.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from _asha import FROM_ONE_SHARD, Asha, Search, interval, recorded
from _report import Report
from _seeds import of_each
from _sizes import sized
from cerebro_tune import Cerebro, Decision, ShardedDataset, TorchTrainable, TrialResult
from record_curves import EPOCHS, SHARDS, build, draw, images

SEEDS, REAL_SEEDS = range(sized(10, 200, 1_000)), range(sized(1, 10, 30))
WORKERS, LIVE = 2, 4
BUDGET = 800  # units
ROWS = 8_000  # of the real training sets


@dataclass(frozen=True)
class Pair:
    """Seconds: when each had the accuracy, when the second had used its budget up."""

    by_unit: float
    by_epoch: float
    budget: float


def add(report: Report, case: str, pairs: list[Pair]) -> None:
    for than, times, bar in (
        ("time / whole epochs' whole time", [pair.by_unit / pair.budget for pair in pairs], 0.7),
        ("time / whole epochs' time to it", [pair.by_unit / pair.by_epoch for pair in pairs], None),
        ("whole epochs' time to it / their whole time", [pair.by_epoch / pair.budget for pair in pairs], None),
    ):
        ratios = np.array(times)
        runs = times if len(times) <= len(REAL_SEEDS) else ()
        report.add(f"{case}: {than}", np.median(ratios), bar, row=4, runs=runs, interval=interval(ratios, np.median))
    late = [pair.by_unit > pair.budget for pair in pairs]
    report.add(f"{case}: not within the whole epochs' whole time", 100 * float(np.mean(late)), None, "%", row=4)


# Recorded curves.


def on_curves(seed: int) -> Pair:
    def search(by_unit: bool) -> Search:
        return Search(recorded(), WORKERS, LIVE, "shared", by_unit, FROM_ONE_SHARD if by_unit else 1, seed)

    theirs = search(by_unit=False).run(lambda running: running.units >= BUDGET)
    when, accuracy = theirs.best[-1]
    ours = search(by_unit=True).run(lambda running: bool(running.best) and running.best[-1][1] >= accuracy)
    reached = ours.best[-1]
    return Pair(reached[0] if reached[1] >= accuracy else math.inf, when, theirs.now)


# Real.


class Perceptron(TorchTrainable):
    def build(self, config: Any, plan: Any) -> Any:
        return build(config)

    def training_step(self, model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    def validation_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean()}


@dataclass
class Race:
    """A tuner that plays ASHA until it is told to end, and notes when the accuracy on the whole set got better."""

    seed: int
    units: float
    accuracy: float = math.inf
    best: list[tuple[float, float]] = field(default_factory=list)

    def run(self, cerebro: Cerebro) -> float:
        """Seconds that it took; it ends after so many units, or with the accuracy."""
        self._run = run = cerebro.run(Perceptron, self, metric="accuracy", mode="max")
        configs = (draw((self.seed + 1) * 10_000 + number) for number in count())
        self._asha = Asha(run, configs, LIVE, FROM_ONE_SHARD if cerebro.report_every == "unit" else 1)
        self._began = perf_counter()
        self._asha.fill()
        cerebro.drive(run)
        return self._ended - self._began

    def on_report(self, trial_id: str, report: Mapping[str, Any]) -> Decision | None:
        now = perf_counter()
        if report["units"] % SHARDS == 0 and (not self.best or report["accuracy"] > self.best[-1][1]):
            self.best.append((now - self._began, report["accuracy"]))
        if self._run.units >= self.units or (self.best and self.best[-1][1] >= self.accuracy):
            self._ended = now
            self._run.interrupt()
            return Decision.CONTINUE
        last = report["units"] == EPOCHS * SHARDS
        return self._asha.heard(trial_id, report["training_iteration"], report["accuracy"], last)

    def on_end(self, result: TrialResult) -> None:
        self._asha.ended(result.trial_id)


def real(by_unit: Cerebro, by_epoch: Cerebro, seed: int) -> Pair:
    theirs = Race(seed, BUDGET)
    budget_s = theirs.run(by_epoch)
    when, accuracy = theirs.best[-1]
    ours = Race(seed, 3 * BUDGET, accuracy)
    ours.run(by_unit)
    reached = ours.best[-1]
    return Pair(reached[0] if reached[1] >= accuracy else math.inf, when, budget_s)


def write_data(folder: Path) -> list[ShardedDataset]:
    written = []
    for number, (pixels, labels) in enumerate(images()):
        x, y = pixels[:ROWS], labels[:ROWS]
        image = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().ravel()), x.shape[1])
        table = pa.table({"image": image, "label": y.numpy()})
        written.append(ShardedDataset.write(table, folder / f"part-{number}", num_shards=(SHARDS, 1)[number]))
    return written


def executors(folder: Path) -> Iterator[Cerebro]:
    """One that reports every unit, one that reports every epoch."""
    train, validation = write_data(folder)
    for report_every in ("unit", "epoch"):
        yield Cerebro(
            train, validation, epochs=EPOCHS, workers=WORKERS, devices="cpu", live_trials=LIVE,
            report_every=report_every, keep="none", run_dir=folder / report_every, progress=False,
        )  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    report = Report("ASHA with rungs from one shard on against ASHA with rungs from one epoch on:")
    add(report, f"recorded, {len(SEEDS)} seeds", of_each(on_curves, SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        by_unit, by_epoch = executors(Path(folder))
        with by_unit, by_epoch:
            for cerebro in (by_unit, by_epoch):
                cerebro.fit(Perceptron, [draw(0) | {"epochs": 1}] * 2, metric="accuracy", mode="max")  # workers warm up
            pairs = [real(by_unit, by_epoch, seed) for seed in REAL_SEEDS]
    add(report, f"real, {len(REAL_SEEDS)} seeds", pairs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
