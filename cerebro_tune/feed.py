"""What the units of a run read: data sets, how they become batches, and the processes that load them.

The coordinator makes a `RunData` and ships it, as one pickle, to every worker; a `Feed` is what a worker makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cerebro_tune.data.base import Draw, RowSet
from cerebro_tune.data.datamodule import SharedModule
from cerebro_tune.data.loader import Loader
from cerebro_tune.data.order import Rows
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.loading import Loading

_VALIDATION_EPOCH = -1
"""Seeds the rows of the validation set, so that a random transform there is the same whenever it is measured."""


@dataclass(frozen=True)
class RunData:
    """What a run reads, as it travels to the workers.

    validation_batch_size: None for the trial's own.
    module: the user's DataModule, where the sets come from one.
    """

    train: RowSet
    loading: Loading
    validation: RowSet | None = None
    validation_loading: Loading | None = None
    validation_batch_size: int | None = None
    module: SharedModule | None = None


class Feed:
    """The data of a run in one worker."""

    def __init__(self, data: RunData, seed: int, device: str) -> None:
        self.data, self._seed = data, seed
        how = data.loading
        self._train = Loader(data.train.reader(how.form, seed, how.on_row_error), how.options, device)
        self._validation: Loader | None = None
        if data.validation is not None and (how := data.validation_loading or how):
            reader = data.validation.reader(how.form, seed, how.on_row_error)
            self._validation = Loader(reader, how.options, device)
        self._counts: dict[int, tuple[int, ...]] = {}

    def start(self) -> None:
        """Start the loader processes."""
        for loader in self._loaders():
            loader.start()

    @property
    def died(self) -> str | None:
        """How loader processes died, if any did."""
        return next((loader.died for loader in self._loaders() if loader.died), None)

    def close(self) -> None:
        """End the loader processes; they start again when they are needed."""
        for loader in self._loaders():
            loader.close()

    def release(self) -> None:
        """End the loader processes for good, and let go of what the DataModule holds."""
        self.close()
        if self.data.module is not None:
            self.data.module.close()

    def batch_counts(self, batch_size: int) -> tuple[int, ...]:
        """How many batches each shard gives in every epoch."""
        if batch_size not in self._counts:
            train, batching = self.data.train, self.data.loading.batching
            shards = range(train.num_shards)
            self._counts[batch_size] = tuple(batching.count(train, self._seed, shard, batch_size) for shard in shards)
        return self._counts[batch_size]

    def train(self, epoch: int, shard: int, batch_size: int, begin: Callable[[], None]) -> UnitBatches:
        """The batches of a unit; `begin` seeds the generators before each pass over them."""
        rows = self.data.loading.batching.batches(self.data.train, self._seed, epoch, shard, batch_size)
        expected = self.batch_counts(batch_size)[shard]
        if len(rows) != expected:
            raise ConfigurationError(
                f"loader's batch_sampler gave shard {shard} {len(rows)} batches in epoch {epoch}, and {expected} in "
                "epoch 0; schedules are laid out for a number of steps, so it must be the same in every epoch: "
                "cut the rows into batches of batch_size, and order or group them as you like."
            )
        return UnitBatches(self._train, [Draw(epoch, shard, numbers) for numbers in rows], begin)

    def validation(self, batch_size: int, rows: Rows | None) -> UnitBatches | None:
        """The batches of these rows of the validation set (None: all), in order; None when there is no such set."""
        if self._validation is None or self.data.validation is None:
            return None
        numbers = np.arange(self.data.validation.num_rows) if rows is None else rows
        size = self.data.validation_batch_size or batch_size
        draws = [Draw(_VALIDATION_EPOCH, None, numbers[start : start + size]) for start in range(0, len(numbers), size)]
        return UnitBatches(self._validation, draws, _nothing)

    def _loaders(self) -> list[Loader]:
        return [self._train] if self._validation is None else [self._train, self._validation]


class UnitBatches:
    """A sized, re-iterable source of batches.

    sizes: rows of each batch; those of batches that are yet to come are what was drawn, and bad rows that are skipped
        do not count once the batch is here.
    """

    def __init__(self, loader: Loader, draws: Sequence[Draw], begin: Callable[[], None]) -> None:
        self._loader, self._draws, self._begin = loader, draws, begin
        self.sizes = [len(draw.rows) for draw in draws]

    def __len__(self) -> int:
        return len(self._draws)

    def __iter__(self) -> Iterator[Any]:
        batches = self._loader.read(self._draws)
        self._begin()
        for number, drawn in enumerate(batches):
            self.sizes[number] = drawn.rows
            yield drawn.batch

    @property
    def rows_skipped(self) -> int:
        """Bad rows that were left out."""
        return sum(len(draw.rows) for draw in self._draws) - sum(self.sizes)


def _nothing() -> None:
    return
