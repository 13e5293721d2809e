"""Trainables that the tests train; importable in the workers, because the tests' folder is on their path."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Plan, TorchTrainable


class Linear(TorchTrainable):
    """Logistic regression by SGD with momentum."""

    def build(self, config: Any, plan: Plan) -> Any:
        model = nn.Linear(8, 2)
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    def validation_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "val_loss": F.cross_entropy(scores, batch[1]),
            "val_accuracy": (scores.argmax(1) == batch[1]).float().mean(),
        }


class Deep(Linear):
    """Dropout and BatchNorm: random numbers and buffers."""

    def build(self, config: Any, plan: Plan) -> Any:
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=config["lr"])


class Hoarding(Linear):
    """Keeps one tensor more with each unit, before all others, so that these lie elsewhere in every state."""

    def start(self, config: Any, plan: Plan) -> None:
        super().start(config, plan)
        self.hoard: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"hoard": self.hoard, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hoard = state.pop("hoard")
        super().load_state_dict(state)

    def run_unit(self, work: Any) -> dict[str, float]:
        self.hoard.append(torch.full((100,), 7.0))
        return super().run_unit(work)


class Unhurried(Deep):
    """Takes a fifth of a second for a unit, in which other things may happen."""

    def run_unit(self, work: Any) -> dict[str, float]:
        time.sleep(0.2)
        return super().run_unit(work)


class Raising(Linear):
    """Raises where the config says: {"raise_in": (epoch, shard)}."""

    def run_unit(self, work: Any) -> dict[str, float]:
        if self.state.plan and self._config.get("raise_in") == (work.epoch, work.shard):
            raise RuntimeError("this unit was told to raise")
        return super().run_unit(work)


class Remembering(Deep):
    """Carries the units it has trained in its state, and reports how many they are; takes a while in odd shards."""

    def start(self, config: Any, plan: Plan) -> None:
        super().start(config, plan)
        self.seen: list[tuple[int, int]] = []

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state.pop("seen")
        super().load_state_dict(state)

    def run_unit(self, work: Any) -> dict[str, float]:
        assert (work.epoch, work.shard) not in self.seen, f"{work.epoch}, {work.shard} again, after {self.seen}"
        self.seen.append((work.epoch, work.shard))
        time.sleep(0.02 * (work.shard % 2))
        return super().run_unit(work) | {"seen": len(self.seen)}


class Diverging(Linear):
    """Loses its loss to NaN at once."""

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return super().training_step(model, batch) * float("nan")


class Talking(Linear):
    """Prints, warns, and writes to stderr in each unit."""

    def run_unit(self, work: Any) -> dict[str, float]:
        print("hello from a unit")
        print("to stderr", file=sys.stderr)
        warnings.warn("a warning of user code", UserWarning, stacklevel=1)
        return super().run_unit(work)


class Mortal(Deep):
    """Kills its own worker in the middle of the units in config["die"], config["times"] times each.

    A mark in the folder config["marks"] counts each death.
    """

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        loss = super().training_step(model, batch)
        if self.place in self._config.get("die", []):
            mark = "{}-{}-".format(*self.place)
            deaths = len(list(Path(self._config["marks"]).glob(f"{mark}*")))
            if deaths < self._config["times"]:
                Path(self._config["marks"], f"{mark}{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def run_unit(self, work: Any) -> dict[str, float]:
        self.place = (work.epoch, work.shard)
        return super().run_unit(work)


class Counting(Deep):
    """Keeps what no state_dict lists: a counter in the trainable, and attributes of the model's own module."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Linear(8, 2)
            self.calls, self.sizes, self.mean = 0, [], torch.zeros(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.calls += 1
                self.sizes.append(len(x))
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.layers(x - self.mean)

    def build(self, config: Any, plan: Plan) -> Any:
        self.steps = 0
        model = self.Model()
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"])

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            self.steps += 1
            self.latest = torch.ones(3) * self.steps  # set for the first time in mid-training
        return super().training_step(model, batch) * min(1.0, self.steps / 50)

    def run_unit(self, work: Any) -> dict[str, float]:
        metrics = super().run_unit(work)
        model: Any = self.state.model
        assert len(model.sizes) == model.calls == self.steps == self.latest[0]
        return metrics | {"steps": self.steps, "rows": sum(model.sizes), "mean": float(model.mean.sum())}


class AtEpochsEnd(Linear):
    """Has a metric only where an epoch ends."""

    def run_unit(self, work: Any) -> dict[str, float]:
        return super().run_unit(work) | ({"at_the_end": work.epoch} if work.last else {})


class Exiting(Linear):
    """Calls sys.exit in a unit."""

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        sys.exit(3)
