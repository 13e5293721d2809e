"""Plain Python attributes of what is trained: counters, histories, moving averages that no `state_dict` lists.

A model that counts its steps in `self.n += 1` would count only those of one worker if the count did not hop. Carried
is what differs from a fresh build and is plain: numbers, text, tensors, arrays, and containers of these. What is
private to torch and to the host never is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_MAPPINGS = (dict, OrderedDict, Counter)
_DEEPEST = 8
_OF_TORCH = frozenset(vars(nn.Module()))

Owners = Callable[[], Iterable[tuple[str, Any]]]
"""Gives (name, object) of all whose attributes hop."""


class Attributes:
    """What the plain attributes were in a fresh build, and what has become of them."""

    def __init__(self, owners: Owners, excluded: Collection[str] = ()) -> None:
        self._owners, self._excluded = owners, _OF_TORCH | set(excluded)
        plain = {name: self._plain(owner) for name, owner in owners()}
        copier = _Filler({})
        self._fresh = {name: {key: copier.copy(value) for key, value in of.items()} for name, of in plain.items()}
        self._mine = {id(tensor): (tensor, _place(tensor)) for of in plain.values() for tensor in _tensors(of)}

    def dump(self) -> dict[str, dict[str, Any]]:
        """What differs from a fresh build, by owner and attribute."""
        changed = {}
        for name, owner in self._owners():
            fresh = self._fresh.get(name, {})
            plain = self._plain(owner).items()
            if different := {key: value for key, value in plain if key not in fresh or not _same(value, fresh[key])}:
                changed[name] = different
        return changed

    def load(self, dumped: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the attributes those of a fresh build, but for what was dumped.

        Containers and tensors are refilled, not replaced: a hook's closure may hold the same object.
        """
        filler = _Filler(self._mine)
        for name, owner in self._owners():
            wanted = {**self._fresh.get(name, {}), **dumped.get(name, {})}
            for key, value in self._plain(owner).items():
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
        return {key: value for key, value in values if key not in self._excluded and _is_plain(value)}


def modules_of(model: nn.Module, skip: Callable[[nn.Module], bool] = lambda _: False) -> list[tuple[str, nn.Module]]:
    """The parts of a model that may keep attributes of their own; torch's layers do not."""
    parts = model.named_modules()
    return [(f"model.{name}", part) for name, part in parts if not _of_torch(type(part)) and not skip(part)]


def _of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")


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
