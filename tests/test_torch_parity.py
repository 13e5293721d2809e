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
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.seeding import seed_build
from runs import outliving
from trees import round_trip

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


class SplitBuffers(Momentum):
    """Two buffers that begin as one tensor and part; a model whose state dict is of copies; an extra state."""

    def build(self, config: Any, plan: Plan) -> Any:
        model = Odd()
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)


class Odd(nn.Module):
    mean: torch.Tensor
    zero: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = Copying(8, 2)
        one = torch.zeros(8)
        self.register_buffer("mean", one)
        self.register_buffer("zero", one)
        self.steps = {"done": 0}

    def get_extra_state(self) -> Any:
        return {"steps": self.steps["done"]}

    def set_extra_state(self, state: Any) -> None:
        self.steps["done"] = state["steps"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps["done"] += 1
        self.mean = self.mean * 0.9 + x.mean(0)
        return self.layer(x - self.mean + self.zero) * (1 + 0.01 * self.steps["done"])  # type: ignore[no-any-return]


class Copying(nn.Linear):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        tensors = super().state_dict(*args, **options)
        prefix = options.get("prefix", "")
        for name in ("weight", "bias"):
            tensors[prefix + name] = tensors[prefix + name].detach().clone()
        return tensors


class Master(torch.optim.Optimizer):
    """Moments and weights in float32, whatever the model's dtype, in an optimizer that torch must load itself."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["master"] = parameter.float().clone()
                state["moment"].mul_(0.9).add_(parameter.grad.float())
                state["master"].sub_(state["moment"], alpha=group["lr"])
                parameter.copy_(state["master"])


class MasterWeights(HalfTrue):
    def build(self, config: Any, plan: Plan) -> Any:
        model = mlp()
        return model, Master(model.parameters(), config["lr"])


class OwnLoss(Momentum):
    """A parameter that is trained, but is not the model's."""

    def build(self, config: Any, plan: Plan) -> Any:
        model = mlp()
        self.temperature = nn.Parameter(torch.ones(3, 2))
        return model, torch.optim.SGD([*model.parameters(), self.temperature], lr=config["lr"])


class Teacher(Momentum):
    def build(self, config: Any, plan: Plan) -> Any:
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(2))
        self.teachers = [mlp()]
        return super().build(config, plan)


class Inside(Teacher):
    """The same parts, but all of them in the model."""

    def build(self, config: Any, plan: Plan) -> Any:
        self.net, self.teacher = nn.Linear(8, 2), nn.Linear(8, 2)
        model = nn.ModuleDict({"net": self.net, "teacher": self.teacher})
        return model, torch.optim.SGD(self.net.parameters(), lr=config["lr"])


def plain_loop(
    kind: type[TorchTrainable], loader: VisitLoader, lr: float, device: str = "cpu"
) -> tuple[nn.Module, Any, list[float]]:
    """An independent loop: what a PyTorch user would write for the same training."""
    steps_per_epoch = math.ceil(len(loader) / kind.accumulate)
    plan = Plan(EPOCHS, BATCH, tuple(loader.dataset.rows(s) for s in range(4)), accumulate=kind.accumulate)
    assert plan.steps_per_epoch == steps_per_epoch
    seed_build(loader.seed, loader.trial_index)
    trainable = kind()
    model, optimizer, *rest = trainable.build({"lr": lr}, plan)
    if kind.precision == "bf16-true":
        model.to(torch.bfloat16)
    model.to(device)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(kind.precision)
    scaler = torch.amp.GradScaler(device, enabled=half is torch.float16)
    model.train()
    rates = []
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader, 1):
            with torch.autocast(device, dtype=half, enabled=half is not None):
                loss = trainable.training_step(model, [part.to(device) for part in batch])
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
                bits = values[name].detach().cpu().double().flatten()
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


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return str(request.param)


@pytest.fixture(scope="module")
def cerebro(device: str, train: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cerebro]:
    with Cerebro(
        train, epochs=EPOCHS, batch_size=BATCH, workers=2, placement="pinned", report_every="epoch", seed=5,
        devices=device, run_dir=tmp_path_factory.mktemp("runs"), progress=False,
    ) as cerebro:  # fmt: skip
        yield outliving(cerebro)


@pytest.mark.parametrize(
    "kind",
    [Momentum, OneCycle, Accumulating, Mixed, HalfTrue, Scaled, Tied, SplitBuffers, MasterWeights],
    ids=lambda k: k.__name__,
)
def test_hops_equal_a_plain_loop(
    cerebro: Cerebro, device: str, kind: type[TorchTrainable], train: ShardedDataset
) -> None:
    results = cerebro.fit(spied(kind), [{"lr": 0.05}, {"lr": 0.01}], metric="train_loss")
    torch.set_num_threads(1)
    for index, result in enumerate(results):
        assert result.status == "finished", result.error
        assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
        loader = VisitLoader(train, result.visits, batch_size=BATCH, seed=5, trial_index=index)
        model, optimizer, rates = plain_loop(kind, loader, result.config["lr"], device)
        weights = load_file(Path(str(result.last_checkpoint)))
        expected = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor.cpu()), name
        assert [report["rate"] for report in result.history] == rates
        assert result.history[-1]["optimizer"] == checksum(optimizer)


def test_what_is_trained_beside_the_model_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"OwnLoss trains parameters of shapes \(3, 2\) that are not the model's"
    ):
        OwnLoss().start({"lr": 0.1}, Plan(1, 4, (8,)))


def test_a_module_beside_the_model_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Teacher\.teachers\[0\] is a Sequential that is not part of the model"
    ):
        Teacher().start({"lr": 0.1}, Plan(1, 4, (8,)))
    Inside().start({"lr": 0.1}, Plan(1, 4, (8,)))


def test_buffers_that_parted_may_be_one_again() -> None:
    """A trial's state may go back to where two buffers were one tensor, on a worker that has them apart."""
    here, there = SplitBuffers(), SplitBuffers()
    for trial in (here, there):
        trial.start({"lr": 0.1}, Plan(1, 4, (8,)))
    together = round_trip(here.state_dict())
    here.state.model(torch.ones(2, 8))
    there.load_state_dict(round_trip(here.state_dict()))
    model: Any = there.state.model
    assert not torch.equal(model.mean, model.zero)
    there.load_state_dict(together)
    model.mean.add_(1)
    assert torch.equal(model.zero, torch.ones(8))


def test_loading_writes_to_no_buffer_that_a_trial_was_in_before() -> None:
    """By then the buffer may be another trial's."""
    source, trial = SplitBuffers(), SplitBuffers()
    for one in (source, trial):
        one.start({"lr": 0.1}, Plan(1, 4, (8,)))
    first = round_trip(source.state_dict())
    trial.load_state_dict(first)
    before = [tensor.clone() for tensor in tensors_of(first)]
    with torch.no_grad():
        for tensor in source.state.model.parameters():
            tensor.add_(1)
    source.state.model(torch.ones(2, 8))
    trial.load_state_dict(round_trip(source.state_dict()))
    assert all(map(torch.equal, tensors_of(first), before))
    assert all(map(torch.equal, trial.state.model.parameters(), source.state.model.parameters()))


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [*state["model"].values(), *state["buffers"].values()]
    return [tensor.detach() for tensor in tensors if isinstance(tensor, torch.Tensor)]
