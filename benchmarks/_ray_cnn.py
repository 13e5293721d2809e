"""How the CNNs of a task are searched in Ray Tune: by stock Ray, each way as one would write it, and by hops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import ray.tune

from _cnn import Batches, Grid, Task, fit, loaders, quiet, written
from _ray_searches import ray_tune


class Report(pl.Callback):
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            ray.tune.report({name: float(value) for name, value in trainer.callback_metrics.items()})


def train_function(config: dict[str, Any], task: Task, batches: Batches) -> None:
    """A function trainable as Ray's Lightning example has it: each trial loads the data."""
    fit(task, config, loaders(task, task.load(), batches), Report())


# The contenders: a turn trains all configs of a grid.


@contextmanager
def stock_function(task: Task) -> Iterator[Callable[..., int]]:
    """Stock Ray: (grid, batches, whether actors are handed on) -> epochs."""
    with ray_tune() as run:

        def train(grid: Grid, batches: Batches = "DataLoader", reuse_actors: bool = False) -> int:
            trainable = ray.tune.with_parameters(train_function, task=task, batches=batches)
            return _search(partial(run, reuse_actors=reuse_actors), trainable, task, grid)

        yield train


@contextmanager
def ours(task: Task) -> Iterator[Callable[[Grid], int]]:
    """By hops between two workers."""
    quiet()
    with ray_tune() as run, written(task) as executor, executor(workers=2) as cerebro:
        yield partial(_search, partial(run, executor=cerebro), task.module, task)


def _search(run: Callable[..., Any], trainable: Any, task: Task, grid: Grid) -> int:
    """Search a grid, and return the epochs trained."""
    space = {name: ray.tune.grid_search(values) for name, values in grid.items()}
    trials = run(trainable, config=space, metric="val_accuracy", mode="max").trials
    assert {trial.status for trial in trials} == {"TERMINATED"}, "all are trained"
    return len(trials) * task.epochs
