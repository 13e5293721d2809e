"""Plain Python attributes of what is trained: counters, histories, moving averages that no `state_dict` lists.

A model that counts its steps in `self.n += 1` would count only those of one worker if the count did not hop. Carried
is what differs from a fresh build and is plain: numbers, text, tensors, arrays, and containers of these. What is
private to torch and to the host never is. Of anything else only what training has made of it is refused, since it
would be lost: what a build makes is there in every worker.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from cerebro_tune.errors import StateError, UnsupportedLeafError

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_MAPPINGS = (dict, OrderedDict, Counter)
_DEEPEST = 8
OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_SETTINGS = (bool, int, float, type(None))
"""What is carried of torch's own layers: a dropout's `p`, a batch norm's `momentum`."""
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, Random)
_HOSTS = frozenset({"cerebro_tune", "torch", "torchmetrics", "pytorch_lightning", "lightning", "lightning_fabric"})

Owners = Callable[[], Iterable[tuple[str, Any]]]
"""Gives (name, object) of all whose attributes hop."""


class Attributes:
    """What the plain attributes were in a fresh build, and what has become of them."""

    def __init__(self, owners: Owners, excluded: Collection[str] = ()) -> None:
        self._owners, self._excluded = owners, frozenset(excluded)
        self._excluded_of_modules = self._excluded | OF_TORCH
        plain = {name: self._plain(owner) for name, owner in owners()}
        copier = _Filler({})
        self._fresh = {name: {key: copier.copy(value) for key, value in of.items()} for name, of in plain.items()}
        self._mine = {id(tensor): (tensor, _place(tensor)) for of in plain.values() for tensor in _tensors(of)}
        self.settle()

    def settle(self) -> None:
        """What is there by now is made in every worker, whether it is plain or not."""
        self._built = {name: set(vars(owner)) for name, owner in self._owners() if not of_torch(owner)}
        self._places = {
            (name, key): _place_of(value)
            for name, owner in self._owners()
            for key, value in vars(owner).items()
            if isinstance(value, _GENERATORS)
        }

    def dump(self) -> dict[str, dict[str, Any]]:
        """What differs from a fresh build, by owner and attribute; UnsupportedLeafError for what would be lost."""
        changed = {}
        for name, owner in self._owners():
            fresh, plain = self._fresh.get(name, {}), self._plain(owner)
            if of_torch(owner):
                if plain != fresh:
                    changed[name] = {key: value for key, value in plain.items() if fresh.get(key) != value}
                continue
            self._refuse_losses(name, owner, plain)
            if different := {k: value for k, value in plain.items() if k not in fresh or not _same(value, fresh[k])}:
                changed[name] = different
        return changed

    def load(self, dumped: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the attributes those of a fresh build, but for what was dumped.

        Containers and tensors are refilled, not replaced: a hook's closure may hold the same object.
        """
        filler, owners = _Filler(self._mine), list(self._owners())
        if lacking := sorted(dumped.keys() - {name for name, _ in owners}):
            raise StateError(
                f"The state has attributes of {', '.join(lacking)}, which a fresh build has not: make in the "
                "constructor what training needs, or before it starts."
            )
        for name, owner in owners:
            fresh, plain = self._fresh.get(name, {}), self._plain(owner)
            if of_torch(owner) and name not in dumped and plain == fresh:
                continue
            wanted = {**fresh, **dumped.get(name, {})}
            for key, value in plain.items():
                if key not in wanted:
                    delattr(owner, key)
                elif _same(value, wanted[key]):
                    del wanted[key]
            for key, value in wanted.items():
                setattr(owner, key, filler.fill(vars(owner).get(key), value))
        present = {id(tensor) for _, owner in self._owners() for tensor in _tensors(self._plain(owner))}
        self._mine = {number: known for number, known in filler.known.items() if number in present}

    def _plain(self, owner: Any) -> dict[str, Any]:
        values = vars(owner).items()
        excluded = self._excluded_of_modules if isinstance(owner, nn.Module) else self._excluded
        if of_torch(owner):
            return {key: value for key, value in values if type(value) in _SETTINGS and key not in excluded}
        return {key: value for key, value in values if key not in excluded and _is_plain(value)}

    def _refuse_losses(self, name: str, owner: Any, plain: Mapping[str, Any]) -> None:
        excluded = self._excluded_of_modules if isinstance(owner, nn.Module) else self._excluded
        fresh, built = self._fresh.get(name, {}), self._built.get(name, set())
        for key, value in vars(owner).items():
            if key in plain or key in excluded:
                continue
            path = f"{name.rstrip('.')}.{key}".lstrip(".")
            if isinstance(value, _GENERATORS) and self._places.get((name, key)) != _place_of(value):
                raise UnsupportedLeafError(
                    f"{path} is a {type(value).__name__} that training draws from, and its place in its stream does "
                    "not hop: draw from the global generators, which are seeded for every unit."
                )
            if (key in fresh or key not in built) and not _is_reference(value) and not _saves_itself(owner):
                raise UnsupportedLeafError(
                    f"{path} has become a {_kind(value)} in training, which cannot be carried to another worker: keep "
                    "numbers, text, tensors, arrays or containers of these there, delete it before the unit ends, or "
                    "save it in the hooks for that (on_save_checkpoint, state_dict)."
                )


def modules_of(
    model: nn.Module, skip: Callable[[nn.Module], bool] = lambda _: False, name: str = "model."
) -> list[tuple[str, nn.Module]]:
    """The parts of a model, which may keep attributes of their own."""
    return [(f"{name}{path}", part) for path, part in model.named_modules() if not skip(part)]


def of_torch(owner: Any) -> bool:
    """Whether an object is one of torch's own layers, which keep nothing but settings."""
    return type(owner).__module__.startswith("torch.nn.")


def _is_reference(value: Any) -> bool:
    """Whether a value only stands for what every worker has: code, or an object of torch or a host."""
    if isinstance(value, torch.Tensor):
        return False
    return callable(value) or isinstance(value, ModuleType) or _root(type(value)) in _HOSTS


def _place_of(generator: Any) -> Any:
    """Where a generator of random numbers is in its stream, to be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate())


def _saves_itself(owner: Any) -> bool:
    """Whether its class, and not torch or a host, says what to save of it."""
    hooks = (getattr(type(owner), name, None) for name in ("state_dict", "on_save_checkpoint", "get_extra_state"))
    return any(hook is not None and _root(hook) not in _HOSTS for hook in hooks)


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def _kind(value: Any) -> str:
    """The type of a value, or for a container that of the first thing in it that is not plain."""
    if type(value) in _CONTAINERS or type(value) in _MAPPINGS:
        items = [*value, *value.values()] if type(value) in _MAPPINGS else value
        inner = next((item for item in items if not _is_plain(item)), None)
        return f"{type(value).__name__} with a {_kind(inner)}" if inner is not None else type(value).__name__
    return type(value).__name__


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if isinstance(value, _SCALARS) and kind.__module__ in ("builtins", "numpy"):
        return True
    if kind is torch.Tensor:
        # What an optimizer may train is no plain value, and would be lost to it if it were replaced.
        return value.layout is torch.strided and not value.is_meta and not (value.requires_grad and value.is_leaf)
    if kind is np.ndarray:
        return bool(value.dtype != object)
    if depth == _DEEPEST:
        return False
    if kind in _CONTAINERS:
        return all(_is_plain(item, depth + 1) for item in value)
    return kind in _MAPPINGS and all(_is_plain(k, depth + 1) and _is_plain(v, depth + 1) for k, v in value.items())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in _MAPPINGS or type(value) in _CONTAINERS:
        for item in value.values() if type(value) in _MAPPINGS else value:
            yield from _tensors(item)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


Known = dict[int, tuple[torch.Tensor, tuple[Any, ...]]]
"""Tensors by id, each with where it was."""


class _Filler:
    """Copies values, what is shared among them once, into the objects that are there where these can take it.

    A tensor is written to only if it is one of `known` and still where it was: any other may view a trial's buffer, and
    that may belong to another trial by now.
    """

    def __init__(self, known: Known) -> None:
        self.known = dict(known)
        self._done: dict[Any, tuple[Any, Any]] = {}  # by the value: the value, kept alive, and what stands for it

    def copy(self, value: Any) -> Any:
        return self.fill(None, value)

    def fill(self, existing: Any, value: Any) -> Any:
        """The value, in `existing` if possible."""
        kind = type(value)
        if isinstance(value, _SCALARS):
            return value
        # Two tensors read from a buffer are one if they lie in one place there.
        key = _place(value) if kind is torch.Tensor and value.numel() else id(value)
        if key not in self._done:
            self._done[key] = value, self._filled(existing if type(existing) is kind else None, value)
        return self._done[key][1]

    def _filled(self, existing: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._filled_tensor(existing, value)
        if isinstance(value, np.ndarray):
            return value.copy()
        if type(value) in _MAPPINGS:
            old = {} if existing is None else dict(existing)
            return _refilled(existing, {key: self.fill(old.get(key), item) for key, item in value.items()}, value)
        old_items = list(existing) if isinstance(existing, list | deque) else []
        old_items += [None] * len(value)
        return _refilled(existing, [self.fill(old, item) for old, item in zip(old_items, value, strict=False)], value)

    def _filled_tensor(self, existing: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        known = None if existing is None else self.known.get(id(existing))
        if existing is not None and known and known[1] == _place(existing) and not existing.requires_grad:
            fits = existing.shape == value.shape and existing.dtype == value.dtype
            if fits:
                return existing.copy_(value)
        result = value.clone() if existing is None else value.to(existing.device, copy=True)
        self.known[id(result)] = result, _place(result)
        return result


def _refilled(existing: Any, items: Any, model: Any) -> Any:
    """A container of these items, of the type and length limit of `model`: the existing one, if it can be changed."""
    limit = getattr(model, "maxlen", None)
    if existing is None or isinstance(model, tuple | frozenset) or getattr(existing, "maxlen", None) != limit:
        return deque(items, limit) if isinstance(model, deque) else type(model)(items)
    existing.clear()
    if isinstance(model, list | deque):
        existing.extend(items)
    else:
        existing.update(items)
    return existing


def _same(one: Any, other: Any) -> bool:
    """Equal in type and value. NaN differs from itself, and so is carried, which does no harm."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, _MAPPINGS):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
