"""What a clone with another config makes of the optimizer and the schedule that it takes over."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from cerebro_tune import Plan, TorchTrainable
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.trainable import UnitWork, change_optimizers
from trees import round_trip


class Free(TorchTrainable):
    """Two layers; the test says which optimizer and schedule."""

    schedule = "step"
    optimizer: Any
    scheduler: Any = None

    def build(self, config: Any, plan: Plan) -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizer = type(self).optimizer(model, config)
        kind = type(self).scheduler
        return (model, optimizer) if kind is None else (model, optimizer, kind(optimizer, config))

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    def validation_step(self, model: nn.Module, batch: Any) -> Any:
        return {"val_loss": 1.0}  # never better, so that a plateau is seen at once


def trainable(optimizer: Any, scheduler: Any = None, **attributes: Any) -> type[Free]:
    return type("Changed", (Free,), {"optimizer": staticmethod(optimizer), "scheduler": scheduler} | attributes)


def start(kind: type[Free], config: dict[str, Any], batch_size: int = 4) -> Free:
    trial = kind()
    trial.start(config, Plan(4, batch_size, (12, 12), accumulate=kind.accumulate))
    return trial


def unit(trial: Free, position: int, epoch: int = 0, batches: int = 3) -> None:
    generator = torch.Generator().manual_seed(10 * epoch + position)
    data = [(torch.randn(4, 4, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(batches)]
    trial.run_unit(UnitWork(epoch, position, position, position == 1, data, data[:1], nullcontext))


def clone(source: Free, old: dict[str, Any], new: dict[str, Any], batch_size: int = 4) -> Free:
    other = start(type(source), new, batch_size)
    other.load_state_dict(round_trip(source.state_dict()))
    other.change_config(old, new)
    return other


def rates(trial: Free, units: int) -> list[float]:
    """The rate after each unit that follows the first."""
    seen = []
    for number in range(1, units + 1):
        unit(trial, number % 2, number // 2)
        seen.append(float(trial.state.optimizer.param_groups[0]["lr"]))
    return seen


def sgd(model: nn.Module, config: Any) -> Any:
    return optim.SGD(model.parameters(), lr=config["lr"])


def test_a_key_that_is_no_value_of_the_optimizer_changes_none_that_equals_it() -> None:
    def reads_dropout(model: nn.Sequential, config: Any) -> Any:
        model.append(nn.Dropout(config["dropout"]))
        return sgd(model, config)

    old, new = {"lr": 0.1, "dropout": 0.0}, {"lr": 0.1, "dropout": 0.3}
    source = start(trainable(reads_dropout), old)
    unit(source, 0)
    (group,) = clone(source, old, new).state.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["lr"]) == (0, 0, 0, 0.1)


def test_a_default_that_equals_the_old_rate_stays() -> None:
    kind = trainable(lambda model, config: optim.AdamW(model.parameters(), lr=config["learning_rate"]))
    old, new = {"learning_rate": 0.01}, {"learning_rate": 0.04}
    source = start(kind, old)
    unit(source, 0)
    (group,) = clone(source, old, new).state.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.04, 0.01)


def test_values_of_groups_follow_their_keys() -> None:
    def adam(model: nn.Sequential, config: Any) -> Any:
        groups = [{"params": model[0].parameters(), "lr": config["rate"] / 10}, {"params": model[1].parameters()}]
        return optim.AdamW(groups, config["rate"], (config["beta"], 0.99), weight_decay=config["decay"])

    old = {"rate": 0.1, "beta": 0.9, "decay": 0.3}
    new = {"rate": 0.2, "beta": 0.8, "decay": 0.6}
    source = start(trainable(adam), old)
    unit(source, 0)
    slow, fast = clone(source, old, new).state.optimizer.param_groups
    assert [group["betas"] for group in (slow, fast)] == [(0.8, 0.99)] * 2
    assert [group["weight_decay"] for group in (slow, fast)] == [0.6] * 2
    assert (slow["lr"], fast["lr"]) == (pytest.approx(0.02), 0.2)


SCHEDULES: dict[str, Any] = {
    "none": None,
    "plateau": lambda o, _: schedules.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=10.0),
    "cyclic": lambda o, c: schedules.CyclicLR(o, c["lr"] / 10, c["lr"], step_size_up=2, cycle_momentum=False),
    "sequential": lambda o, _: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.LambdaLR(o, lambda _: 0.5)], [4]
    ),
    "chained": lambda o, _: schedules.ChainedScheduler(
        [schedules.LambdaLR(o, lambda n: 1 / (n + 1)), schedules.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "one cycle": lambda o, c: schedules.OneCycleLR(o, c["lr"], total_steps=40),
    "cosine": lambda o, _: schedules.CosineAnnealingLR(o, 9),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_in_its_shape(name: str, tensor: bool) -> None:
    def build(model: nn.Module, config: Any) -> Any:
        if not tensor:
            return sgd(model, config)
        return optim.Adam(model.parameters(), lr=torch.tensor(config["lr"], dtype=torch.float64))

    kind = trainable(build, SCHEDULES[name], schedule="epoch" if name == "plateau" else "step")
    old, new = {"lr": 0.1}, {"lr": 0.4}
    source = start(kind, old)
    for position, epoch in ((0, 0), (1, 0), (0, 1)):
        unit(source, position, epoch)
    changed = clone(source, old, new)
    now = [float(trial.state.optimizer.param_groups[0]["lr"]) for trial in (changed, source)]
    assert now[0] == pytest.approx(4 * now[1])
    assert rates(changed, 6) == pytest.approx([4 * rate for rate in rates(source, 6)])


def test_only_the_top_of_a_cycle() -> None:
    kind = trainable(
        lambda model, config: optim.SGD(model.parameters(), lr=1.0),
        lambda o, c: schedules.CyclicLR(o, 0.01, c["top"], step_size_up=4, cycle_momentum=False),
    )
    old, new = {"top": 0.1}, {"top": 0.4}
    source, wanted = start(kind, old), start(kind, new)
    unit(source, 0)
    unit(wanted, 0)
    assert rates(clone(source, old, new), 3) == pytest.approx(rates(wanted, 3))


def test_a_key_named_like_a_value_of_the_group_that_changes_nothing_is_refused() -> None:
    kind = trainable(lambda model, config: optim.SGD(model.parameters(), lr=config["lr"] ** 2))
    source = start(kind, {"lr": 0.1})
    unit(source, 0)
    with pytest.raises(ConfigurationError, match="changes lr, but nothing in the optimizer had the old value"):
        clone(source, {"lr": 0.1}, {"lr": 0.4})


def test_without_a_fresh_build_the_name_decides_and_a_plateau_keeps_its_ratio() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5, weight_decay=0.5)
    plateau = schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        plateau.step(1.0)
    old, new = {"lr": 0.1, "momentum": 0.5}, {"lr": 0.4, "momentum": 0.6}
    assert change_optimizers([optimizer], [plateau], old, new) == {"lr", "momentum"}
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (pytest.approx(0.1), 0.6, 0.5)


@pytest.mark.parametrize("key", ["batch_size", "epochs"])
def test_our_own_keys_need_no_reader(key: str) -> None:
    source = start(trainable(sgd), {"lr": 0.1})
    unit(source, 0)
    changed = clone(source, {"lr": 0.1}, {"lr": 0.1, key: 2})
    assert changed.state.optimizer.param_groups[0]["lr"] == 0.1


def test_another_batch_size_is_refused_where_gradients_accumulate_over_it() -> None:
    kind = trainable(sgd, accumulate=2)
    old, new = {"lr": 0.1, "batch_size": 4}, {"lr": 0.1, "batch_size": 2}
    source = start(kind, old)
    unit(source, 0)
    with pytest.raises(ConfigurationError, match="changes batch_size from 4 to 2 in mid-epoch"):
        clone(source, old, new, batch_size=2)
    unit(source, 1)
    changed = clone(source, old, new, batch_size=2)
    unit(changed, 0, 1, batches=6)
    unit(changed, 1, 1, batches=5)
    assert changed.state.step == source.state.step + 6  # the last one closes a window of one batch
    assert all(parameter.grad is None for parameter in changed.state.model.parameters())


def test_an_epoch_ends_with_its_last_unit_whatever_size_its_batches_had() -> None:
    """Without accumulation, a clone may change its batch size in mid-epoch; the count of batches then fits no plan."""
    old, new = {"lr": 0.1, "batch_size": 4}, {"lr": 0.1, "batch_size": 2}
    source = start(trainable(sgd), old)
    unit(source, 0)
    changed = clone(source, old, new, batch_size=2)
    unit(changed, 1, batches=6)
    assert (changed.state.step, changed.state.batches_done) == (9, 0)
