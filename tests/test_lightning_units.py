"""Lightning modules unit by unit, in this process: where their tensors live, what they report, what they refuse."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import cerebro_tune_lightning
from cerebro_tune import Cerebro, Plan, ShardedDataset, state
from cerebro_tune.buffers import Mapped
from cerebro_tune.data import BatchForm
from cerebro_tune.data.order import batch_sizes, shard_order
from cerebro_tune.errors import ConfigurationError, NotTrainableError, StateError, UnsupportedLeafError
from cerebro_tune.seeding import seed_build, seed_unit, seed_validation
from cerebro_tune.trainable import Trainable, UnitWork, as_recipe
from cerebro_tune_lightning import LightningTrainable
from cerebro_tune_lightning.adapt import adapt
from lightning_nets import Adversarial, Average, Busy, Logging, Marked, Momentum, OneCycle, Outspoken, Teacher
from trees import same

BATCH = 16


class Batches:
    """What a worker would feed: a shard in its order, reseeded at the first batch."""

    def __init__(self, dataset: ShardedDataset, epoch: int, shard: int, batch_size: int = BATCH) -> None:
        self.dataset, self.epoch, self.shard = dataset, epoch, shard
        self.sizes = batch_sizes(dataset.rows(shard), batch_size)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        order = shard_order(0, self.epoch, self.shard, self.dataset.rows(self.shard))
        seed_unit(0, 0, self.epoch, self.shard)
        yield from self.dataset.shard(self.shard).batches(order, self.sizes, BatchForm())


class ValidationBatches:
    """The first rows of the validation set."""

    def __init__(self, dataset: ShardedDataset, rows: int) -> None:
        self.dataset, self.rows = dataset, np.arange(rows)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / BATCH)

    def __iter__(self) -> Iterator[Any]:
        return self.dataset.batches_of(BATCH, BatchForm(), self.rows)


class Hopping:
    """One trial that hops between two kept trainables, through buffers as in the workers."""

    def __init__(
        self, recipe: Any, config: Mapping[str, Any], train: ShardedDataset, epochs: int = 2, datamodule: Any = None
    ) -> None:
        self.train, self.config = train, config
        self.plan = Plan(
            epochs,
            BATCH,
            tuple(train.rows(shard) for shard in range(train.num_shards)),
            accumulate=recipe.accumulate,
            datamodule=datamodule,
        )
        self.seats: list[Trainable] = []
        for _ in range(2):
            seed_build(0, 0)
            self.seats.append(recipe.create())
            self.seats[-1].start(config, self.plan)
        self.buffers = [Mapped.private(1 << 20), Mapped.private(1 << 20)]
        self.units = self.validations = self.used = 0

    @property
    def place(self) -> tuple[int, int]:
        return divmod(self.units, self.train.num_shards)

    def unit(self, validation: Any = None, batch_size: int = BATCH) -> dict[str, float]:
        """Run the next unit where the last one did not run."""
        epoch, shard = self.place
        seat = self.seats[self.units % 2]
        self.buffers.reverse()
        committed, working = self.buffers
        if self.units:
            working.memory[: self.used] = committed.memory[: self.used]
            seat.load_state_dict(state.read(working))
        seed_unit(0, 0, epoch, shard)
        last = shard == self.train.num_shards - 1
        batches = Batches(self.train, epoch, shard, batch_size)
        work = UnitWork(epoch, shard, shard, last, batches, validation, self._validating)
        metrics = seat.run_unit(work)
        self.used = state.write(seat.state_dict(), working)
        self.units += 1
        return metrics

    @contextmanager
    def _validating(self) -> Iterator[None]:
        self.validations += 1
        seed_validation(0, 0, *self.place)
        yield

    @property
    def seat(self) -> Any:
        """Where the last unit ran."""
        return self.seats[(self.units - 1) % 2]

    @property
    def tree(self) -> Any:
        """The state as the next unit would get it."""
        return state.read(self.buffers[1])

    def close(self) -> None:
        for seat in self.seats:
            seat.close()
        for buffer in self.buffers:
            buffer.close()


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)


@pytest.mark.parametrize(("kind", "kwargs"), [(OneCycle, {}), (Busy, {"accumulate_grad_batches": 3})])
def test_the_state_is_trained_in_the_buffer(train: ShardedDataset, kind: Any, kwargs: dict[str, Any]) -> None:
    hopping = Hopping(LightningTrainable(kind, trainer_kwargs=kwargs), {"lr": 0.05}, train)
    hopping.unit()
    for _ in range(4):
        hopping.unit()
        tree, buffer = hopping.seat.state_dict(), hopping.buffers[1]
        places = [
            t.data_ptr() - buffer.address for part in ("state_dict", "optimizer_states") for t in tensors_of(tree[part])
        ]
        assert len(places) > 10
        assert all(0 <= place < hopping.used for place in places)
    hopping.close()


def test_validation_in_mid_epoch_changes_nothing_but_the_report(
    train: ShardedDataset, validation: ShardedDataset
) -> None:
    recipe = LightningTrainable(Busy, trainer_kwargs={"accumulate_grad_batches": 3})
    often, rarely = Hopping(recipe, {}, train), Hopping(recipe, {}, train)
    whole = ValidationBatches(validation, validation.num_rows)
    for unit in range(8):
        last = unit % 4 == 3
        report = often.unit(whole if last else ValidationBatches(validation, 40))
        assert "val_loss" in report
        assert ("val_loss" in rarely.unit(whole if last else None)) == last
    assert (often.validations, rarely.validations) == (8, 2)
    one, other = often.tree, rarely.tree
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for part in ("state_dict", "optimizer_states"):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one[part]), tensors_of(other[part]), strict=True))
    assert one["lr_schedulers"] == other["lr_schedulers"]
    often.close()
    rarely.close()


def test_what_is_logged_is_reported(train: ShardedDataset, validation: ShardedDataset) -> None:
    hopping = Hopping(
        LightningTrainable(Logging, trainer_kwargs={"accumulate_grad_batches": 3}), {"scale": 2.0}, train, epochs=1
    )
    seen: list[torch.Tensor] = []
    for shard in range(4):
        rows = validation.num_rows if shard == 3 else 40
        report = hopping.unit(ValidationBatches(validation, rows) if shard > 1 else None)
        unit = [x for x, _ in Batches(train, 0, shard)]
        seen += unit
        assert report["train_loss"] == pytest.approx(2 * float(torch.cat(unit).square().mean()), rel=1e-5)
        assert report["mean_x"] == pytest.approx(float(torch.cat(seen).mean()), rel=1e-4, abs=1e-6), (
            "of the epoch so far"
        )
        assert report["last_x"] == pytest.approx(float(unit[-1].mean()), rel=1e-5)
        if shard > 1:
            x = torch.cat([x for x, _ in ValidationBatches(validation, rows)])
            sizes = [min(BATCH, rows - start) for start in range(0, rows, BATCH)]
            assert report["val_loss"] == pytest.approx(float(x.square().mean()), rel=1e-5)
            assert report["val_rows"] == pytest.approx(sum(n * n for n in sizes) / rows)
        else:
            assert report.keys() == {"train_loss", "mean_x", "last_x"}
    hopping.close()


class LogsItsLoss(Logging):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", 7.0)
        return loss * float("inf") if self.scale < 0 and batch_idx == 0 else loss


def test_a_logged_train_loss_wins_unless_the_loss_is_not_finite(train: ShardedDataset) -> None:
    for scale in (1.0, -1.0):
        hopping = Hopping(LightningTrainable(LogsItsLoss), {"scale": scale}, train)
        loss = hopping.unit()["train_loss"]
        assert loss == 7.0 if scale > 0 else not math.isfinite(loss)
        hopping.close()


def test_the_trainer_sees_the_whole_horizon_and_leaves_signals_alone(train: ShardedDataset, capfd: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    hopping = Hopping(LightningTrainable(OneCycle, trainer_kwargs={"accumulate_grad_batches": 3}), {}, train, epochs=3)
    trainer = hopping.seats[0].trainer  # type: ignore[attr-defined]
    assert (trainer.max_epochs, trainer.num_training_batches) == (3, 16)
    assert trainer.estimated_stepping_batches == hopping.plan.total_steps == 18
    hopping.unit()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr() == ("", "")
    hopping.close()


def test_a_missing_validation_step_is_told_where_there_is_something_to_validate_with(
    train: ShardedDataset, validation: ShardedDataset, tmp_path: Path
) -> None:
    for given, told in (((train,), nullcontext()), ((train, validation), pytest.warns(match="no `validation_step`"))):
        with Cerebro(
            *given, epochs=1, batch_size=BATCH, backend="inline", run_dir=tmp_path / str(len(given)), progress=False
        ) as executor, told:  # fmt: skip
            (result,) = executor.fit(Marked, [{"tag": 1.0, "how": "plain"}], metric="train_loss")
            assert result.error is None


# Checkpoints.


def exported(recipe: Any, config: Mapping[str, Any], train: ShardedDataset, folder: Path) -> tuple[Path, Any]:
    hopping = Hopping(recipe, config, train)
    hopping.unit()
    hopping.unit()
    path = folder / "best.ckpt"
    recipe.export(hopping.tree, path)
    weights = {name: tensor.clone() for name, tensor in hopping.seat.module.state_dict().items()}
    hopping.close()
    assert [entry.name for entry in folder.iterdir()] == ["best.ckpt"]
    return path, weights


class Unsaved(Momentum):
    """Saves no hyper-parameters, and takes its config as one mapping."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config["lr"], config["width"])
        self._hparams_name = None  # as if the base class had not saved them
        self._hparams.clear()
        self.lr = config["lr"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Keywords(Unsaved):
    """Saves no hyper-parameters, and takes its config as keywords."""

    def __init__(self, lr: float, width: int = 4) -> None:
        super().__init__({"lr": lr, "width": width})


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Momentum, {"lr": 0.1, "width": 5}), (Unsaved, {"lr": 0.1, "width": 5}), (Keywords, {"lr": 0.1, "width": 5})],
)
def test_checkpoints_open_in_plain_lightning(
    train: ShardedDataset, tmp_path: Path, kind: Any, config: dict[str, Any]
) -> None:
    path, weights = exported(LightningTrainable(kind), config, train, tmp_path)
    given = {"config": config} if kind is Unsaved else config
    for module in (kind.load_from_checkpoint(path), kind.load_from_checkpoint(path, **given)):
        assert module.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 8
    assert path.stat().st_size < 20_000, "the buffer around the tensors was written with them"


class Odd(Momentum):
    def __init__(self, lr: Any = 0.1, width: Any = 4, activation: Any = None, options: Any = None) -> None:
        super().__init__(float(lr), int(width))
        self.save_hyperparameters()


def test_unsafe_hyper_parameters_are_left_out_by_name(train: ShardedDataset, tmp_path: Path) -> None:
    config = {
        "lr": np.float64(0.1),
        "width": np.int64(4),
        "activation": nn.functional.relu,
        "options": {"a": np.bool_(True), "b": Path()},
    }
    with pytest.warns(
        UserWarning, match=r"best.ckpt leaves out hyper_parameters.activation, hyper_parameters.options.b, which"
    ):
        path, _ = exported(LightningTrainable(Odd), config, train, tmp_path)
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved == {"lr": 0.1, "width": 4, "options": {"a": True}, "dropout": 0.3}
    assert {type(value) for value in saved.values()} == {float, int, dict}
    assert Odd.load_from_checkpoint(path, activation=nn.functional.relu).hparams["lr"] == 0.1


# What is refused.


class AnyKeyword(Momentum):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("kind", "config", "problem"),
    [
        (Momentum, {"lrr": 0.1}, r"does not take 'lrr' \(did you mean 'lr'\?\)\. Valid keys are lr, width, dropout"),
        (Momentum, {"lr": 0.1, "depth": 3}, "does not take 'depth'"),
        (Keywords, {"width": 3}, "it needs lr"),
        (Keywords, {}, "it needs lr"),
        (Keywords, {"rate": 3}, r"does not take 'rate' and it needs lr"),
        (Momentum, {"lr": 0.1}, None),
        (Keywords, {"lr": 0.1}, None),
        (Unsaved, {"anything": 1}, None),
        (AnyKeyword, {"anything": 1}, None),
    ],
)
def test_a_config_is_checked_against_the_signature(kind: Any, config: dict[str, Any], problem: str | None) -> None:
    recipe = as_recipe(kind)
    if problem is None:
        recipe.check_config(config)
    else:
        with pytest.raises(ConfigurationError, match=problem):
            recipe.check_config(config)


class Batched(Momentum):
    def __init__(self, batch_size: int, lr: float = 0.1) -> None:
        super().__init__(lr)


def test_batch_size_and_epochs_are_the_executors_unless_the_module_takes_them() -> None:
    config = {"batch_size": 8, "epochs": 2, "lr": 0.1}
    assert as_recipe(Batched).model_config(config) == {"batch_size": 8, "lr": 0.1}
    assert as_recipe(Momentum).model_config(config) == {"lr": 0.1}
    assert as_recipe(Unsaved).model_config(config) == config
    assert [as_recipe(kind).takes("batch_size") for kind in (Batched, Momentum, Unsaved)] == [True, False, False]


class Two(Momentum):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class Frozen(Momentum):
    def configure_optimizers(self) -> Any:
        return None


class Skipping(Momentum):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
        return -1


class OwnCheckpoint(pl.callbacks.Checkpoint):
    pass


class BringsSaver(Momentum):
    def configure_callbacks(self) -> Any:
        return [pl.callbacks.ModelCheckpoint(every_n_epochs=1), pl.callbacks.LearningRateMonitor()]


class BringsEagerSaver(Momentum):
    def configure_callbacks(self) -> Any:
        return pl.callbacks.ModelCheckpoint(every_n_train_steps=1)


class BringsTimer(Momentum):
    def configure_callbacks(self) -> Any:
        return pl.callbacks.Timer()


class Outside(Momentum):
    def configure_optimizers(self) -> Any:
        outside = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(()))]
        return torch.optim.SGD([*self.parameters(), *outside], 0.1)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")  # Lightning, to Frozen
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch, to Skipping, which skips every step
@pytest.mark.parametrize(
    ("kind", "kwargs", "reason"),
    [
        (Two, {}, "multiple optimizers.*one optimizer, or several with automatic_optimization off"),
        (Frozen, {}, "configure_optimizers gave no optimizers"),
        (Skipping, {}, "on_train_batch_start returned -1"),
        (Momentum, {"callbacks": pl.callbacks.StochasticWeightAveraging(0.1)}, "StochasticWeightAv.*EMAWeightAv"),
        (Momentum, {"callbacks": pl.callbacks.LearningRateFinder()}, "LearningRateFinder.*search space"),
        (Momentum, {"callbacks": pl.callbacks.BatchSizeFinder()}, "BatchSizeFinder.*search space"),
        (Momentum, {"callbacks": [pl.callbacks.Timer()]}, "Timer.*limit the epochs"),
        (
            Momentum,
            {"callbacks": pl.callbacks.ModelPruning("l1_unstructured")},
            "ModelPruning.*prune the trained model",
        ),
        (Momentum, {"callbacks": OwnCheckpoint()}, "OwnCheckpoint.*a ModelCheckpoint"),
        (BringsEagerSaver, {}, "BringsEagerSaver is trained with a ModelCheckpoint with every_n_train_steps=1"),
        (BringsTimer, {}, "BringsTimer is trained with the callback Timer"),
        (Outside, {}, r"not in the module, of shape \(2, 3\), \(\); only the module's own hop"),
        (lambda config: nn.Linear(8, 2), {}, "must make a LightningModule"),
    ],
)
def test_what_cannot_hop_is_refused(train: ShardedDataset, kind: Any, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotTrainableError, match=reason):
        Hopping(LightningTrainable(kind, trainer_kwargs=kwargs), {}, train).unit()


def test_what_is_not_lightnings_is_left_to_others() -> None:
    assert adapt(nn.Linear) is None
    assert adapt(nn.Linear(2, 2)) is None
    assert adapt(Path()) is None


def test_trainer_arguments_that_the_executor_decides_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_epochs, strategy, which the executor decides"):
        LightningTrainable(Momentum, trainer_kwargs={"strategy": "ddp", "max_epochs": 3, "precision": "bf16-mixed"})
    for name, value, instead in (
        ("strategy", "fsdp", "a worker has one device: leave it out"),
        ("max_time", "00:01:00:00", "limit the epochs, or let the tuner stop trials"),
        ("reload_dataloaders_every_n_epochs", 1, "in the Dataset's __getitem__ or in the module"),
    ):
        with pytest.raises(ConfigurationError, match=f"Instead of {name}: .*{instead}"):
            LightningTrainable(Momentum, trainer_kwargs={name: value})
    LightningTrainable(Momentum, trainer_kwargs={"enable_progress_bar": True, "logger": False, "max_time": None})


def test_callbacks_that_show_and_save_have_nothing_to_do_in_a_worker(
    train: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    best = pl.callbacks.ModelCheckpoint(tmp_path / "saved", monitor="val_loss", mode="max")
    shown = [pl.callbacks.ModelSummary(), pl.callbacks.RichModelSummary(), pl.callbacks.TQDMProgressBar()]
    recipe = LightningTrainable(
        Momentum, trainer_kwargs={"callbacks": [*shown, best, pl.callbacks.DeviceStatsMonitor()]}
    )
    assert recipe.checkpoint_callback is best
    assert LightningTrainable(Momentum).checkpoint_callback is None
    for each, left in ((recipe, "DeviceStatsMonitor"), (LightningTrainable(BringsSaver), "LearningRateMonitor")):
        hopping = Hopping(each, {}, train, epochs=1)
        for _ in range(4):
            hopping.unit()
        hopping.close()
        assert [type(callback).__name__ for callback in hopping.seat.trainer.callbacks[1:]] == [left]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_without_lightning_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ImportError, match=r'pip install "cerebro-tune\[lightning\]"'):
        cerebro_tune_lightning.LightningTrainable  # noqa: B018


# Configs that change.


class Custom(Momentum):
    def on_config_change(self, old: Any, new: Any) -> None:
        self.told = (dict(old), dict(new))


def changed(recipe: Any, train: ShardedDataset, old: dict[str, Any], new: dict[str, Any]) -> Any:
    """A trial that trained under one config, and goes on under another in a trainable of its own."""
    hopping = Hopping(recipe, old, train)
    hopping.unit()
    successor = recipe.create()
    successor.start(new, hopping.plan)
    successor.load_state_dict(hopping.tree)
    hopping.close()
    successor.change_config(old, new)
    return successor


def test_a_changed_config_takes_effect(train: ShardedDataset) -> None:
    successor = changed(LightningTrainable(OneCycle), train, {"lr": 0.1, "dropout": 0.1}, {"lr": 0.2, "dropout": 0.4})
    assert successor.trainer.optimizers[0].param_groups[0]["max_lr"] == 0.2
    assert successor.module.hparams["dropout"] == successor.module.net[3].p == 0.4
    momentum = changed(LightningTrainable(Momentum), train, {"lr": 0.1}, {"lr": 0.2})
    assert momentum.trainer.optimizers[0].param_groups[0]["lr"] == 0.2
    assert momentum.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.2]


class Dropping(Momentum):
    """Dropout of 0 like the optimizer's momentum and weight decay; a rate that falls at each epoch's end."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_a_changed_key_leaves_alone_what_only_equals_it(train: ShardedDataset) -> None:
    successor = changed(LightningTrainable(Dropping), train, {"dropout": 0.0}, {"dropout": 0.3})
    group = successor.trainer.optimizers[0].param_groups[0]
    assert (successor.module.net[3].p, group["momentum"], group["weight_decay"]) == (0.3, 0, 0)


def test_a_changed_rate_counts_from_where_the_schedule_has_brought_it(
    train: ShardedDataset, validation: ShardedDataset
) -> None:
    hopping = Hopping(LightningTrainable(Dropping), {"lr": 0.1}, train, epochs=3)
    for _ in range(8):
        hopping.unit(ValidationBatches(validation, 40))
    tree = hopping.tree
    rate = tree["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate < 0.1
    successor = LightningTrainable(Dropping).create()
    successor.start({"lr": 0.2}, hopping.plan)
    successor.load_state_dict(tree)
    successor.change_config({"lr": 0.1}, {"lr": 0.2})
    assert successor.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2 * rate)  # type: ignore[attr-defined]
    hopping.close()


@pytest.mark.parametrize("units", [1, 4])
def test_the_batch_size_changes_at_an_epochs_end_only(train: ShardedDataset, units: int) -> None:
    recipe = LightningTrainable(Momentum, trainer_kwargs={"accumulate_grad_batches": 3})
    hopping = Hopping(recipe, {}, train)
    for _ in range(units):
        hopping.unit()
    plan = replace(hopping.plan, batch_size=8)
    successor: Any = recipe.create()
    successor.start({}, plan)
    if units == 1:
        with pytest.raises(ConfigurationError, match="batch_size is changed from 16 to 8 in mid-epoch; it can change"):
            successor.load_state_dict(hopping.tree)
    else:
        steps = hopping.seat.trainer.global_step
        successor.load_state_dict(hopping.tree)
        successor.change_config({"batch_size": 16}, {"batch_size": 8, "epochs": 2})
        hopping.seats, hopping.plan = [successor, successor], plan
        for _ in range(4):
            hopping.unit(batch_size=8)
        assert successor.trainer.global_step - steps == plan.steps_per_epoch
        assert not successor.state_dict()["cerebro_tune"]["gradients"]
    hopping.close()


class Resumed(Momentum):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cache"] = [1, 2]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.cache = [*getattr(self, "cache", []), *checkpoint["cache"]]


def test_what_the_load_hook_puts_into_attributes_is_kept(train: ShardedDataset) -> None:
    hopping = Hopping(LightningTrainable(Resumed), {}, train)
    hopping.unit()
    for _ in range(4):
        hopping.unit()
        assert hopping.seat.module.cache == [1, 2], "the hook runs on a fresh build, as Lightning's does"
    hopping.close()


class Indexed(Momentum):
    """Has its load hook make what is no value."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.index: Any = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.index = memoryview(bytes([*(self.index or b""), batch_idx]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["index"] = bytes(self.index)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.index = memoryview(checkpoint["index"])


def test_what_the_load_hook_makes_of_no_value_is_kept(train: ShardedDataset) -> None:
    hopping = Hopping(LightningTrainable(Indexed), {}, train)
    for _ in range(3):
        hopping.unit()
    assert [*hopping.seat.module.index] == [*range(12)]
    hopping.close()


def test_training_starts_and_ends_once(train: ShardedDataset) -> None:
    hopping = Hopping(LightningTrainable(Teacher), {}, train, epochs=1)
    ends = []
    for _ in range(4):
        hopping.unit()
        assert hopping.seat.module.first_step == 0
        ends.append(float(hopping.tree["state_dict"]["ends"]))
    assert ends == [0, 0, 0, 3]
    hopping.close()


def test_a_changed_key_that_nothing_reads_is_named(train: ShardedDataset) -> None:
    successor = changed(LightningTrainable(Momentum), train, {"lr": 0.1}, {"lr": 0.1})
    with pytest.raises(ConfigurationError, match="changes depth, which neither Momentum nor its optimizer reads"):
        successor.change_config({"lr": 0.1, "depth": 1}, {"lr": 0.1, "depth": 2})


def test_a_module_may_change_its_config_itself(train: ShardedDataset) -> None:
    successor = changed(LightningTrainable(Custom), train, {"lr": 0.1}, {"lr": 0.2})
    assert successor.module.told == ({"lr": 0.1}, {"lr": 0.2})
    assert successor.trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_state_of_another_shape_is_refused_by_name(train: ShardedDataset) -> None:
    with pytest.raises(StateError, match=r"net.0.weight has shape \(16, 8\) in the state"):
        changed(LightningTrainable(Momentum), train, {"width": 16}, {"width": 8})


# What belongs to the worker: its DataModule.


class Data(pl.LightningDataModule):
    """Scales batches by a factor that it changes and saves; counts what is called."""

    def __init__(self, scale: float = 0.5, function: Any = abs) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.factor = scale
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append("setup")

    def teardown(self, stage: str) -> None:
        self.called.append("teardown")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        self.factor *= 0.99 if self.trainer.training else 1
        return self.factor * batch[0], batch[1]

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]


class KnowsData(Momentum):
    def configure_optimizers(self) -> Any:
        assert self.trainer.datamodule.hparams["scale"] == 0.5
        return super().configure_optimizers()


def test_trials_share_their_workers_datamodule_one_at_a_time(train: ShardedDataset) -> None:
    data, recipe = Data(), LightningTrainable(KnowsData)

    def trial() -> Hopping:
        return Hopping(recipe, {}, train, datamodule=data)

    alone = trial()
    for _ in range(8):
        alone.unit()
    one, other = trial(), trial()
    for _ in range(8):
        one.unit()
        other.unit()
    for hopping in (one, other):
        assert hopping.seat.trainer.datamodule is data
        assert hopping.tree["Data"] == alone.tree["Data"] == {"factor": pytest.approx(0.5 * 0.99**32)}
        assert same(hopping.tree["state_dict"], alone.tree["state_dict"])
        assert hopping.tree["cerebro_tune"]["left_out"] == ["datamodule_hyper_parameters.function"]
    for hopping in (alone, one, other):
        hopping.close()
    assert data.called == []


def test_a_datamodule_of_the_other_package_is_refused(train: ShardedDataset) -> None:
    class Other(import_module("lightning.pytorch").LightningDataModule):  # type: ignore[misc]
        pass

    with pytest.raises(NotTrainableError, match="Other is a LightningDataModule of lightning"):
        Hopping(LightningTrainable(Momentum), {}, train, datamodule=Other())
    Hopping(LightningTrainable(Momentum), {}, train, datamodule=object()).close()


# Optimization by hand, and stops.


def test_a_validation_in_mid_epoch_leaves_gradients_that_wait_for_a_step(
    train: ShardedDataset, validation: ShardedDataset
) -> None:
    often, rarely = (Hopping(LightningTrainable(Adversarial), {}, train) for _ in range(2))
    for unit in range(7):
        often.unit(ValidationBatches(validation, 40))
        report = rarely.unit(ValidationBatches(validation, 40) if unit == 3 else None)
        assert "train_loss" not in report, "the module returned no loss"
    assert any(gradient.any() for gradient in rarely.tree["cerebro_tune"]["gradients"].values())
    for part in ("state_dict", "optimizer_states"):
        assert same(often.tree[part], rarely.tree[part])
    often.close()
    rarely.close()


class Stopping(Momentum):
    """Asks to stop at one batch of the trial."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            self.trainer.should_stop = True


@pytest.mark.parametrize("min_epochs", [None, 1, 2])
def test_a_module_that_stops_its_trainer_stops_its_trial(train: ShardedDataset, min_epochs: int | None) -> None:
    recipe = LightningTrainable(Stopping, trainer_kwargs={"min_epochs": min_epochs})
    hopping = Hopping(recipe, {}, train, epochs=3)
    stops = []
    while not stops or not stops[-1]:
        hopping.unit()
        stops.append(hopping.seat.should_stop)
    # After batch 6, in the second unit; or as soon as so many epochs are over.
    assert len(stops) == {None: 2, 1: 4, 2: 8}[min_epochs]
    assert hopping.seat.trainer.global_step == {None: 7, 1: 16, 2: 32}[min_epochs]
    hopping.close()


# What only training makes.


class Late(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.copy = nn.Linear(2, 2)


class Foreign(Momentum):
    def on_train_start(self) -> None:
        self.kept = object()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.made = [1, object()]


class Adding(Momentum):
    def on_train_epoch_start(self) -> None:
        self.optimizers().add_param_group({"params": [nn.Parameter(torch.ones(3))]})


class Lengthening(Momentum):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.extra = nn.Linear(2, 2)


def test_layers_made_in_training_fail_the_first_hop(train: ShardedDataset) -> None:
    hopping = Hopping(LightningTrainable(Lengthening), {}, train)
    with pytest.raises(UnsupportedLeafError, match=r"model.extra has become a Linear in training, which other workers"):
        hopping.unit()
    hopping.close()


@pytest.mark.parametrize(
    ("kind", "kwargs", "error", "reason"),
    [
        (Momentum, {"callbacks": Late()}, StateError, r"callbacks\[0\].Late.copy has become a Linear in training"),
        (Foreign, {}, StateError, r"model.made\[1\] has become a object in training"),
        (Adding, {}, NotTrainableError, r"parameters that are not in the module, of shape \(3,\)"),
    ],
)
def test_what_only_one_worker_has_fails_the_first_hop(
    train: ShardedDataset, kind: Any, kwargs: dict[str, Any], error: Any, reason: str
) -> None:
    hopping = Hopping(LightningTrainable(kind, trainer_kwargs=kwargs), {}, train)
    with pytest.raises(error, match=reason):
        hopping.unit()
    hopping.close()


def test_a_held_average_lives_in_the_buffer_too(train: ShardedDataset) -> None:
    hopping = Hopping(LightningTrainable(Momentum, trainer_kwargs={"callbacks": Average()}), {}, train)
    for _ in range(3):
        hopping.unit()
    (saved,) = hopping.tree["cerebro_tune"]["asides"].values()
    held = hopping.seat.trainer.callbacks[1].copy
    buffer = hopping.buffers[1]
    assert saved["tensors"].keys() == dict([*held.named_parameters(), *held.named_buffers()]).keys()
    assert all(0 <= p.data_ptr() - buffer.address < hopping.used for p in held.parameters())
    hopping.close()


def test_what_a_logger_says_in_a_worker_comes_with_the_trial(options: dict[str, Any], capfd: Any) -> None:
    with Cerebro(**options | {"backend": "local"}) as cerebro:
        cerebro.fit(Outspoken, [{}, {}], metric="val_loss")
    err = capfd.readouterr().err
    assert [err.count(f"[trial-000{trial}] an epoch begins") for trial in range(2)] == [2, 2]
    assert err.count("an epoch begins") == 4
