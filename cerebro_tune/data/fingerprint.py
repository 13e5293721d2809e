"""Digests of samples, to tell whether a Dataset still gives what it gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash


def digest_of(sample: Any) -> str:
    """The xxh3 of a sample's content in hex: tensors, arrays, images, text, numbers, and containers of these.

    Of anything else only the type counts, since its bytes need not be the same in another process.
    """
    digest = xxhash.xxh3_64()
    _feed(digest, sample)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        value = _array_of(value)
    content = _bytes_of(value)
    items = [] if content is not None else _items_of(value)
    _part(digest, f"{kind} {len(items)}".encode())
    _part(digest, content or b"")
    for item in items:
        _feed(digest, item)


def _array_of(tensor: Any) -> Any:
    plain = tensor.detach().cpu()
    if plain.is_sparse or str(plain.dtype) == "torch.bfloat16":  # NumPy has neither
        plain = plain.to_dense().float()
    return plain.numpy()


def _bytes_of(value: Any) -> bytes | None:
    """The content of a value that holds no others; None for one that does, or of which nothing is known."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | int | float | complex | np.generic | None):
        return repr(value).encode()
    if all(hasattr(value, name) for name in ("tobytes", "size", "mode")):  # an image of Pillow's
        return f"{value.mode}{value.size}".encode() + bytes(value.tobytes())
    return None


def _items_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _part(digest: Any, content: bytes) -> None:
    # The lengths keep the parts apart: ("ab", "c") is not ("a", "bc").
    digest.update(b"%d:" % len(content))
    digest.update(content)
