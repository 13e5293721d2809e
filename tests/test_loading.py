"""Batches of a unit: the same whoever reads them, by the user's settings, from processes that are kept and leave."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, default_collate

from cerebro_tune import Cerebro, ShardedDataset, VisitLoader
from cerebro_tune.data.base import RowSet
from cerebro_tune.errors import ConfigurationError, DataError, NotPicklableError, RowError
from cerebro_tune.feed import Feed, RunData
from cerebro_tune.loading import loading
from cerebro_tune.seeding import one_thread, seed_build, seed_unit
from map_datasets import (
    ROWS,
    Augmented,
    Bad,
    ByLength,
    Drawing,
    Numbered,
    OneFile,
    PerProcess,
    Plain,
    Threaded,
    Words,
    noisy,
    seed_by_process,
    shifted,
)
from nets import Deep, Linear
from runs import InOrder, outcome


@contextmanager
def feed_of(data: Any, loader: Any = None, num_shards: int = 2, seed: int = 0) -> Iterator[Feed]:
    """What a worker reads with."""
    if not isinstance(data, RowSet):
        data = ShardedDataset.index(data, num_shards)
    feed = Feed(RunData(data, loading(loader or {}, data)), seed, "cpu")
    try:
        feed.start()
        yield feed
    finally:
        feed.close()


def begin() -> None:
    seed_unit(0, 0, 0, 0)


def batches(feed: Feed, epoch: int = 0, shard: int = 0, batch_size: int = 8) -> list[Any]:
    return list(feed.train(epoch, shard, batch_size, begin))


def rows_in(feed: Feed, epoch: int = 0, shard: int = 0, batch_size: int = 8) -> list[list[int]]:
    return [batch.tolist() for batch in batches(feed, epoch, shard, batch_size)]


def bits(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.numpy().tobytes()
    return [bits(part) for part in tree] if isinstance(tree, list | tuple) else tree


# What is read.


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("source", "loader"),
    [
        (Augmented(), {}),
        (Plain(), {"collate_fn": noisy}),
        (Augmented(), {"collate_fn": noisy, "transform": shifted}),
        (Augmented(), {"worker_init_fn": seed_by_process}),
        (PerProcess(), {}),
        (Bad(), {"on_row_error": "skip"}),
        ("table", {"collate_fn": noisy}),
        ("table", {"transform": shifted}),
        (Augmented(), {"weights": np.arange(ROWS), "batch_sampler": None}),
        (Augmented(), {"batch_sampler": BatchSampler}),
    ],
)
def test_the_same_batches_however_many_processes_read_them(source: Any, loader: Any, train: ShardedDataset) -> None:
    data = train if source == "table" else source
    found, streams = [], []
    for processes in (0, 1, 3):
        with feed_of(data, loader | {"num_workers": processes}) as feed:
            for _ in range(2):
                passes = []
                for epoch, shard in ((1, 0), (0, 1)):
                    for batch in feed.train(epoch, shard, 8, begin):
                        passes.append((bits(batch), bits(torch.rand(2))))  # a draw of the unit's own, as of dropout
                found.append(passes)
                streams.append((bits(torch.rand(2)), np.random.rand()))
    assert all(passes == found[0] for passes in found)
    assert len(set(streams)) == 1


def test_rows_draw_by_run_epoch_and_row() -> None:
    """Another epoch or run draws otherwise; a row draws the same whatever batch it is in."""
    with feed_of(Augmented()) as feed, feed_of(Augmented(), seed=1) as other:
        order, drawn = [], []
        for size in (5, 9):
            order.append(np.concatenate([draw.rows for draw in feed.train(0, 0, size, begin)._draws]).tolist())
            drawn.append(torch.cat([x for x, _ in batches(feed, batch_size=size)]))
        assert order[0] == order[1]
        assert torch.equal(*drawn)
        later = torch.cat([x for x, _ in batches(feed, epoch=1)])
        elsewhere = torch.cat([x for x, _ in batches(other)])
        assert not set(drawn[0].flatten().tolist()) & set(later.flatten().tolist()) & set(elsewhere.flatten().tolist())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_torch_change_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    with feed_of(Threaded(8), {"num_workers": 1}) as processes, feed_of(Threaded(8)) as here:
        torch.set_num_threads(threads)
        try:
            assert bits(batches(here)) == bits(batches(processes))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)


def test_a_file_that_the_dataset_opens_is_opened_by_each_process(tmp_path: Path) -> None:
    """Also by processes that take the place of dead ones."""
    OneFile.write(tmp_path / "rows")
    with feed_of(OneFile(tmp_path / "rows"), {"num_workers": 2}) as feed:
        for _ in range(2):
            for epoch in range(4):
                for batch in batches(feed, epoch):
                    assert (batch == batch[:, :1]).all(), "processes share the offset of one file"
            feed.close()


def run_all(options: dict[str, Any], loaders: Any, base: Any = Deep) -> list[Any]:
    """The outcome of a run for each of these loaders, set by the trainable, on one executor."""
    found = []
    with Cerebro(**options) as cerebro:
        for number, loader in enumerate(loaders):
            net = type(f"Net{number}", (base,), {"loader": loader})
            results = cerebro.fit(net, [{"lr": 0.03}, {"lr": 0.3}], metric="val_loss")
            assert [result.error for result in results] == [None, None]
            found.append(results)
    return found


@pytest.fixture
def indexed(options: dict[str, Any]) -> dict[str, Any]:
    """A run on an augmented Dataset that repeats exactly."""
    return options | {
        "train": ShardedDataset.index(Augmented(), 4),
        "validation": Augmented(20),
        "policy": "fixed",
        "placement": "pinned",
    }


def test_a_unit_is_a_pure_function(indexed: dict[str, Any]) -> None:
    """With 0, 1 and 3 processes, twice, on another worker, inline and local; dropout is in the model."""
    random = {"collate_fn": noisy, "transform": shifted}
    local = run_all(
        indexed | {"backend": "local", "loader": random},
        [{"num_workers": 0}, {"num_workers": 3}, {"num_workers": 1}, {"num_workers": 1}],
    )
    (inline,) = run_all(indexed, [random])
    assert all(outcome(results) == outcome(inline) for results in local)
    first = inline[0]
    # As many workers, since those have as many threads; and another one in the end, for a unit or more.
    alone = indexed | {"policy": InOrder(first.visits), "live_trials": 1, "placement": "shared"}
    with Cerebro(**alone, loader=random | {"num_workers": 1}) as cerebro:
        (result,) = cerebro.fit(Deep, [first.config], metric="val_loss")
    assert [visit[:2] for visit in result.visits] == [visit[:2] for visit in first.visits]
    assert result.visits != first.visits
    assert [report["val_loss"] for report in result.history] == [report["val_loss"] for report in first.history]
    assert Path(str(result.last_checkpoint)).read_bytes() == Path(str(first.last_checkpoint)).read_bytes()


def test_a_table_with_processes_is_read_as_without(options: dict[str, Any]) -> None:
    fixed = options | {"policy": "fixed", "placement": "pinned"}
    for loader in ({}, {"collate_fn": noisy}):
        with_, without = run_all(fixed, [loader | {"num_workers": 1}, loader])
        assert outcome(with_) == outcome(without)


class OneThread(Deep):
    """As the plain loop that it is compared with, whatever the machine."""

    def run_unit(self, work: Any) -> dict[str, float]:
        with one_thread():
            return super().run_unit(work)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_plain_loop_over_the_same_batches_gives_the_same_weights(indexed: dict[str, Any], processes: int) -> None:
    loader = {"collate_fn": noisy, "num_workers": processes}
    with Cerebro(**indexed, loader=loader) as cerebro:
        (result,) = cerebro.fit(OneThread, [{"lr": 0.03}], metric="val_loss")
        plain = VisitLoader(cerebro.train, result.visits, batch_size=16, loader=loader)
    seed_build(0, 0)
    model, optimizer = Deep().build({"lr": 0.03}, None)  # type: ignore[arg-type]
    with one_thread():
        for _ in range(2):
            seen = 0
            for x, y in plain:
                seen += 1
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert seen == len(plain)
    plain.close()
    from safetensors.torch import load_file

    hopped = load_file(str(result.last_checkpoint))
    assert bits(list(model.state_dict().values())) == bits([hopped[name] for name in model.state_dict()])


# Settings.


def test_a_shards_rows_come_once_an_epoch_in_another_order_each() -> None:
    with feed_of(Numbered(), {"num_workers": 1}) as feed:
        orders = [tuple(chain(*rows_in(feed, epoch, shard))) for epoch in range(3) for shard in range(2)]
    assert len(set(orders)) == 6
    for epoch in range(3):
        assert sorted(orders[2 * epoch] + orders[2 * epoch + 1]) == list(range(ROWS))


@pytest.mark.parametrize(
    ("last_batch", "sizes"), [("spread", [9, 9, 9, 8]), ("keep", [10, 10, 10, 5]), ("drop", [10, 10, 10])]
)
def test_the_last_batch(last_batch: str, sizes: list[int]) -> None:
    with feed_of(Numbered(), {"last_batch": last_batch}) as feed:
        assert [len(batch) for batch in rows_in(feed, batch_size=10)] == sizes
        assert feed.train(0, 0, 10, begin).sizes == sizes
        assert feed.batch_counts(10) == (len(sizes), len(sizes))


def test_samples_reach_collate_fn_as_in_torch(train: ShardedDataset) -> None:
    def lengths(samples: list[Any]) -> Any:
        return torch.tensor([len(sample) for sample in samples])

    data = Words()
    with feed_of(data, {"collate_fn": lengths, "num_workers": 1}) as feed:
        drawn = feed.train(0, 0, 8, begin)
        assert [batch.tolist() for batch in drawn] == [
            [data.lengths[row] for row in draw.rows] for draw in drawn._draws
        ]
    with feed_of(train, {"collate_fn": list, "columns": ["y"], "as_dict": True}) as feed:
        assert {tuple(sample) for batch in batches(feed) for sample in batch} == {("y",)}


def test_weights_draw_rows_in_proportion() -> None:
    weights = np.where(np.arange(ROWS) % 2, 3.0, 1.0)
    weights[:10] = 0
    count: Counter[int] = Counter()
    with feed_of(Numbered(), {"weights": weights}, num_shards=1) as feed:
        for epoch in range(100):
            rows = list(chain(*rows_in(feed, epoch, batch_size=35)))
            assert len(rows) == ROWS
            count.update(rows)
    assert not any(count[row] for row in range(10))
    drawn = np.array([count[row] for row in range(10, ROWS)])
    expected = 100 * ROWS * weights[10:] / weights.sum()
    assert ((drawn - expected) ** 2 / expected).sum() < 120  # chi-square of 59 degrees: 2e-6
    assert max(count.values()) > 100, "with replacement"


def test_weights_without_replacement_put_heavy_rows_first() -> None:
    weights = torch.where(torch.arange(ROWS) < 20, 50.0, 1.0)
    weights[69] = 0
    places = np.zeros(ROWS)
    with feed_of(Numbered(), {"weights": weights, "replacement": False}, num_shards=1) as feed:
        for epoch in range(20):
            rows = list(chain(*rows_in(feed, epoch, batch_size=35)))
            assert sorted(rows) == list(range(ROWS))
            assert rows[-1] == 69
            places[rows] += np.arange(ROWS)
    assert places[:20].max() < places[20:].min()


def test_weights_by_the_name_of_a_column_or_attribute(train: ShardedDataset) -> None:
    with feed_of(train, {"weights": "y"}) as feed:
        assert all((y == 1).all() for _, y in batches(feed))
    with feed_of(Plain(), {"weights": "targets"}) as feed:
        assert all((y == 1).all() for _, y in batches(feed))


def test_batch_samplers(indexed: dict[str, Any]) -> None:
    """Torch's own, and one by length, whose batches are shuffled and repeat; the schedule knows how many there are."""
    with (
        feed_of(Numbered(), {"batch_sampler": BatchSampler}) as feed,
        feed_of(Numbered(), {"last_batch": "keep"}) as own,
    ):
        assert rows_in(feed) == rows_in(own)
    with feed_of(Numbered(), {"batch_sampler": BatchSampler, "last_batch": "drop"}) as feed:
        assert {len(batch) for batch in rows_in(feed)} == {8}
    lengths = Words().lengths
    with feed_of(Numbered(), {"batch_sampler": ByLength}) as feed:
        dealt = rows_in(feed, 0)
        assert dealt == rows_in(feed, 0)
        assert {frozenset(batch) for batch in dealt} == {frozenset(batch) for batch in rows_in(feed, 1)}
        assert [batch[0] for batch in dealt] != [batch[0] for batch in rows_in(feed, 1)]
    spans = sorted((min(lengths[row] for row in batch), max(lengths[row] for row in batch)) for batch in dealt)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))

    class Schedule(Linear):
        def build(self, config: Any, plan: Any) -> Any:
            self.planned = plan.total_steps
            return super().build(config, plan)

        def run_unit(self, work: Any) -> dict[str, float]:
            return super().run_unit(work) | {"steps": self.state.step, "planned": self.planned}

    def singly(rows: list[int], batch_size: int, drop_last: bool) -> Any:
        return [[row] for row in rows]

    with Cerebro(**indexed, loader={"batch_sampler": singly}) as cerebro:
        (result,) = cerebro.fit(Schedule, [{"lr": 0.01}])
    assert result.metrics["planned"] == result.last_metrics["steps"] == 2 * ROWS


@pytest.mark.parametrize(
    ("sampler", "last_batch", "message"),
    [
        (lambda rows, size, drop: [rows[1:]], "keep", '34 rows in 1 batches for the 35 rows of shard 0.*"drop" may'),
        (lambda rows, size, drop: [[*rows[1:], rows[1]]], "keep", "35 rows in 1 batches"),
        (lambda rows, size, drop: [[*rows[:9], rows[0]]], "drop", "each row number that it was called with once"),
        (lambda rows, size, drop: [rows, []], "keep", "in batches of one or more"),
        (lambda rows, size, drop: [range(len(rows))], "keep", "each row number that it was called with"),
        (lambda rows, size, drop: [], "drop", "0 rows in 0 batches"),
    ],
)
def test_bad_batch_samplers(sampler: Any, last_batch: str, message: str) -> None:
    with (
        feed_of(Numbered(), {"batch_sampler": sampler, "last_batch": last_batch}) as feed,
        pytest.raises(ConfigurationError, match=message),
    ):
        feed.train(0, 0, 8, begin)


def test_a_batch_sampler_whose_counts_change_is_refused(indexed: dict[str, Any]) -> None:
    sizes = iter([8] * 4 + [5] * 100)  # the shards are counted first

    def moody(rows: list[int], batch_size: int, drop_last: bool) -> Any:
        return BatchSampler(rows, next(sizes), False)

    with feed_of(Numbered(), {"batch_sampler": moody}, num_shards=4) as feed:
        feed.batch_counts(8)
        with pytest.raises(ConfigurationError, match="gave shard 1 4 batches in epoch 3, and 3 in epoch 0"):
            feed.train(3, 1, 8, begin)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_units_batches_may_be_iterated_again_but_not_at_once(processes: int) -> None:
    with feed_of(Augmented(), {"num_workers": processes}) as feed:
        unit = feed.train(0, 0, 8, begin)
        whole = bits(list(unit))
        next(iter(unit))  # a look at the first
        assert bits(list(unit)) == whole
        first = iter(unit)
        next(first)
        assert bits(list(unit)) == whole
        with pytest.raises(ConfigurationError, match="iterated again before a first iteration was over"):
            next(first)


def test_settings_of_the_trainable_win_over_the_executors(indexed: dict[str, Any]) -> None:
    class Rows(Linear):
        loader: ClassVar = {"last_batch": "drop", "collate_fn": default_collate}

        def run_unit(self, work: Any) -> dict[str, float]:
            assert work.train.sizes == [16]
            assert len(next(iter(work.validation))[0]) == 16, "validation drops nothing"
            return super().run_unit(work)

    with Cerebro(**indexed, loader={"last_batch": "keep", "collate_fn": noisy}) as cerebro:
        (result,) = cerebro.fit(Rows, [{"lr": 0.01}])
        assert result.error is None
        unknown = type("Unknown", (Linear,), {"loader": {"shuffle": True}})
        with pytest.raises(ConfigurationError, match="loader has shuffle"):
            cerebro.fit(unknown, [{"lr": 0.01}])


# Bad input.


def test_a_row_that_raises_fails_the_trial_by_name_or_is_skipped_and_counted(indexed: dict[str, Any]) -> None:
    bad = indexed | {"train": ShardedDataset.index(Bad(ROWS, (13, 14, 57)), 4), "validation": Bad(20, (3,))}
    with Cerebro(**bad) as cerebro:
        for processes in (0, 1):
            raising = type("Raising", (Deep,), {"loader": {"num_workers": processes}})
            (result,) = cerebro.fit(raising, [{"lr": 0.03}])
            assert result.status == "failed"
            assert "RowError: trial-0000, epoch 0, shard" in str(result.error)
            assert "of the Dataset Bad raised OSError: image" in str(result.error)
            assert '{"on_row_error": "skip"}' in str(result.error)
            skipping = type("Skipping", (Deep,), {"loader": {"num_workers": processes, "on_row_error": "skip"}})
            (result,) = cerebro.fit(skipping, [{"lr": 0.03}], metric="val_loss")
            assert result.status == "finished"
            skipped = [report["rows_skipped"] for report in result.history]
            assert sum(skipped) == 2 * 3 + len(skipped), (
                "three an epoch, and one each time that the 20 rows are measured"
            )


def test_a_batch_of_bad_rows_only_fails_the_trial(indexed: dict[str, Any]) -> None:
    data = ShardedDataset.index(lambda: Bad(ROWS, [row for row in range(ROWS) if row != 23]), 4)
    with Cerebro(**indexed | {"train": data}, loader={"on_row_error": "skip"}) as cerebro:
        (result,) = cerebro.fit(Deep, [{"lr": 0.03}])
    assert "Every row of a batch of the Dataset Bad raised" in str(result.error)


def test_rows_that_fit_in_no_batch_are_named() -> None:
    with (
        feed_of(Words()) as feed,
        pytest.raises(RowError, match=r"Rows \d+, \d+, .*cannot be put together.*collate_fn"),
    ):
        batches(feed)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ({"shuffle": True, "sampler": 1}, ConfigurationError, "loader has sampler, shuffle; valid: .*num_workers"),
        (7, ConfigurationError, "loader is a int"),
        ({"num_workers": -1}, ConfigurationError, "num_workers is -1"),
        ({"num_workers": 1.5}, ConfigurationError, "num_workers is 1.5"),
        ({"prefetch_factor": 0}, ConfigurationError, "prefetch_factor is 0"),
        ({"last_batch": "wrap"}, ConfigurationError, "last_batch is 'wrap'; valid: 'spread', 'keep', 'drop'"),
        ({"on_row_error": "ignore"}, ConfigurationError, "on_row_error is 'ignore'; valid: 'raise', 'skip'"),
        ({"collate_fn": "pad"}, ConfigurationError, "collate_fn is a str; it must be a function"),
        ({"columns": ["x"]}, ConfigurationError, "loader has columns, which belongs to tables"),
        ({"as_dict": True}, ConfigurationError, "loader has as_dict, which belongs to tables"),
        ({"weights": [1.0]}, ConfigurationError, rf"weights has shape \(1,\).* the {ROWS} rows"),
        ({"weights": [-1.0] * ROWS}, ConfigurationError, "finite and not negative"),
        ({"weights": [float("nan")] * ROWS}, ConfigurationError, "finite and not negative"),
        ({"weights": ["heavy"] * ROWS}, ConfigurationError, "weights"),
        ({"weights": "loads"}, DataError, "neither an attribute nor a column 'loads'"),
        ({"weights": [0.0] * ROWS}, DataError, "weights of all .* rows of shard 0 are 0"),
        ({"weights": [1.0] + [0.0] * (ROWS - 1)}, DataError, "weights of all .* rows of shard . are 0"),
        ({"weights": [1.0] * ROWS, "batch_sampler": BatchSampler}, ConfigurationError, "weights and batch_sampler"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    indexed: dict[str, Any], loader: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Cerebro(**indexed, loader=loader)
    assert not Path(indexed["run_dir"]).exists()


def test_a_collate_function_that_does_not_pickle_is_told_before_training(indexed: dict[str, Any]) -> None:
    lock = threading.Lock()

    def collate(samples: list[Any]) -> Any:
        with lock:
            return default_collate(samples)

    with (
        Cerebro(**indexed, loader={"collate_fn": collate}) as cerebro,
        pytest.raises(NotPicklableError, match="collate_fn, cannot be sent to the workers"),
    ):
        cerebro.fit(Deep, [{"lr": 0.03}])


@pytest.mark.parametrize("processes", [0, 1])
def test_a_stop_iteration_of_the_users_does_not_end_a_unit_early(processes: int) -> None:
    def run_out(samples: list[Any]) -> Any:
        return next(iter([]))

    with (
        feed_of(Plain(), {"collate_fn": run_out, "num_workers": processes}) as feed,
        pytest.raises(RuntimeError, match="StopIteration"),
    ):
        batches(feed)


def test_a_collate_function_draws_other_numbers_than_the_rows() -> None:
    def paired(samples: list[Any]) -> Any:
        return samples[0], random.random()

    with feed_of(Drawing(), {"collate_fn": paired}) as feed:
        pairs = batches(feed)
    assert all(row != drawn for row, drawn in pairs)
    assert len({drawn for _, drawn in pairs}) == len(pairs)


def test_reading_leaves_the_generators_of_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the model's dropout draws; simulated, where there is no device."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with feed_of(Augmented(), {"collate_fn": noisy}) as feed:
        assert len(batches(feed)) > 1
    assert len(seeded) == 1, "when the unit's first batch is fetched"


def test_a_given_loaders_batches_are_replayed_with_the_executors_settings(options: dict[str, Any]) -> None:
    given = DataLoader(Plain(), batch_size=8, shuffle=True, drop_last=True, collate_fn=noisy)
    with Cerebro(**options | {"train": given, "validation": None, "batch_size": None, "epochs": 1}) as cerebro:
        (result,) = cerebro.fit(Linear, [{"lr": 0.1}])
        replay = VisitLoader(cerebro.train, result.visits, batch_size=cerebro.batch_size, loader=cerebro.loader)
        assert {len(batch[0]) for batch in replay} == {8}
        assert VisitLoader(cerebro.train, result.visits[:3], batch_size=8, loader=cerebro.loader).__len__() == 3
