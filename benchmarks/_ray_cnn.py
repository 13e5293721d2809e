"""How the CNNs of a task are searched in Ray Tune: by stock Ray, each way as one would write it, and by hops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import ray.tune
import torch
from torch.nn import functional as F

from _cnn import Batches, Data, Gathered, Grid, Task, cnn, fit, loaders, quiet, written
from _ray_searches import ray_tune


class Looped(ray.tune.Trainable):
    """A class trainable of stock Ray with the shortest loop there is; a step is an epoch."""

    def setup(self, config: dict[str, Any], task: Task) -> None:
        self.train_data, self.validation_data = task.load()
        self.batch = task.batch
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.net = cnn(new_config["width"], new_config["dropout"])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=new_config["lr"])
        return True

    def step(self) -> dict[str, float]:
        self.net.train()
        for images, digits in Gathered(*self.train_data, self.batch, shuffle=True):
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(images[:, None] / 255), digits).backward()
            self.optimizer.step()
        self.net.eval()
        validation = Gathered(*self.validation_data, self.batch)
        with torch.no_grad():
            right = [(self.net(images[:, None] / 255).argmax(1) == digits).sum() for images, digits in validation]
        return {"val_accuracy": float(sum(right)) / len(self.validation_data[1])}


class Report(pl.Callback):
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            ray.tune.report({name: float(value) for name, value in trainer.callback_metrics.items()})


def train_function(config: dict[str, Any], task: Task, batches: Batches) -> None:
    """A function trainable as Ray's Lightning example has it: each trial loads the data."""
    fit(task, config, loaders(task, task.load(), batches), Report())


class Given:
    """Data that Ray hands to each trial, in place of one that the trial loads."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self) -> Data:
        return self.data


def handed(task: Task) -> Task:
    """The task with its data in it."""
    return replace(task, load=Given(task.load()))


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
def stock_class(task: Task) -> Iterator[Callable[[Grid], int]]:
    """Stock Ray with a class trainable, and actors that are handed on."""
    with ray_tune() as run:
        reused = partial(run, reuse_actors=True, stop={"training_iteration": task.epochs})
        yield partial(_search, reused, ray.tune.with_parameters(Looped, task=task), task)


@contextmanager
def ours(task: Task, **options: Any) -> Iterator[Callable[[Grid], int]]:
    """By hops between two workers, with these options of the executor."""
    quiet()
    with ray_tune() as run, written(task) as executor, executor(workers=2, **options) as cerebro:
        yield partial(_search, partial(run, executor=cerebro), task.module, task)


def _search(run: Callable[..., Any], trainable: Any, task: Task, grid: Grid) -> int:
    """Search a grid, and return the epochs trained."""
    space = {name: ray.tune.grid_search(values) for name, values in grid.items()}
    trials = run(trainable, config=space, metric="val_accuracy", mode="max").trials
    assert {trial.status for trial in trials} == {"TERMINATED"}, "all are trained"
    return len(trials) * task.epochs
