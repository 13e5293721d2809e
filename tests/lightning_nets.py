"""LightningModules that the tests train; importable in the workers, because the tests' folder is on their path."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAccuracy


class Momentum(pl.LightningModule):
    """SGD with momentum and a rate per epoch; dropout and BatchNorm."""

    def __init__(self, lr: float = 0.05, width: int = 16, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class MultiStep(Momentum):
    """A schedule whose state has a Counter with int keys."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)]


class OneCycle(Momentum):
    """AdamW, and a rate per step over the whole horizon."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plateau(Momentum):
    """A rate that falls whenever the validation loss is not a hundredth of what it was: each epoch but the first."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Busy(OneCycle):
    """Much that modules do: augmentation, warm-up, tied weights, torchmetrics, state of its own in checkpoints."""

    def __init__(self, lr: float = 0.05, width: int = 8) -> None:
        super().__init__(lr, width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.outer.weight = self.inner.weight
        self.accuracy = BinaryAccuracy()
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.noise = 0.0

    def on_train_epoch_start(self) -> None:
        self.noise = float(torch.rand(()))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + 0.1 * torch.randn_like(x), y) if self.trainer.training else batch

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        if self.trainer.global_step < 5:
            for group in optimizer.param_groups:
                group["lr"] *= (self.trainer.global_step + 1) / 5

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.mean.lerp_(x.mean(0), 0.1)
        hidden = self.net[:4](x + 0.01 * self.noise - self.mean)
        scores = self.net[4](self.outer(self.inner(hidden).relu()) + hidden)
        self.accuracy(scores.argmax(1), y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        loss = F.cross_entropy(scores, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "scores": scores.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x - self.mean + 0.1 * torch.randn_like(x))
        self.log("val_loss", F.cross_entropy(scores, y))
        self.log("val_noise", torch.rand(()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["noise"] = {"now": self.noise}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noise = checkpoint["noise"]["now"]


class Logging(pl.LightningModule):
    """One weight that never moves, so that what is logged can be computed by hand; rows are x of 8 floats."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.scale * self.weight * batch[0].square().mean()
        self.log("mean_x", batch[0].mean(), on_step=False, on_epoch=True)
        self.log("last_x", batch[0].mean())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val_loss": batch[0].square().mean(), "val_rows": float(len(batch[0]))})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Counting(Momentum):
    """Keeps plain attributes of its own, private ones too, and logs them."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.batches, self._rows = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        self._rows.append(len(batch[0]))
        counts = {"batches": float(self.batches), "rows": float(sum(self._rows))}
        self.log_dict(counts, on_step=False, on_epoch=True, reduce_fx="max")
        return super().training_step(batch, batch_idx) * min(1.0, self.batches / 50)


class Teacher(Momentum):
    """A teacher made of the student when training starts, a counter of starts, and work at the end."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.teacher = nn.Linear(8, 2).requires_grad_(False)
        self.register_buffer("ends", torch.zeros(()))

    def on_train_start(self) -> None:
        self.first_step = self.global_step
        with torch.no_grad():
            self.teacher.weight.copy_(self.net[0].weight[:2])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight[:2], 0.05)
        scores = self.net(batch[0])
        return F.cross_entropy(scores, batch[1]) + 0.1 * F.mse_loss(scores, self.teacher(batch[0]))

    def on_train_end(self) -> None:
        self.ends += 1
        with torch.no_grad():
            self.net[4].weight.mul_(0.5)

    def on_fit_end(self) -> None:
        self.ends *= 3


class Untied(Momentum):
    """Two buffers that are one in a fresh build, and two as soon as training has bound the first anew."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        zeros = torch.zeros(8)
        self.register_buffer("moving", zeros)
        self.register_buffer("fixed", zeros)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.moving = self.moving * 0.9 + batch[0].mean(0)
        return F.cross_entropy(self.net(batch[0] - self.moving + self.fixed), batch[1])


class Marked(pl.LightningModule):
    """A tag in a large buffer, which every step checks; how the buffer gets into a checkpoint is up to `how`."""

    def __init__(self, tag: float = 0.0, how: str = "plain") -> None:
        super().__init__()
        self.tag, self.how = tag, how
        self.net = nn.Linear(8, 2)
        self.register_buffer("mark", torch.full((200_000,), tag))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = super().state_dict(*args, **kwargs)
        return type(held)((name, value.clone()) for name, value in held.items()) if self.how == "copies" else held

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.how == "hook":
            checkpoint["mark"] = self.mark.clone()
        if self.how == "trimmed":
            del checkpoint["state_dict"]["mark"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.how == "hook":
            self.mark.copy_(checkpoint["mark"])
        if self.how == "trimmed":
            checkpoint["state_dict"]["mark"] = self.mark.clone()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.mark.unique().tolist()
        if found != [self.tag]:
            raise RuntimeError(f"the trial with tag {self.tag} finds {found}")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)
