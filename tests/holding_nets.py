"""LightningModules that keep their state in objects: meters, averages, schedules and optimizers of people's own."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lightning_nets import Momentum, pl


class Meter:
    """The mean of what it was shown, as most people write it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


class Shadow:
    """An average of weights in a dict of tensors, and a list of the parameters that it is of."""

    def __init__(self, net: nn.Module) -> None:
        self.parameters = list(net.parameters())
        self.averages = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.newest: dict[Any, float] = {}

    def update(self) -> None:
        for name, parameter in zip(self.averages, self.parameters, strict=True):
            self.averages[name].lerp_(parameter.detach(), 0.2)
            self.newest[parameter] = float(self.averages[name].sum())

    def distance(self) -> Any:
        pairs = zip(self.parameters, self.averages.values(), strict=True)
        return sum((one - other).square().sum() for one, other in pairs)


class Mood(Enum):
    WARM = 1
    HOT = 2


class Seen(NamedTuple):
    """What is noted of a batch."""

    mean: Any
    rows: int


@dataclass(slots=True)
class Notes:
    """Without a dict of attributes, and with a container of a class of its own."""

    steps: int = 0
    by_mood: dict[str, Meter] = field(default_factory=lambda: {mood.name: Meter() for mood in Mood})


class Settings(dict[str, Any]):
    """A dict whose items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def made_counter() -> Any:
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    return counted


class Holding(Momentum):
    """Objects of all kinds, made in __init__ and in hooks; what training makes of them weighs the loss."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.meter, self.lists = Meter(), defaultdict(list)
        self.deep: Any = defaultdict(lambda: defaultdict(float))
        self.shadow, self.notes = Shadow(self.net), Notes()
        self.settings, self.mood, self.folder = Settings(scale=1.0), Mood.WARM, Path("a")
        self.history: list[Seen] = []
        self.counter, self.count = made_counter(), self.meter.update
        self.bias = self.net[0].bias.data
        self.losses = [F.cross_entropy, F.multi_margin_loss]
        self.loss = self.losses[0]
        self.best: Any = None

    def on_train_start(self) -> None:
        self.later = Meter()

    def on_train_epoch_start(self) -> None:
        self.later = Meter()
        if self.current_epoch:
            self.mood, self.best, self.loss = Mood.HOT, self.meter, self.losses[1]
            self.folder = Path("b")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        loss = self.loss(scores, batch[1]) + 0.01 * self.shadow.distance() + 0.1 * self.bias.sum()
        self.count(float(loss.detach()))
        self.later.update(float(loss.detach()))
        self.lists["losses"].append(float(loss.detach()))
        self.deep[self.mood.name][batch_idx % 3] += float(loss.detach())
        self.history = [*self.history[-2:], Seen(batch[0].mean(0), len(batch[0]))]
        self.settings["scale"] *= 0.99
        self.notes.steps += self.counter()
        self.notes.by_mood[self.mood.name].update(float(loss.detach()))
        self.shadow.update()
        weight = self.settings.scale * self.meter.mean * (1 + 1e-4 * self.notes.steps + len(self.lists["losses"]) / 99)
        weight += self.later.mean + self.notes.by_mood["HOT"].mean + sum(self.deep["WARM"].values()) / 99
        weight += float(sum(seen.mean.sum() for seen in self.history)) + (self.best.mean if self.best else 0.0)
        return loss * weight


class Averager:
    """A copy of a net, held by an object that is no module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = deepcopy(net).eval().requires_grad_(False)

    def update(self, net: nn.Module) -> None:
        for mine, theirs in zip(self.net.parameters(), net.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 0.1)


class ByHand(Momentum):
    """A schedule and an optimizer that only the module knows, an average in an object, a leaf that it trains."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.scale = torch.ones(1, requires_grad=True)
        self.inner = torch.optim.Adam([self.scale], lr=0.01)
        self.falling = torch.optim.lr_scheduler.SequentialLR(
            self.inner,
            [
                torch.optim.lr_scheduler.LinearLR(self.inner, 0.1, total_iters=5),
                torch.optim.lr_scheduler.ExponentialLR(self.inner, 0.9),
            ],
            [5],
        )
        self.average = Averager(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            wanted = self.average.net(batch[0])
        scores = self.net(batch[0])
        loss = F.cross_entropy(self.scale.item() * scores, batch[1]) + 0.1 * F.mse_loss(scores, wanted)
        self.inner.zero_grad()
        (self.scale.square().sum() * loss.detach()).backward()
        self.inner.step()
        self.falling.step()
        self.average.update(self.net)
        return loss


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around another optimizer, which shares its groups."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=float(group["rho"] / (norm + 1e-12)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Sharpness(Momentum):
    """SAM by hand, whose base keeps momentum, with a rate per batch."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers().optimizer
        for step in (optimizer.climb, optimizer.step):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            step()
            optimizer.zero_grad()
        self.lr_schedulers().step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        optimizer = SAM(self.parameters(), torch.optim.SGD, lr=self.hparams["lr"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)]


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside those of another optimizer, of which its `load_state_dict` knows nothing."""

    def __init__(self, optimizer: Any, k: int = 3) -> None:
        self.optimizer, self.k = optimizer, k
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state: Any = defaultdict(dict)
        self.fast_state = optimizer.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}  # type: ignore[assignment]
        for group in self.param_groups:
            group["counter"] = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            group["counter"] += 1
            if group["counter"] % self.k == 0:
                for fast in group["params"]:
                    slow = self.state[fast].setdefault("slow", torch.zeros_like(fast.data))
                    slow.lerp_(fast.data, 0.5)
                    fast.data.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        slow = [dict(self.state[p]) for group in self.param_groups for p in group["params"] if p in self.state]
        return {**self.optimizer.state_dict(), "slow": slow}

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.param_groups = self.optimizer.param_groups


class LookingAhead(Momentum):
    def configure_optimizers(self) -> Any:
        optimizer = Lookahead(torch.optim.Adam(self.parameters(), lr=self.hparams["lr"]))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Late(Momentum):
    """A buffer that has no value before the first batch, and a hook that a parameter has from the start."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.register_buffer("mean", None)
        self.meter = Meter()
        self.net[0].weight.register_hook(self.count)

    def count(self, gradient: Any) -> Any:
        self.meter.update(1.0)
        return gradient * (1 + self.meter.total / 50)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean = batch[0].mean(0)
        self.mean = mean if self.mean is None else self.mean.lerp(mean, 0.1)
        return F.cross_entropy(self.net(batch[0] - self.mean), batch[1])


class Sparse(Momentum):
    """An embedding with sparse gradients, which wait for a step by hand."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False
        self.words = nn.Embedding(12, 8, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        dense, sparse = self.optimizers()
        words = (batch[0][:, 0] * 3).long().clamp(-6, 5) + 6
        loss = F.cross_entropy(self.net(batch[0] + self.words(words)), batch[1])
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            for optimizer in (dense, sparse):
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net.parameters(), 0.01), torch.optim.SparseAdam(self.words.parameters(), 0.01)]


class Keeping(pl.Callback):
    """Holds what a callback may: lists by name, a meter, a schedule of its own for the module."""

    def __init__(self) -> None:
        self.h: Any = defaultdict(list)
        self.meters = [Meter(), Meter()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.h["loss"].append(float(outputs["loss"]))
        self.meters[0].update(float(outputs["loss"]))
        if batch_idx % 5 == 4:
            self.meters.reverse()
        with torch.no_grad():
            pl_module.net[4].bias += 1e-3 * (len(self.h["loss"]) + self.meters[0].mean - self.meters[1].mean)


class Parting(pl.Callback):
    """Holds a part of the module, and an object that the module holds, too."""

    def __init__(self, part: Any, meter: Any) -> None:
        self.part, self.meter = part, meter

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.meter.update(float(outputs["loss"]))
        with torch.no_grad():
            self.part.bias += 0.01 * self.meter.mean
