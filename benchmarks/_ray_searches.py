"""Searches of Ray Tune over a class trainable whose units take a given time: as stock Ray runs them, and by hops."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining

from cerebro_tune import Cerebro
from cerebro_tune_ray import tune

SPACE = {"lr": tune.loguniform(1e-4, 1.0)}


class Timed(ray.tune.Trainable):
    """A unit is a sleep; the loss falls the faster the nearer the learning rate is to 0.01."""

    def setup(self, config: dict[str, Any]) -> None:
        self.loss, self.unit_s = 1.0, config["unit_s"]
        self.fall = 0.25 / (1 + math.log10(config["lr"] / 1e-2) ** 2)

    def step(self) -> dict[str, float]:
        time.sleep(self.unit_s)
        self.loss *= 1 - self.fall
        return {"loss": self.loss}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, float]:
        return {"loss": self.loss}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.loss = checkpoint["loss"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True


class Units(ray.tune.Callback):
    """Counts what is reported: of a population's trial the iterations of others are no units."""

    count = 0

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        self.count += 1


def scheduler(name: str, epoch: int, epochs: int) -> Any:
    """A scheduler that compares the trials after an epoch of so many units; a trial trains for so many epochs."""
    if name == "ASHA":
        return ASHAScheduler(max_t=epoch * epochs, grace_period=epoch, reduction_factor=3)
    if name == "HyperBand":
        return HyperBandScheduler(max_t=epoch * epochs, reduction_factor=3)
    return PopulationBasedTraining(perturbation_interval=epoch, hyperparam_mutations=SPACE)


def search(run: Callable[..., Any], name: str, unit_s: float, trials: int, epoch: int, epochs: int) -> int:
    """Run one search and return its units."""
    random.seed(0)
    np.random.seed(0)
    units = Units()
    run(
        Timed, config={**SPACE, "unit_s": unit_s}, num_samples=trials, scheduler=scheduler(name, epoch, epochs),
        stop={"training_iteration": epoch * epochs}, metric="loss", mode="min", callbacks=[units],
    )  # fmt: skip
    return units.count


@contextmanager
def ray_tune() -> Iterator[Callable[..., Any]]:
    """A Ray of two CPUs, and its `tune.run` with what is equal in all calls."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with tempfile.TemporaryDirectory() as storage:
        ray.init(num_cpus=2, object_store_memory=200_000_000, **options)
        try:
            yield partial(tune.run, storage_path=storage, verbose=0)
        finally:
            ray.shutdown()


@contextmanager
def stock(reuse: bool) -> Iterator[Callable[..., int]]:
    """Stock Ray, with an actor for each trial, or with two that are handed on."""
    with ray_tune() as run:
        yield partial(search, partial(run, reuse_actors=reuse))


@contextmanager
def ours() -> Iterator[Callable[..., int]]:
    """By hops between two workers."""
    with (
        ray_tune() as run,
        tempfile.TemporaryDirectory() as folder,
        Cerebro(workers=2, run_dir=folder, progress=False) as cerebro,
    ):
        yield partial(search, partial(run, executor=cerebro))
