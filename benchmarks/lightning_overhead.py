"""What a unit costs through Lightning, beyond what the same batches cost inside one long `Trainer.fit`.

One trial on 2 local workers with pinned shards, so that every unit hops, validated after each; and a plain fit over the
same batches, which validates as often and on the same rows. The two take turns. A figure is the median over a run's
units of the wall clock from report to report, and from shard to shard; the bar is on the median difference of the runs.

A trial alone leaves each worker idle for every other unit, and a core that has slept begins with cold caches. So two
trials are measured too, which keep both workers busy, beside two plain fits side by side. They go in lock step: where
one waits for the other, that is in the figure.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from _report import Report
from _sizes import sized
from cerebro_tune import Cerebro, Decision, ShardedDataset, TrialResult, VisitLoader
from cerebro_tune.arguments import cores
from cerebro_tune.data import BatchForm
from cerebro_tune_lightning import LightningTrainable, ReseedCallback

SHARDS, EPOCHS, BATCH, BATCHES, VALIDATION_BATCHES, WORKERS = 8, 5, 32, 10, 4, 2
Visits = Any
"""Those of a `TrialResult`."""
WARM_UP = 3  # units in which the workers build the module, and the plain fit its loops
RUNS = sized(2, 7, 15)
BAR = 5.0  # ms


class Net(pl.LightningModule):
    """0.3 million parameters; with AdamW's, 4 MB of state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Reports:
    """Notes when each trial's reports are made, and how it has ended."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.results: list[TrialResult] = []

    def on_report(self, trial_id: str, report: Any) -> Decision:
        self.times.setdefault(trial_id, []).append(perf_counter())
        return Decision.CONTINUE

    def on_end(self, result: TrialResult) -> None:
        self.results.append(result)


class Shards(pl.Callback):
    """Notes when a plain fit is through with the batches of each shard, and has validated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.times.append(perf_counter())


class InOrder:
    """The validation set as the workers read it."""

    def __init__(self, dataset: ShardedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return math.ceil(self.dataset.num_rows / BATCH)

    def __iter__(self) -> Iterator[Any]:
        return self.dataset.batches_of(BATCH, BatchForm(), None)


def table(rows: int) -> pa.Table:
    rng = np.random.default_rng(rows)
    x = pa.FixedSizeListArray.from_arrays(rng.normal(size=rows * 64).astype("float32"), 64)
    return pa.table({"x": x, "y": rng.integers(0, 10, rows)})


def by_hops(cerebro: Cerebro, trials: int) -> tuple[list[float], list[Visits]]:
    """What the units of so many trials took, and which shards each trial has visited."""
    reports = Reports()
    run = cerebro.run(LightningTrainable(Net), reports, metric="val_loss")
    for _ in range(trials):
        run.add({})
    run.end_search()
    cerebro.drive(run)
    assert all(result.error is None for result in reports.results), reports.results
    for result in reports.results:
        workers = [worker for _, _, worker in result.visits]
        assert all(before != after for before, after in pairwise(workers)), "every unit hops"
    return [ms for times in reports.times.values() for ms in unit_ms(times)], [r.visits for r in reports.results]


def plain(folder: str, visits: Visits) -> list[float]:
    """What the same batches took in one fit; for a process of its own."""
    quiet()
    train, validation = (ShardedDataset.open(f"{folder}/{name}") for name in ("train", "validation"))
    shards = Shards()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", val_check_interval=BATCHES, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ReseedCallback(0, 0, visits), shards],
    )  # fmt: skip
    trainer.fit(Net(), VisitLoader(train, visits, batch_size=BATCH), InOrder(validation))
    return unit_ms(shards.times)


def unit_ms(times: list[float]) -> list[float]:
    assert len(times) == SHARDS * EPOCHS
    return [(after - before) * 1e3 for before, after in pairwise(times)][WARM_UP:]


def quiet() -> None:
    torch.set_num_threads(max(1, len(cores()) // WORKERS))  # as many as each worker has
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # torch to Lightning


def main() -> int:
    quiet()
    report = Report(f"A unit of {BATCHES} batches and {VALIDATION_BATCHES} of validation, 4 MB of state:")
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        train = ShardedDataset.write(table(SHARDS * BATCHES * BATCH), f"{folder}/train", num_shards=SHARDS)
        validation = ShardedDataset.write(table(VALIDATION_BATCHES * BATCH), f"{folder}/validation", num_shards=1)
        with Cerebro(
            train, validation, epochs=EPOCHS, batch_size=BATCH, workers=WORKERS, devices="cpu", placement="pinned",
            validation_rows="all", run_dir=f"{folder}/runs", progress=False,
        ) as cerebro:  # fmt: skip
            for trials, case in ((1, ""), (2, ", two trials beside two fits")):
                hopped, straight = [], []
                for _ in range(RUNS):
                    units, visits = by_hops(cerebro, trials)
                    hopped.append(units)
                    fits = pool.starmap(plain, [(folder, each) for each in visits], chunksize=1)
                    straight.append([ms for fit in fits for ms in fit])
                tell(report, case, list(zip(hopped, straight, strict=True))[1:])
    return report.finish()


def tell(report: Report, case: str, pairs: list[tuple[list[float], list[float]]]) -> None:
    """Add the figures of a case: (milliseconds of units by hops, and in plain fits) of each run."""
    for name, runs in zip(("a unit by hops", "the same in one long fit"), zip(*pairs, strict=True), strict=True):
        medians = [statistics.median(run) for run in runs]
        report.add(f"{name}{case}", statistics.median(medians), None, "ms", row=6, runs=medians)
    beyond = [statistics.median(one) - statistics.median(other) for one, other in pairs]
    report.add(f"what hopping adds to a unit{case}", statistics.median(beyond), BAR, "ms", row=6, runs=beyond)
    means = [statistics.mean(one) - statistics.mean(other) for one, other in pairs]
    name = "the same, mean with epochs' ends and checkpoints"
    report.add(f"{name}{case}", statistics.median(means), None, "ms", row=6, runs=means)


if __name__ == "__main__":
    sys.exit(main())
