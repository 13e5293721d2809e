"""A trial's state, a tree with tensors at its leaves, to and from one flat buffer.

    header (64 bytes) | region, region, ... each at a multiple of 64 | table of regions | JSON text of the tree

Tensors and arrays lie in the regions (`regions.py`), all other values in the text (`treecodec.py`), which comes last:
a scheduler that counts further moves no tensor. A tensor that was read from the buffer and trained in place is already
where `write` wants it, so that in steady state only table and text are written. Equal trees give equal bytes, which is
what the digest is for: bytes that no leaf touches are zeroed when a region is placed.

What a tensor keeps: elements, dtype, shape, strides, aliases, `requires_grad`, and the name of its device. A Parameter
comes back as a tensor; conjugated and negated views come back resolved, in a storage of their own; a NumPy array comes
back in C or Fortran order, without aliases. Attributes, hooks and gradients of a tensor are not part of its value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from cerebro_tune.buffers import Mapped, readable
from cerebro_tune.errors import StateError, StateMemoryError
from cerebro_tune.regions import ALIGNMENT, ARRAY, TENSOR, Leaves, Region, arrays_in, dtype_of_name, move, tensors_in
from cerebro_tune.treecodec import Reader, decode, dumps

if TYPE_CHECKING:
    import torch

VERSION = 1
_MAGIC = b"cerebro\0"
_HEADER = struct.Struct("<8sIxxxxQQQ24x")  # magic, version, end of the regions, lengths of table and text
assert _HEADER.size == ALIGNMENT


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where everything of one tree will lie; holds the tree's tensors until it is written."""

    nbytes: int
    leaves: Leaves
    end: int  # of the regions
    table: bytes
    text: bytes
    regions: tuple[Region, ...] | None  # what must lie where; None when all of it is in place in `buffer`
    buffer: Mapped | None


def plan(tree: Any, buffer: Mapped | None = None) -> StateLayout:
    """Lay a tree out; UnsupportedLeafError names the key path of a leaf that cannot be carried.

    `buffer` is where the tree was probably read from: it saves time if all its tensors are there still.
    """
    leaves = Leaves()
    text = dumps(leaves.encode(tree)).encode()
    if buffer is not None and (known := leaves.known(buffer)) is not None:
        return StateLayout(known.end + len(known.text) + len(text), leaves, known.end, known.text, text, None, buffer)
    table = leaves.table()
    nbytes = table.end + len(table.text) + len(text)
    return StateLayout(nbytes, leaves, table.end, table.text, text, table.regions, None)


def write(tree: Any, buffer: Mapped) -> int:
    """Write a tree, or the layout of one, and return the number of bytes used."""
    layout = tree if isinstance(tree, StateLayout) else plan(tree, buffer)
    if layout.nbytes > buffer.nbytes:
        raise StateMemoryError(
            f"the state needs {readable(layout.nbytes)} and its buffer has {readable(buffer.nbytes)}: "
            f"grow it to layout.nbytes first"
        )
    if layout.regions is not None:
        move(layout.regions, buffer)
    elif layout.buffer is not buffer:
        move(layout.leaves.table().regions, buffer)
    seal(buffer.memory, layout.end, layout.table, layout.text)
    return layout.nbytes


def read(buffer: Mapped, device: str | None = None) -> Any:
    """The tree in a buffer, without a copy: its tensors view the buffer, those of one storage view one storage.

    Tensors that were on a device lie in host memory, like the buffer, unless `device` says where to put them.
    """
    import torch

    end, table, text = parts(buffer.memory)
    tensors = tensors_in(buffer, table, end, device)

    def tensor(index: int) -> torch.Tensor:
        data = tensors[index].data  # not the tensor itself, which is kept for the next time
        return data.requires_grad_() if tensors[index].requires_grad else data

    readers: dict[str, Reader] = {
        TENSOR: tensor,
        "~dtype": dtype_of_name,
        "~device": torch.device,
        "~size": torch.Size,
    }
    if ARRAY in text:
        readers[ARRAY] = arrays_in(buffer, table).__getitem__
    return decode(text, readers)


def digest(buffer: Mapped, used: int) -> str:
    """The xxh3 of a written state, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(buffer.memory[:used])


def seal(memory: memoryview, end: int, table: bytes, text: bytes) -> None:
    """Complete a state whose regions are in place: its table, its text and its header."""
    memory[end : end + len(table)] = table
    memory[end + len(table) : end + len(table) + len(text)] = text
    _HEADER.pack_into(memory, 0, _MAGIC, VERSION, end, len(table), len(text))


def parts(memory: memoryview) -> tuple[int, bytes, str]:
    """Where the regions of a written state end, its table and its text."""
    header = _HEADER.unpack_from(memory) if len(memory) >= _HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, end, table, text = header
    if magic != _MAGIC:
        raise StateError("there is no state in this buffer: its first bytes are not those of one")
    if version != VERSION:
        raise StateError(f"the state has layout version {version}; this version of cerebro_tune reads {VERSION}")
    if end + table + text > len(memory):
        raise StateError(f"the state ends at byte {end + table + text} of a buffer of {len(memory)}")
    middle = end + table
    return end, bytes(memory[end:middle]), bytes(memory[middle : middle + text]).decode("ascii")
