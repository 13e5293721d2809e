"""Column types: the one form a type is stored in, and which types become tensors.

Sources differ in details that mean nothing (string or large_string, a list's field name, dictionary encoding). Rows are
stored in one canonical form, so that equal rows give equal shards whatever they were read from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import types

from cerebro_tune.errors import DataError

_LIST_TYPES = (pa.ListType, pa.LargeListType, pa.ListViewType, pa.LargeListViewType)


@dataclass(frozen=True, slots=True)
class TensorType:
    """Form of a column whose rows all have one shape; `shape` and `axes` are of one row.

    `shape` is as stored; `axes` is the order in which the reader sees those axes.
    """

    value: pa.DataType
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def row_values(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape)


def tensor_type(kind: pa.DataType) -> TensorType | None:
    """How a column of this type becomes a tensor; None for one that has to go through a collate function."""
    if isinstance(kind, pa.FixedShapeTensorType):
        shape = tuple(kind.shape)
        axes = tuple(kind.permutation) if kind.permutation else tuple(range(len(shape)))
        return TensorType(kind.value_type, shape, axes) if _is_number(kind.value_type) and all(shape) else None
    if types.is_fixed_size_list(kind):
        inner = tensor_type(kind.value_type)
        if inner is None or not kind.list_size:
            return None
        return TensorType(inner.value, (kind.list_size, *inner.shape), (0, *(axis + 1 for axis in inner.axes)))
    return TensorType(kind, (), ()) if _is_number(kind) else None


def is_number_list(kind: pa.DataType) -> bool:
    """Whether each row is a list of numbers of its own length, that is, a 1-d tensor."""
    return types.is_large_list(kind) and _is_number(kind.value_type)


def canonical_schema(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """The schema that these columns of a source are stored with."""
    require_columns(schema.names, schema.names)
    names = schema.names if columns is None else list(columns)
    require_columns(names, schema.names)
    if not names:
        raise DataError("no columns: a training set needs at least one")
    return pa.schema([pa.field(name, canonical_type(schema.field(name).type)) for name in names])


def require_columns(asked: Iterable[str], valid: Sequence[str]) -> None:
    """Raise DataError for a column that is not among the `valid`, or asked for twice."""
    seen: set[str] = set()
    for name in asked:
        if name not in valid:
            raise DataError(f"there is no column {name!r}; the columns are {', '.join(map(repr, valid)) or '(none)'}")
        if name in seen:
            raise DataError(f"column {name!r} occurs twice; each column needs a name of its own")
        seen.add(name)


def canonical_type(kind: pa.DataType) -> pa.DataType:
    """The type that a column of type `kind` is stored as."""
    stored = kind
    if isinstance(kind, pa.FixedShapeTensorType):
        axes = kind.permutation
        plain = not axes or list(axes) == sorted(axes)
        stored = pa.fixed_shape_tensor(kind.value_type, kind.shape, permutation=None if plain else axes)
    elif isinstance(kind, pa.BaseExtensionType):
        stored = _shaped(kind) or canonical_type(kind.storage_type)
    elif isinstance(kind, pa.DictionaryType):
        stored = canonical_type(kind.value_type)
    elif types.is_string(kind) or types.is_string_view(kind):
        stored = pa.large_string()
    elif types.is_binary(kind) or types.is_binary_view(kind):
        stored = pa.large_binary()
    elif isinstance(kind, pa.FixedSizeListType):
        stored = pa.list_(pa.field("item", canonical_type(kind.value_type)), kind.list_size)
    elif isinstance(kind, _LIST_TYPES):
        stored = pa.large_list(pa.field("item", canonical_type(kind.value_type)))
    return stored


def conform(batch: pa.RecordBatch, schema: pa.Schema, first_row: int) -> pa.RecordBatch:
    """The batch in canonical form. DataError for a value that is missing; `first_row` is its row in the source."""
    arrays = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            raise DataError(
                f"column {field.name!r} is missing from row {first_row} on; all files need the same columns"
            )
        array = _cast(batch.column(index), field)
        _refuse_nulls(array, field.name, first_row)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def to_values(array: pa.Array[Any]) -> npt.NDArray[Any]:
    """The numbers of a tensor column without a copy (bool: unpacked), as (rows, numbers in a row)."""
    rows = len(array)
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif isinstance(array, pa.FixedSizeListArray):
            array = array.flatten()
        else:
            break
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=not types.is_boolean(array.type))
    return values.reshape(rows, -1)


def from_values(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array[Any]:
    """A tensor column from its numbers, the opposite of `to_values`, without a copy (bool: packed)."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return pa.ExtensionArray.from_storage(kind, from_values(values, kind.storage_type))
    if isinstance(kind, pa.FixedSizeListType):
        inner = from_values(values.reshape(len(values) * kind.list_size, -1), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None], children=[inner])
    return pa.array(values.reshape(-1), type=kind)


def _shaped(kind: pa.BaseExtensionType) -> pa.DataType | None:
    """Fixed-size lists for a foreign extension type that states a shape, such as Hugging Face's Array2D."""
    shape = getattr(kind, "shape", None)
    if not shape or not all(isinstance(size, int) for size in shape):
        return None
    stored = kind.storage_type
    while isinstance(stored, _LIST_TYPES):
        stored = stored.value_type
    for size in reversed(shape):
        stored = pa.list_(pa.field("item", stored), size)
    return stored


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _cast(array: pa.Array[Any], field: pa.Field[Any]) -> pa.Array[Any]:
    if array.type == field.type:
        return array
    if isinstance(array, pa.ExtensionArray) and not isinstance(field.type, pa.BaseExtensionType):
        array = array.storage
    if isinstance(field.type, pa.FixedShapeTensorType):
        storage = array.storage if isinstance(array, pa.ExtensionArray) else array
        return pa.ExtensionArray.from_storage(field.type, storage.cast(field.type.storage_type))
    try:
        return array.cast(field.type)
    except pa.ArrowException as error:
        raise DataError(
            f"column {field.name!r} has type {array.type}, which cannot be stored as {field.type}: {error}"
        ) from error


def _refuse_nulls(array: pa.Array[Any], name: str, first_row: int) -> None:
    if array.null_count:
        row = first_row + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"column {name!r} has no value in row {row} of the source; fill or drop such rows before writing"
        )
    kind = array.type
    if tensor_type(kind) is None and not is_number_list(kind):
        return
    while True:  # down to the numbers themselves
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif isinstance(array, pa.FixedSizeListArray | pa.LargeListArray):
            array = array.flatten()
        else:
            break
        if array.null_count:
            raise DataError(
                f"column {name!r} has a list with a missing value in rows {first_row} and following; "
                "fill or drop such rows before writing"
            )
