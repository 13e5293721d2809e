"""Writing a sharded set: one shuffle of a stream of rows that may not fit in memory.

    source -> [spool] -> spill -> shard-00000.arrow, ... -> manifest.json -> rename

1. Rows are counted; a source that can (or should) be read only once is copied to the spool meanwhile.
2. The place of every row in the shuffled set is drawn, 8 bytes a row. It depends on the count, the seed and, with
   `stratify`, that column: not on how the source happens to be cut into batches.
3. The stream is read in chunks; each is sorted by shard and written to the spill, with the rows' places.
4. Shard by shard, the slices of all chunks are gathered in memory and written as one record batch, so that every column
   lies in one piece in the file.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from cerebro_tune.data.manifest import FILE_NAME, Manifest, ShardEntry, shard_file
from cerebro_tune.data.order import Rows, shard_bounds, stratified_order, write_order
from cerebro_tune.data.remote import is_uri, uploaded
from cerebro_tune.data.schema import canonical_schema, conform, from_values, require_columns, tensor_type, to_values
from cerebro_tune.data.sources import Source, open_source, validated
from cerebro_tune.errors import DataError
from cerebro_tune.wholefile import sync_folder, whole_file

# Rows in flight while the stream is sorted by shard: large enough for slices of some size, small beside a shard.
_CHUNK_BYTES = 16 << 20


def write_shards(
    source: Any,
    path: str | os.PathLike[str],
    num_shards: int,
    seed: int,
    *,
    stratify: str | None,
    columns: Sequence[str] | None,
) -> str | os.PathLike[str]:
    """Write the set and return its folder, or its URI; see `ShardedDataset.write`."""
    if is_uri(path):
        with uploaded(os.fspath(path)) as folder:
            write_shards(source, folder, num_shards, seed, stratify=stratify, columns=columns)
        return path
    if num_shards < 1:
        raise DataError(f"num_shards is {num_shards}; it must be 1 or more")
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more")
    target = _free_target(path)
    table = open_source(source)
    schema = canonical_schema(table.schema, columns)
    if stratify is not None:
        _check_classes(stratify, table.schema)
    # A sibling, so that the rename stays on one file system; hidden, so that a glob over data sets does not meet it.
    work = target.parent / f".{target.name}.writing-{secrets.token_hex(4)}"
    made = [parent for parent in target.parents if not parent.exists()]
    work.mkdir(parents=True)
    try:
        schema, entries = _write_into(work, table, schema, (num_shards, seed, stratify))
        manifest = Manifest(schema, seed, stratify, tuple(entries))
        with whole_file(work / FILE_NAME, durable=True) as file:
            file.write(manifest.to_json().encode())
        _move(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not target.exists():
            with suppress(OSError):  # someone else has put something there meanwhile
                for parent in made:
                    parent.rmdir()
    return target


def _write_into(
    work: Path, table: Source, schema: pa.Schema, how: tuple[int, int, str | None]
) -> tuple[pa.Schema, list[ShardEntry]]:
    num_shards, seed, stratify = how
    with ExitStack() as opened:
        if table.rows is not None:
            _check_count(table.name, table.rows, num_shards)
        if table.rows is None or table.settled is not None:
            table = _spool(work / "spool.arrow", table, schema, stratify, opened)
            schema = canonical_schema(table.schema, schema.names)
        rows = table.rows or 0
        _check_count(table.name, rows, num_shards)
        places = write_order(seed, rows)
        if stratify is not None:
            places = stratified_order(places, _classes(table, stratify), num_shards)
        bounds = shard_bounds(rows, num_shards)
        slices = _Spill(work / "spill.arrow", schema, bounds)
        slices.fill(table, places)
        del places
    (work / "spool.arrow").unlink(missing_ok=True)
    entries = [_write_shard(work, shard, slices.gather(shard)) for shard in range(num_shards)]
    slices.close()
    return schema, entries


def _check_count(name: str, rows: int, num_shards: int) -> None:
    if not rows:
        raise DataError(f"{name} has no rows")
    if num_shards > rows:
        raise DataError(f"num_shards is {num_shards}, but {name} has only {rows} rows; use {rows} or fewer")


class _Spill:
    """The rows sorted by shard within each chunk, in one file, and each shard's slice of each chunk."""

    def __init__(self, path: Path, schema: pa.Schema, bounds: Rows) -> None:
        self._path = path
        self._schema = schema
        self._bounds = bounds
        self._cuts: list[Rows] = []  # per chunk: where each shard's rows start in it
        self._chunks: list[pa.RecordBatch] = []
        self._mapped: pa.MemoryMappedFile | None = None

    def fill(self, table: Source, places: Rows) -> None:
        """Read the source; `places` has the place of each of its rows in the shuffled set."""
        stored = self._schema.append(pa.field("", pa.int64()))  # the last column: place in the shard
        first = 0
        with pa.OSFile(str(self._path), "wb") as file, pa.ipc.new_file(file, stored) as out:
            for batch in _chunks(table, self._schema):
                here = places[first : first + len(batch)]
                if len(here) < len(batch):
                    break
                out.write_batch(self._sorted(batch, here, stored))
                first += len(batch)
                del batch  # or it lives on while the next is put together
        if first != len(places):
            raise DataError(f"{table.name} announced {len(places)} rows and gave a different number; was it changed?")
        self._mapped = pa.memory_map(str(self._path))
        reader = pa.ipc.open_file(self._mapped)
        self._chunks = [reader.get_batch(index) for index in range(reader.num_record_batches)]

    def _sorted(self, batch: pa.RecordBatch, places: Rows, stored: pa.Schema) -> pa.RecordBatch:
        shard = np.searchsorted(self._bounds, places, side="right") - 1
        order = np.argsort(shard, kind="stable").astype(np.int64, copy=False)
        counts = np.bincount(shard, minlength=len(self._bounds) - 1)
        self._cuts.append(np.concatenate([[0], np.cumsum(counts)]))
        place = pa.array((places - self._bounds[shard])[order])
        return pa.RecordBatch.from_arrays([*batch.take(order).columns, place], schema=stored)

    def gather(self, shard: int) -> pa.RecordBatch:
        """The rows of a shard in their final order."""
        parts = [
            chunk.slice(cuts[shard], cuts[shard + 1] - cuts[shard])
            for chunk, cuts in zip(self._chunks, self._cuts, strict=True)
            if cuts[shard + 1] > cuts[shard]
        ]
        places = [part.column(len(self._schema)).to_numpy() for part in parts]
        arrays = [
            _scatter([part.column(index) for part in parts], places, field.type)
            for index, field in enumerate(self._schema)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def close(self) -> None:
        """Delete the file."""
        self._chunks.clear()
        if self._mapped is not None:
            self._mapped.close()
        self._path.unlink()


def _scatter(parts: list[pa.Array[Any]], places: list[Rows], kind: pa.DataType) -> pa.Array[Any]:
    """One array of the parts' values, each at its place."""
    if tensor_type(kind) is None:
        order = np.argsort(np.concatenate(places)).astype(np.int64, copy=False)
        return pa.concat_arrays(parts).take(order)
    # Straight into the result: a large tensor column is held once, not as its concatenation and its permutation.
    values = to_values(parts[0])
    whole = np.empty((sum(map(len, parts)), values.shape[1]), values.dtype)
    for part, place in zip(parts, places, strict=True):
        whole[place] = to_values(part)
    return from_values(whole, kind)


def _chunks(table: Source, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows in canonical form, in batches of about `_CHUNK_BYTES` whatever the source's were."""
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for raw in validated(table.name, table.batches(schema.names)):
        if not len(raw):
            continue
        batch = conform(raw, schema, rows)
        rows += len(batch)
        step = max(1, _CHUNK_BYTES * len(batch) // max(batch.nbytes, 1))
        for start in range(0, len(batch), step):
            waiting.append(batch.slice(start, step))
            size += waiting[-1].nbytes
            if size >= _CHUNK_BYTES:
                yield _drain(waiting)
                size = 0
        del raw, batch  # or they live on while the source makes the next
    if waiting:
        yield _drain(waiting)


def _drain(waiting: list[pa.RecordBatch]) -> pa.RecordBatch:
    """The batches in one; the list is emptied, so that they do not stay in memory beside the result."""
    joined = waiting[0]
    if len(waiting) > 1:
        joined = pa.concat_batches(waiting)  # type: ignore[attr-defined]  # missing from the stubs
    waiting.clear()
    return joined


def _spool(path: Path, table: Source, schema: pa.Schema, stratify: str | None, opened: ExitStack) -> Source:
    """Copy a source that is read once into a file, where it can be counted and read again."""
    names = list(schema.names)
    if stratify is not None and stratify not in names:
        names.append(stratify)
    stored = canonical_schema(table.schema, names)
    rows = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, stored) as out:
        for batch in _chunks(table, stored):
            out.write_batch(batch)
            rows += len(batch)
    if table.settled is not None:
        stored = canonical_schema(table.settled(), names)
    mapped = opened.enter_context(pa.memory_map(str(path)))
    reader = pa.ipc.open_file(mapped)

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index).select(list(wanted))

    return Source(table.name, stored, rows, batches)


def _check_classes(name: str, schema: pa.Schema) -> None:
    require_columns([name], schema.names)
    kind = canonical_schema(schema, [name]).field(name).type
    form = tensor_type(kind)
    if not (pa.types.is_large_string(kind) or (form and not form.shape and not pa.types.is_floating(kind))):
        raise DataError(
            f"stratify column {name!r} has type {kind}; it must hold classes: integers, booleans or strings"
        )


def _classes(table: Source, name: str) -> npt.NDArray[np.int32]:
    """A number per row that is the same for equal values of the column."""
    schema = canonical_schema(table.schema, [name])
    numbers: dict[Any, int] = {}
    found = []
    rows = 0
    for raw in validated(table.name, table.batches([name])):
        encoded = conform(raw, schema, rows).column(0).dictionary_encode()
        codes = [numbers.setdefault(value, len(numbers)) for value in encoded.dictionary.to_pylist()]
        found.append(np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()])
        rows += len(raw)
    return np.concatenate(found)


def _write_shard(work: Path, shard: int, batch: pa.RecordBatch) -> ShardEntry:
    path = work / shard_file(shard)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as out:
        out.write_batch(batch)
    identity, check, size = hashlib.sha256(), xxhash.xxh3_64(), 0
    with path.open("rb+", buffering=0) as written:
        while block := written.read(4 << 20):
            identity.update(block)
            check.update(block)
            size += len(block)
        os.fsync(written.fileno())
    return ShardEntry(path.name, len(batch), size, identity.hexdigest(), check.hexdigest())


def _free_target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.abspath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(f"{target} exists already: choose another path, delete it, or read it with ShardedDataset.open")
    return target


def _move(work: Path, target: Path) -> None:
    try:
        if target.exists():
            target.rmdir()  # it was empty when this began; Windows does not rename over a folder
        work.replace(target)
    except OSError as error:
        if target.exists():
            raise DataError(
                f"{target} was made by someone else while this set was written; choose another path"
            ) from error
        raise
    sync_folder(target.parent)
