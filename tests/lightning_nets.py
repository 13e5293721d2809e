"""LightningModules that the tests train; importable in the workers, because the tests' folder is on their path.

`unified_nets` is this file once more, for `lightning.pytorch` in place of `pytorch_lightning`.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryConfusionMatrix, BinaryJaccardIndex

HOST = "lightning.pytorch" if __name__ == "unified_nets" else "pytorch_lightning"
pl: Any = import_module(HOST)
boring: Any = import_module(f"{HOST}.demos.boring_classes")
transformer: Any = import_module(f"{HOST}.demos.transformer")


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


class Outspoken(Momentum):
    """Says something through the host's own logger in each epoch."""

    def on_train_epoch_start(self) -> None:
        logging.getLogger(HOST).warning("an epoch begins")


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


# Optimizers and schedules.


class AdamW(Momentum):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.1)


class Stepwise(Momentum):
    """A rate that falls with every second step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"], amsgrad=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}


class Warmup(Momentum):
    """A rate that `optimizer_step` raises over the first 20 steps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.hparams["lr"] * min(1.0, (self.trainer.global_step + 1) / 20)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, nesterov=True)


class Closure(Momentum):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=self.hparams["lr"], max_iter=3, history_size=4)


class Adversarial(pl.LightningModule):
    """Two optimizers stepped by hand: one every batch, one every third; each with a scheduler of its own."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.maker, self.critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        makes, judges = self.optimizers()
        made = self.maker(torch.randn(len(batch[0]), 4))
        self.toggle_optimizer(makes)
        loss = F.softplus(-self.critic(made)).mean()
        makes.zero_grad()
        self.manual_backward(loss)
        makes.step()
        self.untoggle_optimizer(makes)
        judged = (F.softplus(-self.critic(batch[0])) + F.softplus(self.critic(made.detach()))).mean()
        self.manual_backward(judged / 3)
        if batch_idx % 3 == 2:
            self.clip_gradients(judges, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            judges.step()
            judges.zero_grad()
        every_batch, every_epoch = self.lr_schedulers()
        every_batch.step()
        if self.trainer.is_last_batch:
            every_epoch.step()
        self.log_dict({"made": loss, "judged": judged}, prog_bar=True, on_step=True, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.softplus(-self.critic(batch[0])).mean())

    def configure_optimizers(self) -> Any:
        makes = torch.optim.Adam(self.maker.parameters(), lr=self.hparams["lr"])
        judges = torch.optim.SGD(self.critic.parameters(), lr=self.hparams["lr"], momentum=0.9)
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(makes, 0.97),
            torch.optim.lr_scheduler.MultiStepLR(judges, [1, 2]),
        ]
        return [makes, judges], schedulers


class Growing(Momentum):
    """Trains its head only; in each later epoch a layer more, in a parameter group of its own."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            layer = self.net[2 - self.current_epoch]
            self.optimizers().add_param_group({"params": layer.parameters(), "lr": self.hparams["lr"] / 10})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net[4].parameters(), lr=self.hparams["lr"])


# What modules keep.


class Tied(Momentum):
    """Two layers with one weight."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr, dropout=0.0)
        self.again = nn.Linear(8, 16)
        self.again.weight = self.net[0].weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.01 * self.again(batch[0]).square().mean()


class Metrics(Momentum):
    """Metrics that gather over an epoch and are computed at its end; one of them where no state dict sees it."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.found = MetricCollection([BinaryAccuracy(), BinaryAUROC()], prefix="train_")
        self.hidden = {"mean": MeanMetric()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        self.found.update(scores.softmax(1)[:, 1], batch[1])
        self.hidden["mean"].update(batch[0])
        return F.cross_entropy(scores, batch[1])

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.found.compute())
        self.log("mean", self.hidden["mean"].compute())
        self.found.reset()
        self.hidden["mean"].reset()


class Grouped(Metrics):
    """Metrics that share their state, which they update in place."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.found = MetricCollection([BinaryConfusionMatrix(), BinaryJaccardIndex()])

    def on_train_epoch_end(self) -> None:
        found = self.found.compute()
        self.log_dict({"rows": found["BinaryConfusionMatrix"].sum().float(), "jaccard": found["BinaryJaccardIndex"]})
        self.found.reset()


class Composed(Metrics):
    """A metric that is made of two others."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.right, self.area = BinaryAccuracy(), BinaryAUROC()
        self.found = self.right + self.area

    def on_train_epoch_end(self) -> None:
        self.log("both", self.found.compute())
        self.found.reset()


class Refreshing(Momentum):
    """A hook that writes into the model, and into what it holds, before what was saved is loaded."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.held = [nn.Linear(8, 2)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.held[0].weight.mul_(0.99).add_(batch[0].mean(0), alpha=0.01)
        return F.cross_entropy(self.net(batch[0]) + self.held[0](batch[0]).detach(), batch[1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net[4].reset_parameters()
        self.held[0].reset_parameters()


class Nested(Momentum):
    """State of its own in checkpoints, nested; a list of tensors that only the hooks know how to make."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.memory: Any = Memory()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.memory.means = [*self.memory.means[-2:], batch[0].mean(0)]
        return super().training_step((batch[0] - torch.stack(self.memory.means).mean(0), batch[1]), batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["memory"] = {"means": [("mean", mean) for mean in self.memory.means], "of": {3: (1, 2)}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["memory"]["of"] == {3: (1, 2)}
        self.memory.means = [mean.clone() for _, mean in checkpoint["memory"]["means"]]


class Memory:
    """No plain value."""

    def __init__(self) -> None:
        self.means: list[torch.Tensor] = []


class Hyper(Momentum):
    """Hyper-parameters that training changes."""

    def on_train_epoch_start(self) -> None:
        self.hparams["scale"] = self.hparams.get("scale", 1.0) * 0.9

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hparams["dropout"] *= 0.99
        return self.hparams["scale"] * self.hparams["dropout"] * super().training_step(batch, batch_idx)


class Configured(pl.LightningModule):
    """Layers that `configure_model` makes."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr, self.net = lr, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=self.lr)


class Annealed(Momentum):
    """Settings of torch's own layers, and flags, that change in training; a teacher that no state dict lists."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.teachers = [nn.Linear(8, 2)]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[3].p *= 0.98
        if batch_idx == 6:
            self.net[1].momentum = 0.2
            self.net[1].eval()
            self.net[0].bias.requires_grad_(False)
        if batch_idx == 14:
            self.net[1].train()
            self.net[0].bias.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (teacher,) = self.teachers
        with torch.no_grad():
            teacher.weight.lerp_(self.net[0].weight[:2], 0.05)
        scores = self.net(batch[0])
        return F.cross_entropy(scores, batch[1]) + 0.1 * F.mse_loss(scores, teacher(batch[0]).detach())


class Dicts(Momentum):
    """Batches that are dicts, and steps without a batch index."""

    def training_step(self, batch: Any) -> Any:
        return {"loss": F.cross_entropy(self.net(batch["x"]), batch["y"]), "rows": len(batch["x"])}

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch["x"]), batch["y"]))


# Lightning's own demo modules, on this data.


class Boring(boring.BoringModel):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].repeat(1, 4)


class ManualBoring(boring.ManualOptimBoringModel):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].repeat(1, 4)


class Transformer(transformer.LightningTransformer):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(vocab_size=12)
        self.model = transformer.Transformer(12, ninp=8, nhead=2, nhid=8, nlayers=1)
        self.model.pos_encoder.max_len = 16

    def prepare_data(self) -> None:
        """Nothing to download: the tokens are made of the rows."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        tokens = (batch[0] * 3).long().clamp(-6, 5) + 6
        return tokens[:, :-1], tokens[:, 1:].contiguous()


# Callbacks.


class Recorder(pl.Callback):
    """Notes what happens per batch and per epoch, in plain attributes."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.steps: list[Any] = []
        self.epochs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(("on_train_batch_end", batch_idx))
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        place = (trainer.current_epoch, trainer.global_step, trainer.is_last_batch, trainer.num_training_batches)
        self.steps.append([rates, place, _horizon(trainer), self._logged(trainer)])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("on_train_epoch_start")
        self.epochs.append(self._logged(trainer))  # what the epoch before has logged, at its very end too

    @staticmethod
    def _logged(trainer: Any) -> list[dict[str, float]]:
        kinds = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        return [{name: float(value) for name, value in metrics.items()} for metrics in kinds]


def _horizon(trainer: Any) -> Any:
    try:
        return trainer.estimated_stepping_batches
    except import_module(f"{HOST}.utilities.exceptions").MisconfigurationException:
        return "changes"  # with GradientAccumulationScheduler


def _noting(hook: str) -> Any:
    def note(self: Any, *args: Any) -> None:
        self.calls.append((hook, *(arg for arg in args if isinstance(arg, int))))

    return note


_UNSEEN = ("on_train_start", "on_train_end", "on_train_batch_end", "on_train_epoch_start")
for _hook in vars(pl.Callback):
    # The fit's own hooks are called once per worker, as in any of Lightning's resumes.
    if _hook.startswith(("on_train_", "on_validation_", "on_before_", "on_after_")) and _hook not in _UNSEEN:
        setattr(Recorder, _hook, _noting(_hook))


class Hooks(Momentum):
    """Notes every hook of its own that is called per epoch or batch."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.calls: list[Any] = []


def _calling(hook: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((hook, *(arg for arg in (*args, *kwargs.values()) if isinstance(arg, int))))
        return getattr(super(Hooks, self), hook)(*args, **kwargs)

    return call


for _hook in (
    "on_train_epoch_start", "on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping",
    "optimizer_step", "on_train_batch_end", "on_train_epoch_end", "lr_scheduler_step", "on_validation_model_zero_grad",
    "on_validation_model_eval", "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start",
    "validation_step", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
    "on_validation_model_train", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
):  # fmt: skip
    setattr(Hooks, _hook, _calling(_hook))


class Thaw(pl.callbacks.BaseFinetuning):
    """Freezes the first layer and its batch norm, and unfreezes them in epoch 1."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:2], train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:2], optimizer)


class Head(Momentum):
    """Gives the optimizer what is not frozen."""

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.hparams["lr"], momentum=0.9)


class Average(pl.Callback):
    """An average of weights as people write it: a copy in an attribute, a count beside it, and no state dict."""

    def __init__(self) -> None:
        self.updates = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.copy = deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.updates += 1
        rate = 1 / min(self.updates, 10)
        for mine, theirs in zip(self.copy.parameters(), pl_module.net.parameters(), strict=True):
            mine.data.lerp_(theirs.data, rate)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.copy.parameters(), pl_module.net.parameters(), strict=True):
                theirs.copy_(mine)
