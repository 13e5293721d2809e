"""Which rows of a shard make which batch of a unit: the same for every trial, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cerebro_tune.data.base import RowSet
from cerebro_tune.data.order import Rows, batch_sizes, shard_order, weighted_order
from cerebro_tune.errors import ConfigurationError, DataError
from cerebro_tune.seeding import kept_streams, seed_batches

BatchSampler = Callable[[list[int], int, bool], Iterable[list[int]]]
"""Called as torch's BatchSampler is, (row numbers in the unit's order, batch size, drop_last); gives lists of them."""


@dataclass(frozen=True)
class Batching:
    """How a unit's rows become batches.

    last_batch: what becomes of rows that fill no batch; see `batch_sizes`.
    weights: rows are drawn in proportion to these, within a shard: an array with one for each row of the set, or the
        name of a column or attribute that has them.
    replacement: whether a weighted row may be drawn again.
    batch_sampler: deals the rows out to batches, by length say; it must give a shard as many batches in every epoch,
        since schedules are laid out for a number of steps. Random numbers that it draws from the global generators
        repeat.
    """

    last_batch: str = "spread"
    weights: Any = None
    replacement: bool = True
    batch_sampler: BatchSampler | None = None

    def batches(self, data: RowSet, seed: int, epoch: int, shard: int, batch_size: int) -> list[Rows]:
        """The row numbers of each batch of a unit."""
        rows = data.numbers(shard)[self._order(data, seed, epoch, shard)]
        if self.batch_sampler is not None:
            return self._dealt(rows, seed, epoch, shard, batch_size)
        sizes = batch_sizes(len(rows), batch_size, self.last_batch)
        return np.split(rows[: sum(sizes)], np.cumsum(sizes)[:-1]) if sizes else []

    def count(self, data: RowSet, seed: int, shard: int, batch_size: int) -> int:
        """How many batches a shard gives."""
        if self.batch_sampler is not None:
            return len(self.batches(data, seed, 0, shard, batch_size))
        return len(batch_sizes(data.rows(shard), batch_size, self.last_batch))

    def check(self, data: RowSet) -> None:
        """Raise ConfigurationError or DataError when the weights are not one usable number for each row."""
        if self.weights is not None:
            for shard in range(data.num_shards):
                self._weights(data, shard)

    def resolved(self, data: RowSet) -> Batching:
        """The same with the weights as an array, made once and not in every unit."""
        return self if self.weights is None else replace(self, weights=self._all_weights(data))

    def _order(self, data: RowSet, seed: int, epoch: int, shard: int) -> Rows:
        if self.weights is None:
            return shard_order(seed, epoch, shard, data.rows(shard))
        return weighted_order(seed, epoch, shard, self._weights(data, shard), self.replacement)

    def _weights(self, data: RowSet, shard: int) -> npt.NDArray[np.float64]:
        weights: npt.NDArray[np.float64] = np.asarray(self.weights)[data.numbers(shard)]
        if not weights.any():
            raise DataError(
                f"the weights of all {len(weights)} rows of shard {shard} are 0, so that nothing can be drawn from it: "
                "use fewer shards, stratify, or give every row a weight"
            )
        return weights

    def _all_weights(self, data: RowSet) -> npt.NDArray[np.float64]:
        given = data.values(self.weights) if isinstance(self.weights, str) else self.weights
        try:
            weights = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"loader's weights must be numbers, one for each row: {error}.") from error
        if weights.shape != (data.num_rows,):
            raise ConfigurationError(
                f"loader's weights has shape {weights.shape}; it must hold one number for each of the "
                f"{data.num_rows} rows of the training set."
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ConfigurationError("loader's weights must be finite and not negative.")
        return weights

    def _dealt(self, rows: Rows, seed: int, epoch: int, shard: int, batch_size: int) -> list[Rows]:
        assert self.batch_sampler is not None, "asked for by the caller"
        drop_last = self.last_batch == "drop"
        with kept_streams():
            seed_batches(seed, epoch, shard)
            dealt = [
                np.asarray(batch, dtype=np.int64) for batch in self.batch_sampler(rows.tolist(), batch_size, drop_last)
            ]
        together = np.sort(np.concatenate(dealt)) if dealt else np.empty(0, np.int64)
        # Sorted, a row that comes twice lies beside itself; weighted rows may do so, but have no batch sampler.
        once = np.isin(together, rows).all() and (np.diff(together) > 0).all()
        enough = len(together) > 0 if drop_last else len(together) == len(rows)
        if not (once and enough and all(len(batch) for batch in dealt)):
            raise ConfigurationError(
                f"loader's batch_sampler gave {len(together)} rows in {len(dealt)} batches for the {len(rows)} rows of "
                f"shard {shard}; it must give each row number that it was called with once, in batches of one or more"
                + (" (some may be left out)." if drop_last else '; only with last_batch="drop" may it leave some out.')
                + _stranger(together, rows)
            )
        return dealt


def _stranger(given: Rows, rows: Rows) -> str:
    strange = given[~np.isin(given, rows)]
    if not len(strange):
        return ""
    return f" Row {strange[0]} is not one of this shard's: give members of the list it is called with, not positions."
