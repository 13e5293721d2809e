"""Plain Python attributes of what is trained: counters, histories, moving averages that no `state_dict` lists.

A model that counts its steps in `self.n += 1` would count only those of one worker if the count did not hop. Carried
is what differs from a fresh build and is plain: numbers, text, tensors, arrays, and containers of these. What is
private to torch and to the host never is.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
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
        self._fresh = {name: _copies(self._plain(owner)) for name, owner in owners()}

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
        """Make the attributes those of a fresh build, but for what was dumped."""
        for name, owner in self._owners():
            wanted = {**self._fresh.get(name, {}), **dumped.get(name, {})}
            for key, value in self._plain(owner).items():
                if key not in wanted:
                    delattr(owner, key)
                elif _same(value, wanted[key]):
                    del wanted[key]
            for key, value in _copies(wanted).items():
                setattr(owner, key, value)

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
    if kind is torch.Tensor or kind is np.ndarray:
        return kind is torch.Tensor or value.dtype != object
    if depth == _DEEPEST:
        return False
    if kind in _CONTAINERS:
        return all(_is_plain(item, depth + 1) for item in value)
    return kind in _MAPPINGS and all(_is_plain(k, depth + 1) and _is_plain(v, depth + 1) for k, v in value.items())


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(_detached(value)) for key, value in values.items()}


def _detached(value: Any) -> Any:
    """A tensor out of its graph, which could not be copied."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _same(one: Any, other: Any) -> bool:
    """Equal in type and value. NaN differs from itself, and so is carried, which does no harm."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, _MAPPINGS):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
