"""A script such as a user has, whose first batch writes when it is there: (folder, "torch" or "lightning")."""

import sys
import time
from pathlib import Path

import torch

from cerebro_tune import Cerebro, TorchTrainable

FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]


def begun() -> None:
    if not (FOLDER / "begun").exists():
        (FOLDER / "begun").write_text(str(time.monotonic()))


if KIND == "torch":

    class Net(TorchTrainable):
        def build(self, config, plan):
            model = torch.nn.Linear(8, 2)
            return model, torch.optim.SGD(model.parameters(), lr=config["lr"])

        def training_step(self, model, batch):
            begun()
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

else:
    import pytorch_lightning as pl

    class Net(pl.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.lr, self.net = lr, torch.nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            begun()
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)


with Cerebro(FOLDER / "train", workers=2, devices="cpu", run_dir=FOLDER / "runs", progress=False) as cerebro:
    cerebro.fit(Net, [{"lr": 0.1}, {"lr": 0.2}], metric="train_loss")
