"""The training set, split once into shards that stay where they are."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cerebro_tune.data.base import Reader, RowSet
from cerebro_tune.data.form import Batch, BatchForm
from cerebro_tune.data.manifest import Manifest, read_manifest
from cerebro_tune.data.order import Rows, batch_sizes
from cerebro_tune.data.remote import RemoteSet, is_uri, shown
from cerebro_tune.data.schema import require_columns
from cerebro_tune.data.shard import TableShard, check_shard
from cerebro_tune.errors import DataError

if TYPE_CHECKING:
    from cerebro_tune.data.index import IndexedDataset


class ShardedDataset(RowSet):
    """Rows of a table, shuffled and split into shards of equal size, in a folder.

    Make one with `write`, come back to it with `open`. It pickles as its path or URI; shards are mapped when first
    used. `path` is the folder that they are mapped from: of a set at a URI, the one in the cache that they are fetched
    into.
    """

    def __init__(self, path: Path, manifest: Manifest, remote: RemoteSet | None = None) -> None:
        self.path = path
        self._remote = remote
        self.num_rows = manifest.rows
        self.num_shards = len(manifest.shards)
        self.seed = manifest.seed
        self.columns: tuple[str, ...] = tuple(manifest.schema.names)
        self._manifest = manifest
        self._bounds = np.cumsum([0, *(entry.rows for entry in manifest.shards)])
        self._shards: dict[int, TableShard] = {}
        self._visited: TableShard | None = None
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
            URI of Parquet, Arrow or CSV files; a Hugging Face `datasets.Dataset`; a map-style torch Dataset, or
            anything with `__getitem__` and `__len__`, whose rows are the same whenever they are read. Its samples give
            the columns: "0", "1", ... for a tuple, the fields of a named tuple, the keys of a dict, "0" for anything
            else. Of tensors or arrays of one shape a column has that shape; 1-d ones may vary in length.
        path: a folder, or a URI that `pyarrow.fs` knows ("s3://bucket/train", "gs://...", "file:///..."). A set for a
            URI is written to a temporary folder (TMPDIR) and uploaded, its manifest last.
        stratify: a column whose values are to be spread evenly over the shards.
        columns: which columns to keep, in which order; None for all.

        Rows are streamed: the memory needed is one shard and about 20 bytes a row (40 to stratify); the disk holds the
        rows up to three times while this runs. The result depends on the rows and the seed only. Until the set is
        complete it lies in a hidden folder beside `path`, which a failure removes.
        """
        from cerebro_tune.data.write import write_shards

        return cls.open(write_shards(source, path, num_shards, seed, stratify=stratify, columns=columns))

    @classmethod
    def index(
        cls,
        make_dataset: Any,
        num_shards: int,
        seed: int = 0,
        *,
        stratify: Any = None,
    ) -> IndexedDataset:
        """Shard a map-style torch Dataset by row numbers; it stays as it is, and is read in every epoch.

        make_dataset: the Dataset, or a function without arguments that makes it: in this process once, for its length,
            and in every worker. A Dataset that holds its rows in memory is better made by a function, which travels
            faster.
        stratify: one class per row, or the name of an attribute (`targets`) or column that has them, whose values are
            to be spread evenly over the shards.

        Decoding, augmentation and tokenization run in the workers, or in loader processes of theirs. Random transforms
        repeat, since the generators of Python, NumPy and torch are seeded by (run seed, epoch, row) for each row; a
        generator of the Dataset's own is not, and a warning tells so.
        """
        from cerebro_tune.data.index import index_rows

        return index_rows(make_dataset, num_shards, seed, stratify)

    @classmethod
    def open(cls, path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> ShardedDataset:
        """The set in the folder `path`, or at that URI; DataError when its manifest is missing, damaged or too new.

        cache_dir: where the shards of a set at a URI are kept, each fetched when first used, in a folder named for the
            fingerprint; None for `cerebro_tune` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
        """
        if is_uri(path):
            remote = RemoteSet.at(os.fspath(path), cache_dir)
            manifest = remote.manifest()
            return cls(remote.cache_dir / manifest.fingerprint, manifest, remote)
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

    def __repr__(self) -> str:
        held = f"{self.num_rows} rows in {self.num_shards} shards of {', '.join(self.columns)}"
        return f"ShardedDataset({self._place!r}: {held})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._remote is not None:
            return _reopen, (self._remote.uri, self._remote.cache_dir, self.columns)
        return _reopen, (self.path, None, self.columns)

    def rows(self, shard: int) -> int:  # noqa: D102
        return self._manifest.shards[self._index(shard)].rows

    def numbers(self, shard: int) -> Rows:  # noqa: D102
        return np.arange(self._bounds[self._index(shard)], self._bounds[shard + 1], dtype=np.int64)

    def values(self, name: str) -> Any:
        """One column of all shards, as a tensor or, where rows have no fixed shape, a list with a value per row."""
        require_columns([name], self._manifest.schema.names)
        everything = range(self.num_shards)
        parts = [self.shard(shard).take(np.arange(self.rows(shard)), [name])[0] for shard in everything]
        return parts[0] if len(parts) == 1 else _join(parts)

    def reader(self, form: BatchForm, seed: int, on_row_error: str = "raise") -> Reader:
        """What makes batches of this form; `seed` is the run's. Reading a row of a table does not raise."""
        from cerebro_tune.data.readers import TableReader

        return TableReader(self, form, seed)

    def select(self, columns: Sequence[str]) -> ShardedDataset:
        """The same rows with these columns only, in this order."""
        require_columns(columns, self.columns)
        if not columns:
            raise DataError(f"no columns selected; choose among {', '.join(map(repr, self.columns))}")
        view = copy.copy(self)
        view.columns = tuple(columns)
        view._shards, view._visited = {}, None
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
        """Where this shard lies; one of a set at a URI does so once it was asked for or checked."""
        return self.path / self._manifest.shards[self._index(index)].file

    def check(self, shards: Iterable[int] | None = None) -> None:
        """Read these shards (None: all) and raise DamagedShardError when a bit is not as it was written."""
        for index in range(self.num_shards) if shards is None else shards:
            file, entry, schema = self.file(index), self._manifest.shards[index], self._manifest.schema
            if self._remote is None:
                check_shard(file, entry, schema)
            else:
                self._remote.fetch(entry, schema, file)
            self._checked.add(index)

    def release(self) -> None:
        """Forget the mapped shards; memory goes back when no batch iterator uses them any more."""
        self._shards.clear()
        self._visited = None

    def batches_of(self, batch_size: int, form: BatchForm, rows: Rows | None = None) -> Iterator[Batch]:
        """Batches of all rows, or of the `rows` numbered across the set, in order; the last may be short."""
        numbers = np.arange(self.num_rows, dtype=np.int64) if rows is None else rows
        start = 0
        for size in batch_sizes(len(numbers), batch_size, "keep"):
            yield self.gather(numbers[start : start + size], form)
            start += size

    def gather(self, numbers: Rows, form: BatchForm, shard: int | None = None) -> Batch:
        """The batch of these rows, which may lie in several shards unless it is said in which: that of a unit."""
        if shard is not None:
            return self._visit(shard).gather(numbers - self._bounds[shard], form)
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

    def _visit(self, shard: int) -> TableShard:
        """The shard of a unit; that of the unit before is left."""
        here = self.shard(shard)
        if self._visited is not None and self._visited is not here:
            self._visited.leave()
        self._visited = here
        return here

    @property
    def _place(self) -> str:
        return str(self.path) if self._remote is None else shown(self._remote.uri)

    def _index(self, shard: int) -> int:
        if not 0 <= shard < self.num_shards:
            raise DataError(f"there is no shard {shard}; {self._place} has shards 0 to {self.num_shards - 1}")
        return shard


def _reopen(path: str | Path, cache_dir: Path | None, columns: tuple[str, ...]) -> ShardedDataset:
    found = ShardedDataset.open(path, cache_dir)
    return found if found.columns == columns else found.select(columns)


def _join(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], list):
        return [value for part in parts for value in part]
    import torch

    return torch.cat(list(parts))
