"""Lightning checkpoints that open anywhere: nothing in them needs more than `torch.load(weights_only=True)`."""

from __future__ import annotations

import io
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cerebro_tune.wholefile import whole_file

EXTRAS = "cerebro_tune"
"""The key of a checkpoint under which lies what Lightning's own keys do not hold."""

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def make_safe(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """These values as `torch.load(weights_only=True)` accepts them, and the key paths of those that it never would.

    NumPy scalars become Python's. Tensors that share memory go on sharing it; a view of a larger storage, such as a
    trial's buffer, becomes a tensor of its own.
    """
    sieve = _Sieve()
    return sieve.mapping(values, ""), sieve.left_out


def export(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a trial's state as a checkpoint file, whole or not at all; warn of what cannot be in it, by name."""
    safe, skipped = make_safe(checkpoint)
    skipped = [name for name in skipped if not name.startswith(f"{EXTRAS}.")]  # which no module is made of
    skipped += checkpoint[EXTRAS]["left_out"]
    if skipped:
        warnings.warn(
            f"{path.name} leaves out {', '.join(skipped)}, which torch.load(weights_only=True) would refuse. "
            "Pass to load_from_checkpoint what the module needs of it.",
            stacklevel=2,
        )
    write(safe, path)


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint file, whole or not at all."""
    content = (
        io.BytesIO()
    )  # to a file of its own torch writes what a full disk makes of it into an error that tells nothing
    torch.save(checkpoint, content)
    with whole_file(path) as file:
        file.write(content.getbuffer())


class _Unsafe(Exception):  # noqa: N818  (never leaves this module)
    """A value that a checkpoint cannot hold."""


class _Sieve:
    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    def mapping(self, values: Mapping[Any, Any], path: str) -> dict[Any, Any]:
        """The safe entries of a dict."""
        safe: dict[Any, Any] = {}
        for key, value in values.items():
            try:
                safe[self._value(key, path)] = self._value(value, f"{path}{key}")
            except _Unsafe:
                self.left_out.append(f"{path}{key}")
        return safe

    def _value(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind in (list, tuple, set):
            return kind(self._value(item, path) for item in value)
        if kind in (OrderedDict, Counter):
            ordered = kind(self.mapping(value, f"{path}."))
            if hasattr(value, "_metadata"):  # the versions of a module's parts
                vars(ordered)["_metadata"] = value._metadata
            return ordered
        if isinstance(value, dict):
            return self.mapping(value, f"{path}.")
        raise _Unsafe

    def _tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() == tensor.nbytes:
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._copies:
            self._copies[key] = tensor.clone()
        return self._copies[key]
