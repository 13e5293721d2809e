"""A shard on disk and in memory: its check, its mapping, and batches gathered from it.

Arrow IPC has no checksum, and a damaged file can crash the process that opens it; so a file's bytes are compared with
the manifest before Arrow sees them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from cerebro_tune.data.form import Batch, BatchForm
from cerebro_tune.data.manifest import ShardEntry
from cerebro_tune.data.order import Rows
from cerebro_tune.data.schema import require_columns
from cerebro_tune.errors import DamagedShardError

if TYPE_CHECKING:
    from torch import Tensor

    from cerebro_tune.data.columns import Column

_BLOCK_BYTES = 4 << 20
_LARGE_BYTES = 32 << 20  # of a shard: below it, to map the pages again would cost more than holding them
_DONTNEED = 4  # MADV_DONTNEED of Linux, which `mmap` offers for its own mappings only


class TableShard:
    """The rows of one shard, mapped from its file.

    The mapping is private (copy-on-write) since torch warns about read-only memory; pages that nobody writes to stay
    shared with every process that maps the file. No file descriptor is held.
    """

    def __init__(self, path: Path, entry: ShardEntry, schema: pa.Schema, columns: Sequence[str]) -> None:
        import torch

        from cerebro_tune.data.columns import open_column

        self.rows = entry.rows
        self._columns = tuple(columns)
        self._mapped = mapped = torch.from_file(str(path), shared=False, size=entry.bytes, dtype=torch.uint8)
        content = pa.py_buffer(mapped.numpy())  # type: ignore[arg-type]  # an array is a buffer; its stubs say so from 3.12
        batch = _only_batch(content, str(path), entry, schema)
        self._by_name: dict[str, Column] = {
            name: open_column(batch.column(index), mapped) for index, name in enumerate(schema.names)
        }

    def gather(self, indices: Rows, form: BatchForm) -> Batch:
        """The batch of these rows, numbered from 0 in this shard."""
        names = form.names(self._columns)
        return form.assemble(names, self.take(indices, names))

    def take(self, indices: Rows, names: Sequence[str]) -> list[Any]:
        """These columns' values in these rows, not yet put together into a batch."""
        rows = _as_tensor(indices)
        return [column.take(rows) for column in self._named(names)]

    def batches(self, order: Rows, sizes: Sequence[int], form: BatchForm) -> Iterator[Batch]:
        """Batches of these sizes, one after another, of the rows in this order."""
        names = form.names(self._columns)
        take = [column.take for column in self._named(names)]
        plain = form.collate_fn is None and form.transform is None and not form.as_dict
        for rows in _as_tensor(order[: sum(sizes)]).split_with_sizes(list(sizes)):
            values = [one(rows) for one in take]
            yield tuple(values) if plain else form.assemble(names, values)

    def leave(self) -> None:
        """Give the pages of a large shard back; they stay in the system's cache while it has room, and come again."""
        if self._mapped.numel() >= _LARGE_BYTES and sys.platform == "linux":
            address, length = ctypes.c_void_p(self._mapped.data_ptr()), ctypes.c_size_t(self._mapped.numel())
            ctypes.CDLL(None).madvise(address, length, _DONTNEED)

    def _named(self, names: Sequence[str]) -> list[Column]:
        require_columns(names, tuple(self._by_name))
        return [self._by_name[name] for name in names]


def check_shard(path: Path, entry: ShardEntry, schema: pa.Schema, name: str | None = None) -> None:
    """Raise DamagedShardError unless the file's bytes are those that were written and form the rows expected.

    name: what the error calls the file; None for its path.
    """
    shown = name or str(path)
    digest = xxhash.xxh3_64()
    size = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _damaged(shown, f"cannot be read ({error.strerror or error})") from error
    if size != entry.bytes:
        raise _damaged(shown, f"has {size} bytes, {entry.bytes} were written")
    if digest.hexdigest() != entry.xxh3:
        raise _damaged(shown, f"has the checksum xxh3 {digest.hexdigest()}, {entry.xxh3} was written")
    with pa.memory_map(str(path)) as file:
        batch = _only_batch(file.read_buffer(), shown, entry, schema)
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise _damaged(shown, f"is not valid Arrow data ({error})") from error


def _only_batch(content: pa.Buffer, name: str, entry: ShardEntry, schema: pa.Schema) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(content)
        found = f"{reader.num_record_batches} record batches"
        if reader.num_record_batches == 1 and reader.schema.equals(schema):
            batch = reader.get_batch(0)
            if batch.num_rows == entry.rows:
                return batch
            found = f"{batch.num_rows} rows"
    except pa.ArrowException as error:
        raise _damaged(name, f"is not an Arrow file ({error})") from error
    raise _damaged(name, f"holds {found} of schema\n{reader.schema}\nwhere one batch of {entry.rows} rows was written")


def _damaged(name: str, what: str) -> DamagedShardError:
    return DamagedShardError(
        f"shard {name} {what}: the file was changed or damaged after it was written. "
        "Restore it from a copy, or write the data set again from its source"
    )


def _as_tensor(rows: Rows) -> Tensor:
    import torch

    rows = np.ascontiguousarray(rows, dtype=np.int64)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
