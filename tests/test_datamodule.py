"""DataLoaders and DataModules: read for what they say of loading, or refused by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from cerebro_tune import Cerebro
from cerebro_tune.errors import ConfigurationError, DataError, NotPicklableError
from cerebro_tune.feed import Feed, RunData
from map_datasets import ROWS, Augmented, Numbered, Plain, Stream, noisy
from nets import Deep, Linear
from runs import outcome


def read(options: dict[str, Any], **given: Any) -> RunData:
    """What the workers would be told to read."""
    fixed = {name: value for name, value in options.items() if name not in ("train", "validation", "batch_size")}
    cerebro = Cerebro(**fixed | given)
    data: RunData = cerebro._given.for_run({})
    return data


@contextmanager
def feed_of(data: RunData) -> Iterator[Feed]:
    feed = Feed(data, 0, "cpu")
    try:
        feed.start()
        yield feed
    finally:
        feed.release()


def rows_in(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch.tolist()]


def nothing() -> None:
    return


# DataLoaders.


def test_what_a_loader_says_is_read(options: dict[str, Any]) -> None:
    train = DataLoader(
        Augmented(), batch_size=10, shuffle=True, drop_last=True, collate_fn=noisy, num_workers=1, prefetch_factor=3
    )
    data = read(options, train=train, validation=DataLoader(Plain(30), batch_size=7, drop_last=True))
    assert data.loading.form.collate_fn is noisy
    assert data.loading.batching.last_batch == "drop"
    assert (data.loading.options.num_workers, data.loading.options.prefetch_factor) == (1, 3)
    with feed_of(data) as feed:
        assert feed.train(0, 0, 4, nothing).sizes == [4, 4]
        validation = feed.validation(10, None)
        assert validation is not None
        assert validation.sizes == [7, 7, 7, 7, 2], "all rows are measured"
        for (x, _), draw in zip(validation, validation._draws, strict=True):
            assert torch.equal(x, default_collate([Plain()[row] for row in draw.rows])[0])
    cerebro = Cerebro(**{k: v for k, v in options.items() if k not in ("batch_size", "train")} | {"train": train})
    assert cerebro.batch_size == 10
    assert Cerebro(**options | {"train": train, "batch_size": 5}).batch_size == 5


def test_a_bare_validation_set_is_loaded_as_the_training_set(options: dict[str, Any]) -> None:
    data = read(options, train=DataLoader(Plain(), shuffle=True, collate_fn=noisy), validation=Plain(20))
    assert data.validation_loading is not None
    assert data.validation_loading.form.collate_fn is noisy


def test_the_users_settings_win_over_the_loaders(options: dict[str, Any]) -> None:
    given = DataLoader(Plain(), batch_size=10, shuffle=True, drop_last=True, collate_fn=noisy, num_workers=2)
    chosen = {"num_workers": 0, "collate_fn": default_collate, "last_batch": "keep"}
    data = read(options, train=given, loader=chosen)
    assert data.loading.options.num_workers == 0
    assert data.loading.form.collate_fn is default_collate
    assert data.loading.batching.last_batch == "keep"


class Odd(Sampler[int]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self.source), 2))

    def __len__(self) -> int:
        return len(self.source) // 2


class Scaled(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ([x * 1000, y] for x, y in super().__iter__())


ALL = Plain()


@pytest.mark.parametrize(
    ("loader", "where", "message"),
    [
        (DataLoader(ALL), "train", r"SequentialSampler.*shuffle=True"),
        (DataLoader(ALL, sampler=SequentialSampler(ALL)), "train", "SequentialSampler"),
        (
            DataLoader(ALL, sampler=SubsetRandomSampler(range(9))),
            "train",
            r"SubsetRandomSampler.*Subset of the Dataset",
        ),
        (DataLoader(ALL, sampler=DistributedSampler(ALL, 2, 0)), "train", "DistributedSampler"),
        (DataLoader(ALL, sampler=Odd(ALL)), "train", "has a Odd, which cannot be kept"),
        (DataLoader(ALL, sampler=RandomSampler(ALL, num_samples=9)), "train", "it draws 9 of 70 rows an epoch"),
        (DataLoader(ALL, sampler=WeightedRandomSampler([1.0] * ROWS, 9)), "train", "it draws 9 of 70 rows"),
        (DataLoader(ALL, batch_size=None), "train", "batch_size=None: its Dataset gives whole batches"),
        (DataLoader(ALL, batch_sampler=[[1, 2]]), "train", r"batch sampler of its own, list.*loader=\{"),
        (DataLoader(Stream()), "train", "IterableDataset"),
        (DataLoader(Stream()), "validation", "IterableDataset"),
        (DataLoader(ALL, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)), "validation", "the whole set is measured"),
        (DataLoader(ALL, sampler=Odd(ALL)), "validation", "has a Odd.*the whole set is measured"),
        (DataLoader(ALL, batch_sampler=BatchSampler(Odd(ALL), 4, False)), "train", "Odd"),
        (Scaled(ALL, shuffle=True), "train", "train loader is a Scaled with an __iter__ of its own.*collate_fn"),
        (Scaled(ALL), "validation", "validation loader is a Scaled"),
        (
            DataLoader(ALL, shuffle=True, num_workers=1, multiprocessing_context="spawn"),
            "train",
            "multiprocessing_context='spawn'; loader processes are forked from the worker",
        ),
    ],
)
def test_loaders_that_cannot_be_kept_are_refused_by_name(
    options: dict[str, Any], loader: Any, where: str, message: str
) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        Cerebro(**options | {where: loader})


def test_samplers_that_can_be_kept(options: dict[str, Any]) -> None:
    weights = [float(row % 2) for row in range(ROWS)]
    for sampler, drawn in [
        (RandomSampler(ALL), "once"),
        (RandomSampler(ALL, replacement=True), "again"),
        (WeightedRandomSampler(weights, ROWS), "odd"),
        (BatchSampler(RandomSampler(ALL), 4, drop_last=False), "once"),
        (WeightedRandomSampler(np.arange(ROWS) + 1.0, ROWS, replacement=False), "once"),  # type: ignore[arg-type]
    ]:
        kind = "batch_sampler" if isinstance(sampler, BatchSampler) else "sampler"
        loader = DataLoader(Numbered(), **{kind: sampler})  # type: ignore[arg-type]
        with feed_of(read(options, train=loader, num_shards=2)) as feed:
            rows = [row for shard in range(2) for row in rows_in(feed.train(0, shard, 8, nothing))]
        assert len(rows) == ROWS
        assert (sorted(rows) == list(range(ROWS))) == (drawn == "once")
        assert all(row % 2 for row in rows) == (drawn == "odd")
    for shuffled in (RandomSampler(ALL), SequentialSampler(ALL)):
        data = read(options, train=ALL, validation=DataLoader(Numbered(), sampler=shuffled))
        with feed_of(data) as feed:
            batches = feed.validation(8, None)
            assert batches is not None
            assert rows_in(batches) == list(range(ROWS))


def test_a_loader_that_forks_and_one_of_a_subclass_are_read(options: dict[str, Any]) -> None:
    class Named(DataLoader[Any]):
        pass

    forking = Named(Plain(), shuffle=True, num_workers=1, multiprocessing_context="fork")
    assert read(options, train=forking).loading.options.num_workers == 1


def test_a_collate_method_of_the_dataset_travels(options: dict[str, Any]) -> None:
    given = options | {"train": DataLoader(own := Own(), shuffle=True, collate_fn=own.collate, num_workers=1)}
    with Cerebro(**given) as cerebro:
        (result,) = cerebro.fit(Linear, [{"lr": 0.1}])
    assert result.error is None


class Own(Plain):
    def collate(self, samples: list[Any]) -> Any:
        assert len(samples) <= len(self)
        return default_collate(samples)


# DataModules.


class NoLoaders(pl.LightningDataModule):
    """Lightning's own methods, which raise."""


class Module(pl.LightningDataModule):
    """Splits at random, without a generator; leaves a mark for each call of a hook in each process."""

    def __init__(self, marks: Path, num_workers: int = 0, **options: Any) -> None:
        super().__init__()
        self.marks, self.options = marks, {"batch_size": 10, "num_workers": num_workers} | options
        self.words = 0

    def mark(self, what: str) -> None:
        (self.marks / f"{what}-{os.getpid()}-{uuid4().hex}").touch()

    def prepare_data(self) -> None:
        self.mark("prepare")
        self.words = 7  # of a vocabulary, say

    def setup(self, stage: str) -> None:
        assert (stage, self.words) == ("fit", 7)
        self.mark("setup")
        self.train, self.val = random_split(self.rows(), [ROWS - 20, 20])
        (self.marks / f"split-{hash(tuple(self.train.indices))}").touch()

    def rows(self) -> Any:
        return Augmented()

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, shuffle=True, drop_last=True, collate_fn=self.collate, **self.options)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.val, batch_size=6, collate_fn=self.collate)]

    def collate(self, samples: list[Any]) -> Any:
        assert self.words == 7
        self.mark("collate")
        return noisy(samples)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        moved: Any = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - 1000, batch[1]

    def teardown(self, stage: str) -> None:
        self.mark("teardown")


class Hooked(Deep):
    """Sees what the module's hooks make of batches."""

    def training_step(self, model: Any, batch: Any) -> Any:
        assert batch[0].max() < -900
        return super().training_step(model, (batch[0] + 1000, batch[1]))

    def validation_step(self, model: Any, batch: Any) -> Any:
        assert len(batch[0]) in (6, 2), "the validation loader's own batch size"
        assert batch[0].max() < -900
        return super().validation_step(model, (batch[0] + 1000, batch[1]))


@pytest.fixture
def alone(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "marks").mkdir()
    data = ("train", "validation", "batch_size")
    return {name: value for name, value in options.items() if name not in data} | {
        "policy": "fixed",
        "placement": "pinned",
        "num_shards": 4,
    }


def processes(marks: Path, what: str) -> Counter[str]:
    return Counter(path.name.split("-")[1] for path in marks.iterdir() if path.name.startswith(f"{what}-"))


def test_a_module_is_prepared_once_set_up_once_per_process_and_torn_down(alone: dict[str, Any], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with Cerebro(datamodule=Module(marks, num_workers=1), **alone | {"backend": "local"}) as cerebro:
        assert cerebro.batch_size == 10
        results = cerebro.fit(Hooked, [{"lr": 0.03}, {"lr": 0.1}], metric="val_loss")
        workers = {str(pid) for pid in cerebro._workers.pids.values()}  # type: ignore[union-attr]
    assert [result.error for result in results] == [None, None]
    here = str(os.getpid())
    assert processes(marks, "prepare") == {here: 1}
    assert processes(marks, "setup") == dict.fromkeys({here} | workers, 1)
    assert processes(marks, "teardown") == processes(marks, "setup"), (here, workers)
    assert len(processes(marks, "split")) == 1, "every process split alike"
    assert len(processes(marks, "collate").keys() - workers) >= 2, "in loader processes"
    with Cerebro(datamodule=Module(marks), **alone) as cerebro:
        again = cerebro.fit(Hooked, [{"lr": 0.03}, {"lr": 0.1}], metric="val_loss")
    assert outcome(results) == outcome(again)


def test_a_module_without_a_validation_loader(alone: dict[str, Any], tmp_path: Path) -> None:
    """Without a validation loader nothing is measured."""
    marks = tmp_path / "marks"
    module = Module(marks)
    module.val_dataloader = lambda: None  # type: ignore[method-assign]
    with Cerebro(datamodule=module, **alone) as cerebro:
        (result,) = cerebro.fit(Hooked, [{"lr": 0.03}])
        assert result.error is None
        assert "val_loss" not in result.last_metrics
        assert cerebro.validation is None
        assert len(cerebro.train) == ROWS - 20


class Ranked(Module):
    """Looks at its trainer wherever it is called."""

    def prepare_data(self) -> None:
        super().prepare_data()
        assert self.trainer.is_global_zero  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.ranks = (self.trainer.world_size, self.trainer.global_rank)  # type: ignore[union-attr]

    def train_dataloader(self) -> Any:
        self.options["batch_size"] = 10 // self.trainer.world_size  # type: ignore[union-attr]
        return super().train_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        assert self.trainer.training != self.trainer.validating
        assert self.trainer.validating == (len(batch[0]) in (6, 2)), "the validation loader's batch sizes"
        return super().on_after_batch_transfer(batch, dataloader_idx)


@pytest.mark.parametrize("backend", ["inline", "local"])
def test_a_module_has_a_trainer_of_one_process(alone: dict[str, Any], tmp_path: Path, backend: str) -> None:
    module = Ranked(tmp_path / "marks", num_workers=1)
    with Cerebro(datamodule=module, **alone | {"backend": backend}) as cerebro:
        (result,) = cerebro.fit(Hooked, [{"lr": 0.03}], metric="val_loss")
        assert result.error is None
        mine = cerebro._given.module.module  # type: ignore[union-attr]
        assert mine.ranks == (1, 0)
        assert mine.trainer.datamodule is mine
        with pytest.raises(
            AttributeError, match=r"has no 'current_epoch'.*shared by all trials.*training, validating, world_size"
        ):
            _ = mine.trainer.current_epoch
    assert module.trainer is None, "the user's own module is as it was"


class Attached(Ranked):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert isinstance(self.trainer, pl.Trainer)
        return super().on_after_batch_transfer(batch, dataloader_idx)


def test_a_trial_of_lightning_attaches_its_own_trainer(alone: dict[str, Any], tmp_path: Path) -> None:
    from lightning_nets import Momentum

    with Cerebro(datamodule=Attached(tmp_path / "marks"), **alone) as cerebro:
        (result,) = cerebro.fit(Momentum, [{"lr": 0.03}], metric="val_loss")
    assert result.error is None


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"val_dataloader": lambda self: [DataLoader(self.val)] * 2}, r"val_dataloader\(\) returned 2 loaders.*Concat"),
        ({"train_dataloader": lambda self: DataLoader(self.train)}, "SequentialSampler"),
        ({"train_dataloader": lambda self: [1, 2, 3][:1]}, "returned a int; it must be a torch DataLoader"),
        ({"train_dataloader": lambda self: None}, "gives no loader, and there is nothing to train on"),
        ({"train_dataloader": lambda self: DataLoader(Stream())}, "IterableDataset"),
    ],
)
def test_modules_that_are_refused(alone: dict[str, Any], tmp_path: Path, methods: Any, message: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        Cerebro(datamodule=type("Mine", (Module,), methods)(tmp_path / "marks"), **alone)


def test_what_is_no_module_is_refused(alone: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"NoLoaders.train_dataloader\(\) gives no loader"):
        Cerebro(datamodule=NoLoaders(), **alone)
    for given in (7, Module):
        with pytest.raises(ConfigurationError, match="it must be a LightningDataModule"):
            Cerebro(datamodule=given, **alone)
    with pytest.raises(ConfigurationError, match="beside datamodule"):
        Cerebro(Plain(), datamodule=Module(tmp_path / "marks"), **alone)
    module = Module(tmp_path / "marks")
    module.handle = open(__file__, "rb")  # noqa: SIM115
    with module.handle, pytest.raises(NotPicklableError, match=r"DataModule cannot be sent .*in setup\(\)"):
        Cerebro(datamodule=module, **alone)


def test_lightning_modules_train_on_a_module(alone: dict[str, Any], tmp_path: Path) -> None:
    from lightning_nets import Momentum

    found = []
    for _ in range(2):
        with Cerebro(datamodule=Module(tmp_path / "marks"), **alone) as cerebro:
            (result,) = cerebro.fit(Momentum, [{"lr": 0.03}], metric="val_loss")
        assert result.error is None
        found.append([report["val_loss"] for report in result.history])
    assert found[0] == found[1]
