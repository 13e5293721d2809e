"""What a model, its optimizers and callbacks hold beside plain values, each thing by the key path it is found at.

The objects of a user's own classes are gone into: an average of weights, a meter, a schedule that is stepped by hand.
So are torch's optimizers, schedules and scalers, and modules that are no part of the model. Functions, files, data
sets and what belongs to a host are only known by where they are.
"""

from __future__ import annotations

import inspect
import sys
import types
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
import xxhash
from torch import nn

from cerebro_tune.plain import DEEPEST, MAPPINGS, SEQUENCES, SETS, is_dense, is_named_tuple, is_simple

OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_HOSTS = frozenset({"cerebro_tune", "torchmetrics", "pytorch_lightning", "lightning", "lightning_fabric"})
OF_HOSTS = _HOSTS | {"torch"}
"""Packages whose classes know themselves what to save."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, Random)
_OPEN_PARTS_OF_TORCH = ("torch.optim", "torch.amp", "torch.cuda.amp", "torch.distributions")
_OPEN_OF_PYTHON = (SimpleNamespace, Namespace)
_OF_PYTHON = sys.stdlib_module_names - {"__main__", "abc", "types"}  # classes that are made by a call are of the latter
_CODE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType,
)  # fmt: skip
_CLOSED = (
    types.ModuleType, nn.Module, torch.Tensor, torch.Generator, tuple, bytearray, np.generic, np.ndarray,
)  # fmt: skip
_SETTINGS = (bool, int, float, type(None))
ITEMS = "items()"
"""Stands among the attributes of a container of a class of its own for what is in it."""
_DATA = "data"
_LARGEST_BYTES = 8_000_000
"""What takes more than that to pickle is taken for data, which training only reads."""


class Owner(NamedTuple):
    """Something whose attributes hop."""

    path: str
    holder: Any
    origin: Any
    """Itself, or the given one that it was found in."""
    simple: dict[str, Any]
    others: dict[str, Any]
    """Attributes that hold a tensor, or something that is no plain value."""


class Reached:
    """One look at everything that some owners hold.

    Args:
        roots: (key path, object) of the owners to begin with.
        closed: Whether a module keeps its state itself.
        excluded: Gives the attributes of an object that are not looked at; it is told whether that is a given one.
        before: An earlier look; what is new since then has a name only in the place of one of its own class.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        closed: Callable[[nn.Module], bool],
        excluded: Callable[[Any, bool], frozenset[str]],
        before: Reached | None = None,
    ) -> None:
        self.names: dict[int, str] = {}
        self.things: dict[str, Any] = {}
        self.modules: dict[str, nn.Module] = {}
        """Those that are no part of a given one, by their key paths."""
        self.kinds: dict[str, type] = {}
        self.origins: dict[str, Any] = {}
        self._closed, self._excluded, self._before = closed, excluded, before
        self._of_modules: set[int] = set()
        self.owners: list[Owner] = []
        for path, holder in roots:
            self._name(holder, path)
            self._own(path, holder, holder)
        for owner in self.owners:  # which grow
            self._origin = owner.origin
            for key, value in owner.others.items():
                self._visit(value, join(owner.path, key))

    def _own(self, path: str, holder: Any, origin: Any) -> None:
        owner = Owner(path, holder, origin, {}, {})
        self.owners.append(owner)
        if isinstance(holder, nn.Module):
            self._of_modules.update(map(id, holder._parameters.values()))
        if of_torch(holder):
            owner.simple.update(settings_of(holder))
            return
        for key, value in held(holder, self._excluded(holder, holder is origin)):
            (owner.simple if is_simple(value) else owner.others)[key] = value

    def _visit(self, value: Any, path: str, depth: int = 0) -> None:
        if depth == DEEPEST or (depth and is_simple(value)):
            return
        if is_dense(value) and (not is_leaf(value) or id(value) in self._of_modules):
            return
        kind = type(value)
        if kind in SEQUENCES or kind in SETS or is_named_tuple(value):
            for index, item in enumerate(value):
                self._visit(item, f"{path}[{index}]", depth + 1)
        elif kind in MAPPINGS or kind is defaultdict:
            for key, item in value.items():
                self._visit(key, f"{path}[{type(key).__name__}]", depth + 1)
                self._visit(item, f"{path}[{key!r}]", depth + 1)
            if kind is defaultdict:
                self._visit(value.default_factory, f"{path}.default_factory", depth + 1)
        elif kind is types.MethodType:
            self._visit(value.__self__, f"{path}.__self__", depth + 1)
            self._meet(value, path)
        else:
            self._meet(value, path)

    def _meet(self, value: Any, path: str) -> None:
        if id(value) not in self.names and (found := self._place_of(value, path)) is not None:
            self._found(value, found)

    def _place_of(self, thing: Any, path: str) -> str | None:
        """The key path by which other workers know the thing, or one in its place."""
        before = self._before
        if before is None:
            return path if path not in self.things else None
        name = before.names.get(id(thing))
        if name is None:
            there = before.things.get(path)
            replaces = type(there) is type(thing) and (is_open(thing) or isinstance(thing, nn.Module))
            name = path if replaces or (isinstance(thing, _CODE) and there == thing) else None
        return name if name is not None and name not in self.things else None

    def _found(self, thing: Any, path: str) -> None:
        self._name(thing, path)
        self.origins[path] = self._origin
        if isinstance(thing, nn.Module):
            self.modules[path] = thing
            if self._closed(thing):
                return
            for name, part in thing.named_modules():
                if id(part) not in self.names:
                    self._name(part, join(path, name))
                if not self._closed(part):
                    self._own(join(path, name), part, self._origin)
        elif is_open(thing):
            self._own(path, thing, self._origin)

    def _name(self, thing: Any, path: str) -> None:
        self.names.setdefault(id(thing), path)
        self.things[path] = thing
        self.kinds[path] = type(thing)


def join(path: str, key: str) -> str:
    """The key path of an attribute."""
    return ".".join(filter(None, (path.rstrip("."), key)))


def settings_of(layer: Any) -> dict[str, Any]:
    """What is carried of torch's own layers: a dropout's `p`, a batch norm's `momentum`."""
    return {key: value for key, value in vars(layer).items() if type(value) in _SETTINGS and key not in OF_TORCH}


def held(holder: Any, excluded: frozenset[str] = frozenset()) -> list[tuple[str, Any]]:
    """The attributes of an object, and the items of one that is a container, too."""
    if isinstance(holder, torch.Tensor):
        return [(_DATA, holder.detach())]
    if isinstance(holder, types.FunctionType):
        return [(key, cell.cell_contents) for key, cell in _cells(holder).items()]
    found = [(key, value) for key, value in getattr(holder, "__dict__", {}).items() if key not in excluded]
    if hasattr(type(holder), "__slots__"):
        found += [(key, getattr(holder, key)) for key in _slots(type(holder)) if hasattr(holder, key)]
    kind = _container_of(holder)
    return found if kind is None else [*found, (ITEMS, kind(holder))]


def hold(holder: Any, key: str, value: Any) -> None:
    """Make a value an attribute, as it was: without what a class does when one is set."""
    if isinstance(holder, torch.Tensor):
        holder.data = value
    elif isinstance(holder, types.FunctionType):
        _cells(holder)[key].cell_contents = value
    elif key == ITEMS and (kind := _container_of(holder)) is not None:
        kind.clear(holder)
        (kind.extend if kind is list or kind is deque else kind.update)(holder, value)
    elif hasattr(holder, "__dict__") and key not in _slots(type(holder)):
        vars(holder)[key] = value
    else:
        object.__setattr__(holder, key, value)


def let_go(holder: Any, key: str) -> None:
    """Take an attribute away."""
    if hasattr(holder, "__dict__") and key in vars(holder):
        del vars(holder)[key]
    else:
        object.__delattr__(holder, key)


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of a function that are those of the one around it, as far as they have a value."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {name: cell for name, cell in cells.items() if cell != types.CellType()}


def _container_of(holder: Any) -> Any:
    """The container of Python's that an object of a class of its own is."""
    return next((kind for kind in (dict, list, deque, set) if isinstance(holder, kind)), None)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield f"_{base.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name


def is_leaf(value: Any) -> bool:
    """Whether a value is a tensor that may be trained, and so must stay the same object."""
    return is_dense(value) and value.requires_grad and value.is_leaf


def of_torch(holder: Any) -> bool:
    """Whether an object is one of torch's own layers, which keep nothing but settings."""
    return type(holder).__module__.startswith("torch.nn.")


def of_host(thing: Any) -> bool:
    """Whether a thing is a host's own, which carries it if it is to be carried."""
    return isinstance(thing, types.ModuleType) or root_of(type(thing)) in _HOSTS


def root_of(thing: Any) -> str:
    """The package that a class or function is of."""
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def is_open(thing: Any) -> bool:
    """Whether what a thing is can be told from its attributes."""
    kind = type(thing)
    if is_leaf(thing):
        return True
    if kind is types.FunctionType:  # one that keeps variables of the function around it
        return bool(thing.__closure__) and not _is_known(thing)
    if isinstance(thing, (*_CODE, *_CLOSED)) or any(
        base.__module__.startswith("torch.utils.data") for base in kind.__mro__
    ):
        return False
    if root_of(kind) == "torch":
        return kind.__module__.startswith(_OPEN_PARTS_OF_TORCH)
    if _is_known(kind):
        return isinstance(thing, _OPEN_OF_PYTHON)
    return hasattr(thing, "__dict__") or any(True for _ in _slots(kind))


def _is_known(code: Any) -> bool:
    """Whether a class or function is a host's, torch's or Python's own."""
    root = root_of(code)
    return root in OF_HOSTS or root in _OF_PYTHON


def fingerprint(thing: Any) -> Any:
    """What tells whether a thing that is not open has been changed; None where nothing does."""
    if isinstance(thing, GENERATORS):
        return _place_in_stream(thing)
    if isinstance(thing, torch.Tensor):
        return None if thing.is_meta or is_open(thing) else _digest(thing)
    if inspect.isgenerator(thing):
        return inspect.getgeneratorstate(thing) == inspect.GEN_CREATED
    kept = isinstance(thing, (*_CODE, types.ModuleType, nn.Module)) or is_open(thing) or of_host(thing)
    return None if kept or any(base.__module__.startswith("torch.") for base in type(thing).__mro__) else _digest(thing)


def _place_in_stream(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate())


def _digest(thing: Any) -> str | None:
    try:
        pickled = cloudpickle.dumps(thing)
    except Exception:  # noqa: BLE001  # pickling runs code of the object's own, which may raise anything
        return None
    return xxhash.xxh3_64_hexdigest(pickled) if len(pickled) <= _LARGEST_BYTES else None


def tensors_of(modules: Iterable[tuple[str, Any]]) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers of modules by their key paths."""
    found = {}
    for path, part in modules:
        for own in (part._parameters, part._buffers) if isinstance(part, nn.Module) else ():
            found.update({join(path, name): tensor for name, tensor in own.items() if tensor is not None})
    return found
