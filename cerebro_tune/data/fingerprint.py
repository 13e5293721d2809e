"""Digests of samples, to tell whether a Dataset still gives what it gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

_DEEPEST = 100


def digest_of(sample: Any) -> str:
    """The xxh3 of a sample's content in hex: tensors, arrays, images, text, numbers, and containers of these.

    Of anything else only the type counts, since its bytes need not be the same in another process; of a tensor that
    NumPy lacks, its dtype, layout and shape as well. Nothing is raised.
    """
    digest = xxhash.xxh3_64()
    _feed(digest, sample, ())
    return digest.hexdigest()


def _feed(digest: Any, value: Any, above: tuple[int, ...]) -> None:
    """`above` are the ids of the containers that hold this value: one that holds itself is not entered again."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    content, items = (b"", []) if id(value) in above or len(above) == _DEEPEST else _parts_of(value)
    _part(digest, f"{kind} {len(items)}".encode())
    _part(digest, content)
    for item in items:
        _feed(digest, item, (*above, id(value)))


def _parts_of(value: Any) -> tuple[bytes, list[Any]]:
    """A value's own content, and the values in it."""
    try:
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            value = _array_of(value)
        content = _bytes_of(value)
        return (b"", _items_of(value)) if content is None else (content, [])
    except Exception:  # noqa: BLE001  code of the value's class may raise anything: then only the type counts
        return b"", []


def _array_of(tensor: Any) -> Any:
    """The elements as an array, or as text what is known of a tensor without them."""
    try:
        plain = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg()
        if plain.is_floating_point() and plain.dtype.itemsize < 4:  # NumPy has no bfloat16 or float8
            plain = plain.float()
        return plain.numpy()
    except (RuntimeError, TypeError):  # a quantized, nested or meta tensor, or a subclass
        return f"{tensor.dtype} {tensor.layout} {_shape_of(tensor)}"


def _shape_of(tensor: Any) -> list[int | None]:
    """Sizes that are numbers; of a nested tensor the others are symbols, new ones for each tensor, or not known."""
    try:
        return [size if type(size) is int else None for size in tensor.shape]
    except RuntimeError:
        return [None] * tensor.dim()


def _bytes_of(value: Any) -> bytes | None:
    """The content of a value that holds no others; None for one that does, or of which nothing is known."""
    if isinstance(value, np.ndarray | np.void) and value.dtype.hasobject:
        return None
    if isinstance(value, np.ndarray):
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
    if isinstance(value, np.ndarray | np.void):
        return [value.tolist()]
    if isinstance(value, list | tuple):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _part(digest: Any, content: bytes) -> None:
    # The lengths keep the parts apart: ("ab", "c") is not ("a", "bc").
    digest.update(b"%d:" % len(content))
    digest.update(content)
