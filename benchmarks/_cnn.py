"""What the benchmarks that train for real share: CNNs in Lightning, their data, and ways to train without a tuner.

A `Task` is what all contenders of a benchmark train, each in its own way; a contender's turn trains every config of a
grid to its end, and tells how many epochs that were.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cerebro_tune import Cerebro, ShardedDataset

Grid = dict[str, list[float]]
Pair = tuple[Tensor, Tensor]
Data = tuple[Pair, Pair | None]
"""What is trained on, and what is validated with."""
Batches = Literal["DataLoader", "by index"]


# Models.


def cnn(width: int, dropout: float) -> nn.Sequential:
    """The demo's, for images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 49, 10),
    )  # fmt: skip


def strided(width: int, dropout: float) -> nn.Sequential:
    """Two strided convolutions and two layers on top: 0.1 million parameters with 16 channels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def normal(images: Tensor) -> Tensor:
    """Images of values from 0 to 1 with mean and deviation of Fashion-MNIST taken out."""
    return (images - 0.2860) / 0.3530


class LitCnn(pl.LightningModule):
    make = staticmethod(cnn)

    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = self.make(width, dropout)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images if images.is_floating_point() else normal(images[:, None] / 255))
        return scores

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Pair, batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("val_loss", F.cross_entropy(scores, batch[1]))
        self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class LitStrided(LitCnn):
    make = staticmethod(strided)


# Data.


FASHION_FILES = Path("/usr/share/datasets/fashion-mnist")
NO_FASHION = "" if FASHION_FILES.is_dir() else "Fashion-MNIST is missing: apt-get install dataset-fashion-mnist"


def fashion(rows: int = 60_000, validation: bool = True, folder: Path = FASHION_FILES) -> Data:
    """So many of the 60,000 images of Fashion-MNIST to train on, and its 10,000 to validate with, read anew."""
    return _images(folder, "train", rows), _images(folder, "t10k", 10_000) if validation else None


def unpack(folder: Path) -> None:
    """Put the files of Fashion-MNIST into a folder as they are in use, without their compression."""
    for packed in FASHION_FILES.glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def _images(folder: Path, part: str, rows: int) -> Pair:
    pixels, kinds = (_content(folder / f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    images = np.frombuffer(pixels, np.uint8, rows * 784, offset=16).reshape(-1, 28, 28)
    return torch.tensor(images), torch.tensor(np.frombuffer(kinds, np.uint8, rows, offset=8).astype("int64"))


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


class Samples(Dataset[Any]):
    """Images one by one, each made a tensor and normalized, as Ray's example for PyTorch has it.

    That takes the data set of torchvision with its transforms ToTensor and Normalize, which do more steps per row.
    """

    def __init__(self, images: Tensor, digits: Tensor) -> None:
        self.images, self.digits = images, digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[row].numpy())
        return normal(torch.from_numpy(np.array(image))[None] / 255), int(self.digits[row])


class Gathered:
    """Batches that are gathered by index, without a DataLoader."""

    def __init__(self, images: Tensor, digits: Tensor, batch: int, shuffle: bool = False) -> None:
        self.images, self.digits, self.batch, self.shuffle = images, digits, batch, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.digits) / self.batch)

    def __iter__(self) -> Iterator[Pair]:
        rows = torch.randperm(len(self.digits)) if self.shuffle else torch.arange(len(self.digits))
        for batch in rows.split(self.batch):
            yield self.images.index_select(0, batch), self.digits.index_select(0, batch)


def table(images: Tensor, digits: Tensor) -> pa.Table:
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images.numpy()), "digit": digits.numpy()})


# Tasks.


@dataclass(frozen=True)
class Task:
    """What to train, on what, and for how long."""

    module: type[pl.LightningModule]
    load: Callable[[], Data]
    epochs: int
    batch: int
    shards: int
    samples: Callable[[Tensor, Tensor], Dataset[Any]] = TensorDataset
    """What the examples of the tuners would give a DataLoader."""


FASHION = Task(LitStrided, fashion, epochs=2, batch=128, shards=8, samples=Samples)


def of_fashion(rows: int, **changes: Any) -> Task:
    """That task with fewer images, and whatever else is to be different."""
    return replace(FASHION, load=partial(fashion, rows), **changes)


def loaders(task: Task, data: Data, batches: Batches) -> list[Any]:
    """Of the training and the validation set; only the first is shuffled."""
    made: list[Any] = []
    for pair in data:
        if pair is not None and batches == "DataLoader":
            made.append(DataLoader(task.samples(*pair), task.batch, shuffle=not made))
        elif pair is not None:
            made.append(Gathered(*pair, task.batch, shuffle=not made))
    return made


def fit(task: Task, config: dict[str, Any], sets: list[Any], *callbacks: pl.Callback, **arguments: Any) -> None:
    """One plain fit, on the CPU unless the Trainer's arguments say otherwise."""
    quiet()
    trainer = pl.Trainer(
        max_epochs=task.epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"accelerator": "cpu", **arguments},
    )  # fmt: skip
    trainer.fit(task.module(**config), *sets)


def quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def configs_of(grid: Grid) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


# Contenders.


@contextmanager
def one_after_another(task: Task) -> Iterator[Callable[[Grid], int]]:
    """A fit per config, by index, one after another in this process."""
    torch.set_num_threads(1)
    sets = loaders(task, task.load(), "by index")

    def fit_all(grid: Grid) -> int:
        configs = configs_of(grid)
        for config in configs:
            fit(task, config, sets)
        return len(configs) * task.epochs

    yield fit_all


@contextmanager
def two_processes(task: Task) -> Iterator[Callable[[Grid], int]]:
    """A fit per config, by index, spread over two processes that have each loaded the data.

    It forks, which must be before torch has threads.
    """
    with multiprocessing.get_context("fork").Pool(2, _prepare, (task,)) as pool:

        def fit_all(grid: Grid) -> int:
            configs = configs_of(grid)
            pool.map(_fit_prepared, configs, chunksize=1)
            return len(configs) * task.epochs

        yield fit_all


_prepared: list[Any] = []


def _prepare(task: Task) -> None:
    torch.set_num_threads(1)
    _prepared[:] = [task, loaders(task, task.load(), "by index")]


def _fit_prepared(config: dict[str, Any]) -> None:
    task, sets = _prepared
    fit(task, config, sets)


@contextmanager
def written(task: Task) -> Iterator[Callable[..., Cerebro]]:
    """The data as shards on disk, and what makes executors that train on it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, pair, shards in zip(("train", "validation"), task.load(), (task.shards, 1), strict=True):
            if pair is not None:
                paths.append(Path(folder, name))
                ShardedDataset.write(table(*pair), paths[-1], num_shards=shards)
        common: dict[str, Any] = {"epochs": task.epochs, "batch_size": task.batch, "devices": "cpu", "progress": False}
        yield partial(Cerebro, *paths, **common, run_dir=f"{folder}/runs", resume="never")


@contextmanager
def hopping(task: Task, **options: Any) -> Iterator[Callable[[Grid], int]]:
    """By hops between two workers, which are up, with these options of the executor."""
    quiet()
    with written(task) as executor, executor(**{"workers": 2, **options}) as cerebro:
        yield partial(fit_by_hops, cerebro, task)


def fit_by_hops(cerebro: Cerebro, task: Task, grid: Grid) -> int:
    results = cerebro.fit(task.module, configs_of(grid), metric="train_loss")
    assert {trial.status for trial in results} == {"finished"}, [trial.error for trial in results]
    return len(results) * task.epochs
