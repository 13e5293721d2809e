"""Plain values: what of an attribute is carried as it is, when two are the same, and how one is put into another.

Plain are numbers, text, enums, dates, paths, tensors, arrays, and containers of these. In a container, a `Reference`
stands for what is no value and is there in every worker: a layer, a parameter, a function, an object of the user's.
"""

from __future__ import annotations

import datetime
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

SEQUENCES = (list, tuple, deque)
SETS = (set, frozenset)
MAPPINGS = (dict, OrderedDict, Counter)
DEEPEST = 8
"""How many containers may lie within each other."""

_ATOMS = frozenset(
    {
        bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device, torch.Size,
        datetime.date, datetime.datetime, datetime.time, datetime.timedelta,
        pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()),
    }
)  # fmt: skip


class Reference(NamedTuple):
    """Stands for what every worker has, by its key path."""

    path: str


class Defaulting(NamedTuple):
    """Stands for a defaultdict: its factory, by name or by reference, and its items."""

    factory: Any
    items: Any


class Aboard(NamedTuple):
    """Stands for a tensor on the device that trains, whichever that is where it is read."""

    tensor: torch.Tensor


_BUILTINS = {factory.__name__: factory for factory in (list, dict, set, int, float, str, bool, tuple)}


def factory_name(factory: Any) -> str | None:
    """The name of a builtin factory of a defaultdict, by which any worker finds it."""
    name = getattr(factory, "__name__", None)
    return name if _BUILTINS.get(name or "") is factory else None


def is_named_tuple(value: Any) -> bool:
    """Whether a value is a tuple of named fields."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def is_simple(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain and holds neither tensor nor reference."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if depth == DEEPEST:
        return False
    if kind in SEQUENCES or kind in SETS or is_named_tuple(value):
        return all(is_simple(item, depth + 1) for item in value)
    if kind in MAPPINGS:
        return all(is_simple(k, depth + 1) and is_simple(v, depth + 1) for k, v in value.items())
    if kind is np.ndarray:
        return bool(value.dtype != object)
    return isinstance(value, Enum) or (isinstance(value, np.generic) and kind.__module__ == "numpy")


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor whose elements say all of it."""
    kinds = torch.Tensor, torch.nn.Parameter
    return type(value) in kinds and value.layout is torch.strided and not value.is_meta


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a plain value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, MAPPINGS):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (*SEQUENCES, *SETS)):
        for item in value:
            yield from tensors_in(item)


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how."""
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


Known = dict[int, tuple[torch.Tensor, tuple[Any, ...]]]
"""Tensors by id, each with where it was."""


class Filler:
    """Copies values, what is shared among them once, into the objects that are there where these can take it.

    A tensor is written to only if it is one of `known` and still where it was: any other may view a trial's buffer, and
    that may belong to another trial by now. `resolve` finds what a reference stands for; `device` is that which trains.
    """

    def __init__(self, known: Known, resolve: Callable[[str], Any] = Reference, device: Any = "cpu") -> None:
        self.known, self._resolve, self._device = dict(known), resolve, torch.device(device)
        self._done: dict[Any, tuple[Any, Any]] = {}  # by the value: the value, kept alive, and what stands for it

    def copy(self, value: Any) -> Any:
        """The value, in memory of its own."""
        return self.fill(None, value)

    def fill(self, existing: Any, value: Any) -> Any:
        """The value, in `existing` if possible."""
        kind = type(value)
        if kind in _ATOMS or isinstance(value, Enum | np.generic):
            return value
        if kind is Reference:
            return self._resolve(value.path)
        if kind is Aboard:
            return self._boarded(existing, value)
        # Two tensors read from a buffer are one if they lie in one place there.
        key = place(value) if isinstance(value, torch.Tensor) and value.numel() else id(value)
        if key not in self._done:
            self._done[key] = value, self._filled(existing, value)
        return self._done[key][1]

    def _boarded(self, existing: Any, value: Aboard) -> Any:
        filled = self.fill(existing, value.tensor)
        if self._resolve is Reference:  # what is copied to be kept stays what it stands for
            return Aboard(filled)
        key = "aboard", id(filled)
        if key not in self._done:
            self._done[key] = filled, filled.to(self._device) if filled.is_cpu else filled
            self.known[id(self._done[key][1])] = self._done[key][1], place(self._done[key][1])
        return self._done[key][1]

    def _filled(self, existing: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._filled_tensor(existing if isinstance(existing, torch.Tensor) else None, value)
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, Defaulting):
            return self._filled_defaults(existing if type(existing) is defaultdict else None, value)
        if type(existing) is not type(value):
            existing = None
        if type(value) in MAPPINGS:
            return _refilled(existing, self._filled_items(existing or {}, value), value)
        old_items = list(existing) if isinstance(existing, list | deque) else []
        old_items += [None] * len(value)
        items = [self.fill(old, item) for old, item in zip(old_items, value, strict=False)]
        return type(value)._make(items) if is_named_tuple(value) else _refilled(existing, items, value)

    def _filled_items(self, existing: Any, items: Any) -> dict[Any, Any]:
        # A key may be a parameter, which is found by identity.
        keys = [self.fill(None, key) for key in items]
        return {key: self.fill(existing.get(key), item) for key, item in zip(keys, items.values(), strict=True)}

    def _filled_defaults(self, existing: Any, value: Defaulting) -> Any:
        items = self._filled_items(existing or {}, value.items)
        if self._resolve is Reference:
            return Defaulting(value.factory, items)
        factory = value.factory
        made = self.fill(None, factory) if isinstance(factory, Reference) else _BUILTINS.get(factory)
        if existing is None:
            return defaultdict(made, items)
        existing.default_factory = made
        existing.clear()
        existing.update(items)
        return existing

    def _filled_tensor(self, existing: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        known = None if existing is None else self.known.get(id(existing))
        if existing is not None and known and known[1] == place(existing) and not existing.requires_grad:
            fits = existing.shape == value.shape and existing.dtype == value.dtype
            if fits:
                existing.copy_(value)
                return existing
        result = value.to("cpu" if existing is None else existing.device, copy=True)
        self.known[id(result)] = result, place(result)
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


def same(one: Any, other: Any) -> bool:
    """Equal in type and value. NaN differs from itself, and so is carried, which does no harm."""
    if type(one) is not type(other):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and same(one.data, other.data)
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, MAPPINGS):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, SEQUENCES):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
