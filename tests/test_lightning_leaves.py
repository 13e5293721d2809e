"""What a fit by hops leaves behind beside weights, and what it refuses, as a user of a plain Trainer expects it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import holding_nets
import lightning_nets
import unified_nets
from cerebro_tune import Cerebro, Decision, VisitLoader, verify_hop
from cerebro_tune.errors import ConfigurationError, NotTrainableError, TrialFailedError, UnsupportedLeafError
from cerebro_tune_lightning import LightningTrainable
from runs import outliving
from test_hop_strategy import (
    BATCH,
    EPOCHS,
    SEED,
    TRAIN,
    VALIDATION,
    Asked,
    assert_same,
    fit,
    loaders,
    made,
    noted,
    plain_fit,
)
from test_lightning_parity import assert_equal

pl = lightning_nets.pl
ModelCheckpoint = pl.callbacks.ModelCheckpoint
BOTH = pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cerebro]:
    with made(tmp_path_factory.mktemp("runs")) as cerebro:
        yield outliving(cerebro)


# Objects.


def test_what_module_and_callbacks_share_they_share_in_every_worker(executor: Cerebro) -> None:
    def both() -> tuple[Any, Any]:
        module = lightning_nets.Momentum()
        module.meter = holding_nets.Meter()
        return module, holding_nets.Parting(module.net[4], module.meter)

    (module, parting), (expected, other) = both(), both()
    expected.load_state_dict(module.state_dict())
    hopped = fit(executor, module, *loaders(), callbacks=[parting])
    plain = plain_fit(executor, hopped.strategy.result, expected, callbacks=[other])
    assert_same(hopped, plain)
    assert parting.part is module.net[4]
    assert parting.meter is module.meter
    assert vars(module.meter) == vars(expected.meter)
    assert module.meter.count == 48


def test_objects_come_back_to_the_users_own(executor: Cerebro) -> None:
    module, expected = holding_nets.Holding(), holding_nets.Holding()
    expected.load_state_dict(module.state_dict())
    expected.shadow = holding_nets.Shadow(expected.net)
    keeping, other = holding_nets.Keeping(), holding_nets.Keeping()
    shadow, counter = module.shadow, module.counter
    hopped = fit(executor, module, *loaders(), callbacks=[keeping])
    plain = plain_fit(executor, hopped.strategy.result, expected, callbacks=[other])
    assert_same(hopped, plain)
    assert module.shadow is shadow
    assert_equal(shadow.averages, expected.shadow.averages)
    assert shadow.parameters[0] is module.net[0].weight
    assert [shadow.newest[p] for p in module.net.parameters()] == [*expected.shadow.newest.values()]
    assert module.counter is counter
    assert counter() == expected.counter() == 49
    assert (module.lists, module.deep, module.mood) == (expected.lists, expected.deep, expected.mood)
    assert module.best is module.meter
    assert module.bias.data_ptr() == module.net[0].bias.data_ptr()
    assert keeping.h == other.h
    assert [vars(meter) for meter in keeping.meters] == [vars(meter) for meter in other.meters]


def test_hooks_of_parameters_travel(executor: Cerebro) -> None:
    module, expected = holding_nets.Late(), holding_nets.Late()
    expected.load_state_dict(module.state_dict())
    hopped = fit(executor, module, *loaders())
    assert_same(hopped, plain_fit(executor, hopped.strategy.result, expected))
    assert vars(module.meter) == vars(expected.meter)


class Exchanging(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
    """Does to itself, in mid-training, what `change` says."""

    change: Any

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.nn.CrossEntropyLoss()
        self.aux, self.function = torch.nn.Identity(), torch.relu
        self.numbers, self.words = iter(range(10_000)), holding_nets.Settings(a=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.change(self)


def set_to(name: str, value: Any) -> Any:
    return lambda module: setattr(module, name, value())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_to("loss", torch.nn.MultiMarginLoss), "model.loss has become a MultiMarginLoss in training"),
        (set_to("aux", lambda: None), "model.aux, a Identity, is gone since training has begun"),
        (set_to("function", lambda: torch.tanh), "model.function has become a builtin_function_or_method in training"),
        (set_to("words", lambda: {"a": object()}), r"model.words\['a'\] has become a object in training"),
        (set_to("another", lambda: abs), "model.another has become a builtin_function_or_method in training"),
        (lambda module: next(module.numbers), "model.numbers is a range_iterator that training has changed"),
        (lambda module: torch.nn.utils.parametrizations.weight_norm(module.net[0]), "model.net.0"),
    ],
    ids=["loss", "gone", "function", "within", "new", "iterator", "parametrized"],
)
def test_what_would_be_lost_fails_the_first_hop(change: Any, reason: str) -> None:
    done: list[int] = []

    def once(module: Any) -> None:
        if not done:
            done.append(1)
            change(module)

    batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(4)]
    with pytest.raises(UnsupportedLeafError, match=reason):
        verify_hop(LightningTrainable(lambda _: exchanging(once)), batches=batches)


def exchanging(change: Any) -> Any:
    module = Exchanging()
    module.change = change
    return module


# Data.


def points_module(nets: Any) -> Any:
    class Points(nets.pl.LightningDataModule):
        """Counts what is called, and has what only `setup` knows."""

        def __init__(self) -> None:
            super().__init__()
            self.called: list[str] = []
            self.sets: Any = None

        def setup(self, stage: str) -> None:
            self.called.append(f"setup {stage}")
            self.sets, self.drawn = (TRAIN, VALIDATION), float(torch.rand(()))

        def teardown(self, stage: str) -> None:
            self.called.append(f"teardown {stage}")

        def train_dataloader(self) -> Any:
            return DataLoader(self.sets[0], BATCH, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.sets[1], 25)

    return Points()


@BOTH
def test_the_data_is_left_as_a_fit_leaves_it(tmp_path: Path, nets: Any) -> None:
    with made(tmp_path, backend="inline") as cerebro:
        for given in ({"datamodule": points_module(nets)}, {}):
            module, before = nets.Momentum(), torch.get_rng_state()
            hopped = fit(cerebro, module, *(() if given else loaders()), nets=nets, max_epochs=1, **given)
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(hopped.train_dataloader.dataset.tensors[0], TRAIN.tensors[0])
            assert torch.equal(hopped.val_dataloaders.dataset.tensors[0], VALIDATION.tensors[0])
            assert hopped.num_val_batches == [4]
            assert hopped.num_training_batches == 16
            if given:
                assert given["datamodule"].called == ["setup fit", "teardown fit"]
                assert hopped.datamodule is given["datamodule"]
                assert given["datamodule"].drawn == cerebro.plan(1, BATCH).datamodule.drawn
                cerebro.close()
                cerebro = made(tmp_path / "again", backend="inline")  # noqa: PLW2901
        cerebro.close()


class WithData(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
    """Prepares, sets up and loads by itself."""

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        assert self.prepared
        self.rows = TRAIN, VALIDATION

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows[0], BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows[1], 25)


def test_a_module_that_brings_its_data(executor: Cerebro) -> None:
    module, expected = WithData(), lightning_nets.Momentum()
    expected.load_state_dict(module.state_dict())
    hopped = fit(executor, module)
    assert_same(hopped, plain_fit(executor, hopped.strategy.result, expected))
    assert hopped.train_dataloader.dataset is TRAIN


def test_a_datamodule_whose_hooks_take_no_stage_is_told_so() -> None:
    class Stageless(pl.LightningDataModule):  # type: ignore[misc,name-defined]
        def setup(self) -> None:
            """Not as Lightning calls it."""

        def train_dataloader(self) -> Any:
            return loaders()[0]

    with pytest.raises(ConfigurationError, match=r"Stageless.setup does not take the stage, .* def setup\(self, stage"):
        Cerebro(datamodule=Stageless())


def test_a_hook_may_change_the_clipping(executor: Cerebro) -> None:
    class Loosening(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
        def on_train_epoch_start(self) -> None:
            self.trainer.gradient_clip_val = 0.05 * (self.current_epoch + 1)

    module, expected = Loosening(), Loosening()
    expected.load_state_dict(module.state_dict())
    hopped = fit(executor, module, *loaders(), gradient_clip_val=1.0)
    assert_same(hopped, plain_fit(executor, hopped.strategy.result, expected, gradient_clip_val=1.0))
    assert hopped.gradient_clip_val == pytest.approx(0.05 * EPOCHS)


# Ends.


class Ending(lightning_nets.Teacher):  # type: ignore[misc,name-defined]
    """Does its work at the end of an epoch, of training and of the fit; logs it."""

    def on_train_epoch_end(self) -> None:
        self.log("ends", self.ends)

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.calls = [*getattr(self, "calls", []), "on_fit_end"]


class StopsAt(pl.Callback):  # type: ignore[misc,name-defined]
    """What a tuner's STOP amounts to."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize(("units", "steps"), [(3, 12), (4, 16)], ids=["in mid-epoch", "after an epoch"])
def test_a_stop_of_the_tuner_ends_as_should_stop_does(tmp_path: Path, units: int, steps: int) -> None:
    module, expected = Ending(), Ending()
    expected.load_state_dict(module.state_dict())
    with made(tmp_path, backend="inline", report_every="unit") as cerebro:
        answers = [Decision.CONTINUE] * (units - 1) + [Decision.STOP]
        hopped = fit(None, module, *loaders(), trial=Asked(cerebro, *answers))
        visits = hopped.strategy.result.visits
        assert len(visits) == units
        order = [*visits, *((0, shard, "") for shard in range(4) if shard not in {visit[1] for visit in visits})]
        loader = VisitLoader(cerebro.train, order, batch_size=BATCH, seed=SEED)
        torch.set_num_threads(1)
        plain = pl.Trainer(
            max_epochs=EPOCHS, enable_checkpointing=False, num_sanity_val_steps=0, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[StopsAt(steps)], limit_val_batches=0,
        )  # fmt: skip
        from cerebro_tune_lightning import ReseedCallback

        plain.callbacks.insert(0, ReseedCallback(SEED, 0, order))
        plain.fit(expected, loader, loaders()[1])
    assert_equal(module.state_dict(), expected.state_dict())
    assert (hopped.global_step, hopped.current_epoch) == (plain.global_step, plain.current_epoch) == (steps, 1)
    assert (module.calls, float(module.ends)) == (["on_fit_end"], 3.0)
    assert hopped.should_stop


# Schedules.


def test_a_schedule_that_would_run_out_is_told_before_training(executor: Cerebro) -> None:
    class Short(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            steps = EPOCHS * len(loaders()[0])
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

    reason = "OneCycleLR of Short is laid out for 39 steps, and there will be 48: .*estimated_stepping_batches"
    with pytest.raises(TrialFailedError, match=reason):
        fit(executor, Short(), *loaders())


# Checkpoints.


def with_saver(executor: Cerebro, folder: Path, **options: Any) -> Any:
    saver = ModelCheckpoint(folder, monitor="val_loss", **options)
    fit(executor, lightning_nets.AdamW(), *loaders(), max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    return saver


def test_a_checkpoint_of_weights_only_has_these(executor: Cerebro, tmp_path: Path) -> None:
    saver = with_saver(executor, tmp_path, save_weights_only=True, filename="only", enable_version_counter=False)
    saved = torch.load(saver.best_model_path, weights_only=True)
    plain = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path / "plain", save_weights_only=True, filename="only")],
    )  # fmt: skip
    plain.fit(lightning_nets.AdamW(), *loaders())
    assert saved.keys() == torch.load(tmp_path / "plain" / "only.ckpt", weights_only=True).keys()
    lightning_nets.AdamW.load_from_checkpoint(saver.best_model_path)
    with_saver(executor, tmp_path, filename="only", enable_version_counter=False)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["only.ckpt"]


class Announcing(ModelCheckpoint):  # type: ignore[misc]
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)


class Named(ModelCheckpoint):  # type: ignore[misc]
    CHECKPOINT_NAME_LAST = "newest"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, save_last=True)


@pytest.mark.parametrize(
    ("saver", "reason"),
    [
        (
            lambda: ModelCheckpoint(every_n_train_steps=5),
            "ModelCheckpoint with every_n_train_steps=5, but the executor",
        ),
        (lambda: ModelCheckpoint(train_time_interval=timedelta(1)), "train_time_interval=datetime"),
        (lambda: ModelCheckpoint(every_n_epochs=2), "every_n_epochs=2"),
        (lambda: ModelCheckpoint(save_on_exception=True), "save_on_exception=True"),
        (
            Announcing,
            "Announcing, a ModelCheckpoint with its own on_validation_end, which would not be called",
        ),
    ],
)
def test_what_a_model_checkpoint_cannot_have_is_refused(executor: Cerebro, saver: Any, reason: str) -> None:
    with pytest.raises(NotTrainableError, match=reason):
        fit(executor, lightning_nets.Momentum(), *loaders(), callbacks=[saver()], enable_checkpointing=True)
    with pytest.raises(NotTrainableError, match=reason):
        LightningTrainable(lightning_nets.Momentum, trainer_kwargs={"callbacks": saver()})


def test_a_model_checkpoint_that_keeps_more_is_warned_of(executor: Cerebro, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="has save_top_k=3, but of each trial the best checkpoint and the last are kept"
    ):
        saver = with_saver(executor, tmp_path, save_top_k=3)
    assert [*saver.best_k_models] == [saver.best_model_path]
    named = Named(tmp_path / "named")
    fit(executor, lightning_nets.AdamW(), *loaders(), max_epochs=1, callbacks=[named], enable_checkpointing=True)
    assert (tmp_path / "named" / "newest.ckpt").exists()


# Loggers.


class Asking(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
    """Asks its logger where and what it is, and gives it what it can take."""

    def on_train_start(self) -> None:
        assert isinstance(self.logger, pl.loggers.TensorBoardLogger)
        self.asked = [self.logger.name, self.logger.version, self.logger.save_dir, str(self.trainer.log_dir)]
        self.asked += [str(self.trainer.default_root_dir), self.logger.log_dir]

    def on_train_epoch_end(self) -> None:
        self.logger.experiment.add_text("epoch", str(self.current_epoch), self.global_step)

    def on_train_end(self) -> None:
        if self.hparams["width"] == 3:
            self.logger.experiment.add_text("lock", threading.Lock())


def test_a_module_finds_the_users_folders_in_a_worker(executor: Cerebro, tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="board", version="seven")
    module = Asking()
    hopped = fit(executor, module, *loaders(), logger=logger, default_root_dir=tmp_path / "root", max_epochs=1)
    folder = str(tmp_path / "board" / "seven")
    assert module.asked == ["board", "seven", str(tmp_path), folder, str(tmp_path / "root"), folder]
    assert str(hopped.log_dir) == folder
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="board")
    with pytest.raises(TrialFailedError, match=r"logger.experiment.add_text is called in a worker with what cannot"):
        fit(executor, Asking(width=3), *loaders(), logger=logger, max_epochs=1)
    plain = fit(executor, lightning_nets.Momentum(), *loaders(), default_root_dir=tmp_path / "root", max_epochs=1)
    assert str(plain.log_dir) == str(tmp_path / "root")


def test_callbacks_in_threads_are_each_fits_own(executor: Cerebro) -> None:
    def one(rate: float) -> Any:
        module = lightning_nets.Momentum(lr=rate)
        keeping = holding_nets.Keeping()
        fit(executor, module, *loaders(), callbacks=[keeping], max_epochs=1)
        return noted(keeping)["h"]["loss"]

    with ThreadPoolExecutor(2) as pool:
        one_losses, other_losses = pool.map(one, (0.1, 0.01))
    assert len(one_losses) == len(other_losses) == 16
    assert one_losses != other_losses
