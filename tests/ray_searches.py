"""Searches that a test restores after their driver was killed: one module for the test and for the driver that dies."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch

import lightning_nets
import nets
import resumed_runs
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.journal import NAME
from cerebro_tune_lightning import HopStrategy
from cerebro_tune_ray import PromotionASHA, tune

SAMPLES = 6
KILL_AT, KILL_AFTER = int(os.environ.get("KILL_AT", "0")), "KILL_AFTER" in os.environ
"""Set in a process that is to die, at its so many-th result: the search that is restored has the same callbacks."""
SIGNAL = signal.Signals[os.environ.get("SIGNAL", "SIGKILL")]
"""What it sends itself then."""
DIE_AT_ROW = int(os.environ.get("DIE_AT_ROW", "0"))
"""Set in a process that is to die when it has written this row of its record."""
FULL_AT = int(os.environ.get("FULL_AT", "0"))
"""Set in a process in which no file can grow beyond so many bytes until its record has tried to for a while."""


def scheduler(name: str) -> Any:
    if name == "function":
        return None
    if name == "asha":
        return ASHAScheduler(max_t=16, grace_period=4, reduction_factor=2)
    if name == "hyperband":
        return HyperBandScheduler(max_t=8, reduction_factor=2)
    if name in ("promotion", "breaking"):
        return PromotionASHA(max_t=16, grace_period=4, reduction_factor=2)
    return PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=4, quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 0.3)},
    )  # fmt: skip


def searcher(name: str) -> Any:
    return None if name.endswith("pbt") else OptunaSearch(seed=4)


def executor(folder: Path, live: int) -> Cerebro:
    """One trial at a time has a forced order of results; with more, what matters is that no unit is told twice."""
    return Cerebro(
        ShardedDataset.open(folder / "train"), ShardedDataset.open(folder / "validation"), epochs=4, batch_size=16,
        workers=2 if live > 1 else 1, backend="inline", live_trials=live, run_dir=folder / "runs", progress=False,
    )  # fmt: skip


def hopping(config: dict[str, Any]) -> None:
    """A function trainable that fits, and then reports what it makes of the weights."""
    module = lightning_nets.Momentum(config["lr"])
    trainer = lightning_nets.pl.Trainer(
        strategy=HopStrategy(), max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    with torch.no_grad():
        total = float(sum(weights.sum() for weights in module.parameters()))
    tune.report({"val_loss": total, "step": trainer.global_step})


class Deep(nets.Deep):
    """Has a tuple in its config; raises in its third epoch, once, where a file names its learning rate."""

    def build(self, config: Any, plan: Any) -> Any:
        assert tuple(config["betas"]) == (0.9, 0.99)
        return super().build(config, plan)

    def run_unit(self, work: Any) -> dict[str, float]:
        named = Path(os.environ.get("BREAKS", "nowhere"))
        if (work.epoch, work.position) == (2, 2) and named.exists() and repr(self._config["lr"]) in named.read_text():
            named.unlink()
            raise RuntimeError("told to raise")
        return super().run_unit(work)


def trainable(name: str) -> Any:
    return hopping if name.startswith("function") else Deep


class Watch(tune.Callback):
    """Writes every result down, and kills the process at the n-th: before what was decided is carried out, or after."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        with self.log.open("a") as file:
            lr = result["config"]["lr"]
            file.write(f"{trial.trial_id} {result['training_iteration']} {lr!r} {result['val_loss']!r}\n")
        if not KILL_AFTER:
            self.die_if_due()

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self.die_if_due()

    def die_if_due(self) -> None:
        if KILL_AT and self.log.exists() and len(self.log.read_text().splitlines()) >= KILL_AT:
            os.kill(os.getpid(), SIGNAL)


def search(name: str, folder: Path, cerebro: Cerebro) -> Any:
    random.seed(5)
    np.random.seed(5)
    constant = {} if name.startswith("function") else {"betas": (0.9, 0.99)}
    tuner = tune.Tuner(
        trainable(name), param_space={"lr": tune.loguniform(1e-3, 0.3)} | constant,
        tune_config=tune.TuneConfig(
            num_samples=SAMPLES, metric="val_loss", mode="min", scheduler=scheduler(name), search_alg=searcher(name)
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"), name="search", verbose=0, callbacks=[Watch(folder / "log")],
            failure_config=tune.FailureConfig(max_failures=int(name == "breaking")),
        ),
        executor=cerebro,
    )  # fmt: skip
    return tuner.fit()


def restore(name: str, folder: Path, cerebro: Cerebro) -> Any:
    return tune.Tuner.restore(str(folder / "ray" / "search"), trainable(name), executor=cerebro).fit()


def fill_disk(written: Path) -> None:
    """Let files grow to FULL_AT bytes and no further, until a while after this one has come near that."""

    def make_room() -> None:
        while not written.exists() or written.stat().st_size < FULL_AT - 10_000:
            time.sleep(0.01)
        time.sleep(1.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, resource.RLIM_INFINITY))
    threading.Thread(target=make_room).start()


def main() -> None:
    """The driver that dies; one that is started where another has died takes the search up."""
    name, where, live = sys.argv[1:]
    folder = Path(where)
    if DIE_AT_ROW:
        resumed_runs.die_at(DIE_AT_ROW, before=False)
    if FULL_AT:
        fill_disk(folder / "ray" / "search" / "cerebro" / f"{NAME}-wal")
    ray.init(address=os.environ["RAY_SESSION"], logging_level="ERROR", log_to_driver=False)
    with executor(folder, int(live)) as dying:
        if (folder / "log").exists():
            restore(name, folder, dying)
        else:
            search(name, folder, dying)
