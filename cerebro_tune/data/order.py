"""Which rows make which batch: pure functions of numbers, the same for every trial and in every process.

Permutations are the argsort of raw Philox words and not `Generator.permutation`: NumPy fixes the words of a bit
generator for ever, but may change how a Generator uses them, and a run must be repeatable after an upgrade.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cerebro_tune.errors import ConfigurationError

Rows = npt.NDArray[np.int64]

# First word of every seed, so that equal numbers used for two purposes give unrelated streams.
_WRITE, _SHARD, _SUBSET, _WEIGHTED = 1, 2, 3, 4
_LAST_BATCH = ("spread", "keep", "drop")


def batch_sizes(rows: int, batch_size: int, last_batch: str = "spread") -> list[int]:
    """Lengths of the batches that `rows` rows are cut into.

    "spread": ceil(rows / batch_size) near-equal batches, none larger than `batch_size`, longer ones first, so that no
    one-row batch meets a BatchNorm; "keep": the last one may be short; "drop": a short last one is left out.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; it must be 1 or more")
    if last_batch not in _LAST_BATCH:
        raise ConfigurationError(f"last_batch is {last_batch!r}; it must be one of {', '.join(map(repr, _LAST_BATCH))}")
    full, rest = divmod(rows, batch_size)
    if last_batch == "drop":
        if rows and not full:
            raise ConfigurationError(
                f'last_batch="drop" leaves nothing of {rows} rows with batch_size {batch_size}: '
                'use last_batch="spread", a smaller batch_size or fewer shards'
            )
        return [batch_size] * full
    if last_batch == "keep":
        return [batch_size] * full + [rest] * bool(rest)
    count = full + bool(rest)
    if not count:
        return []
    size, longer = divmod(rows, count)
    return [size + 1] * longer + [size] * (count - longer)


def shard_order(run_seed: int, epoch: int, shard: int, rows: int) -> Rows:
    """The order in which a unit visits the rows of its shard: a permutation of range(rows)."""
    return _permutation((_SHARD, run_seed, epoch, shard), rows)


def weighted_order(
    run_seed: int, epoch: int, shard: int, weights: npt.NDArray[np.float64], replacement: bool = True
) -> Rows:
    """As many of the rows of a shard as it has, drawn in proportion to their weights.

    With replacement a row may come several times and others not at all; without, all come, heavy ones rather earlier
    (Efraimidis and Spirakis, 2006), and rows of weight 0 last.
    """
    words = np.random.Philox(np.random.SeedSequence((_WEIGHTED, run_seed, epoch, shard))).random_raw(len(weights))
    chance = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1), as exactly as a double holds it
    if replacement:
        ends = np.cumsum(weights)
        found: Rows = np.searchsorted(ends, chance * ends[-1], side="right").astype(np.int64, copy=False)
        return np.minimum(found, len(weights) - 1, dtype=np.int64)
    with np.errstate(divide="ignore"):
        keys = np.log1p(-chance) / weights  # of an exponential variable, negated
    keys[weights == 0] = -np.inf
    return np.argsort(-keys, kind="stable").astype(np.int64, copy=False)


def subset_rows(rows: int, count: int, seed: int) -> Rows:
    """`count` of `rows` row numbers (all of them when there are no more), drawn by `seed`, in ascending order."""
    if count >= rows:
        return np.arange(rows, dtype=np.int64)
    return np.sort(_permutation((_SUBSET, seed), rows)[:count])


def write_order(seed: int, rows: int) -> Rows:
    """For each source row its place in the shuffled set."""
    return _permutation((_WRITE, seed), rows)


def shard_bounds(rows: int, num_shards: int) -> Rows:
    """Where each shard starts in the shuffled set, and the end of the last: num_shards + 1 numbers.

    Lengths differ by at most one; the longer shards come first.
    """
    size, longer = divmod(rows, num_shards)
    lengths = np.full(num_shards, size, dtype=np.int64)
    lengths[:longer] += 1
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def stratified_order(order: Rows, classes: npt.NDArray[np.int32], num_shards: int) -> Rows:
    """`order` (a place per source row) changed so that each class is dealt out evenly over the shards.

    The rows are sorted by class, shuffled within it, and dealt like cards: shard sizes and, for each class, the counts
    per shard differ by at most one. Inside a shard the rows keep the shuffled order.
    """
    rows = len(order)
    shard = np.empty(rows, dtype=np.int64)
    shard[np.lexsort((order, classes))] = np.arange(rows, dtype=np.int64) % num_shards
    place = np.empty(rows, dtype=np.int64)
    place[np.lexsort((order, shard))] = np.arange(rows, dtype=np.int64)
    return place


def _permutation(seed: Sequence[int], count: int) -> Rows:
    if min(seed) < 0:
        raise ConfigurationError(f"seed is {min(seed)}; it must be 0 or more")
    words = np.random.Philox(np.random.SeedSequence(tuple(seed))).random_raw(count)
    # Stable, since equal words must not leave the result to the sort's instruction set.
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
