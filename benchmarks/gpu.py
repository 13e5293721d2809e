"""On a GPU, in bf16-mixed precision: efficiency beside plain fits on the same GPU, and an empty unit with its hop.

    python benchmarks/bench.py --only gpu       # where torch sees a CUDA device; `make bench` leaves it out

Efficiency: 4 configs of a CNN with 64 and 128 channels x 2 epochs x 60,000 images in 8 shards, batches of 128. Plain is
one `Trainer.fit` per config over batches gathered by index, one after another while the workers wait; ours is
one, two and four workers that share the GPU. Both validate the 10,000 images once an epoch. The figure is
plain's wall clock / ours, more is better: with one worker what hopping costs and our batches bring, with more what
sharing the device brings, which plain fits in several processes would have, too.

An empty unit has its state on the device: written to the host when the unit ends, and put back before the next.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import _cnn
import overhead
from _cnn import FASHION, Grid, LitCnn, of_fashion
from _report import Report
from _sizes import sized
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.trainable import Config, Plan
from cerebro_tune_lightning import LightningTrainable

GRID: Grid = {"lr": sized([1e-3], [1e-3, 3e-3], [3e-4, 1e-3, 3e-3, 1e-2]), "width": [64], "dropout": [0.0, 0.2]}
ROUNDS = sized(1, 3, 5)
WORKERS = (1, 2, 4)
PRECISION = "bf16-mixed"
STATES_MB = (1, 100)
UNITS, WARM_UP = sized((40, 8), (400, 40))


class OnDevice(overhead.Empty):
    """Trains nothing, with so many MB of state on the device."""

    def start(self, config: Config, plan: Plan) -> None:
        self.weights = torch.zeros(int(config["mb"] * 250_000), device=plan.device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.copy_(state["weights"])


class OnDeviceRecipe(overhead.EmptyRecipe):
    def create(self) -> OnDevice:
        return OnDevice()


def empty_unit_ms(mb: int) -> float:
    """Wall clock per unit of 4 trials on 2 workers that share the device, each unit a hop."""
    with tempfile.TemporaryDirectory() as folder:
        data = ShardedDataset.write(pa.table({"x": np.zeros(4, "float32")}), f"{folder}/data", num_shards=2)
        with Cerebro(
            data, epochs=UNITS // 8, workers=2, devices="cuda", workers_per_device=2, live_trials=4, keep="none",
            run_dir=f"{folder}/runs", progress=False, policy=overhead.Restless(),
        ) as cerebro:  # fmt: skip
            return overhead.one_run(cerebro, OnDeviceRecipe(), [{"mb": mb}] * 4, UNITS, WARM_UP)[0]


def seconds(act: Any) -> float:
    began = perf_counter()
    act()
    return perf_counter() - began


def efficiency(report: Report) -> None:
    _cnn.quiet()
    task = replace(sized(of_fashion(12_000), FASHION), module=LitCnn)
    options: dict[str, Any] = {"devices": "cuda", "report_every": "epoch"}
    trainable = LightningTrainable(task.module, trainer_kwargs={"precision": PRECISION})
    found: dict[int, list[float]] = {count: [] for count in WORKERS}
    sets = _cnn.loaders(task, task.load(), "by index")

    def plain(grid: Grid) -> None:
        for config in _cnn.configs_of(grid):
            _cnn.fit(task, config, sets, accelerator="gpu", devices=1, precision=PRECISION)

    few: Grid = {**GRID, "lr": GRID["lr"][:1], "dropout": [0.0]}
    with _cnn.written(task) as executor, ExitStack() as stack:
        executors = {count: stack.enter_context(executor(**options, workers_per_device=count)) for count in WORKERS}
        plain(few)
        for count, cerebro in executors.items():
            cerebro.fit(trainable, _cnn.configs_of({**few, "dropout": [0.0] * count}), metric="train_loss")
        for _ in range(ROUNDS):
            alone = seconds(partial(plain, GRID))
            for count, cerebro in executors.items():
                ours = partial(cerebro.fit, trainable, _cnn.configs_of(GRID), metric="train_loss")
                found[count].append(alone / seconds(ours))
    for count, ratios in found.items():
        name = f"{PRECISION}: plain fits / ours, {count} worker{'s' * (count > 1)} on the device"
        report.add(name, statistics.median(ratios), 0.96 if count == 1 else None, at_most=False, runs=ratios)


def main() -> int:
    report = Report(f"On {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    if not torch.cuda.is_available() or _cnn.NO_FASHION:
        report.not_run("GPU", _cnn.NO_FASHION or "torch sees no CUDA device")
        return report.finish()
    efficiency(report)
    for mb in STATES_MB:
        runs = [empty_unit_ms(mb) for _ in range(ROUNDS)]
        name = f"empty unit that hops, {mb} MB of state on the device, 2 workers"
        report.add(name, statistics.median(runs), None, "ms", runs=runs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
