"""Searches that a test restores after their driver was killed: one module for the test and for the driver that dies."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch

import nets
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune_ray import PromotionASHA, tune

SAMPLES = 6
DYING = "RAY_SESSION" in os.environ
"""Whether this is the process that is to die; the search that is restored has the same callbacks."""


def scheduler(name: str) -> Any:
    if name == "asha":
        return ASHAScheduler(max_t=16, grace_period=4, reduction_factor=2)
    if name == "hyperband":
        return HyperBandScheduler(max_t=8, reduction_factor=2)
    if name == "promotion":
        return PromotionASHA(max_t=16, grace_period=4, reduction_factor=2)
    return PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=4, quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 0.3)},
    )  # fmt: skip


def searcher(name: str) -> Any:
    return None if name == "pbt" else OptunaSearch(seed=4)


def executor(folder: Path, live: int) -> Cerebro:
    """One trial at a time has a forced order of results; with more, what matters is that no unit is told twice."""
    return Cerebro(
        ShardedDataset.open(folder / "train"), ShardedDataset.open(folder / "validation"), epochs=4, batch_size=16,
        workers=2 if live > 1 else 1, backend="inline", live_trials=live, run_dir=folder / "runs", progress=False,
    )  # fmt: skip


class Watch(tune.Callback):
    """Writes every result down, and kills the process at the n-th: before what was decided is carried out, or after."""

    def __init__(self, log: Path, kill_at: int = 0, after: bool = False) -> None:
        self.log, self.kill_at, self.after, self.count = log, kill_at, after, 0

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self.count += 1
        with self.log.open("a") as file:
            lr = result["config"]["lr"]
            file.write(f"{trial.trial_id} {result['training_iteration']} {lr!r} {result['val_loss']!r}\n")
        if self.count == self.kill_at and not self.after and DYING:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if self.kill_at and self.count >= self.kill_at and DYING:
            os.kill(os.getpid(), signal.SIGKILL)


def search(name: str, folder: Path, cerebro: Cerebro, watch: Watch) -> Any:
    random.seed(5)
    np.random.seed(5)
    tuner = tune.Tuner(
        nets.Deep, param_space={"lr": tune.loguniform(1e-3, 0.3)},
        tune_config=tune.TuneConfig(
            num_samples=SAMPLES, metric="val_loss", mode="min", scheduler=scheduler(name), search_alg=searcher(name)
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), name="search", verbose=0, callbacks=[watch]),
        executor=cerebro,
    )  # fmt: skip
    return tuner.fit()


def main() -> None:
    """The driver that dies."""
    what, where, lives, moment, how = sys.argv[1:]
    ray.init(address=os.environ["RAY_SESSION"], logging_level="ERROR", log_to_driver=False)
    with executor(Path(where), int(lives)) as dying:
        search(what, Path(where), dying, Watch(Path(where, "log"), int(moment), how == "after"))
