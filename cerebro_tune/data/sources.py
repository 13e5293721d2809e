"""Every kind of table source, brought to one form: a schema and a stream of record batches.

A source that knows its number of rows and can be read again is shuffled straight from where it is. Any other (a reader,
CSV, which has to be parsed to be counted) has `rows` None and is read once, into a spool file beside the target; so are
the rows of a torch Dataset, which take time to decode.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from cerebro_tune.data.remote import failed, is_uri, shown
from cerebro_tune.errors import DataError

_FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".arrows": "arrow",
    ".csv": "csv", ".csv.gz": "csv", ".tsv": "tsv", ".tsv.gz": "tsv",
}  # fmt: skip
_ARROW_FILE_MAGIC = b"ARROW1"
# Batches of a file scan that may wait in memory; the scanner's own default of 16 can hold a gigabyte of images.
_BATCHES_AHEAD = 2
_HUGGING_FACE_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """A table to be read in order; see `batches` for which part.

    batches: takes the columns that are needed; may give more, and may be called again when `rows` is known.
    settled: where types are known only when all rows were read: the schema, asked for then. `schema` must be one that
        the rows can be cast from. Such a source is read once.
    """

    name: str
    schema: pa.Schema
    rows: int | None
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    settled: Callable[[], pa.Schema] | None = None


def open_source(source: Any) -> Source:
    """The source that a user named; DataError when it is none that can be read."""
    if isinstance(source, pa.RecordBatch):
        source = pa.table(source)
    if isinstance(source, str | os.PathLike):
        source = [source]
    if isinstance(source, pa.Table):
        table = source
        return Source("the table", table.schema, table.num_rows, lambda names: iter(table.select(names).to_batches()))
    if isinstance(source, pa.RecordBatchReader):
        return _reader(source)
    if isinstance(source, list | tuple) and source and all(isinstance(item, str | os.PathLike) for item in source):
        return _files([os.fspath(item) for item in source])
    if hasattr(source, "with_format") and getattr(source, "features", None) is not None and hasattr(source, "iter"):
        return _hugging_face(source)
    if hasattr(source, "__arrow_c_stream__"):
        return _reader(pa.RecordBatchReader.from_stream(source))
    return _rows_of(source)


def _rows_of(source: Any) -> Source:
    """A torch Dataset, or whatever else has rows with numbers."""
    kind = type(source).__qualname__
    if any(base.__name__ == "IterableDataset" for base in type(source).__mro__) or isinstance(source, Iterator):
        raise DataError(
            f"a {kind} is read from front to back and may have no end. Write what it yields through a record batch "
            "reader: pyarrow.RecordBatchReader.from_batches(schema, batches), where `batches` is a generator of "
            "pyarrow.RecordBatch"
        )
    if hasattr(source, "__getitem__") and not isinstance(source, Mapping | str | bytes):
        from cerebro_tune.data.objects import read_rows

        return read_rows(source)
    raise DataError(
        f"a {kind} cannot be read as a table: pass an Arrow table or record batch reader, path(s), a folder, a glob or "
        "a URI of Parquet, Arrow or CSV files, a Hugging Face Dataset, or a torch Dataset with __getitem__ and __len__"
    )


def _reader(reader: pa.RecordBatchReader) -> Source:
    def batches(_: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reader:
            yield from reader

    return Source("the reader", reader.schema, None, batches)


def _hugging_face(dataset: Any) -> Source:
    """By its methods, so that `datasets` need not be installed; they honour a selected or shuffled row order."""

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=_HUGGING_FACE_ROWS):
            yield from table.to_batches()

    rows = len(dataset) if hasattr(dataset, "__len__") else None  # an IterableDataset has no length
    return Source("the Hugging Face data set", dataset.features.arrow_schema, rows, batches)


def _files(names: list[str]) -> Source:
    found = [_expand(name) for name in names]
    paths = [path for _, group in found for path in group]
    systems = [system for system, _ in found]
    named = [shown(name) if is_uri(name) else name for name in names]
    if any(system != systems[0] for system in systems):
        raise DataError(f"{', '.join(named)} lie on several file systems; name files of one at a time")
    kinds = {path: _format(path) for path in paths}
    if len(set(kinds.values())) > 1:
        raise DataError(f"{', '.join(named)} holds files of several formats ({', '.join(sorted(set(kinds.values())))})")
    kind, name = kinds[paths[0]], named[0] if len(named) == 1 else f"{named[0]} and {len(named) - 1} more"
    try:
        if kind == "arrow" and not all(_is_arrow_file(systems[0], path) for path in paths):
            return _arrow_streams(name, systems[0], paths)
        scanned = ds.dataset(paths, filesystem=systems[0], format=_scan_format(kind))
        rows = None if kind in ("csv", "tsv") else scanned.count_rows()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as {kind}: {error}") from error

    def batches(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from scanned.to_batches(
            columns=list(columns), batch_readahead=_BATCHES_AHEAD, fragment_readahead=1, cache_metadata=False
        )

    return Source(name, scanned.schema, rows, batches)


def _scan_format(kind: str) -> ds.FileFormat:
    if kind == "tsv":
        from pyarrow import csv

        return ds.CsvFileFormat(parse_options=csv.ParseOptions(delimiter="\t"))
    formats: dict[str, Callable[[], ds.FileFormat]] = {
        "parquet": ds.ParquetFileFormat, "arrow": ds.IpcFileFormat, "csv": ds.CsvFileFormat,
    }  # fmt: skip
    return formats[kind]()


def _arrow_streams(name: str, system: fs.FileSystem, paths: Sequence[str]) -> Source:
    """Files in Arrow's stream form, which have no row count and which a data set scan does not take."""

    def batches(_: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for path in paths:
            with system.open_input_stream(path) as file, pa.ipc.open_stream(file) as reader:
                yield from reader

    with system.open_input_stream(paths[0]) as file, pa.ipc.open_stream(file) as reader:
        schema = reader.schema
    return Source(name, schema, None, batches)


def _is_arrow_file(system: fs.FileSystem, path: str) -> bool:
    with system.open_input_stream(path) as file:
        return bool(file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC)


def _expand(name: str) -> tuple[fs.FileSystem, list[str]]:
    """The files that a path, folder, glob or URI stands for, in the order in which they are read."""
    if is_uri(name):
        return _expand_uri(name)
    wild = any(letter in name for letter in "*?[")
    local = fs.LocalFileSystem()
    if wild and not os.path.exists(name):
        paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    elif os.path.isdir(name):
        paths = _in_folder(local, name)
    else:
        paths = [name] if os.path.isfile(name) else []
    if not paths:
        raise _nothing(name)
    return local, [Path(path).absolute().as_posix() for path in paths]


def _expand_uri(uri: str) -> tuple[fs.FileSystem, list[str]]:
    place, mark, options = uri.partition("?")  # so that "?" is no wildcard here
    wild = next((index for index, letter in enumerate(place) if letter in "*["), None)
    base = place if wild is None else place[: place.rindex("/", 0, wild)]
    try:
        system, path = fs.FileSystem.from_uri(base + mark + options)
        info = system.get_file_info(path)
        if wild is not None:
            pattern = path + place[len(base) :]
            listed = system.get_file_info(fs.FileSelector(path, recursive=True))
            paths = sorted(item.path for item in listed if item.is_file and fnmatch(item.path, pattern))
        elif info.type == fs.FileType.Directory:
            paths = _in_folder(system, path)
        else:
            paths = [path] if info.is_file else []
    except (pa.ArrowException, OSError) as error:
        raise failed(uri, "cannot be read", error) from error
    if not paths:
        raise _nothing(shown(uri))
    return system, paths


def _in_folder(system: fs.FileSystem, folder: str) -> list[str]:
    listed = system.get_file_info(fs.FileSelector(folder, recursive=True))
    return sorted(item.path for item in listed if item.is_file and _is_table(item.path))


def _is_table(path: str) -> bool:
    # Names that begin with "_" or "." are marks and leftovers of the program that wrote the folder.
    name = path.rsplit("/", 1)[-1]
    return not name.startswith(("_", ".")) and name.lower().endswith(tuple(_FORMATS))


def _format(path: str) -> str:
    for ending, kind in _FORMATS.items():
        if path.lower().endswith(ending):
            return kind
    raise DataError(f"{path} has no ending that tells its format; readable are {_endings()}")


def _nothing(name: str) -> DataError:
    return DataError(f"{name}: no such file, or a folder or glob with no table in it; readable are {_endings()}")


def _endings() -> str:
    return ", ".join(_FORMATS)


def validated(name: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, with Arrow's errors told as errors of the source; offsets and UTF-8 are looked at too."""
    try:
        for batch in batches:
            batch.validate(full=True)
            yield batch
    except pa.ArrowException as error:
        raise DataError(
            f"{name} cannot be read to its end: {error}. (The types of CSV columns are guessed from the first block; "
            "to set them, open the file with pyarrow.csv.open_csv and pass the reader.)"
        ) from error
