"""Plain attributes go into a trial's state and out of it, into the very objects that are there."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cerebro_tune.attributes import Attributes, modules_of
from cerebro_tune.errors import StateError, UnsupportedLeafError
from trees import round_trip, same


class Owner(SimpleNamespace):
    """Whatever is set on it."""


def carried(owner: Owner) -> Attributes:
    return Attributes(lambda: [("owner", owner)])


def hop(source: Attributes, target: Attributes) -> dict[str, Any]:
    """What travelled."""
    dumped: dict[str, Any] = round_trip(source.dump())
    target.load(dumped)
    return dumped


VALUES: list[tuple[Any, Any]] = [
    ([1], [1, 2, 3]),
    ({"a": [1]}, {"a": [1, 2], "b": 2}),
    (deque([1], 2), deque([2, 3], 2)),
    ({1}, {2, 3}),
    (OrderedDict(a=1), OrderedDict(b=2, a=1)),
    (Counter("ab"), Counter("bbc")),
    (torch.zeros(3), torch.ones(3)),
    ([torch.zeros(2)], [torch.ones(2), torch.ones(1)]),
]


@pytest.mark.parametrize(("fresh", "trained"), VALUES, ids=lambda value: type(value).__name__)
def test_what_can_be_refilled_stays_the_same_object(fresh: Any, trained: Any) -> None:
    """As a hook's closure that holds it expects."""
    (first,) = round_trip([fresh])
    (wanted,) = round_trip([trained])
    source, target = Owner(value=first), Owner(value=fresh)
    out, into = carried(source), carried(target)
    held, source.value = fresh, trained
    hop(out, into)
    assert target.value is held
    assert same(held, wanted)
    into.load({})  # and back to a fresh build
    assert target.value is held
    assert same(held, first)


def test_inner_containers_stay_too() -> None:
    source, target = (Owner(seen={"layer": [], "other": ()}) for _ in range(2))
    out, into = carried(source), carried(target)
    held = target.seen["layer"]
    source.seen["layer"] += [1, 2]
    hop(out, into)
    assert target.seen["layer"] is held == [1, 2]


def test_two_names_of_one_object_stay_two_names_of_one() -> None:
    def owner() -> Owner:
        history: list[int] = []
        mean = torch.zeros(2)
        return Owner(history=history, alias=history, mean=mean, same=mean)

    source, target = owner(), owner()
    out, into = carried(source), carried(target)
    source.history.append(1)
    source.mean += 1
    hop(out, into)
    target.history.append(2)
    target.mean += 1
    assert target.alias == [1, 2]
    assert torch.equal(target.same, torch.full((2,), 2.0))


def test_tensors_that_became_one_are_one_after_the_hop() -> None:
    source, target = (Owner(best=None, last=None) for _ in range(2))
    out, into = carried(source), carried(target)
    source.best = source.last = torch.ones(2)
    hop(out, into)
    assert target.best is target.last


def test_a_tensor_that_views_a_state_buffer_is_replaced() -> None:
    """That buffer may be another trial's by now, so that nothing may be written there."""
    source, target = (Owner(last=torch.zeros(2)) for _ in range(2))
    out, into = carried(source), carried(target)
    elsewhere = torch.full((2,), 7.0)
    target.last = elsewhere.detach()
    source.last = torch.ones(2)
    hop(out, into)
    assert torch.equal(target.last, torch.ones(2))
    assert torch.equal(elsewhere, torch.full((2,), 7.0))


def test_what_is_loaded_shares_nothing_with_the_state() -> None:
    source, target = (Owner(items=None, array=None) for _ in range(2))
    out, into = carried(source), carried(target)
    source.items, source.array = [torch.ones(2)], np.ones(2)
    dumped = hop(out, into)["owner"]
    target.items[0] += 1
    target.array += 1
    assert torch.equal(dumped["items"][0], torch.ones(2))
    assert dumped["array"].tolist() == [1, 1]


def test_outputs_with_their_graph_are_carried_without_it() -> None:
    source, target = (Owner(outputs=[]) for _ in range(2))
    out, into = carried(source), carried(target)
    weight = nn.Parameter(torch.ones(2))
    source.outputs += [weight * 2, weight.sum()]
    hop(out, into)
    assert same(target.outputs, [torch.full((2,), 2.0), torch.tensor(2.0)])


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, requires_grad=True), object()],
    ids=["sparse", "meta", "trained", "object"],
)
def test_what_is_not_plain_is_left_alone(value: Any) -> None:
    owner = Owner(value=value, within=[value])
    attributes = carried(owner)
    assert attributes.dump() == {}
    attributes.load({})
    assert owner.value is value is owner.within[0]


def test_attributes_that_came_and_went() -> None:
    source, target = (Owner(kept=1) for _ in range(2))
    out, into = carried(source), carried(target)
    target.later, target.kept, source.new = 5, 2, "new"
    hop(out, into)
    assert vars(target) == {"kept": 1, "new": "new"}
    hop(out, into)
    assert vars(target) == {"kept": 1, "new": "new"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_a_tensor_goes_back_to_its_device() -> None:
    source, target = (Owner(mean=torch.zeros(2, device="cuda"), same=torch.ones(2).cuda()) for _ in range(2))
    out, into = carried(source), carried(target)
    source.mean += 1
    hop(out, into)
    assert target.mean.is_cuda
    assert target.mean.tolist() == [1, 1]
    into.load({"owner": {"mean": torch.ones(2)}})  # compared across devices
    assert target.mean.is_cuda


class Noisy(nn.Module):
    """Torch's own layers, and what no other worker can be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.parts = {"a": 1}
        self.source = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.drop(x))


def of_model(model: nn.Module) -> Attributes:
    return Attributes(lambda: modules_of(model))


def test_settings_of_torchs_own_layers_are_carried() -> None:
    source, target = Noisy(), Noisy()
    out, into = of_model(source), of_model(target)
    source.drop.p, source.norm.momentum, source.norm.track_running_stats = 0.25, None, False
    into.load(round_trip(out.dump()))
    assert (target.drop.p, target.norm.momentum, target.norm.track_running_stats) == (0.25, None, False)
    into.load({})
    assert (target.drop.p, target.norm.momentum, target.norm.track_running_stats) == (0.5, 0.1, True)


def test_a_part_that_a_fresh_build_lacks_is_named() -> None:
    source, target = Noisy(), Noisy()
    out, into = of_model(source), of_model(target)
    source.late = nn.Dropout(0.1)
    with pytest.raises(UnsupportedLeafError, match=r"model.late has become a Dropout in training, which other workers"):
        out.dump()
    with pytest.raises(StateError, match=r"The state has attributes of model.late, which a fresh build has not"):
        into.load({"model.late": {"p": 0.2}})


def has_become(model: Any) -> None:
    model.parts["b"] = object()


def is_new(model: Any) -> None:
    model.made = iter(())


def draws(model: Any) -> None:
    torch.rand(1, generator=model.source)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (has_become, r"model.parts\['b'\] has become a object in training"),
        (is_new, "model.made has become a tuple_iterator in training"),
        (draws, "model.source is a Generator that training draws from"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(change: Any, reason: str) -> None:
    model = Noisy()
    attributes = of_model(model)
    assert attributes.dump() == {}
    change(model)
    with pytest.raises(UnsupportedLeafError, match=reason):
        attributes.dump()


class Saving(Noisy):
    def get_extra_state(self) -> Any:
        return {}


def test_whoever_saves_its_state_itself_may_keep_anything() -> None:
    model = Saving()
    attributes = of_model(model)
    has_become(model)
    is_new(model)
    model.function = print
    assert attributes.dump() == {}
