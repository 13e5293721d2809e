"""The training set, split once into shards that stay where they are."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cerebro_tune.data.form import Batch, BatchForm
from cerebro_tune.data.manifest import Manifest, read_manifest
from cerebro_tune.data.order import Rows, batch_sizes, subset_rows
from cerebro_tune.data.schema import require_columns
from cerebro_tune.data.shard import TableShard, check_shard
from cerebro_tune.errors import DataError


class ShardedDataset:
    """Rows of a table, shuffled and split into shards of equal size, in a folder.

    Make one with `write`, come back to it with `open`. It pickles as its path; shards are mapped when first used.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.num_rows = manifest.rows
        self.num_shards = len(manifest.shards)
        self.seed = manifest.seed
        self.columns: tuple[str, ...] = tuple(manifest.schema.names)
        self._manifest = manifest
        self._bounds = np.cumsum([0, *(entry.rows for entry in manifest.shards)])
        self._shards: dict[int, TableShard] = {}
        self._checked: set[int] = set()

    @classmethod
    def write(
        cls,
        source: Any,
        path: str | os.PathLike[str],
        num_shards: int,
        seed: int = 0,
        *,
        stratify: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> ShardedDataset:
        """Shuffle the rows of `source` and write them as `num_shards` shards into the new folder `path`.

        source: an Arrow table or record batch reader, or anything with `__arrow_c_stream__`; path(s), folder, glob or
            URI of Parquet, Arrow or CSV files; a Hugging Face `datasets.Dataset`.
        stratify: a column whose values are to be spread evenly over the shards.
        columns: which columns to keep, in which order; None for all.

        Rows are streamed: the memory needed is one shard and about 20 bytes a row (40 to stratify); the disk holds the
        rows up to three times while this runs. The result depends on the rows and the seed only. Until the set is
        complete it lies in a hidden folder beside `path`, which a failure removes.
        """
        from cerebro_tune.data.write import write_shards

        return cls.open(write_shards(source, path, num_shards, seed, stratify=stratify, columns=columns))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardedDataset:
        """The set in the folder `path`; DataError when its manifest is missing, damaged or of another format."""
        folder = Path(os.path.abspath(path))  # workers may have another current folder
        return cls(folder, read_manifest(folder))

    @property
    def schema(self) -> pa.Schema:
        """Types of the columns."""
        return pa.schema([self._manifest.schema.field(name) for name in self.columns])

    @property
    def fingerprint(self) -> str:
        """Identity of the rows, their order and the columns chosen, in hex."""
        whole = self._manifest.fingerprint
        if self.columns == tuple(self._manifest.schema.names):
            return whole
        return hashlib.sha256("\0".join((whole, *self.columns)).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        held = f"{self.num_rows} rows in {self.num_shards} shards of {', '.join(self.columns)}"
        return f"ShardedDataset({str(self.path)!r}: {held})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.columns)

    def rows(self, shard: int) -> int:
        """Rows in this shard."""
        return self._manifest.shards[self._index(shard)].rows

    def select(self, columns: Sequence[str]) -> ShardedDataset:
        """The same rows with these columns only, in this order."""
        require_columns(columns, self.columns)
        if not columns:
            raise DataError(f"no columns selected; choose among {', '.join(map(repr, self.columns))}")
        view = copy.copy(self)
        view.columns = tuple(columns)
        view._shards = {}
        return view

    def shard(self, index: int) -> TableShard:
        """This shard, checked and mapped when first asked for; imports torch."""
        if index not in self._shards:
            self._index(index)
            if index not in self._checked:
                self.check([index])
            manifest = self._manifest
            self._shards[index] = TableShard(self.file(index), manifest.shards[index], manifest.schema, self.columns)
        return self._shards[index]

    def file(self, index: int) -> Path:
        """Where this shard lies."""
        return self.path / self._manifest.shards[self._index(index)].file

    def check(self, shards: Iterable[int] | None = None) -> None:
        """Read these shards (None: all) and raise DamagedShardError when a bit is not as it was written."""
        for index in range(self.num_shards) if shards is None else shards:
            check_shard(self.file(index), self._manifest.shards[index], self._manifest.schema)
            self._checked.add(index)

    def release(self) -> None:
        """Forget the mapped shards; memory goes back when no batch iterator uses them any more."""
        self._shards.clear()

    def subset(self, rows: int, seed: int) -> Rows:
        """Numbers of `rows` rows of the set (all, when it has no more) drawn by `seed`, ascending."""
        return subset_rows(self.num_rows, rows, seed)

    def batches_of(self, batch_size: int, form: BatchForm, rows: Rows | None = None) -> Iterator[Batch]:
        """Batches of all rows, or of the `rows` numbered across the set, in order; the last may be short."""
        numbers = np.arange(self.num_rows, dtype=np.int64) if rows is None else rows
        start = 0
        for size in batch_sizes(len(numbers), batch_size, "keep"):
            yield self._gather(numbers[start : start + size], form)
            start += size

    def _gather(self, numbers: Rows, form: BatchForm) -> Batch:
        owner = np.searchsorted(self._bounds, numbers, side="right") - 1
        cuts = np.flatnonzero(np.diff(owner)) + 1
        if not len(cuts):
            return self.shard(int(owner[0])).gather(numbers - self._bounds[owner[0]], form)
        names = form.names(self.columns)
        pieces = []
        for part in np.split(numbers, cuts):
            index = int(np.searchsorted(self._bounds, part[0], side="right")) - 1
            pieces.append(self.shard(index).take(part - self._bounds[index], names))
        return form.assemble(names, [_join(column) for column in zip(*pieces, strict=True)])

    def _index(self, shard: int) -> int:
        if not 0 <= shard < self.num_shards:
            raise DataError(f"there is no shard {shard}; {self.path} has shards 0 to {self.num_shards - 1}")
        return shard


def _reopen(path: Path, columns: tuple[str, ...]) -> ShardedDataset:
    found = ShardedDataset.open(path)
    return found if found.columns == columns else found.select(columns)


def _join(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], list):
        return [value for part in parts for value in part]
    import torch

    return torch.cat(list(parts))
