"""State trees: what is equal, and what is inside."""

from __future__ import annotations

import collections
import math
import types
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cerebro_tune import state
from cerebro_tune.buffers import Mapped


def round_trip(tree: Any, junk: bytes = b"") -> Any:
    """Through a buffer that held `junk` before, so that nothing depends on fresh memory."""
    layout = state.plan(tree)
    buffer = Mapped.private(layout.nbytes + 100)
    if junk:
        buffer.memory[:] = (junk * (buffer.nbytes // len(junk) + 1))[: buffer.nbytes]
    assert state.write(layout, buffer) == layout.nbytes
    return state.read(buffer)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit and of the same types, all the way down."""
    return _exact(a) == _exact(b)


def _exact(value: Any) -> Any:  # noqa: PLR0911
    """A value that is equal to another's only if the two are the same."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return torch.Tensor, value.dtype, value.shape, value.stride(), value.requires_grad, bits(value)
    if isinstance(value, np.ndarray | np.generic):
        return kind, value.dtype, value.shape, value.tobytes()
    if isinstance(value, float):
        return kind, "nan" if math.isnan(value) else (value, math.copysign(1, value))
    if isinstance(value, complex):
        return kind, _exact(value.real), _exact(value.imag)
    if isinstance(value, collections.defaultdict):
        return kind, value.default_factory, _exact(dict(value))
    if isinstance(value, dict):
        return kind, [(_exact(key), _exact(item)) for key, item in value.items()]
    if isinstance(value, collections.deque):
        return kind, value.maxlen, [_exact(item) for item in value]
    if isinstance(value, list | tuple):
        return kind, [_exact(item) for item in value]
    if isinstance(value, types.SimpleNamespace | Namespace):
        return kind, _exact(vars(value))
    if isinstance(value, set | frozenset):
        return kind, value, {type(item) for item in value}
    return kind, value


def bits(tensor: torch.Tensor) -> bytes:
    copy = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(copy.view(-1).view(torch.uint8).numpy()) if copy.numel() else b""


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
