"""The test that matters, for plain PyTorch: hops over two processes against one plain loop, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Cerebro, Plan, ShardedDataset, TorchTrainable, VisitLoader
from cerebro_tune.seeding import seed_build

EPOCHS, BATCH = 3, 16


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


class Momentum(TorchTrainable):
    schedule = "epoch"

    def build(self, config: Any, plan: Plan) -> Any:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.3)

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])


class OneCycle(Momentum):
    schedule = "step"
    clip_norm = 0.5

    def build(self, config: Any, plan: Plan) -> Any:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        return (
            model,
            optimizer,
            torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], total_steps=plan.total_steps),
        )


class Accumulating(OneCycle):
    accumulate = 3


class Mixed(OneCycle):
    precision = "bf16-mixed"


class HalfTrue(Momentum):
    precision = "bf16-true"

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])


class Scaled(OneCycle):
    precision = "16-mixed"


class Tied(Momentum):
    def build(self, config: Any, plan: Plan) -> Any:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        model.register_buffer("unlisted", torch.zeros(3), persistent=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
        return model, optimizer

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        model.unlisted.add_(1)
        return F.cross_entropy(model(batch[0])[:, :2], batch[1]) + model.unlisted.sum() * 1e-3


def plain_loop(kind: type[TorchTrainable], loader: VisitLoader, lr: float) -> tuple[nn.Module, Any, list[float]]:
    """An independent loop: what a PyTorch user would write for the same training."""
    steps_per_epoch = math.ceil(len(loader) / kind.accumulate)
    plan = Plan(EPOCHS, BATCH, tuple(loader.dataset.rows(s) for s in range(4)), accumulate=kind.accumulate)
    assert plan.steps_per_epoch == steps_per_epoch
    seed_build(loader.seed, loader.trial_index)
    trainable = kind()
    model, optimizer, *rest = trainable.build({"lr": lr}, plan)
    if kind.precision == "bf16-true":
        model.to(torch.bfloat16)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(kind.precision)
    scaler = torch.amp.GradScaler("cpu", enabled=half is torch.float16)
    model.train()
    rates = []
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader, 1):
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                loss = trainable.training_step(model, batch)
            scaler.scale(loss / kind.accumulate if kind.accumulate > 1 else loss).backward()
            if number % kind.accumulate == 0 or number == len(loader):
                if kind.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), kind.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if rest and kind.schedule == "step":
                    rest[0].step()
        assert number == len(loader)
        if rest and kind.schedule == "epoch":
            rest[0].step()
        rates.append(optimizer.param_groups[0]["lr"])
    return model, optimizer, rates


def checksum(optimizer: torch.optim.Optimizer) -> float:
    """A number that any changed bit of the optimizer's state would change, with near certainty."""
    total = 0.0
    for index, (_, values) in enumerate(optimizer.state.items()):
        for name in sorted(values):
            if isinstance(values[name], torch.Tensor):
                bits = values[name].detach().double().flatten()
                total += float((bits * torch.arange(1, bits.numel() + 1, dtype=torch.float64)).sum()) * (index + 1)
    return total


def spied(kind: type[TorchTrainable]) -> type[TorchTrainable]:
    """The same trainable, reporting its optimizer's checksum and rate."""

    class Spied(kind):  # type: ignore[valid-type, misc]
        def run_unit(self, work: Any) -> dict[str, float]:
            metrics = super().run_unit(work)
            optimizer = self.state.optimizer
            return metrics | {"optimizer": checksum(optimizer), "rate": optimizer.param_groups[0]["lr"]}

    return Spied


@pytest.fixture(scope="module")
def cerebro(train: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cerebro]:
    with Cerebro(
        train, epochs=EPOCHS, batch_size=BATCH, workers=2, placement="pinned", report_every="epoch", seed=5,
        run_dir=tmp_path_factory.mktemp("runs"), progress=False,
    ) as cerebro:  # fmt: skip
        yield cerebro


@pytest.mark.parametrize(
    "kind", [Momentum, OneCycle, Accumulating, Mixed, HalfTrue, Scaled, Tied], ids=lambda k: k.__name__
)
def test_hops_equal_a_plain_loop(cerebro: Cerebro, kind: type[TorchTrainable], train: ShardedDataset) -> None:
    results = cerebro.fit(spied(kind), [{"lr": 0.05}, {"lr": 0.01}], metric="train_loss")
    torch.set_num_threads(1)
    for index, result in enumerate(results):
        assert result.status == "finished", result.error
        assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
        loader = VisitLoader(train, result.visits, batch_size=BATCH, seed=5, trial_index=index)
        model, optimizer, rates = plain_loop(kind, loader, result.config["lr"])
        weights = load_file(Path(str(result.last_checkpoint)))
        expected = model.state_dict()
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), name
        assert [report["rate"] for report in result.history] == rates
        assert result.history[-1]["optimizer"] == checksum(optimizer)
