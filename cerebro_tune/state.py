"""A trial's state, a tree with tensors at its leaves, to and from one flat buffer.

    header (64 bytes) | region, region, ... each at a multiple of 64 | JSON text of the tree

A region is the span of one storage that the leaves touch, so that tied weights and overlapping views are stored once
and come back as views of one storage. Regions lie in the order in which the tree is walked, and the text lies last:
a scheduler that counts further moves no tensor. A tensor that was read from the buffer and trained in place is already
where `write` wants it, so that in steady state only the text is written.

Equal trees give equal bytes, which is what the digest is for: bytes of a region that no leaf touches, and those
between regions, are zeroed when the region is placed.

What a tensor keeps: elements, dtype, shape, strides, aliases, `requires_grad`, and the name of its device. A Parameter
comes back as a tensor; conjugated and negated views come back resolved, in a storage of their own; a NumPy array comes
back in C or Fortran order, without aliases. Attributes, hooks and gradients of a tensor are not part of its value.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from cerebro_tune.buffers import Mapped, readable
from cerebro_tune.errors import StateError, StateMemoryError
from cerebro_tune.treecodec import Encoder, Handler, decode, dtype_of, dtype_text, dumps, refuse

if TYPE_CHECKING:
    import numpy as np
    import torch

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
VERSION = 1
_MAGIC = b"cerebro\0"
_HEADER = struct.Struct("<8sIxxxxQQ32x")  # magic, version, offset and length of the text
_SPAN_ALIGNMENT = 16  # bytes: the largest element, so that every dtype's elements stay aligned within a region

# Tags of the leaves that live in regions, with their payloads.
TENSOR = "~tensor"  # [offset, nbytes, dtype, shape]: contiguous, alone in its region
VIEW = "~view"  # [offset, nbytes, dtype, shape, stride, first element, requires_grad, device or null]
EMPTY = "~empty"  # [dtype, shape, stride, requires_grad, device or null]: no elements, hence no region
ARRAY = "~array"  # [offset, nbytes, dtype, shape, "C" or "F"]


@dataclass(eq=False, slots=True)
class _Region:
    """A span of memory that is stored as it is, and the leaves that view it."""

    storage: Any  # torch.UntypedStorage, or the array
    leaves: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)  # each with its JSON
    start: int = 0  # of the span within the storage, in bytes
    nbytes: int = 0
    address: int | None = None  # None on a device
    offset: int = 0  # in the buffer
    gaps: bool = False  # whether there may be bytes that no leaf touches


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where everything of one tree will lie; holds the tree's tensors until it is written."""

    nbytes: int
    regions: tuple[_Region, ...]
    text_offset: int
    text: bytes


def plan(tree: Any) -> StateLayout:
    """Lay a tree out; UnsupportedLeafError names the key path of a leaf that cannot be carried."""
    planner = _Planner()
    encoded = Encoder(planner.handlers()).encode(tree)
    end = planner.place()
    text = dumps(encoded).encode()
    return StateLayout(end + len(text), tuple(planner.regions.values()), end, text)


def write(tree: Any, buffer: Mapped) -> int:
    """Write a tree, or the layout of one, and return the number of bytes used."""
    layout = tree if isinstance(tree, StateLayout) else plan(tree)
    if layout.nbytes > buffer.nbytes:
        raise StateMemoryError(
            f"the state needs {readable(layout.nbytes)} and its buffer has {readable(buffer.nbytes)}: "
            f"grow it to layout.nbytes first"
        )
    base = buffer.address
    moving = [region for region in layout.regions if region.address != base + region.offset]
    if moving:
        _move(moving, buffer)
    seal(buffer.memory, layout.text_offset, layout.text)
    return layout.nbytes


def read(buffer: Mapped, device: str | None = None) -> Any:
    """The tree in a buffer, without a copy: its tensors view the buffer, those of one storage view one storage.

    Tensors that were on a device lie in host memory, like the buffer, unless `device` says where to put them.
    """
    memory = buffer.memory
    return decode(text_of(memory), _Reader(memory, device).readers())


def digest(buffer: Mapped, used: int) -> str:
    """The xxh3 of a written state, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(buffer.memory[:used])


def seal(memory: memoryview, text_offset: int, text: bytes) -> None:
    """Complete a state whose regions are in place: its text and its header."""
    memory[text_offset : text_offset + len(text)] = text
    _HEADER.pack_into(memory, 0, _MAGIC, VERSION, text_offset, len(text))


def text_of(memory: memoryview) -> str:
    """The JSON text of a written state."""
    magic, version, offset, length = _HEADER.unpack_from(memory) if len(memory) >= _HEADER.size else (b"", 0, 0, 0)
    if magic != _MAGIC:
        raise StateError("there is no state in this buffer: its first bytes are not those of one")
    if version != VERSION:
        raise StateError(f"the state has layout version {version}; this version of cerebro_tune reads {VERSION}")
    if offset + length > len(memory):
        raise StateError(f"the state ends at byte {offset + length} of a buffer of {len(memory)}")
    return bytes(memory[offset : offset + length]).decode("ascii")


def aligned(offset: int) -> int:
    """The next place where a region or the text may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


class _Planner:
    """Collects the regions of a tree while it is walked."""

    def __init__(self) -> None:
        self.regions: dict[Any, _Region] = {}  # by address of the storage: equal addresses are aliases

    def handlers(self) -> dict[type, Handler]:
        """How to encode what torch and NumPy know; what was never imported cannot be in the tree."""
        handlers: dict[type, Handler] = {}
        if torch := sys.modules.get("torch"):
            handlers |= {
                torch.Tensor: self.tensor,
                torch.nn.Parameter: self.tensor,
                torch.dtype: lambda value: {"~dtype": _name(value)},
                torch.device: lambda value: {"~device": str(value)},
                torch.Size: lambda value: {"~size": list(value)},
            }
        if numpy := sys.modules.get("numpy"):
            handlers[numpy.ndarray] = self.array
        return handlers

    def tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The tensor's JSON, complete once the regions are placed."""
        if why := _unstorable(tensor):
            refuse(tensor, why)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.detach().resolve_conj().resolve_neg().requires_grad_(tensor.requires_grad)
        if not tensor.numel():
            shape, stride = list(tensor.shape), list(tensor.stride())
            return {EMPTY: [_name(tensor.dtype), shape, stride, tensor.requires_grad, _device(tensor)]}
        storage = tensor.untyped_storage()
        key = storage.data_ptr() if tensor.is_cpu else (str(tensor.device), storage.data_ptr())
        region = self.regions.get(key)
        if region is None:
            region = self.regions[key] = _Region(storage)
        encoded: dict[str, Any] = {}
        region.leaves.append((tensor, encoded))
        return encoded

    def array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        """The array's JSON, complete once the regions are placed."""
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        encoded = {ARRAY: [0, array.nbytes, dtype_text(array.dtype), list(array.shape), order]}
        if array.nbytes:
            array = array.copy(order="C") if not array.flags.forc else array
            address = array.__array_interface__["data"][0]
            self.regions["array", len(self.regions)] = _Region(array, [(array, encoded)], 0, array.nbytes, address)
        return encoded

    def place(self) -> int:
        """Give every region its offset and complete the JSON of its leaves; returns where the text starts."""
        end = _HEADER.size
        for region in self.regions.values():
            region.offset = end
            ((tensor, encoded), *others) = region.leaves
            if ARRAY in encoded:
                encoded[ARRAY][0] = end
            elif not others and tensor.is_contiguous():
                _fill_whole(region, tensor, encoded)
            else:
                _fill_views(region)
            end = aligned(end + region.nbytes)
        return end


def _unstorable(tensor: torch.Tensor) -> str | None:
    """Why a tensor's elements are not plain strided memory, if so."""
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        return "is sparse or nested: convert it with to_dense() or to_padded_tensor()"
    if tensor.is_quantized:
        return "is quantized: carry int_repr() and its scale"
    if tensor.is_meta:
        return "is a meta tensor and has no data"
    return None


def _fill_whole(region: _Region, tensor: torch.Tensor, encoded: dict[str, Any]) -> None:
    """One contiguous tensor: its own bytes, however large the storage is that it was cut from."""
    region.start, region.nbytes = int(tensor.storage_offset()) * tensor.element_size(), tensor.nbytes
    device = _device(tensor)
    region.address = tensor.data_ptr() if device is None else None
    shape, name = list(tensor.shape), _name(tensor.dtype)
    if device is None and not tensor.requires_grad:
        encoded[TENSOR] = [region.offset, region.nbytes, name, shape]
    else:
        stride = list(tensor.stride())
        encoded[VIEW] = [region.offset, region.nbytes, name, shape, stride, 0, tensor.requires_grad, device]


def _fill_views(region: _Region) -> None:
    """Views of one storage: the span from the first to the last byte that any of them touches."""
    spans = [_span(tensor) for tensor, _ in region.leaves]
    region.start = min(first for first, _ in spans) // _SPAN_ALIGNMENT * _SPAN_ALIGNMENT
    region.nbytes = max(last for _, last in spans) - region.start
    region.gaps = not any(t.nbytes == region.nbytes and t.is_contiguous() for t, _ in region.leaves)
    for (tensor, encoded), (first, _) in zip(region.leaves, spans, strict=True):
        device = _device(tensor)
        region.address = region.storage.data_ptr() + region.start if device is None else None
        encoded[VIEW] = [
            region.offset,
            region.nbytes,
            _name(tensor.dtype),
            list(tensor.shape),
            list(tensor.stride()),
            (first - region.start) // tensor.element_size(),
            tensor.requires_grad,
            device,
        ]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one after the last, that a tensor touches in its storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    reach = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * size


def _move(regions: list[_Region], buffer: Mapped) -> None:
    """Bring regions to their places; those that lie elsewhere in this very buffer are set aside first."""
    memory, base = buffer.memory, buffer.address
    sources: list[tuple[int, Any]] = []  # (address, what keeps it alive)
    for region in regions:
        if region.address is None:
            host = _device_bytes(region)
            sources.append((host.data_ptr(), host))
        elif base <= region.address < base + buffer.nbytes:
            aside = (ctypes.c_char * region.nbytes).from_buffer_copy(memory, region.address - base)
            sources.append((ctypes.addressof(aside), aside))
        else:
            sources.append((region.address, region.storage))
    for region, (address, _) in zip(regions, sources, strict=True):
        end = region.offset + region.nbytes
        ctypes.memmove(base + region.offset, address, region.nbytes)
        memory[end : aligned(end)] = bytes(aligned(end) - end)
        if region.gaps:
            _clear_gaps(region, memory)


def _device_bytes(region: _Region) -> torch.Tensor:
    """A device region's bytes in host memory."""
    import torch  # noqa: PLC0415

    whole = torch.empty(0, dtype=torch.uint8, device=region.storage.device).set_(region.storage)
    return whole[region.start : region.start + region.nbytes].cpu()


def _clear_gaps(region: _Region, memory: memoryview) -> None:
    """Zero the bytes that no leaf touches: they are whatever the allocator left there."""
    import numpy as np  # noqa: PLC0415

    touched = np.zeros(region.nbytes, dtype=bool)
    for tensor, encoded in region.leaves:
        size = tensor.element_size()
        elements = touched[encoded[VIEW][5] * size :]
        strides = [step * size for step in tensor.stride()]
        np.lib.stride_tricks.as_strided(elements, (*tensor.shape, size), (*strides, 1))[...] = True
    np.frombuffer(memory, np.uint8, region.nbytes, region.offset)[~touched] = 0


class _Reader:
    """Makes the leaves of a tree from the regions of a buffer."""

    def __init__(self, memory: memoryview, device: str | None) -> None:
        self._memory = memory
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}

    def readers(self) -> dict[str, Handler]:
        """What to do with the tags of this module."""
        return {
            TENSOR: self.tensor,
            VIEW: self.view,
            EMPTY: self.empty,
            ARRAY: self.array,
            "~dtype": _dtype,
            "~device": lambda text: _torch().device(text),
            "~size": lambda shape: _torch().Size(shape),
        }

    def tensor(self, payload: list[Any]) -> Any:
        """A contiguous tensor with a storage of its own."""
        offset, _, name, shape = payload
        flat = _torch().frombuffer(self._memory, dtype=_dtype(name), count=math.prod(shape), offset=offset)
        return flat if len(shape) == 1 else flat.view(shape)

    def view(self, payload: list[Any]) -> Any:
        """One of several views of a storage."""
        offset, nbytes, name, shape, stride, first, requires_grad, device = payload
        storage = self._storages.get(offset)
        if storage is None:
            torch = _torch()
            whole = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=offset)
            whole = whole.to(self._device) if device and self._device else whole
            storage = self._storages[offset] = whole.untyped_storage()
        return self._strided(name, storage.device, requires_grad, storage, first, shape, stride)

    def empty(self, payload: list[Any]) -> Any:
        """A tensor without elements."""
        name, shape, stride, requires_grad, device = payload
        place = self._device if device and self._device else "cpu"
        return self._strided(name, place, requires_grad, _torch().UntypedStorage(0, device=place), 0, shape, stride)

    @staticmethod
    def _strided(name: str, device: Any, requires_grad: bool, *geometry: Any) -> Any:
        tensor = _torch().empty(0, dtype=_dtype(name), device=device).set_(*geometry)
        return tensor.requires_grad_() if requires_grad else tensor

    def array(self, payload: list[Any]) -> np.ndarray[Any, Any]:
        """A NumPy array."""
        import numpy as np  # noqa: PLC0415

        offset, nbytes, dtype, shape, order = payload
        if not nbytes:
            return np.zeros(shape, dtype_of(dtype), order)
        return np.ndarray(shape, dtype_of(dtype), self._memory, offset, order=order)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _dtype(name: str) -> Any:
    torch = _torch()
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"the state has tensors of dtype {name!r}, which torch {torch.__version__} does not have")
    return dtype


def _device(tensor: torch.Tensor) -> str | None:
    return None if tensor.is_cpu else str(tensor.device)


def _torch() -> Any:
    import torch  # noqa: PLC0415

    return torch
