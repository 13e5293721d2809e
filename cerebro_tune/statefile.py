"""A written state on disk: one safetensors file that any safetensors reader opens.

Every region is one entry, named by the key path of the leaf that lives there; the tree's JSON text and the digest are
in the file's metadata. Reading rebuilds the buffer's bytes exactly and checks them against the digest, then makes the
header once more and compares it, so that one flipped bit anywhere is noticed. No pickle, and no torch to move bytes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import sys
import sysconfig
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import DamagedStateError, StateError
from cerebro_tune.regions import ARRAY, TENSOR, aligned, check_rows, clear_tail, contiguous
from cerebro_tune.state import digest, parts, plan, read, seal, write
from cerebro_tune.treecodec import named_leaves
from cerebro_tune.wholefile import sync_file, sync_folder, whole_file

_LENGTH = struct.Struct("<Q")
_SYNCED_AT_ONCE = 8
_DTYPES = {  # torch's and NumPy's names -> safetensors' name and bytes; the others are stored as plain bytes
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1), "bool": ("BOOL", 1),
    "'<f8'": ("F64", 8), "'<f4'": ("F32", 4), "'<f2'": ("F16", 2), "'<i8'": ("I64", 8), "'<i4'": ("I32", 4),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    """A region of the buffer as an entry of the file."""

    offset: int  # in the buffer
    nbytes: int
    name: str
    dtype: str
    itemsize: int
    shape: list[int]


def save(state: Any, path: Path | str, durable: bool = True) -> str:
    """Write a tree, or a buffer that holds one, and return its digest; the file appears whole or not at all.

    `durable` waits until the disk has it, so that it survives a power failure.
    """
    path = Path(path)
    if not isinstance(state, Mapped):
        layout = plan(state)
        state = Mapped.private(layout.nbytes)
        write(layout, state)
    memory = state.memory
    end, rows, text = parts(memory)
    table = rows.decode("ascii")
    entries = _entries(table, text)
    checksum = digest(state, end + len(table) + len(text))
    with whole_file(path, durable) as file:
        file.write(_header(table, text, checksum, entries))
        for entry in entries:
            file.write(memory[entry.offset : entry.offset + entry.nbytes])
    return checksum


def sync(paths: Collection[Path]) -> None:
    """Wait until the disk has files that were saved without `durable`."""
    with ThreadPoolExecutor(_SYNCED_AT_ONCE) as pool:  # a file system takes those that come together in one go
        list(pool.map(sync_file, paths))
    for folder in {path.parent for path in paths}:
        sync_folder(folder)


def load(path: Path | str, device: str | None = None) -> Any:
    """The tree of a saved state; DamagedStateError when its bytes are not those that were written."""
    buffer, _, _ = load_into(path, Mapped.private)
    return read(buffer, device)


def load_into(path: Path | str, buffer_of: Callable[[int], Mapped]) -> tuple[Mapped, int, str]:
    """Bring a saved state into the buffer that `buffer_of(nbytes)` gives; returns it, the bytes used and the digest."""
    with open(path, "rb") as file:
        try:
            table, text, checksum, entries = _read_header(file)
            end = _end(entries)
            check_rows(table, end)
            _check_classes(text)
            used = end + len(table) + len(text)
        except (LookupError, OverflowError, TypeError, ValueError, StateError, struct.error, RecursionError) as error:
            raise _damaged(path, f"its header cannot be read ({error!r})") from error
        buffer = buffer_of(used)
        memory = buffer.memory
        for entry in entries:
            file.readinto(memory[entry.offset : entry.offset + entry.nbytes])  # what is cut short fails the digest
            clear_tail(memory, entry.offset + entry.nbytes)
    seal(memory, end, table.encode("ascii"), text.encode("ascii"))
    if digest(buffer, used) != checksum:
        raise _damaged(path, "its digest is not the one that was written")
    return buffer, used, checksum


def _header(table: str, text: str, checksum: str, entries: list[_Entry]) -> bytes:
    metadata = {"check": _check(table, text, checksum), "xxh3": checksum, "table": table, "tree": text}
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.nbytes]
        described[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        end += entry.nbytes
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _LENGTH.pack(len(encoded)) + encoded


def _read_header(file: BinaryIO) -> tuple[str, str, str, list[_Entry]]:
    size = os.fstat(file.fileno()).st_size
    raw = file.read(_LENGTH.size)
    (length,) = _LENGTH.unpack(raw)
    if length > size:
        raise ValueError(f"it tells of a header of {length} bytes in a file of {size}")
    raw += file.read(length)
    metadata = json.loads(raw[_LENGTH.size :])["__metadata__"]
    table, text, checksum = metadata["table"], metadata["tree"], metadata["xxh3"]
    if metadata["check"] != _check(table, text, checksum):  # so that nothing below meets a damaged table
        raise ValueError("its check sum is not the one that was written")
    entries = _entries(table, text)
    if raw != _header(table, text, checksum, entries):
        raise ValueError("it is not the one that was written")
    expected = len(raw) + sum(entry.nbytes for entry in entries)
    if size != expected:
        raise ValueError(f"the file has {size} bytes, not {expected}")
    return table, text, checksum, entries


def _check(*parts: str) -> str:
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def _entries(table: str, text: str) -> list[_Entry]:
    """The regions of a state in the order of the file: the widest elements first, so that all of them are aligned."""
    rows = json.loads(table)
    found: dict[int, _Entry] = {}
    used: set[str] = {"__metadata__"}
    for path, tag, index in named_leaves(text, (TENSOR, ARRAY)):
        offset, nbytes, *described = rows["tensors" if tag == TENSOR else "arrays"][index]
        if nbytes and offset not in found:
            name = path or "state"
            while name in used:
                name += "'"
            used.add(name)
            found[offset] = _Entry(offset, nbytes, name, *_described(nbytes, *described))
    _check_places(found)
    return sorted(found.values(), key=lambda entry: (-entry.itemsize, entry.offset))


def _described(nbytes: int, dtype: str, shape: list[int], *rest: Any) -> tuple[str, int, list[int]]:
    """The entry's dtype, bytes per element and shape: those of its first leaf where that is all of the region."""
    name, size = _DTYPES.get(dtype, ("", 0))
    whole = nbytes == math.prod(shape) * size and (rest[:2] in [(), ("C",)] or rest[:2] == (contiguous(shape), 0))
    return (name, size, shape) if whole else ("U8", 1, [nbytes])


def _check_places(entries: dict[int, _Entry]) -> None:
    end = aligned(1)
    for offset in sorted(entries):
        if offset != end or entries[offset].nbytes < 0:
            raise ValueError(f"a region starts at byte {offset}, not at {end}")
        end = aligned(offset + entries[offset].nbytes)


def _check_classes(text: str) -> None:
    """Raise StateError for a tree with a class of a module that is neither in use nor of an installed package.

    A file that somebody has forged may name any: one that lies in the current folder, say, would be run by its import.
    """
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]

    def look(value: dict[str, Any]) -> Any:
        for tag, payload in value.items():
            if tag in ("~enum", "~flag", "~named"):
                root = str(payload[0]).partition(".")[0]
                spec = None if root in sys.modules else importlib.util.find_spec(root)
                origin = Path(str(getattr(spec, "origin", None)))
                if root not in sys.modules and not any(origin.is_relative_to(folder) for folder in installed):
                    raise StateError(f"it needs {payload[1]!r} of the module {payload[0]!r}, which nobody here uses")
        return value

    json.loads(text, object_hook=look)


def _end(entries: list[_Entry]) -> int:
    return aligned(max((entry.offset + entry.nbytes for entry in entries), default=1))


def _damaged(path: Path | str, why: str) -> DamagedStateError:
    return DamagedStateError(
        f"the saved state {path} is damaged: {why}. Delete it; the units since an earlier state are computed again"
    )
