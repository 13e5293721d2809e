"""Training goes on bit for bit after a state was written, read and adopted by fresh objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler

from cerebro_tune import state, statefile
from cerebro_tune.adopt import adopt_optimizer
from cerebro_tune.buffers import Mapped
from trees import round_trip, same

Parameters = Any
OPTIMIZERS: dict[str, Callable[[Parameters], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD plain": lambda p: optim.SGD(p, 0.01),
    "Adam": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "Adam capturable lr": lambda p: optim.Adam(p, torch.tensor(0.01), foreach=False),
    "Adam fused": lambda p: optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: optim.AdamW(p, 0.01),
    "NAdam": lambda p: optim.NAdam(p, 0.01),
    "RAdam": lambda p: optim.RAdam(p, 0.01),
    "Adamax": lambda p: optim.Adamax(p, 0.01),
    "Adadelta": lambda p: optim.Adadelta(p, 0.1),
    "Adagrad": lambda p: optim.Adagrad(p, 0.01),
    "Adafactor": lambda p: optim.Adafactor(p, 0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.01, t0=2),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    "Muon": lambda p: optim.Muon([q for q in p if q.ndim == 2], 0.01),
    "SparseAdam": lambda p: optim.SparseAdam(p, 0.01),
}
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, mode="exp_range", gamma=0.9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 8]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.MultiStepLR(o, [2, 4])], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 3), lr_scheduler.CosineAnnealingLR(o, 7)]
    ),
}


def test_the_lists_are_complete() -> None:
    def stock(module: Any, base: type) -> set[str]:
        classes = {n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
        return {name for name in classes if not name.startswith("_")}

    assert stock(optim, optim.Optimizer) - {"Optimizer"} == {name.split()[0] for name in OPTIMIZERS}
    assert stock(lr_scheduler, lr_scheduler.LRScheduler) - {"LRScheduler"} == set(SCHEDULERS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Training:
    """A model that learns with an optimizer and a scheduler; batches are numbered."""

    def __init__(self, optimizer: str, scheduler: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        sparse = optimizer == "SparseAdam"
        first = torch.nn.Embedding(6, 5, sparse=True) if sparse else torch.nn.Linear(6, 5)
        rest = [] if sparse else [torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 3)]
        self.model = torch.nn.Sequential(first, *rest)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.losses: list[float] = []

    def run(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 6, generator=generator)
            batch = x.argmax(1) if isinstance(self.model[0], torch.nn.Embedding) else x

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = (self.model(batch) - 1).square().mean()
                loss.backward()
                return loss.detach()

            self.losses.append(float(self.optimizer.step(closure)))
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(self.losses[-1])
            else:
                self.scheduler.step()

    def tree(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def adopt(self, tree: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data = tree["model"][name]
        for name, values in self.model.named_buffers():
            values.set_(tree["model"][name])  # type: ignore[call-overload]
        self.load(tree)

    def load(self, tree: dict[str, Any]) -> None:
        adopt_optimizer(self.optimizer, tree["optimizer"])
        self.scheduler.load_state_dict(tree["scheduler"])


CASES = [(name, "MultiStepLR") for name in OPTIMIZERS] + [("Adam", name) for name in SCHEDULERS]


@pytest.mark.parametrize(("optimizer", "scheduler"), CASES)
def test_training_goes_on_bitwise_equal_in_fresh_objects(optimizer: str, scheduler: str, tmp_path: Path) -> None:
    undisturbed = Training(optimizer, scheduler)
    undisturbed.run(range(12))
    buffer = Mapped.private(1 << 16)
    losses = []
    for hop, steps in enumerate([range(5), range(5, 6), range(6, 10), range(10, 12)]):
        here = Training(optimizer, scheduler, seed=hop)
        if hop:
            here.adopt(statefile.load(tmp_path / "state") if hop == 2 else state.read(buffer))
        here.run(steps)
        assert same(round_trip(here.tree()), here.tree())
        state.write(here.tree(), buffer)
        statefile.save(buffer, tmp_path / "state")
        losses += here.losses
    assert losses == undisturbed.losses
    assert same(state.read(buffer), undisturbed.tree())


def test_adopting_is_loading_without_the_copies() -> None:
    for optimizer in OPTIMIZERS:
        trained = Training(optimizer, "StepLR")
        trained.run(range(3))
        adopted, loaded = Training(optimizer, "StepLR", seed=1), Training(optimizer, "StepLR", seed=1)
        adopt_optimizer(adopted.optimizer, round_trip(trained.optimizer.state_dict()))
        loaded.optimizer.load_state_dict(round_trip(trained.optimizer.state_dict()))
        assert same(adopted.optimizer.state_dict(), loaded.optimizer.state_dict()), optimizer


def test_a_wide_moment_of_a_narrow_parameter_is_not_rounded() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = optim.SGD([parameter], 0.1, momentum=0.9)
    saved = optimizer.state_dict() | {"state": {0: {"momentum_buffer": torch.tensor([1.0001, 2.0001])}}}
    adopt_optimizer(optimizer, round_trip(saved))
    assert optimizer.state[parameter]["momentum_buffer"].dtype is torch.float32


class Remembering(optim.SGD):
    """Something of the user's, with a say in how it is loaded."""

    loaded = 0

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded += 1
        super().load_state_dict(state_dict)


def test_an_optimizer_that_overrides_loading_is_loaded_its_own_way() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    own = Remembering([parameter], 0.1)
    adopt_optimizer(own, own.state_dict())
    assert own.loaded == 1
    hooked = optim.SGD([parameter], 0.1)
    called = []
    handle = hooked.register_load_state_dict_post_hook(called.append)
    adopt_optimizer(hooked, hooked.state_dict())
    handle.remove()
    assert called == [hooked]


def test_groups_that_differ_are_refused_as_torch_refuses_them() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    one, two = optim.SGD(parameters, 0.1), optim.SGD([{"params": [p]} for p in parameters], 0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        adopt_optimizer(one, two.state_dict())
