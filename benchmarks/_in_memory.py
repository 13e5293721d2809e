"""Searches over a training set of 2 GB: of stock Ray and two Optuna processes, and by hops in both."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pyarrow as pa
import pytorch_lightning as pl
import ray.tune
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import _cnn
import _ray_cnn
from _ray_searches import ray_tune
from _sizes import sized
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.data import BatchForm
from cerebro_tune_optuna import optimize

FLOATS = 4096
ROWS, VALIDATION_ROWS = sized(8_192, 131_072), 1_000
BLOCK = 4_096  # rows made at once
BATCH, SHARDS, EPOCHS, WORKERS = 256, 8, 1, 2
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
DATA_BYTES = ROWS * FLOATS * 4
Way = Literal["own copy", "mapped"]
"""How a stock trial reads."""


class Linear(pl.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Linear(FLOATS, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


# The data.


def write_data(folder: Path) -> None:
    """The same rows as shards, and as a NumPy file."""
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (ROWS, FLOATS))
    np.save(folder / "y.npy", np.arange(ROWS) % 10)
    for first in range(0, ROWS, BLOCK):
        x[first : first + BLOCK] = np.random.default_rng(first).random((BLOCK, FLOATS), np.float32)
    x.flush()
    schema = _table(x[:1], 0).schema
    blocks = (_table(x[first : first + BLOCK], first).to_batches()[0] for first in range(0, ROWS, BLOCK))
    ShardedDataset.write(pa.RecordBatchReader.from_batches(schema, blocks), folder / "train", num_shards=SHARDS)
    ShardedDataset.write(_table(x[:VALIDATION_ROWS], 0), folder / "validation", num_shards=1)


def _table(x: np.ndarray, first: int) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(x).ravel(), FLOATS)
    return pa.table({"x": column, "y": (first + np.arange(len(x))) % 10})


class Mapped:
    """Batches of a mapped set, in order."""

    def __init__(self, path: Path) -> None:
        self.dataset = ShardedDataset.open(path)

    def __len__(self) -> int:
        return math.ceil(self.dataset.num_rows / BATCH)

    def __iter__(self) -> Iterator[Any]:
        return self.dataset.batches_of(BATCH, BatchForm())


def sets(folder: Path, way: Way) -> list[Any]:
    if way == "mapped":
        return [Mapped(folder / "train"), Mapped(folder / "validation")]
    x, y = torch.from_numpy(np.load(folder / "x.npy")), torch.from_numpy(np.load(folder / "y.npy"))
    few = slice(VALIDATION_ROWS)
    return [DataLoader(TensorDataset(x, y), BATCH, shuffle=True), DataLoader(TensorDataset(x[few], y[few]), BATCH)]


# The contenders: a turn searches all rates, and tells how many trials that were.


def fit(lr: float, folder: Path, way: Way, *callbacks: pl.Callback) -> float:
    _cnn.quiet()
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(Linear(lr), *sets(folder, way))
    return float(trainer.callback_metrics["val_loss"])


def in_ray(config: dict[str, Any], folder: Path, way: Way) -> None:
    fit(config["lr"], folder, way, _ray_cnn.Report())


@contextmanager
def stock_ray(folder: Path, way: Way) -> Iterator[Callable[[], int]]:
    with ray_tune() as run:
        yield partial(_search, run, partial(in_ray, folder=folder, way=way))


@contextmanager
def ours_in_ray(folder: Path) -> Iterator[Callable[[], int]]:
    with ray_tune() as run, executor(folder) as cerebro:
        yield partial(_search, partial(run, executor=cerebro), Linear)


def _search(run: Callable[..., Any], trainable: Any) -> int:
    trials = run(trainable, config={"lr": ray.tune.grid_search(list(RATES))}, metric="val_loss", mode="min").trials
    assert {trial.status for trial in trials} == {"TERMINATED"}, "all are trained"
    return len(trials)


@contextmanager
def stock_optuna(folder: Path, gc_after_trial: bool) -> Iterator[Callable[[], int]]:
    def act() -> int:
        with tempfile.TemporaryDirectory() as studies:
            study = enqueued(f"{studies}/log")
            context = multiprocessing.get_context("spawn")
            arguments = f"{studies}/log", folder, gc_after_trial
            each = [context.Process(target=_optuna_process, args=arguments) for _ in range(WORKERS)]
            for process in each:
                process.start()
            for process in each:
                process.join()
            return len(complete(study))

    yield act


def _optuna_process(path: str, folder: Path, gc_after_trial: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        return fit(suggest(trial), folder, "own copy")

    study(path).optimize(objective, n_trials=len(RATES) // WORKERS, gc_after_trial=gc_after_trial)


@contextmanager
def ours_in_optuna(folder: Path) -> Iterator[Callable[[], int]]:
    with executor(folder) as cerebro:

        def act() -> int:
            with tempfile.TemporaryDirectory() as studies:
                mine = enqueued(f"{studies}/log")
                optimize(mine, lambda t: (Linear, {"lr": suggest(t)}), len(RATES), executor=cerebro, metric="val_loss")
                return len(complete(mine))

        yield act


def study(path: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(path))
    return optuna.create_study(study_name="s", storage=storage, load_if_exists=True)


def enqueued(path: str) -> optuna.Study:
    made = study(path)
    for lr in RATES:
        made.enqueue_trial({"lr": lr})
    return made


def suggest(trial: optuna.Trial) -> float:
    return trial.suggest_float("lr", 1e-5, 1e-1, log=True)


def complete(done: optuna.Study) -> list[Any]:
    trials = done.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert len(trials) == len(RATES), "all are trained"
    return trials


def executor(folder: Path) -> Cerebro:
    return Cerebro(
        folder / "train", folder / "validation", epochs=EPOCHS, batch_size=BATCH, workers=WORKERS, devices="cpu",
        run_dir=folder / "runs", resume="never", progress=False,
    )  # fmt: skip
