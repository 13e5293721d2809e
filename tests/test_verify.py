"""`verify_hop`: quiet about what hops, and naming what does not."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_nets
import nets
from cerebro_tune import ShardedDataset, verify_hop
from cerebro_tune.errors import ConfigurationError, StateError, UnsupportedLeafError
from cerebro_tune_lightning import LightningTrainable


class Drawing(nets.Linear):
    """Draws from a generator of its own, which no other worker has."""

    def build(self, config: Any, plan: Any) -> Any:
        self.source = [random.Random(0).random]
        return super().build(config, plan)

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return super().training_step(model, batch) * self.source[0]()


class Unseeded(nets.Linear):
    count = 0

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        Unseeded.count += 1
        return super().training_step(model, batch) * Unseeded.count


class Forgetting(nets.Linear):
    """Leaves a counter out."""

    def build(self, config: Any, plan: Any) -> Any:
        self.seen = 0
        return super().build(config, plan)

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        self.seen += 1
        return super().training_step(model, batch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = 0


class Remembering(lightning_nets.Momentum):  # type: ignore[misc]
    """Keeps state in an object of its own, and no hook that saves it."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.memory = lightning_nets.Memory()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.memory.means = [*self.memory.means, batch[0].mean(0)]
        return super().training_step((batch[0] - self.memory.means[0], batch[1]), batch_idx)


class Hiding(lightning_nets.Momentum):  # type: ignore[misc]
    """Keeps state in its class, which no object holds."""

    seen: ClassVar[dict[int, float]] = {}

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.seen[id(self)] = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[id(self)] *= 0.9
        return super().training_step(batch, batch_idx) * self.seen[id(self)]


class Saving(lightning_nets.Momentum):  # type: ignore[misc]
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"deep": [object()]}


class Tagging(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tags = {"last": lightning_nets.Memory()}


@pytest.mark.parametrize("kind", [nets.Linear, nets.Deep, lightning_nets.Busy, lightning_nets.Adversarial, Remembering])
def test_what_hops_passes(train: ShardedDataset, kind: Any) -> None:
    before = torch.get_rng_state()
    verify_hop(kind, {"lr": 0.1}, train=train, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("trainable", "error", "reason"),
    [
        (Drawing, StateError, "Drawing loses state at a hop: model.weight is tensor.* with a hop and tensor.* without"),
        (Unseeded, StateError, "Unseeded does not train twice alike: after the first unit .* model.weight is"),
        (Forgetting, StateError, r"Forgetting loses state at a hop: attributes\.seen is nothing with a hop and 4"),
        (Hiding, StateError, r"Hiding loses state at a hop: state_dict.net.0.weight is tensor"),
        (Saving, UnsupportedLeafError, r"mine.*deep.*0"),
        (
            LightningTrainable(lightning_nets.Momentum, trainer_kwargs={"callbacks": Tagging()}),
            UnsupportedLeafError,
            r"callbacks\[0\].Tagging.tags\['last'\] has become a Memory in training",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_lost_is_named(train: ShardedDataset, trainable: Any, error: Any, reason: str) -> None:
    with pytest.raises(error, match=reason):
        verify_hop(trainable, {"lr": 0.1}, train=train, batch_size=16)


class Data(pl.LightningDataModule):
    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.forgets, self.factor = forgets, 1.0

    def train_dataloader(self) -> Any:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.factor *= 0.9
        return self.factor * batch[0], batch[1]

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = 1.0 if self.forgets else state["factor"]


def test_a_datamodule_does_for_data_and_what_it_loses_is_named() -> None:
    verify_hop(lightning_nets.Momentum, datamodule=Data(forgets=False))
    with pytest.raises(StateError, match=r"Momentum loses state at a hop: Data.factor is 1.0 with a hop and 0.81"):
        verify_hop(lightning_nets.Momentum, datamodule=Data(forgets=True))


def test_batches_do_for_data() -> None:
    batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(5)]
    verify_hop(lightning_nets.OneCycle, {"lr": 0.1}, batches=batches)
    with pytest.raises(ConfigurationError, match="batches has 1; verify_hop needs two or more"):
        verify_hop(lightning_nets.OneCycle, batches=batches[:1])
