"""Batch lengths and row orders are pure functions of numbers."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebro_tune.data.order import (
    batch_sizes,
    shard_bounds,
    shard_order,
    stratified_order,
    subset_rows,
    weighted_order,
    write_order,
)
from cerebro_tune.errors import ConfigurationError

counts = st.integers(1, 500)


@given(rows=counts, batch_size=st.integers(1, 80))
def test_spread_cuts_into_the_fewest_near_equal_batches(rows: int, batch_size: int) -> None:
    sizes = batch_sizes(rows, batch_size)
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    if rows > 1 and batch_size > 2:
        assert min(sizes) > 1  # no one-row batch breaks a BatchNorm


@given(rows=counts, batch_size=st.integers(1, 80))
def test_keep_and_drop_differ_in_the_short_last_batch(rows: int, batch_size: int) -> None:
    kept = batch_sizes(rows, batch_size, "keep")
    assert sum(kept) == rows
    assert all(size == batch_size for size in kept[:-1])
    if rows >= batch_size:
        assert batch_sizes(rows, batch_size, "drop") == [size for size in kept if size == batch_size]


def test_batch_sizes_refuses_what_would_train_on_nothing() -> None:
    assert batch_sizes(0, 4) == batch_sizes(0, 4, "keep") == batch_sizes(0, 4, "drop") == []
    with pytest.raises(ConfigurationError, match="batch_size is 0; it must be 1 or more"):
        batch_sizes(10, 0)
    with pytest.raises(ConfigurationError, match="'spread', 'keep', 'drop'"):
        batch_sizes(10, 4, "wrap")
    with pytest.raises(ConfigurationError, match="leaves nothing of 3 rows with batch_size 4"):
        batch_sizes(3, 4, "drop")


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), shard=st.integers(0, 50), rows=counts)
def test_an_order_is_a_permutation_that_its_arguments_alone_decide(
    seed: int, epoch: int, shard: int, rows: int
) -> None:
    order = shard_order(seed, epoch, shard, rows)
    assert sorted(order) == list(range(rows))
    np.random.seed(epoch)  # no global stream is used
    assert np.array_equal(order, shard_order(seed, epoch, shard, rows))


def test_orders_differ_by_seed_epoch_and_shard() -> None:
    orders = [tuple(shard_order(*arguments, 50)) for arguments in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({*orders, tuple(write_order(0, 50))}) == 5


def test_orders_never_change() -> None:
    """Golden values: a run is resumed, and a data set compared by digest, with later versions of everything."""
    assert shard_order(7, 3, 1, 8).tolist() == [3, 7, 4, 2, 0, 5, 1, 6]
    assert write_order(7, 8).tolist() == [4, 7, 6, 5, 3, 0, 2, 1]
    assert subset_rows(100, 5, 7).tolist() == [40, 55, 72, 74, 89]


def test_a_seed_must_not_be_negative() -> None:
    with pytest.raises(ConfigurationError, match="seed is -1; it must be 0 or more"):
        shard_order(-1, 0, 0, 4)


@given(rows=counts, count=st.integers(1, 600), seed=st.integers(0, 9))
def test_a_subset_is_ascending_and_without_repeats(rows: int, count: int, seed: int) -> None:
    chosen = subset_rows(rows, count, seed)
    assert len(chosen) == min(rows, count)
    assert all(a < b for a, b in pairwise(chosen.tolist()))
    assert chosen[0] >= 0
    assert chosen[-1] < rows


@given(rows=counts, epoch=st.integers(0, 9), zero=st.integers(0, 10), replacement=st.booleans())
def test_a_weighted_order_has_as_many_rows_and_none_of_weight_0_too_soon(
    rows: int, epoch: int, zero: int, replacement: bool
) -> None:
    weights = np.random.default_rng(rows).random(rows)
    weights[: min(zero, rows - 1)] = 0
    order = weighted_order(3, epoch, 1, weights, replacement)
    assert len(order) == rows
    assert np.array_equal(order, weighted_order(3, epoch, 1, weights * 8, replacement)), "only proportions count"
    heavy = np.count_nonzero(weights)
    assert (weights[order[: rows if replacement else heavy]] > 0).all()
    if not replacement:
        assert sorted(order) == list(range(rows))


def test_weighted_orders_follow_the_weights_and_never_change() -> None:
    """First places by weight, as Efraimidis and Spirakis have it; and golden values."""
    weights = np.array([1.0, 2.0, 5.0])
    for replacement in (True, False):
        first = [weighted_order(0, epoch, 0, weights, replacement)[0] for epoch in range(2000)]
        assert np.allclose(np.bincount(first) / 2000, weights / 8, atol=0.04)
    equal = np.ones(8)
    assert weighted_order(7, 3, 1, equal).tolist() == [5, 0, 5, 1, 5, 6, 0, 4]
    assert weighted_order(7, 3, 1, equal, replacement=False).tolist() == [6, 1, 3, 7, 0, 4, 2, 5]


@given(rows=counts, shards=st.integers(1, 40), classes=st.integers(1, 12), seed=st.integers(0, 3))
def test_strata_are_dealt_evenly(rows: int, shards: int, classes: int, seed: int) -> None:
    shards = min(rows, shards)
    labels = np.random.default_rng(seed).integers(0, classes, rows).astype(np.int32)
    place = stratified_order(write_order(seed, rows), labels, shards)
    assert sorted(place) == list(range(rows))
    bounds = shard_bounds(rows, shards)
    owner = np.searchsorted(bounds, place, side="right") - 1
    assert np.ptp(np.bincount(owner, minlength=shards)) <= 1
    for label in range(classes):
        assert np.ptp(np.bincount(owner[labels == label], minlength=shards)) <= 1


def test_reading_shards_imports_no_torch() -> None:
    """The coordinator reads manifests; only a worker that trains should pay for importing torch."""
    code = "import sys, cerebro_tune.data, cerebro_tune.data.write; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
