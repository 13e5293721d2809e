"""Where tensors and arrays lie in a buffer: rows of a table, one per leaf, and the regions they view.

A region is the span of one storage that its leaves touch, at a multiple of 64 bytes. Rows and regions follow the order
in which the tree is walked, tensors before arrays, so that equal trees give equal tables.

    tensor row   [offset, bytes, dtype, shape]                                            contiguous, alone
                 [offset, bytes, dtype, shape, stride, first element, requires_grad, device or null]    any other
    array row    [offset, bytes, dtype, shape, "C" or "F"]

Offset and bytes are those of the region; a leaf without elements has no region, and 0 for both.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import StateError
from cerebro_tune.treecodec import Encoder, Handler, dtype_of, dtype_text, dumps, refuse

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cerebro_tune.buffers import Mapped

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register; also the length of the header
TENSOR, ARRAY = "~tensor", "~array"  # tags in the tree; the payload is the number of the row
_SPAN_ALIGNMENT = 16  # bytes: the widest element, so that every dtype's elements stay aligned within a region
_NUMPY_DTYPES = {  # torch's names -> NumPy's type strings
    "float32": "f4", "float64": "f8", "float16": "f2", "complex64": "c8", "complex128": "c16",
    "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1", "uint8": "u1", "bool": "?",
}  # fmt: skip


@dataclass(eq=False, slots=True)
class Region:
    """A span of memory that is stored as it is."""

    storage: Any  # torch.UntypedStorage, or the array
    offset: int = 0  # in the buffer
    nbytes: int = 0
    start: int = 0  # of the span within the storage, in bytes
    address: int | None = None  # None on a device
    views: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # where gaps are possible: with first element


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one tree as text, where the text may start, and the regions to be brought there."""

    text: bytes
    end: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """The tensors of a table as views of its buffer: made once, and kept with the mapped buffer for the next time."""

    text: bytes
    end: int
    tensors: list[torch.Tensor]
    signature: list[Any]


class Leaves(Encoder):
    """Encodes a tree and collects those of its leaves that do not go into the text."""

    def __init__(self) -> None:
        self.handlers = _handlers("torch" in sys.modules, "numpy" in sys.modules)
        self.tensors: list[torch.Tensor] = []
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.on_host = True

    def known(self, buffer: Mapped) -> Known | None:
        """What is known of `buffer`, if these leaves are just the tensors that lie there."""
        known = buffer.known
        if (
            isinstance(known, Known)
            and self.on_host
            and not self.arrays
            and _signature(self.tensors) == known.signature
        ):
            return known
        return None

    def table(self) -> Table:
        """Lay the leaves out."""
        groups: dict[Any, list[int]] = {}
        rows: list[list[Any]] = [[] for _ in self.tensors]
        for index, tensor in enumerate(self.tensors):
            if tensor.numel():
                # Equal addresses are one storage, whichever objects stand for it.
                where = tensor.untyped_storage().data_ptr()
                groups.setdefault(where if tensor.is_cpu else (tensor.device, where), []).append(index)
            else:
                rows[index] = [0, 0, *_geometry(tensor, 0)]
        end, regions = ALIGNMENT, []
        for members in groups.values():
            region = self._region(members, end, rows)
            regions.append(region)
            end = aligned(end + region.nbytes)
        array_rows = []
        for array in self.arrays:
            order = "C" if array.flags.c_contiguous else "F"
            array_rows.append([end, array.nbytes, dtype_text(array.dtype), list(array.shape), order])
            if array.nbytes:
                address = array.__array_interface__["data"][0]
                regions.append(Region(array, end, array.nbytes, address=address))
                end = aligned(end + array.nbytes)
            else:
                array_rows[-1][0] = 0
        return Table(dumps({"tensors": rows, "arrays": array_rows}).encode(), end, tuple(regions))

    def _region(self, members: list[int], offset: int, rows: list[list[Any]]) -> Region:
        """The region of the tensors of one storage, whose rows it fills."""
        tensors = [self.tensors[index] for index in members]
        storage = tensors[0].untyped_storage()
        if len(tensors) == 1 and tensors[0].is_contiguous():
            # Its own bytes alone, however large the storage is that it was cut from.
            tensor = tensors[0]
            region = Region(storage, offset, tensor.nbytes, int(tensor.storage_offset()) * tensor.element_size())
            rows[members[0]] = [offset, region.nbytes, _name(tensor.dtype), tensor.shape]
            if tensor.requires_grad or not tensor.is_cpu or list(tensor.stride()) != contiguous(tensor.shape):
                rows[members[0]][2:] = _geometry(tensor, 0)
        else:
            spans = [_span(tensor) for tensor in tensors]
            start = min(first for first, _ in spans) // _SPAN_ALIGNMENT * _SPAN_ALIGNMENT
            region = Region(storage, offset, max(last for _, last in spans) - start, start)
            for tensor, index, (first, _) in zip(tensors, members, spans, strict=True):
                geometry = _geometry(tensor, (first - start) // tensor.element_size())
                rows[index] = [offset, region.nbytes, *geometry]
                region.views.append((tensor, geometry[3]))
            if any(tensor.nbytes == region.nbytes and tensor.is_contiguous() for tensor in tensors):
                region.views.clear()
        region.address = storage.data_ptr() + region.start if tensors[0].is_cpu else None
        return region


@functools.cache
def _handlers(with_torch: bool, with_numpy: bool) -> dict[type, Handler]:
    """How to encode what torch and NumPy know; what was never imported cannot be in a tree."""
    handlers = dict(Encoder.handlers)
    if with_torch:
        import torch

        handlers |= {
            torch.Tensor: _tensor,
            torch.nn.Parameter: _tensor,
            torch.dtype: lambda _, value: {"~dtype": _name(value)},
            torch.device: lambda _, value: {"~device": str(value)},
            torch.Size: lambda _, value: {"~size": list(value)},
        }
    if with_numpy:
        import numpy as np

        handlers[np.ndarray] = _array
    return handlers


def _tensor(leaves: Any, tensor: torch.Tensor) -> dict[str, int]:
    if tensor.is_nested or _name(tensor.layout) != "strided":
        refuse(tensor, "is sparse or nested: convert it with to_dense() or to_padded_tensor()")
    if tensor.is_quantized:
        refuse(tensor, "is quantized: carry int_repr(), scale and zero point instead")
    if not tensor.is_cpu:
        if tensor.is_meta:
            refuse(tensor, "is a meta tensor: it has no data")
        leaves.on_host = False
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg().requires_grad_(tensor.requires_grad)
    tensors: list[torch.Tensor] = leaves.tensors
    tensors.append(tensor)
    return {TENSOR: len(tensors) - 1}


def _array(leaves: Any, array: np.ndarray[Any, Any]) -> dict[str, int]:
    dtype_text(array.dtype)  # refuses objects here, where the key path is known
    leaves.arrays.append(array if array.flags.forc else array.copy(order="C"))
    return {ARRAY: len(leaves.arrays) - 1}


def move(regions: tuple[Region, ...], buffer: Mapped) -> None:
    """Bring regions to their places; those that lie elsewhere in this very buffer are set aside first."""
    memory, base = buffer.memory, buffer.address
    sources: list[tuple[int | None, Any]] = []  # where the bytes of each region are, and what keeps them there
    for region in regions:
        if region.address is None:
            sources.append((None, region.storage))
        elif base <= region.address < base + buffer.nbytes and region.address != base + region.offset:
            aside = (ctypes.c_char * region.nbytes).from_buffer_copy(memory, region.address - base)
            sources.append((ctypes.addressof(aside), aside))
        else:
            sources.append((region.address, region.storage))
    for region, (address, _) in zip(regions, sources, strict=True):
        if address is None:
            _from_device(region, memory)
        elif address != base + region.offset:
            ctypes.memmove(base + region.offset, address, region.nbytes)
        clear_tail(memory, region.offset + region.nbytes)
        if region.views:
            _clear_gaps(region, memory)


def tensors_in(buffer: Mapped, text: bytes, end: int, device: str | None) -> list[torch.Tensor]:
    """The tensors of a table's rows, as views of the buffer; those that were on a device, there if one is given."""
    known = buffer.known
    if isinstance(known, Known) and known.text == text:
        return known.tensors
    rows = json.loads(text)["tensors"]
    if device is not None and any(len(row) > 4 and row[7] for row in rows):
        return _views(rows, buffer.memory, device)
    tensors = _views(rows, buffer.memory, None)
    if all(len(row) == 4 or not row[7] for row in rows):
        buffer.known = Known(text, end, tensors, _signature(tensors))
    return tensors


def check_rows(text: str, end: int) -> None:
    """Raise ValueError for a table with a leaf that is not within its region, or a region that is not within `end`."""
    table = json.loads(text)
    for offset, nbytes, dtype, shape, *rest in [*table["tensors"], *table["arrays"]]:
        strides, first = rest[:2] if len(rest) > 1 else (contiguous(shape), 0)
        size = (dtype_of if len(rest) == 1 else dtype_of_name)(dtype).itemsize
        reach = first + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) + 1
        least = min([*shape, *strides, first, 0])
        if least < 0 or (math.prod(shape) and not reach * size <= nbytes <= end - offset):
            raise ValueError(f"a leaf of shape {shape} and strides {strides} is not within its {nbytes} bytes")


def arrays_in(buffer: Mapped, text: bytes) -> list[np.ndarray[Any, Any]]:
    """The arrays of a table's rows, as views of the buffer."""
    import numpy as np

    return [
        np.ndarray(shape, dtype_of(dtype), buffer.memory if nbytes else None, offset, order=order)
        for offset, nbytes, dtype, shape, order in json.loads(text)["arrays"]
    ]


def contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a new tensor: where a length is 1, a view may have others and be contiguous all the same."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, shape[axis])
    return strides


def aligned(offset: int) -> int:
    """The next place where a region or the text may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def clear_tail(memory: memoryview, end: int) -> None:
    """Zero what lies between a region's end and the next one."""
    memory[end : aligned(end)] = bytes(aligned(end) - end)


def _views(rows: list[list[Any]], memory: memoryview, device: str | None) -> list[torch.Tensor]:
    import numpy as np
    import torch

    storages: dict[int, torch.Tensor] = {}  # region -> its bytes
    tensors = []
    for offset, nbytes, name, shape, *rest in rows:
        if not rest:
            if (dtype := _NUMPY_DTYPES.get(name)) is not None:  # half the time of the other way, which takes any dtype
                tensors.append(torch.from_numpy(np.ndarray(shape, dtype, memory, offset)))
            else:
                flat = torch.frombuffer(memory, dtype=dtype_of_name(name), count=math.prod(shape), offset=offset)
                tensors.append(flat.view(shape))
            continue
        stride, first, requires_grad, was_on = rest
        whole = storages.get(offset)
        if not nbytes:
            whole = torch.empty(0, dtype=torch.uint8)
        elif whole is None:
            whole = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)
        if was_on and device:
            whole = whole.to(device)
        if nbytes:
            storages[offset] = whole
        view = torch.empty(0, dtype=dtype_of_name(name), device=whole.device)
        tensors.append(view.set_(whole.untyped_storage(), first, shape, stride).requires_grad_(requires_grad))
    return tensors


def _signature(tensors: list[torch.Tensor]) -> list[Any]:
    """What tells whether two lists of host tensors are the same views of the same memory."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad) for t in tensors]


def _geometry(tensor: torch.Tensor, first: int) -> list[Any]:
    device = None if tensor.is_cpu else tensor.device.type  # its index is another on another worker
    return [_name(tensor.dtype), tensor.shape, tensor.stride(), first, tensor.requires_grad, device]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one after the last, that a tensor touches in its storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    reach = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * size


def _from_device(region: Region, memory: memoryview) -> None:
    """Copy a device region's bytes to its place."""
    import torch

    if region.nbytes:
        whole = torch.empty(0, dtype=torch.uint8, device=region.storage.device).set_(region.storage)
        place = torch.frombuffer(memory, dtype=torch.uint8, count=region.nbytes, offset=region.offset)
        place.copy_(whole[region.start : region.start + region.nbytes])


def _clear_gaps(region: Region, memory: memoryview) -> None:
    """Zero the bytes that no leaf touches: they are whatever the allocator left there."""
    import numpy as np

    touched = np.zeros(region.nbytes, dtype=bool)
    for tensor, first in region.views:
        size = tensor.element_size()
        strides = [int(step) * size for step in tensor.stride()]
        elements = np.lib.stride_tricks.as_strided(touched[first * size :], (*tensor.shape, size), (*strides, 1))
        elements[...] = True
    np.frombuffer(memory, np.uint8, region.nbytes, region.offset)[~touched] = 0


@functools.cache
def _name(of_torch: Any) -> str:
    """A dtype's or layout's name within torch."""
    return str(of_torch).removeprefix("torch.")


@functools.cache
def dtype_of_name(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"the state has tensors of dtype {name!r}, which torch {torch.__version__} does not have")
    return dtype
