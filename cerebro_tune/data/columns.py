"""Columns of a mapped shard: each takes rows by number, without a step of Python per row where rows have one shape.

Nothing here hands out views of the mapping: a batch is changed in place by many a training step, and the mapping is
what the next epoch reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from cerebro_tune.data.schema import TensorType, is_number_list, tensor_type

if TYPE_CHECKING:
    from torch import Tensor


# index_select knows no wide unsigned integers; the bits are the same.
_SELECTABLE = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class Column(Protocol):
    """Values of one column of a shard."""

    def take(self, rows: Tensor) -> Any:
        """The values of these rows (int64): one tensor, or a list with one value per row."""


class TensorColumn:
    """Rows of one shape; the tensor lies in the mapped file."""

    take: Callable[[Tensor], Tensor]
    """Gives one tensor, (rows, *shape)."""

    def __init__(self, values: Tensor, form: TensorType) -> None:
        stored = _SELECTABLE.get(values.dtype, values.dtype)
        select = partial(torch.index_select, values.view(stored).view(-1, *form.shape), 0)
        axes = (0, *(axis + 1 for axis in form.axes))
        as_it_lies = stored is values.dtype and form.axes == tuple(range(len(form.shape)))
        # A frame of Python more is a tenth of what a small batch takes.
        self.take = select if as_it_lies else partial(_converted, select, values.dtype, axes)


def _converted(select: Callable[[Tensor], Tensor], dtype: torch.dtype, axes: tuple[int, ...], rows: Tensor) -> Tensor:
    return select(rows).view(dtype).permute(axes)


class BitColumn:
    """Booleans of one shape, eight to a byte in the mapped file, unpacked as they are taken."""

    def __init__(self, packed: Tensor, first_bit: int, form: TensorType) -> None:
        self._packed = packed
        self._form = form
        self._bits = torch.arange(first_bit, first_bit + form.row_values)

    def take(self, rows: Tensor) -> Tensor:
        """One bool tensor, (rows, *shape)."""
        place = (rows * self._form.row_values).unsqueeze(1) + self._bits
        bits = (self._packed[place >> 3] >> (place & 7).to(torch.uint8)) & 1
        found = bits.to(torch.bool).view(-1, *self._form.shape)
        return found.permute(0, *(axis + 1 for axis in self._form.axes))


class ListColumn:
    """Lists of numbers, each of its own length: a 1-d tensor per row."""

    def __init__(self, array: pa.LargeListArray[Any]) -> None:
        self._ends = array.offsets.to_numpy()
        self._values = array.values.to_numpy(zero_copy_only=False)

    def take(self, rows: Tensor) -> list[Tensor]:
        """A tensor per row."""
        numbers = rows.numpy()
        spans = zip(self._ends[numbers].tolist(), self._ends[numbers + 1].tolist(), strict=True)
        return [torch.from_numpy(self._values[start:end].copy()) for start, end in spans]


class ObjectColumn:
    """Anything else, as Python objects."""

    def __init__(self, array: pa.Array[Any]) -> None:
        self._array = array

    def take(self, rows: Tensor) -> list[Any]:
        """A Python object per row."""
        return self._array.take(pa.array(rows.numpy())).to_pylist()


def open_column(array: pa.Array[Any], mapped: Tensor) -> Column:
    """The column over `array`, whose buffers lie in `mapped`, the bytes of the shard's file (uint8, 1-d)."""
    form = tensor_type(array.type)
    if form is None:
        return (
            ListColumn(array)
            if isinstance(array, pa.LargeListArray) and is_number_list(array.type)
            else ObjectColumn(array)
        )
    length = len(array) * form.row_values
    while isinstance(array, pa.ExtensionArray | pa.FixedSizeListArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.values
    data = array.buffers()[1]
    assert data is not None, "a shard has at least one row, and a row of a tensor column at least one number"
    start = data.address - mapped.data_ptr()
    if pa.types.is_boolean(form.value):
        return BitColumn(mapped[start : start + data.size], array.offset, form)
    dtype = torch.from_numpy(np.empty(0, form.value.to_pandas_dtype())).dtype
    start += array.offset * dtype.itemsize
    return TensorColumn(mapped[start : start + length * dtype.itemsize].view(dtype), form)
