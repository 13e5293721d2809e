"""Rows of a map-style torch Dataset, or of anything else with `__getitem__` and `__len__`, as columns.

A sample that is a tuple has the columns "0", "1", ... (a named tuple: its fields), one that is a dict those of its
keys; any other value is the column "0". Tensors and arrays of one shape make a column of that shape; 1-d ones may vary
in length, and are lists then; numbers, str and bytes stay what they are.

Whether 1-d rows vary is known only when all were read. So rows are read once, as lists, and get their type then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from cerebro_tune.buffers import readable
from cerebro_tune.data.fingerprint import digest_of
from cerebro_tune.data.schema import from_values
from cerebro_tune.data.sources import Source
from cerebro_tune.errors import DataError, RowError
from cerebro_tune.seeding import kept_streams
from cerebro_tune.warn import warn_user

Value = npt.NDArray[Any] | str | bytes
"""What is stored of one row in one column; a number is an array without axes."""

# Read twice before all are read once: a flip at even odds stays unseen in 1 of 65,536 Datasets.
_TRIED_ROWS = 16
_BATCH_BYTES = 8 << 20
_OBJECT_BYTES = 128  # of an array beside its numbers
_MUCH_LARGER = 4
_LEAST_READ_BYTES = 1024  # fewer are no files: asking for the count is itself counted, with some hundred


def read_rows(dataset: Any) -> Source:
    """The source of these rows; DataError when they cannot be columns, or differ when they are read twice."""
    rows = _Rows(dataset)
    if not rows.count:
        raise DataError(f"{rows.name} has no rows")
    numbers = sorted({int(row) for row in np.linspace(0, rows.count - 1, _TRIED_ROWS)})
    with kept_streams():
        # Copied: a Dataset that changes its rows in place when they are read would change what was read, too.
        first = [{name: _copy(value) for name, value in rows[row].items()} for row in numbers]
        before = _read_bytes()
        second = [rows[row] for row in numbers]
        read = _read_bytes() - before
    _refuse_random(rows.name, numbers, first, second)
    _warn_of_size(rows, read / len(numbers), sum(map(_row_bytes, second)) / len(numbers))
    columns = _columns(first)
    return Source(
        rows.name,
        pa.schema([pa.field(name, column.form.streamed) for name, column in columns.items()]),
        rows.count,
        lambda _: _batches(rows, columns),
        lambda: pa.schema([pa.field(name, column.settled) for name, column in columns.items()]),
    )


class _Rows:
    """Samples by row number, each as values by column; errors name the row."""

    def __init__(self, dataset: Any) -> None:
        self.name = f"the {type(dataset).__name__}"
        self._dataset = dataset
        try:
            self.count = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise DataError(f"{self.name} has no length ({error}): define __len__, the number of its rows") from error

    def __getitem__(self, row: int) -> dict[str, Value]:
        try:
            sample = self._dataset[row]
        except Exception as error:
            raise RowError(f"row {row} of {self.name} cannot be read: {type(error).__name__}: {error}") from error
        found = {}
        for name, given in _named(sample).items():
            if not isinstance(name, str):
                raise DataError(f"row {row} of {self.name} is a dict with the key {name!r}; columns need names, a str")
            try:
                found[name] = _value(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"row {row} of {self.name} has {_described(given)} in column {name!r}, which cannot be stored "
                    f"({error}). Return tensors or arrays of numbers, lists of numbers, numbers, str or bytes, and a "
                    "tuple or a dict for several columns; or use ShardedDataset.index, which takes any sample"
                ) from error
        return found


@dataclass(frozen=True, slots=True)
class _Form:
    """What the rows of a column have in common: numbers of one type and shape, or text, or bytes.

    The length of 1-d rows, None, is not part of it.
    """

    value: pa.DataType
    shape: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, value: Value) -> _Form:
        if isinstance(value, np.ndarray):
            return cls(pa.from_numpy_dtype(value.dtype), (None,) if value.ndim == 1 else value.shape)
        return cls(pa.large_string() if isinstance(value, str) else pa.large_binary())

    @property
    def streamed(self) -> pa.DataType:
        """The type of the column while rows are read."""
        if len(self.shape) > 1:
            return pa.fixed_shape_tensor(self.value, [size for size in self.shape if size is not None])
        return pa.large_list(self.value) if self.shape else self.value

    def fits(self, value: Value) -> bool:
        """Whether this is a row of such a column; an empty list is one of any column of lists."""
        if isinstance(value, np.ndarray) and value.shape == (0,):
            return self.shape == (None,)
        return _Form.of(value) == self

    def __str__(self) -> str:
        sizes = ", ".join("any length" if size is None else str(size) for size in self.shape)
        return f"{self.value} ({sizes})" if sizes else str(self.value)


class _Column:
    """The rows of a column that are not handed on yet, and how long the rows were so far."""

    def __init__(self, form: _Form) -> None:
        self.form = form
        self._waiting: list[Any] = []
        self._lengths: set[int] = set()  # of 1-d rows; two of them tell that they vary

    def add(self, value: Value) -> None:
        self._waiting.append(value)
        if self.form.shape == (None,) and len(self._lengths) < 2:
            self._lengths.add(len(value))

    def drain(self) -> pa.Array[Any]:
        """The rows as an array of the type that they are streamed in."""
        values, self._waiting = self._waiting, []
        kind = self.form.streamed
        if isinstance(values[0], str | bytes):
            return pa.array(values, kind)
        if self.form.shape == (None,):
            ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
            # Unsafe only in that an empty row may be of another type.
            numbers = np.concatenate(values, dtype=self.form.value.to_pandas_dtype(), casting="unsafe")
            found: pa.Array[Any] = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(numbers))  # type: ignore[call-overload]  # stubs: bool
            return found
        return from_values(np.stack(values).reshape(len(values), -1), kind)

    @property
    def settled(self) -> pa.DataType:
        """The type of the column, now that all rows were read."""
        if len(self._lengths) == 1 and (length := min(self._lengths)):
            return pa.list_(self.form.value, length)
        return self.form.streamed


def _columns(samples: Sequence[Mapping[str, Value]]) -> dict[str, _Column]:
    """The columns of the first sample; where it has an empty list, a later one tells of what."""
    found = {}
    for name, value in samples[0].items():
        filled = (sample[name] for sample in samples if name in sample and np.size(sample[name]))
        found[name] = _Column(_Form.of(next(filled, value)))
    return found


def _batches(rows: _Rows, columns: Mapping[str, _Column]) -> Iterator[pa.RecordBatch]:
    size = 0
    for row in range(rows.count):
        sample = rows[row]
        _require_alike(rows.name, row, sample, columns)
        for name, column in columns.items():
            column.add(sample[name])
        size += _row_bytes(sample) + _OBJECT_BYTES * len(sample)
        if size >= _BATCH_BYTES or row == rows.count - 1:
            arrays = [column.drain() for column in columns.values()]
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
            size = 0


def _require_alike(source: str, row: int, sample: Mapping[str, Value], columns: Mapping[str, _Column]) -> None:
    if sample.keys() != columns.keys():
        raise DataError(
            f"row {row} of {source} has the columns {', '.join(map(repr, sample)) or '(none)'}, where row 0 has "
            f"{', '.join(map(repr, columns))}; all rows need the same"
        )
    for name, column in columns.items():
        if not column.form.fits(sample[name]):
            raise DataError(
                f"row {row} of {source} has {_Form.of(sample[name])} in column {name!r}, where other rows have "
                f"{column.form}. Bring all rows to one shape and type in __getitem__ (1-d ones may vary in length), or "
                "use ShardedDataset.index, which takes any sample"
            )


def _named(sample: Any) -> dict[Any, Any]:
    if isinstance(sample, Mapping):
        return dict(sample)
    values = sample if isinstance(sample, tuple) else (sample,)
    names = getattr(sample, "_fields", None) or map(str, range(len(values)))
    return dict(zip(names, values, strict=True))


def _value(given: Any) -> Value:
    """What is stored of this; TypeError, ValueError or RuntimeError when nothing can be."""
    if isinstance(given, str):
        return str(given)
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    if hasattr(given, "detach") and hasattr(given, "numpy"):  # a tensor
        given = given.detach().cpu().numpy()
    if not isinstance(given, bool | int | float | list | tuple | np.ndarray | np.generic):
        raise TypeError("it is not of numbers")
    array = np.asarray(given)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"its values are of type {array.dtype}")
    if array.ndim > 1 and not array.size:
        raise ValueError(f"nothing is in the shape {array.shape}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _described(given: Any) -> str:
    shape = getattr(given, "shape", None)
    dtype = getattr(given, "dtype", None)
    return f"a {type(given).__name__}" + (f" of {dtype}, shape {tuple(shape)}," if shape is not None else "")


def _copy(value: Value) -> Value:
    return value.copy() if isinstance(value, np.ndarray) else value


def _row_bytes(sample: Mapping[str, Value]) -> int:
    return sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for value in sample.values())


def _refuse_random(
    source: str, rows: Sequence[int], first: Sequence[Mapping[str, Value]], second: Sequence[Mapping[str, Value]]
) -> None:
    for row, before, after in zip(rows, first, second, strict=True):
        for name in {**before, **after}:
            if digest_of(before.get(name)) != digest_of(after.get(name)):
                raise DataError(
                    f"row {row} of {source} differs in column {name!r} when it is read twice: it has a random "
                    "transform, of which one outcome would be written for good. Use ShardedDataset.index(dataset, "
                    "num_shards=...), which reads rows anew in every epoch, or leave the transform out"
                )


def _warn_of_size(rows: _Rows, read: float, decoded: float) -> None:
    """Warn when the rows are far larger than the files they come from; `read` and `decoded` are bytes per row."""
    if read * min(rows.count, _TRIED_ROWS) < _LEAST_READ_BYTES or decoded < _MUCH_LARGER * read:
        return
    warn_user(
        f"{rows.name} reads about {readable(read * rows.count)} from files, and its rows will take "
        f"{readable(decoded * rows.count)} as shards, {decoded / read:.0f} times as much. "
        "ShardedDataset.index(dataset, num_shards=...) leaves the files as they are and decodes them in every epoch."
    )


def _read_bytes() -> int:
    """Bytes that this process has read from files so far; 0 where the system does not count them."""
    counters = getattr(psutil.Process(), "io_counters", None)
    try:
        return 0 if counters is None else int(getattr(counters(), "read_chars", 0))
    except psutil.Error:  # a container may forbid it
        return 0
