"""Attributes of what is trained: counters, histories, meters, moving averages that no `state_dict` lists.

A model that counts its steps in `self.n += 1` would count only those of one worker if the count did not hop. Carried
is what differs from a fresh build, of the model and of all objects that can be reached from it (`reach.py`): plain
values (`plain.py`), and which of the things that every worker has is held where. What is private to torch and to the
host never is. All that training has made otherwise is refused by its key path, since it would be lost.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cerebro_tune.adopt import saves_whole
from cerebro_tune.errors import StateError, UnsupportedLeafError
from cerebro_tune.plain import (
    DEEPEST,
    MAPPINGS,
    SEQUENCES,
    SETS,
    Aboard,
    Defaulting,
    Filler,
    Reference,
    factory_name,
    is_dense,
    is_named_tuple,
    is_simple,
    place,
    same,
    tensors_in,
)
from cerebro_tune.reach import (
    GENERATORS,
    OF_HOSTS,
    OF_TORCH,
    Owner,
    Reached,
    fingerprint,
    hold,
    is_leaf,
    join,
    let_go,
    of_host,
    of_torch,
    root_of,
    tensors_of,
)

_OF_OPTIMIZERS = frozenset(("state", "param_groups"))
"""What of an optimizer is in its state dict."""
Owners = Callable[[], Iterable[tuple[str, Any]]]
"""Gives (name, object) of all whose attributes hop; of a module, its parts are named on their own."""


class Attributes:
    """What the attributes were in a fresh build, and what has become of them."""

    def __init__(
        self,
        owners: Owners,
        excluded: Collection[str] = (),
        closed: Callable[[nn.Module], bool] = lambda _: False,
    ) -> None:
        """Note what there is; `excluded` are attributes that are not the user's, `closed` modules save themselves."""
        self._owners, self._closed = owners, closed
        self._of_modules, self._of_others = frozenset(excluded) | OF_TORCH, frozenset(excluded)
        self._fresh: dict[str, dict[str, Any]] = {}
        self._known: dict[int, Any] = {}
        self.held: dict[str, nn.Module] = {}
        """What `modules` gave, or would have at the time of the last `dump`."""
        self.settle()

    def settle(self) -> None:
        """What is there by now is made in every worker."""
        self._settled = self._reach(None)
        copier, encoder = Filler({}), _Encoder(self._settled)
        for owner in self._settled.owners:
            if owner.path not in self._fresh:
                values, _ = encoder.attributes(owner)
                self._fresh[owner.path] = {key: copier.copy(value) for key, value in values.items()}
                mine = (tensor for value in values.values() for tensor in tensors_in(value))
                self._known |= {id(tensor): (tensor, place(tensor)) for tensor in mine}
        self._places = {
            path: found
            for path in self._settled.origins
            if (found := fingerprint(self._settled.things[path])) is not None
        }

    def modules(self) -> dict[str, nn.Module]:
        """The modules that are held without being part of an owner, by key path, as they are now."""
        self.held = self._reach(self._settled).modules
        return self.held

    def dump(self) -> dict[str, dict[str, Any]]:
        """What differs from a fresh build, by owner and attribute; UnsupportedLeafError for what would be lost."""
        now = self._reach(self._settled)
        self.held = now.modules
        self._refuse_other_parts(now)
        encoder, changed = _Encoder(now), {}
        for owner in now.owners:
            values, lost = encoder.attributes(owner)
            if lost and not _saves_itself(owner.origin):
                raise _refusal(*next(iter(lost.values())))
            fresh = self._fresh.get(owner.path, {})
            if different := {k: value for k, value in values.items() if k not in fresh or not same(value, fresh[k])}:
                changed[owner.path] = different
        self._refuse_changes(now)
        return changed

    def load(self, dumped: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the attributes those of a fresh build, but for what was dumped.

        Containers and tensors are refilled, not replaced: a hook's closure may hold the same object.
        """
        now = self._reach(self._settled)
        owners = {owner.path: owner for owner in now.owners}
        for path, holder, *_ in self._settled.owners:  # one that is not held at the moment may be so again
            if path not in owners:
                owners[path] = Reached([(path, holder)], lambda _: True, self._excluded).owners[0]
        if lacking := sorted(dumped.keys() - owners.keys()):
            raise StateError(
                f"The state has attributes of {', '.join(lacking)}, which a fresh build has not: make in the "
                "constructor what training needs, or before it starts."
            )
        encoder, filler = _Encoder(now), Filler(self._known, _Resolver(now, self._settled), _device_of(now))
        present: set[int] = set()
        for owner in owners.values():
            if of_torch(owner.holder) and owner.path not in dumped and owner.simple == self._fresh.get(owner.path):
                continue
            filled = _refill(owner, self._fresh.get(owner.path, {}), dumped.get(owner.path, {}), encoder, filler)
            present.update(id(tensor) for value in filled for tensor in tensors_in(value))
        self._known = {number: known for number, known in filler.known.items() if number in present}

    def _reach(self, before: Reached | None) -> Reached:
        return Reached(self._owners(), self._closed, self._excluded, before)

    def _excluded(self, holder: Any, given: bool) -> frozenset[str]:
        if isinstance(holder, nn.Module):
            return self._of_modules
        if isinstance(holder, torch.optim.Optimizer):
            return _OF_OPTIMIZERS if given and saves_whole(holder) else frozenset()
        return self._of_others if given else frozenset()

    def _refuse_other_parts(self, now: Reached) -> None:
        """Raise for a layer that training has made, exchanged for one of another class, or taken away."""
        before, after = (
            {owner.path: type(owner.holder) for owner in reached.owners if owner.holder is owner.origin}
            for reached in (self._settled, now)
        )
        for path in before.keys() | after.keys():
            if before.get(path) is after.get(path):
                continue
            if path in after:
                raise _refusal(now.things[path], path)
            raise UnsupportedLeafError(
                f"{path}, a {before[path].__name__}, is gone since training has begun, and other workers have it "
                "still: keep it, and leave it unused."
            )

    def _refuse_changes(self, now: Reached) -> None:
        """Raise for a thing that training has changed, and of which only that can be told."""
        for path in self._places.keys() & now.things.keys():
            thing = now.things[path]
            if fingerprint(thing) == self._places[path] or _saves_itself(now.origins.get(path)):
                continue
            if isinstance(thing, GENERATORS):
                raise UnsupportedLeafError(
                    f"{path} is a {type(thing).__name__} that training draws from, and its place in its stream does "
                    "not hop: draw from the global generators, which are seeded for every unit."
                )
            raise UnsupportedLeafError(
                f"{path} is a {type(thing).__name__} that training has changed, and what is in it cannot be carried "
                f"to another worker: {_INSTEAD}"
            )


_INSTEAD = (
    "keep numbers, text, tensors, arrays, containers of these, or objects of a class of your own there, delete it "
    "before the unit ends, or save it in the hooks for that (on_save_checkpoint, state_dict)."
)


def _refusal(thing: Any, path: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        f"{path} has become a {type(thing).__name__} in training, which other workers have none of: make it in "
        f"__init__, setup or on_train_start and leave it there, or {_INSTEAD}"
    )


def _refill(
    owner: Owner, fresh: Mapping[str, Any], dumped: Mapping[str, Any], encoder: _Encoder, filler: Filler
) -> list[Any]:
    """Give an owner the attributes of a fresh build, but for those that were dumped; returns their values."""
    values, lost = encoder.attributes(owner)
    # What is no value is there because the owner's own hook has put it there.
    spared = lost.keys() - dumped.keys() if _saves_itself(owner.origin) else set()
    wanted = {key: value for key, value in {**fresh, **dumped}.items() if key not in spared}
    for key in (values.keys() | lost.keys()) - wanted.keys() - spared:
        let_go(owner.holder, key)
    there = owner.simple | owner.others
    for key, value in wanted.items():
        if key not in values or not same(values[key], value):
            there[key] = filler.fill(there.get(key), value)
            hold(owner.holder, key, there[key])
    return [there[key] for key in wanted]


class _Lost(Exception):  # noqa: N818  (never leaves this module)
    """Something that other workers have none of."""

    def __init__(self, thing: Any, path: str) -> None:
        super().__init__(path)
        self.found = thing, path


class _Encoder:
    """Attributes as they are carried: values as they are, and references in the place of things."""

    def __init__(self, now: Reached) -> None:
        self._now = now
        self._tensors: dict[Any, str] | None = None

    def attributes(self, owner: Owner) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
        """Those of an owner, and for those that cannot be carried: what is in the way, and its key path."""
        values, lost = dict(owner.simple), {}
        for key, value in owner.others.items():
            try:
                values[key] = self._encoded(value, join(owner.path, key))
            except _Lost as error:
                if not of_host(value):
                    lost[key] = error.found
        return values, lost

    def _encoded(self, value: Any, path: str, depth: int = 0) -> Any:
        kind = type(value)
        if is_dense(value):
            name = self._now.names.get(id(value)) if is_leaf(value) else None
            return Reference(name) if name else self._of_module(value) or _carried(value)
        if depth and is_simple(value):
            return value
        if depth == DEEPEST:
            raise _Lost(value, path)
        if kind in SEQUENCES or kind in SETS or is_named_tuple(value):
            items = [self._encoded(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            return kind._make(items) if is_named_tuple(value) else _like(value, items)
        if kind in MAPPINGS:
            return kind(self._items(value, path, depth))
        if kind is defaultdict:
            factory = value.default_factory
            name = factory_name(factory) or (factory and self._encoded(factory, f"{path}.default_factory", depth + 1))
            return Defaulting(name, self._items(value, path, depth))
        if (name := self._now.names.get(id(value))) is None:
            raise _Lost(value, path)
        return Reference(name)

    def _items(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        return {
            self._encoded(key, f"{path}[{type(key).__name__}]", depth + 1): self._encoded(
                item, f"{path}[{key!r}]", depth + 1
            )
            for key, item in value.items()
        }

    def _of_module(self, tensor: torch.Tensor) -> Reference | None:
        """A reference to a parameter or buffer, or to what is in it, if this is one."""
        if self._tensors is None:
            own = tensors_of((owner.path, owner.holder) for owner in self._now.owners)
            self._tensors = {_memory(one): f"{path}{_DATA}" for path, one in own.items() if one.numel()}
            self._tensors |= {id(one): path for path, one in own.items()}
        path = self._tensors.get(id(tensor)) or self._tensors.get(_memory(tensor))
        return None if path is None else Reference(path)


_DATA = ".data"


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _carried(tensor: torch.Tensor) -> Any:
    """The tensor without its graph, and with a word of where it is to lie."""
    free = tensor.detach() if tensor.requires_grad else tensor
    return free if free.is_cpu else Aboard(free)


def _device_of(now: Reached) -> torch.device:
    """Where the first parameter lies."""
    modules = (owner.holder for owner in now.owners if isinstance(owner.holder, nn.Module))
    own = (one.device for part in modules for one in part._parameters.values() if one is not None)
    return next(own, torch.device("cpu"))


def _like(model: Any, items: list[Any]) -> Any:
    return deque(items, model.maxlen) if isinstance(model, deque) else type(model)(items)


class _Resolver:
    """Finds what a reference stands for."""

    def __init__(self, now: Reached, settled: Reached) -> None:
        self._now, self._settled = now, settled
        self._tensors: Mapping[str, torch.Tensor] | None = None

    def __call__(self, path: str) -> Any:
        for things in (self._now.things, self._settled.things):
            if path in things:
                return things[path]
        if self._tensors is None:
            self._tensors = tensors_of((owner.path, owner.holder) for owner in self._now.owners)
        if path in self._tensors:
            return self._tensors[path]
        if path.removesuffix(_DATA) in self._tensors:
            return self._tensors[path.removesuffix(_DATA)].data
        raise StateError(f"The state holds {path}, which a fresh build has not.")


def modules_of(
    model: nn.Module, skip: Callable[[nn.Module], bool] = lambda _: False, name: str = "model."
) -> list[tuple[str, nn.Module]]:
    """The parts of a model, which may keep attributes of their own."""
    return [(f"{name}{path}", part) for path, part in model.named_modules() if not skip(part)]


def _saves_itself(origin: Any) -> bool:
    """Whether its class, and not torch or a host, says what to save of it, in hooks that are called."""
    if isinstance(origin, torch.optim.Optimizer):
        return False
    hooks = (getattr(type(origin), name, None) for name in ("state_dict", "on_save_checkpoint", "get_extra_state"))
    return any(hook is not None and root_of(hook) not in OF_HOSTS for hook in hooks)
