"""Where every random stream of a run comes from.

Random state is not carried between workers. A unit is made repeatable by seeding Python, NumPy and torch from what the
unit *is* (run seed, trial index, epoch, shard): at its start, again when its first batch is fetched, and once more
before validation. `VisitLoader` gives a plain training loop the same streams, for comparison.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from cerebro_tune.data.order import batch_sizes, shard_order

if TYPE_CHECKING:
    from cerebro_tune.data import BatchForm, ShardedDataset

_BUILD, _UNIT, _VALIDATION = 0, 1, 2


def _seed(purpose: int, run_seed: int, *identity: int) -> int:
    """A 64-bit seed from the purpose and the numbers that identify what is being seeded."""
    numbers = (purpose, run_seed, *identity)
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(numbers)}q", *numbers))


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (its CUDA ones where CUDA is in use)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # NumPy's legacy generator takes 32 bits
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


def seed_build(run_seed: int, trial_index: int) -> None:
    """Seed the generators as they are when a trial's model is built."""
    seed_generators(_seed(_BUILD, run_seed, trial_index))


def seed_unit(run_seed: int, trial_index: int, epoch: int, shard: int) -> None:
    """Seed the generators as they are at the start of a unit and when its first batch is fetched."""
    seed_generators(_seed(_UNIT, run_seed, trial_index, epoch, shard))


def seed_validation(run_seed: int, trial_index: int, epoch: int, shard: int) -> None:
    """Seed the generators as they are when the validation after a unit begins."""
    seed_generators(_seed(_VALIDATION, run_seed, trial_index, epoch, shard))


class VisitLoader:
    """The batches a trial saw, for a plain loop or `Trainer.fit`: pass `k` over it is epoch `k` of `visits`.

    Args:
        dataset: The training set of the run.
        visits: `TrialResult.visits`: tuples that begin with (epoch, shard), in the order they were made.
        batch_size: Rows per batch, as the trial had it.
        seed: The seed of the run.
        trial_index: The trial's number in the run, from 0.
        last_batch: As in the run's loader.
        form: What a batch looks like, as in the run's loader.

    Call `cerebro_tune.seeding.seed_build(seed, trial_index)` before the model is built, as the trial's was. Each
    time the first batch of a shard is fetched, the generators are seeded as in the unit, so that dropout and the
    like draw the same numbers.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        visits: Sequence[Sequence[Any]],
        *,
        batch_size: int,
        seed: int = 0,
        trial_index: int = 0,
        last_batch: str = "spread",
        form: BatchForm | None = None,
    ) -> None:
        from cerebro_tune.data import BatchForm

        self.dataset, self.batch_size, self.seed, self.trial_index = dataset, batch_size, seed, trial_index
        self.last_batch, self.form = last_batch, form or BatchForm()
        epochs = sorted({int(visit[0]) for visit in visits})
        self.orders = {epoch: [int(visit[1]) for visit in visits if visit[0] == epoch] for epoch in epochs}
        self.epoch = 0

    def __len__(self) -> int:
        return sum(len(self._sizes(shard)) for shard in range(self.dataset.num_shards))

    def _sizes(self, shard: int) -> list[int]:
        return batch_sizes(self.dataset.rows(shard), self.batch_size, self.last_batch)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for shard in self.orders[epoch]:
            seed_unit(self.seed, self.trial_index, epoch, shard)
            order = shard_order(self.seed, epoch, shard, self.dataset.rows(shard))
            yield from self.dataset.shard(shard).batches(order, self._sizes(shard), self.form)
