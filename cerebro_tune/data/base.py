"""What a worker reads, whatever kind of data it is: rows with numbers, in shards, made into batches by a reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cerebro_tune.data.form import Batch, BatchForm
from cerebro_tune.data.order import Rows, subset_rows


class Draw(NamedTuple):
    """One batch to be read: these rows, by their numbers in the set; all in `shard`, where it is not None.

    `epoch` is part of what seeds a row's random transform; validation has one of its own, so that it repeats.
    """

    epoch: int
    shard: int | None
    rows: Rows


NO_ROWS = Draw(0, None, np.empty(0, np.int64))
"""A draw that reads nothing: the process that it comes to opens its data, and compares it with what it was."""


class Drawn(NamedTuple):
    """A batch (None of a draw of no rows), and its rows: fewer than were drawn where bad ones were skipped."""

    batch: Batch
    rows: int


class Reader(ABC):
    """Makes batches, in the worker or in a loader process: it travels by pickle. `reader[draw]` is a `Drawn`."""

    @property
    @abstractmethod
    def source(self) -> Any:
        """What rows are read from: what user code in a loader process finds as `get_worker_info().dataset`."""

    @abstractmethod
    def __getitem__(self, draw: Draw) -> Drawn: ...


class RowSet(ABC):
    """Rows with numbers from 0, each in one of the shards. It travels to the workers by pickle."""

    num_rows: int
    num_shards: int
    seed: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the rows and of the shard that each is in, in hex."""

    @abstractmethod
    def rows(self, shard: int) -> int:
        """Rows in this shard."""

    @abstractmethod
    def numbers(self, shard: int) -> Rows:
        """The numbers of the rows in this shard."""

    @abstractmethod
    def values(self, name: str) -> Any:
        """A number or text per row, in the order of their numbers: a column, or an attribute of the user's Dataset."""

    @abstractmethod
    def check(self, shards: Iterable[int] | None = None) -> None:
        """Raise DataError when these shards (None: all) are not what they were when the set was made."""

    @abstractmethod
    def reader(self, form: BatchForm, seed: int, on_row_error: str = "raise") -> Reader:
        """What makes batches of this form; `seed` is the run's, for transforms that draw random numbers."""

    @abstractmethod
    def release(self) -> None:
        """Let go of memory that is only a cache."""

    def __len__(self) -> int:
        return self.num_rows

    def subset(self, rows: int, seed: int) -> Rows:
        """Numbers of `rows` rows of the set (all, when it has no more) drawn by `seed`, ascending."""
        return subset_rows(self.num_rows, rows, seed)
