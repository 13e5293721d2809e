"""The batches that a trial saw, for a plain training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cerebro_tune.data.base import RowSet
from cerebro_tune.feed import Feed, RunData, UnitBatches
from cerebro_tune.loading import loading
from cerebro_tune.seeding import seed_unit


class VisitLoader:
    """The batches a trial saw, for a plain loop or `Trainer.fit`: pass `k` over it is epoch `k` of `visits`.

    Args:
        dataset: The training set of the run: `Cerebro(...).train`.
        visits: `TrialResult.visits`: tuples that begin with (epoch, shard), in the order they were made.
        batch_size: Rows per batch, as the trial had it.
        seed: The seed of the run.
        trial_index: The trial's number in the run, from 0.
        loader: As in the run: `Cerebro(...).loader`. Processes that it asks for are ended by `close`.

    Call `cerebro_tune.seeding.seed_build(seed, trial_index)` before the model is built, as the trial's was. Each
    time the first batch of a shard is fetched, the generators are seeded as in the unit, so that dropout and the
    like draw the same numbers.
    """

    def __init__(
        self,
        dataset: RowSet,
        visits: Sequence[Sequence[Any]],
        *,
        batch_size: int,
        seed: int = 0,
        trial_index: int = 0,
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.trial_index = dataset, batch_size, seed, trial_index
        self._feed = Feed(RunData(dataset, loading(loader or {}, dataset)), seed, "cpu")
        epochs = sorted({int(visit[0]) for visit in visits})
        self.orders = {epoch: [int(visit[1]) for visit in visits if visit[0] == epoch] for epoch in epochs}
        self.epoch = 0

    def __len__(self) -> int:
        counts = self._feed.batch_counts(self.batch_size)
        return sum(counts[shard] for shard in self.orders.get(self.epoch, range(len(counts))))

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for shard in self.orders[epoch]:
            yield from self._unit(epoch, shard)

    def close(self) -> None:
        """End the loader processes."""
        self._feed.close()

    def _unit(self, epoch: int, shard: int) -> UnitBatches:
        return self._feed.train(
            epoch, shard, self.batch_size, lambda: seed_unit(self.seed, self.trial_index, epoch, shard)
        )
