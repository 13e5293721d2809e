"""Plain attributes go into a trial's state and out of it, into the very objects that are there."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cerebro_tune.attributes import Attributes, modules_of
from cerebro_tune.errors import StateError, UnsupportedLeafError
from cerebro_tune.plain import Aboard, Filler
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


@pytest.mark.usefixtures("gpu")
def test_a_tensor_goes_back_to_its_device() -> None:
    source, target = (Owner(mean=torch.zeros(2, device="cuda"), same=torch.ones(2).cuda()) for _ in range(2))
    out, into = carried(source), carried(target)
    source.mean += 1
    hop(out, into)
    assert target.mean.is_cuda
    assert target.mean.tolist() == [1, 1]
    into.load({"owner": {"mean": torch.ones(2)}})  # compared across devices
    assert target.mean.is_cuda


def test_what_training_has_made_on_a_device_is_put_on_that_of_the_reader() -> None:
    made = torch.ones(2)
    value = {"first": Aboard(made), "again": [Aboard(made)], "host": torch.zeros(1)}
    into = Filler({}, {}.__getitem__, "meta").fill(None, Filler({}).copy(value))
    assert into["first"].is_meta
    assert into["first"] is into["again"][0]
    assert into["host"].is_cpu


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


# Objects.


class Meter:
    def __init__(self) -> None:
        self.total, self.seen = 0.0, [1]


class Slotted:
    __slots__ = ("count", "meter")

    def __init__(self) -> None:
        self.count, self.meter = 0, Meter()


class Bag(dict[str, Any]):
    pass


class Row(NamedTuple):
    mean: torch.Tensor
    rows: int


def counter() -> Any:
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    return counted


def holder() -> Owner:
    meter = Meter()
    return Owner(
        meter=meter, alias=meter, pair=[Meter(), Meter()], slotted=Slotted(), bag=Bag(a=Meter()), rows=[],
        named=defaultdict(list), deep=defaultdict(lambda: defaultdict(int)), counter=counter(), bound=meter.__init__,
        functions={"one": abs, "other": len}, chosen=None, leaf=torch.ones(2, requires_grad=True),
    )  # fmt: skip


def train(owner: Owner) -> None:
    owner.meter.total += 1.5
    owner.meter.seen.append(2)
    owner.pair[0].total = 7.0
    owner.pair.reverse()
    owner.slotted.count, owner.slotted.meter.total = 3, 2.0
    owner.bag["b"] = 1
    owner.bag["a"].total = 4.0
    owner.rows.append(Row(torch.ones(2), 5))
    owner.named["loss"].append(0.5)
    owner.deep["x"]["y"] += 2
    owner.counter()
    owner.chosen = owner.functions["other"]
    owner.leaf.data.mul_(3)


def test_objects_hop_and_stay_the_same_objects() -> None:
    source, target = holder(), holder()
    out, into = carried(source), carried(target)
    before = dict(vars(target))
    assert out.dump() == {}
    train(source)
    hop(out, into)
    assert {name for name, value in vars(target).items() if value is not before[name]} == {"chosen"}
    assert target.alias is target.meter
    assert (target.meter.total, target.meter.seen) == (1.5, [1, 2])
    assert [meter.total for meter in target.pair] == [0.0, 7.0]
    assert (target.slotted.count, target.slotted.meter.total) == (3, 2.0)
    assert (target.bag["b"], target.bag["a"].total) == (1, 4.0)
    assert same(target.rows, [Row(torch.ones(2), 5)])
    assert target.named["new"] == []
    assert target.deep["x"] == {"y": 2}
    assert target.deep["new"]["z"] == 0
    assert target.counter() == source.counter() == 2
    assert target.chosen is len
    assert target.leaf.tolist() == [3, 3]
    into.load({})
    assert (target.meter.total, target.chosen, target.rows, target.bag.keys()) == (0.0, None, [], {"a"})
    assert [meter.total for meter in target.pair] == [0.0, 0.0]
    assert target.leaf.tolist() == [1, 1]


def test_an_object_made_anew_takes_the_place_of_the_last() -> None:
    source, target = Owner(meter=Meter()), Owner(meter=Meter())
    out, into = carried(source), carried(target)
    source.meter = Meter()
    source.meter.total = 5.0
    hop(out, into)
    assert target.meter.total == 5.0
    source.meter = Slotted()
    with pytest.raises(UnsupportedLeafError, match=r"owner.meter has become a Slotted in training"):
        out.dump()


def test_what_is_let_go_of_and_taken_up_again() -> None:
    source, target = Owner(meter=Meter()), Owner(meter=Meter())
    out, into = carried(source), carried(target)
    kept, target.meter = source.meter, None
    kept.total = 2.0
    hop(out, into)
    assert target.meter.total == 2.0
    source.meter = None
    hop(out, into)
    assert target.meter is None


def test_two_objects_for_one_place_are_refused() -> None:
    source = Owner(meter=Meter(), last=None)
    out = carried(source)
    source.last, source.meter = source.meter, Meter()
    with pytest.raises(UnsupportedLeafError, match="has become a Meter in training"):
        out.dump()


class Holding(nn.Module):
    """Holds parts of itself, and memory of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.held = [self.layer, self.norm.running_mean]
        self.view = self.layer.weight.data
        self.weighted = {self.layer.weight: 1.0}


def test_what_is_the_models_own_is_found_again_in_another() -> None:
    source, target = Holding(), Holding()
    out, into = of_model(source), of_model(target)
    for owner in (source, target):  # as by a hop, in which weights become those of a buffer
        owner.layer.weight.data = torch.ones(2, 2)
        owner.norm.running_mean = torch.zeros(2)  # type: ignore[assignment]
    source.held.append(source.norm.running_mean)
    source.view = source.layer.weight.data
    source.weighted[source.layer.weight] = 2.0
    hop(out, into)
    assert target.held[0] is target.layer
    assert target.held[2] is target.norm.running_mean
    assert target.view.data_ptr() == target.layer.weight.data_ptr()
    assert target.weighted == {target.layer.weight: 2.0}


@pytest.mark.filterwarnings("ignore:Pickle, copy:DeprecationWarning")  # of itertools, from Python 3.12 on
@pytest.mark.parametrize(
    ("value", "change", "reason"),
    [
        (itertools.count(), next, "owner.value is a count that training has changed"),
        (bytearray(b"ab"), lambda value: value.reverse(), "owner.value is a bytearray that training has changed"),
        ((x for x in range(3)), next, "owner.value is a generator that training has changed"),
        (torch.eye(2).to_sparse(), lambda value: value.mul_(2), "owner.value is a Tensor that training has changed"),
    ],
    ids=["count", "bytearray", "generator", "sparse"],
)
def test_what_only_shows_that_it_has_changed_is_refused(value: Any, change: Any, reason: str) -> None:
    owner = Owner(value=value)
    attributes = carried(owner)
    assert attributes.dump() == {}
    change(value)
    with pytest.raises(UnsupportedLeafError, match=reason):
        attributes.dump()


def test_what_is_no_state_is_left_alone() -> None:
    rows = TensorDataset(torch.zeros(2))
    owner = Owner(log=logging.getLogger("some.name"), lock=threading.Lock(), rows=rows, module=torch, file=sys.stderr)
    attributes = carried(owner)
    owner.log.isEnabledFor(10)
    owner.rows.tensors[0].add_(1)
    assert attributes.dump() == {}
    attributes.load({})
    assert owner.rows is rows
