"""What makes batches of drawn rows, in the worker or in a loader process, as a pure function of (run seed, draw).

Whatever code of the user's runs here finds the generators of Python, NumPy and torch seeded, and the caller's streams
are afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import cloudpickle
from torch.utils.data import default_collate, get_worker_info

from cerebro_tune.data.base import Draw, Drawn, Reader
from cerebro_tune.data.form import Batch, BatchForm
from cerebro_tune.errors import RowError
from cerebro_tune.seeding import kept_streams, one_thread, seed_collate, seed_row

if TYPE_CHECKING:
    from cerebro_tune.data.dataset import ShardedDataset
    from cerebro_tune.data.index import IndexedDataset


class TableReader(Reader):
    """Gathers batches from mapped shards."""

    def __init__(self, data: ShardedDataset, form: BatchForm, seed: int) -> None:
        self._data, self._form, self._seed = data, form, seed
        self._plain = form.collate_fn is None and form.transform is None

    @property
    def source(self) -> Any:  # noqa: D102
        return self._data

    def __getitem__(self, draw: Draw) -> Drawn:
        if not len(draw.rows):
            return Drawn(None, 0)
        if self._plain:
            return Drawn(self._data.gather(draw.rows, self._form, draw.shard), len(draw.rows))
        with _streams(), one_thread():
            seed_collate(self._seed, draw.epoch, int(draw.rows[0]))
            return Drawn(self._data.gather(draw.rows, self._form, draw.shard), len(draw.rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_value(TableReader, self._data, self._form, self._seed)


class RowReader(Reader):
    """Reads rows of the user's Dataset, one after another with the generators seeded for each, and collates them."""

    def __init__(self, data: IndexedDataset, form: BatchForm, seed: int, on_row_error: str) -> None:
        self._data, self._form, self._seed, self._on_row_error = data, form, seed, on_row_error

    @property
    def source(self) -> Any:  # noqa: D102
        return self._data.source

    def __getitem__(self, draw: Draw) -> Drawn:
        rows = draw.rows.tolist()
        source = self._data.compared
        if not rows:
            return Drawn(None, 0)
        with _streams(), one_thread():
            samples = [sample for row in rows for sample in self._read(source, draw.epoch, row)]
            if not samples:
                raise RowError(
                    f"Every row of a batch of {self._data.name} raised: {_listed(rows)}. "
                    'on_row_error="skip" leaves single rows out, not whole batches: mend the rows.'
                )
            # The last row, which the streams would otherwise go on from, may be a skipped one.
            seed_collate(self._seed, draw.epoch, rows[0])
            return Drawn(self._collate(samples, rows), len(samples))

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_value(RowReader, self._data, self._form, self._seed, self._on_row_error)

    def _read(self, source: Any, epoch: int, row: int) -> list[Any]:
        """The row's sample, in a list that is empty when the row raised and is to be skipped."""
        seed_row(self._seed, epoch, row)
        try:
            return [source[row]]
        except Exception as error:
            if self._on_row_error == "skip":
                return []
            raise RowError(
                f"Row {row} of {self._data.name} raised {type(error).__name__}: {error}. Mend the row, or leave such "
                'rows out, counted as rows_skipped in the reports: loader={"on_row_error": "skip"}.'
            ) from error

    def _collate(self, samples: list[Any], rows: list[int]) -> Batch:
        if self._form.collate_fn is not None:
            batch = self._form.collate_fn(samples)
        else:
            try:
                batch = default_collate(samples)
            except (RuntimeError, TypeError) as error:
                raise RowError(
                    f"Rows {_listed(rows)} of {self._data.name} cannot be put together into a batch: "
                    f"{str(error).rstrip('.')}. Make them alike in the Dataset, or pass a collate_fn, which gets a "
                    "list of samples."
                ) from error
        return batch if self._form.transform is None else self._form.transform(batch)


def _streams() -> AbstractContextManager[None]:
    """The caller's streams kept; in a loader process there is no caller, and to keep them costs as much as a row."""
    return kept_streams() if get_worker_info() is None else nullcontext()


def _by_value(kind: type[Reader], *parts: Any) -> tuple[Any, ...]:
    """How a reader pickles: a loader process that is not forked knows nothing of the user's script."""
    return _from_bytes, (kind, cloudpickle.dumps(parts))


def _from_bytes(kind: Callable[..., Reader], parts: bytes) -> Reader:
    return kind(*cloudpickle.loads(parts))


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
