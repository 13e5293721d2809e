"""A user's own Trainer on an executor: what it gives is what a plain `Trainer.fit` gives, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler, default_collate

import lightning_nets
import unified_nets
from cerebro_tune import Cerebro, Decision, TrialResult, VisitLoader
from cerebro_tune.errors import (
    ConfigurationError,
    NotPicklableError,
    NotTrainableError,
    TrialFailedError,
    UnknownMetricError,
)
from cerebro_tune.seat import Seat, seated
from cerebro_tune_lightning import HopStrategy, ReseedCallback
from runs import outliving
from test_lightning_parity import assert_equal

pl = lightning_nets.pl
EPOCHS, BATCH, SEED = 3, 16, 5
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}

pytestmark = [
    # torch about Lightning's own CombinedLoader; Lightning about the machine's cores and the folder of checkpoints.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def points(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x @ torch.arange(1.0, 9.0) > 0).long())


TRAIN, VALIDATION = points(202, 0), points(100, 1)


def loaders(batch_size: int = BATCH) -> tuple[Any, Any]:
    return DataLoader(TRAIN, batch_size, shuffle=True), DataLoader(VALIDATION, batch_size=25)


def datamodule(nets: Any) -> Any:
    class Points(nets.pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.sets = TRAIN, VALIDATION

        def train_dataloader(self) -> Any:
            return DataLoader(self.sets[0], BATCH, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.sets[1], 25)

    return Points()


def with_loaders(kind: Any) -> Any:
    class WithLoaders(kind):
        def train_dataloader(self) -> Any:
            return loaders()[0]

        def val_dataloader(self) -> Any:
            return [loaders()[1]]

    return WithLoaders()


def fit(executor: Any, module: Any, *data: Any, nets: Any = lightning_nets, **kwargs: Any) -> Any:
    """A fit by hops; returns the Trainer."""
    given = kwargs.pop("datamodule", None)
    strategy = HopStrategy(executor, kwargs.pop("trial", None), kwargs.pop("metric", None))
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False} | QUIET | kwargs
    trainer = nets.pl.Trainer(strategy=strategy, **options)
    trainer.fit(module, *data, datamodule=given)
    return trainer


def plain_fit(
    executor: Cerebro,
    result: TrialResult,
    module: Any,
    nets: Any = lightning_nets,
    batch_size: int = BATCH,
    **kwargs: Any,
) -> Any:
    """The same batches in one plain fit; returns the Trainer."""
    torch.set_num_threads(1)
    index = int(result.trial_id[-4:])
    loader = VisitLoader(executor.train, result.visits, batch_size=batch_size, seed=SEED, trial_index=index)
    callbacks = [ReseedCallback(SEED, index, result.visits), *kwargs.pop("callbacks", [])]
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False, "num_sanity_val_steps": 0} | QUIET | kwargs
    trainer = nets.pl.Trainer(callbacks=callbacks, **options)
    trainer.fit(module, loader, loaders()[1])
    return trainer


def noted(callback: Any) -> dict[str, Any]:
    """The attributes of a callback that are values."""
    return {k: v for k, v in vars(callback).items() if not callable(v) and not isinstance(v, torch.nn.Module)}


def assert_same(hopped: Any, plain: Any) -> None:
    """Everything that a Trainer is left with after a fit."""
    one, other = (trainer._checkpoint_connector.dump_checkpoint(weights_only=False) for trainer in (hopped, plain))
    for checkpoint in (one, other):
        checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "ModelCheckpoint" not in k}
    assert_equal(one, other)
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert_equal(getattr(hopped, name), getattr(plain, name), name)
    for name in (
        "current_epoch", "global_step", "num_training_batches", "accumulate_grad_batches", "max_epochs",
        "interrupted", "training", "sanity_checking",
    ):  # fmt: skip
        assert getattr(hopped, name) == getattr(plain, name), name
    assert vars(hopped.state) == vars(plain.state)
    assert hopped.lightning_module.training == plain.lightning_module.training


def made(folder: Path, **options: Any) -> Cerebro:
    """An executor that takes its data from the first fit; units hop, and it reports when a plain fit validates."""
    return Cerebro(
        **{"workers": 2, "placement": "pinned", "num_shards": 4, "report_every": "epoch", "live_trials": 4,
           "progress": False, "seed": SEED, "run_dir": folder} | options
    )  # fmt: skip


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cerebro]:
    """For the fits with loaders."""
    with made(tmp_path_factory.mktemp("runs")) as cerebro:
        yield outliving(cerebro)


@pytest.fixture(scope="module", params=[lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def with_module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """For the fits with a DataModule of one package: the executor, and the nets."""
    with made(tmp_path_factory.mktemp("runs")) as cerebro:
        yield outliving(cerebro), request.param


def check_a_fit(executor: Cerebro, nets: Any, module: Any, *data: Any, **given: Any) -> None:
    """That a fit by hops gives what a plain one gives."""
    start = {name: value.clone() for name, value in module.state_dict().items()}
    recorder, other = nets.Recorder(), nets.Recorder()
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3, "log_every_n_steps": 3}
    hopped = fit(executor, module, *data, nets=nets, callbacks=[recorder], **given, **options)
    result = hopped.strategy.result
    assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
    expected = nets.Busy()
    expected.load_state_dict(start)
    plain = plain_fit(executor, result, expected, nets, callbacks=[other], **options)
    assert_same(hopped, plain)
    assert_equal(noted(recorder), noted(other))
    assert_equal(dict(module.named_buffers()), dict(expected.named_buffers()))
    assert module.noise == expected.noise
    assert module.trainer is hopped


@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_a_fit_with_loaders(executor: Cerebro, nets: Any) -> None:
    check_a_fit(executor, nets, nets.Busy(), *loaders())
    check_a_fit(executor, nets, with_loaders(nets.Busy))


def test_a_fit_with_a_datamodule(with_module: tuple[Cerebro, Any]) -> None:
    executor, nets = with_module
    module = datamodule(nets)
    check_a_fit(executor, nets, nets.Busy(), datamodule=module)
    check_a_fit(executor, nets, nets.Busy(), module)
    assert module.trainer.datamodule is module
    # Another of the same class, and after what a plain Trainer has done to it.
    again = datamodule(nets)
    plain = nets.pl.Trainer(**QUIET)
    plain.validate(nets.Busy(), datamodule=again, verbose=False)
    check_a_fit(executor, nets, nets.Busy(), datamodule=again)
    with pytest.raises(ConfigurationError, match="the same rows with another datamodule"):
        fit(executor, nets.Busy(), *loaders(), nets=nets)


CALLBACKS: dict[str, Any] = {
    "stopped early": lambda nets: [nets.pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=9.0)],
    "stopped in the last epoch": lambda nets: [nets.pl.callbacks.EarlyStopping("val_loss", patience=2, min_delta=9.0)],
    "accumulating later": lambda nets: [nets.pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})],
    "averaging": lambda nets: [nets.pl.callbacks.WeightAveraging()],
    "thawing": lambda nets: [nets.Thaw()],
}


@pytest.mark.parametrize("what", CALLBACKS)
def test_callbacks_end_as_in_a_plain_fit(executor: Cerebro, what: str) -> None:
    kind = lightning_nets.Head if what == "thawing" else lightning_nets.Plateau
    module, expected = kind(), kind()
    expected.load_state_dict(module.state_dict())
    mine, others = CALLBACKS[what](lightning_nets), CALLBACKS[what](lightning_nets)
    hopped = fit(executor, module, *loaders(), callbacks=list(mine))
    plain = plain_fit(executor, hopped.strategy.result, expected, callbacks=list(others))
    assert_same(hopped, plain)
    for one, other in zip(mine, others, strict=True):
        assert one in hopped.callbacks
        assert_equal(noted(one), noted(other))
    assert hopped.should_stop == (what == "stopped early")
    assert hopped.current_epoch == (2 if what == "stopped early" else 3)


def test_callbacks_that_the_module_brings(executor: Cerebro) -> None:
    class Bringing(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
        def configure_callbacks(self) -> Any:
            return [pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=9.0), lightning_nets.Recorder()]

    module = Bringing()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    hopped = fit(executor, module, *loaders())
    expected = Bringing()
    expected.load_state_dict(start)
    plain = plain_fit(executor, hopped.strategy.result, expected)
    assert_same(hopped, plain)
    assert_equal(noted(hopped.callbacks[-1]), noted(plain.callbacks[-1]))
    assert hopped.early_stopping_callback.stopped_epoch == 1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_checkpoints_open_and_go_on_in_plain_lightning(executor: Cerebro, nets: Any, tmp_path: Path) -> None:
    def saver(folder: str) -> Any:
        return nets.pl.callbacks.ModelCheckpoint(
            tmp_path / folder, "{epoch}-{step}-{val_loss:.3f}", monitor="val_loss", save_last=True
        )

    kind = nets.AdamW
    module, expected = kind(), kind()
    expected.load_state_dict(module.state_dict())
    hopped = fit(executor, module, *loaders(), nets=nets, callbacks=[saver("hopped")], enable_checkpointing=True)
    result = hopped.strategy.result
    plain = plain_fit(executor, result, expected, nets, callbacks=[saver("plain")], enable_checkpointing=True)
    assert_same(hopped, plain)
    mine, other = hopped.checkpoint_callback, plain.checkpoint_callback
    assert Path(mine.best_model_path).name == Path(other.best_model_path).name
    assert Path(mine.last_model_path) == tmp_path / "hopped" / "last.ckpt"
    assert mine.best_model_score == other.best_model_score
    assert [*mine.best_k_models.values()] == [*other.best_k_models.values()]
    best = kind.load_from_checkpoint(mine.best_model_path)
    assert_equal(best.state_dict(), kind.load_from_checkpoint(other.best_model_path).state_dict())
    after = [
        [
            trainer.validate(own, loaders()[1], verbose=False),
            trainer.validate(dataloaders=loaders()[1], ckpt_path="best", verbose=False),
            trainer.validate(dataloaders=loaders()[1], ckpt_path="last", verbose=False),
        ]
        for trainer, own in ((hopped, module), (plain, expected))
    ]
    assert_equal(*after)
    # And further on, in Trainers that know nothing of hops.
    ends = []
    for path in (mine.last_model_path, other.last_model_path):
        torch.manual_seed(0)
        more = nets.pl.Trainer(max_epochs=EPOCHS + 1, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
        again = kind()
        more.fit(again, DataLoader(TRAIN, BATCH), loaders()[1], ckpt_path=path)
        ends.append((more.current_epoch, more.global_step, again.state_dict()))
    assert_equal(*ends)
    assert ends[0][0] == EPOCHS + 1


def test_testing_and_predicting_after_a_fit(executor: Cerebro, tmp_path: Path) -> None:
    class Net(lightning_nets.AdamW):  # type: ignore[misc,name-defined]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.net(batch[0]).logsumexp(1).mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    module, expected = Net(), Net()
    expected.load_state_dict(module.state_dict())
    savers = [pl.callbacks.ModelCheckpoint(tmp_path / name, monitor="val_loss") for name in ("hopped", "plain")]
    hopped = fit(executor, module, *loaders(), callbacks=savers[:1], enable_checkpointing=True)
    plain = plain_fit(executor, hopped.strategy.result, expected, callbacks=savers[1:], enable_checkpointing=True)
    assert hopped.strategy.result.config == {"fit": "Net", "epochs": EPOCHS, "batch_size": BATCH}
    rows = loaders()[1]
    for path in ("best", None):
        ways = [(hopped, module), (plain, expected)]
        tested = [trainer.test(own, rows, ckpt_path=path, verbose=False) for trainer, own in ways]
        assert_equal(*tested)
        predicted = [trainer.predict(own, rows, ckpt_path=path) for trainer, own in ways]
        assert_equal(*predicted)


def test_fits_one_after_another(executor: Cerebro) -> None:
    module, expected = lightning_nets.Momentum(), lightning_nets.Momentum()
    expected.load_state_dict(module.state_dict())
    recorder, other = lightning_nets.Recorder(), lightning_nets.Recorder()
    for batch_size in (BATCH, 10):  # the module goes on with the weights it has, and callbacks with what they hold
        train, validation = DataLoader(TRAIN, batch_size, shuffle=True), loaders()[1]
        hopped = fit(executor, module, train, validation, callbacks=[recorder])
        plain = plain_fit(executor, hopped.strategy.result, expected, batch_size=batch_size, callbacks=[other])
        assert_same(hopped, plain)
        assert_equal(noted(recorder), noted(other))
    for trainer in (hopped, plain):  # which have trained all that they were to train
        trainer.fit(trainer.lightning_module, *loaders())
        assert (trainer.current_epoch, trainer.global_step) == (EPOCHS, 66)
        assert trainer.state.finished
    assert_equal(module.state_dict(), expected.state_dict())
    hopped.fit_loop.max_epochs = EPOCHS + 1
    with pytest.raises(ConfigurationError, match="has trained 3 of 4 epochs in an earlier fit"):
        hopped.fit(module, *loaders())


def test_what_is_left_is_the_modules_own(executor: Cerebro, tmp_path: Path) -> None:
    module = lightning_nets.AdamW()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    filters = list(warnings.filters)
    hopped = fit(executor, module, *loaders())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert warnings.filters == filters
    tensors = [*module.state_dict().values()]
    for state in hopped.optimizers[0].state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert {id(p) for p in module.parameters()} == {id(p) for p in hopped.optimizers[0].param_groups[0]["params"]}


def test_the_executors_own_data_where_a_fit_brings_none(executor: Cerebro) -> None:
    fit(executor, lightning_nets.Momentum(), *loaders())
    hopped = fit(executor, lightning_nets.Momentum())
    assert len(hopped.strategy.result.visits) == 12
    with pytest.raises(ConfigurationError, match="fit has nothing to train on"):
        fit(None, lightning_nets.Momentum())


def test_other_data_is_refused(executor: Cerebro) -> None:
    fit(executor, lightning_nets.Momentum(), *loaders(), max_epochs=1)
    other = DataLoader(points(90, 7), 16, shuffle=True)
    with pytest.raises(ConfigurationError, match=r"now it is given other data, .* Make another executor"):
        fit(executor, lightning_nets.Momentum(), other)

    def halved(rows: Any) -> Any:
        return default_collate(rows[::2])

    other = DataLoader(TRAIN, BATCH, shuffle=True, collate_fn=halved)
    with pytest.raises(ConfigurationError, match="the same rows with another collate_fn: other batches would be made"):
        fit(executor, lightning_nets.Momentum(), other, loaders()[1])
    other = DataLoader(TRAIN, BATCH, sampler=WeightedRandomSampler([1.0, 2.0] * 101, 202))
    with pytest.raises(ConfigurationError, match="the same rows with another replacement, weights"):
        fit(executor, lightning_nets.Momentum(), other, loaders()[1])


def test_fits_in_threads_advance_side_by_side(tmp_path: Path) -> None:
    rates = [0.1, 0.05, 0.02, 0.01]
    modules = [lightning_nets.Plateau(lr=rate) for rate in rates]
    starts = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    gate = threading.Barrier(len(rates))

    def one(module: Any) -> Any:
        gate.wait()
        saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
        return fit(cerebro, module, *loaders(), callbacks=[saver], enable_checkpointing=True, trial=seat)

    with made(tmp_path / "runs") as cerebro, ThreadPoolExecutor(len(rates)) as pool:
        seat = Asked(cerebro, *[Decision.CONTINUE] * 12)
        trainers = list(pool.map(one, modules))
        results = [trainer.strategy.result for trainer in trainers]
        assert sorted(result.trial_id for result in results) == [f"trial-{number:04d}" for number in range(4)]
        assert {result.last_checkpoint.parent.parent for result in results} == {
            cerebro.run_dir / "run-0000"  # type: ignore[operator]
        }, "one run"
        order = [seat.reports.get()[0] for _ in range(12)]
        assert len([*groupby(order)]) > 4, "none waits until another has ended"
        for trainer, start, rate in zip(trainers, starts, rates, strict=True):
            expected = lightning_nets.Plateau(lr=rate)
            expected.load_state_dict(start)
            assert_same(trainer, plain_fit(cerebro, trainer.strategy.result, expected))
    paths = [Path(trainer.checkpoint_callback.best_model_path) for trainer in trainers]
    assert len(set(paths)) == 4, "none writes over another's"
    for path, module_rate in zip(paths, rates, strict=True):
        assert torch.load(path, weights_only=True)["hyper_parameters"]["lr"] == module_rate


class Asked(Seat):
    """A tuner's seat that answers reports by a script, and notes what it was asked and told."""

    metric, mode = "val_loss", "min"

    def __init__(self, executor: Cerebro, *answers: Decision | None, raises: type[Exception] | None = None) -> None:
        self.executor, self._answers, self._raises = executor, iter(answers), raises
        self.reports: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.concluded: list[TrialResult] = []

    def decide(self, trial_id: str, report: Any) -> Decision | None:
        self.reports.put((trial_id, report))
        return next(self._answers)

    def conclude(self, result: TrialResult) -> None:
        self.concluded.append(result)
        if self._raises is not None:
            raise self._raises(result.trial_id)


class Pruned(Exception):  # noqa: N818  # as a tuner's own
    """Stands for what a tuner raises in a call that it cuts short."""


def run_of(executor: Cerebro) -> Any:
    assert executor.current is not None
    return executor.current


def test_a_seat_pauses_and_decides_later(executor: Cerebro) -> None:
    module, expected = lightning_nets.Momentum(), lightning_nets.Momentum()
    expected.load_state_dict(module.state_dict())
    seat = Asked(executor, Decision.PAUSE, None, Decision.CONTINUE)

    def call() -> Any:
        with seated(seat):
            return fit(None, module, *loaders())

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(call)
        trial, report = seat.reports.get()
        assert (report["epoch"], report["training_iteration"]) == (1.0, 1)
        assert run_of(executor).status(trial) == "paused"
        assert not ended.done()
        run_of(executor).resume(trial)
        trial, report = seat.reports.get()
        assert run_of(executor).status(trial) == "deciding"
        run_of(executor).decide(trial, Decision.CONTINUE)
        hopped = ended.result()
    assert_same(hopped, plain_fit(executor, hopped.strategy.result, expected))
    assert [result.status for result in seat.concluded] == ["finished"]
    assert executor.current is None


def test_a_seat_stops(executor: Cerebro) -> None:
    seat = Asked(executor, Decision.CONTINUE, Decision.STOP)
    hopped = fit(None, lightning_nets.Momentum(), *loaders(), trial=seat)
    assert (hopped.should_stop, hopped.current_epoch, hopped.global_step) == (True, 2, 32)
    assert seat.concluded == [hopped.strategy.result]
    assert hopped.strategy.result.status == "stopped"
    assert hopped.callback_metrics["val_loss"] == pytest.approx(hopped.strategy.result.last_metrics["val_loss"])


def test_a_seat_prunes(executor: Cerebro) -> None:
    class Heeding(pl.Callback):  # type: ignore[misc,name-defined]
        raised: Any = None

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.raised = exception

    heeding = Heeding()
    module = lightning_nets.Momentum()
    before = module.net[0].weight.clone()
    with pytest.raises(Pruned, match="trial-0000") as raised:
        fit(None, module, *loaders(), callbacks=[heeding], trial=Asked(executor, Decision.STOP, raises=Pruned))
    assert heeding.raised is raised.value
    assert module.trainer.interrupted
    assert not torch.equal(module.net[0].weight, before), "the weights are those of the pruned trial"
    fit(executor, module, *loaders(), max_epochs=1)


def test_what_fails_in_a_worker_is_raised_with_its_traceback(executor: Cerebro) -> None:
    class Failing(lightning_nets.Momentum):  # type: ignore[misc,name-defined]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError("nothing to divide by")

    module = Failing()
    with pytest.raises(TrialFailedError, match=r"(?s)trial-0000, a Failing, failed:.*in training_step.*nothing to div"):
        fit(executor, module, *loaders())
    assert module.trainer.interrupted
    assert module.trainer.strategy.result.status == "failed"


def test_a_run_that_breaks_lets_the_next_fit_in(executor: Cerebro) -> None:
    with pytest.raises(UnknownMetricError, match="No report has a metric 'loss_of_validation'"):
        fit(executor, lightning_nets.Momentum(), *loaders(), metric="loss_of_validation")
    fit(executor, lightning_nets.Momentum(), *loaders(), max_epochs=1)


def test_fits_that_share_a_run_agree_on_the_metric(executor: Cerebro) -> None:
    seat = Asked(executor, None)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(fit, None, lightning_nets.Momentum(), *loaders(), trial=seat, max_epochs=1)
        trial, _ = seat.reports.get()
        with pytest.raises(ConfigurationError, match=r"this one has \('train_loss', 'min'\), the run"):
            fit(executor, lightning_nets.Momentum(), *loaders(), metric="train_loss")
        run_of(executor).decide(trial, Decision.CONTINUE)
        one.result()


def test_a_second_monitor_is_told_of(executor: Cerebro, tmp_path: Path) -> None:
    savers = [pl.callbacks.ModelCheckpoint(tmp_path, monitor=name) for name in ("val_loss", "train_loss")]
    with pytest.warns(UserWarning, match="monitors 'train_loss', but the trial's best is found by 'val_loss'"):
        fit(executor, lightning_nets.Momentum(), *loaders(), callbacks=savers, enable_checkpointing=True)
    scores = [float(saver.best_model_score) for saver in savers]
    assert all(Path(saver.best_model_path).exists() for saver in savers)
    assert scores[0] != scores[1]


REFUSED: dict[str, Any] = {
    "max_epochs=-1": {"max_epochs": -1},
    "max_steps=100": {"max_steps": 100},
    "devices=2": {"devices": 2},
    "num_nodes=2": {"num_nodes": 2},
    "fast_dev_run=True": {"fast_dev_run": True},
    "overfit_batches=2": {"overfit_batches": 2},
    "limit_train_batches=0.5": {"limit_train_batches": 0.5},
    "limit_val_batches=3": {"limit_val_batches": 3},
    "val_check_interval=0.5": {"val_check_interval": 0.5},
    "check_val_every_n_epoch=2": {"check_val_every_n_epoch": 2},
    "reload_dataloaders_every_n_epochs=1": {"reload_dataloaders_every_n_epochs": 1},
    "profiler='SimpleProfiler'": {"profiler": "simple"},
    "sync_batchnorm=True": {"sync_batchnorm": True},
    "the plugin MixedPrecision": {"plugins": [pl.plugins.MixedPrecision("bf16-mixed", "cpu")]},
    "the callback Timer": {"max_time": "00:00:10:00"},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_what_cannot_hold_is_refused_before_training(executor: Cerebro, what: str) -> None:
    with pytest.raises((ConfigurationError, NotTrainableError), match=what):
        fit(executor, lightning_nets.Momentum(), *loaders(), **REFUSED[what])
    assert executor.current is None


def test_other_things_that_are_refused(executor: Cerebro, tmp_path: Path) -> None:
    module = lightning_nets.Momentum()
    trainer = pl.Trainer(strategy=HopStrategy(executor), max_epochs=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(ConfigurationError, match=r"ckpt_path='x.ckpt', which cannot hold by hops: go on in a Trainer"):
        trainer.fit(module, *loaders(), ckpt_path="x.ckpt")
    with pytest.raises(ConfigurationError, match="fit is given 2 validation loaders"):
        trainer.fit(module, loaders()[0], [loaders()[1]] * 2)
    with pytest.raises(ConfigurationError, match="The train loader has a SequentialSampler"):
        trainer.fit(module, loaders()[1])
    with pytest.raises(ConfigurationError, match=r"Momentum is compiled, .* in configure_model\(\)"):
        trainer.fit(torch.compile(lightning_nets.Momentum(), backend="eager"), *loaders())
    module.lock = threading.Lock()
    with pytest.raises(NotPicklableError, match=r"Momentum, or a callback .* cannot be sent .* Make in setup\(\)"):
        trainer.fit(module, *loaders())
    with pytest.raises(ConfigurationError, match="keep='none', but a fit gives its weights back"):
        fit(Cerebro(keep="none", run_dir=tmp_path), lightning_nets.Momentum(), *loaders())


@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_workers_that_are_the_caller_itself(tmp_path: Path, nets: Any) -> None:
    with made(tmp_path, backend="inline") as cerebro:
        torch.manual_seed(3)
        module, expected = nets.Busy(), nets.Busy()
        expected.load_state_dict(module.state_dict())
        drawn = torch.rand(3)
        torch.manual_seed(3)
        hopped = fit(cerebro, module, *loaders(), nets=nets)
        assert_same(hopped, plain_fit(cerebro, hopped.strategy.result, expected, nets))
        del drawn


def test_an_instance_is_trained_from_the_weights_it_has(executor: Cerebro) -> None:
    fit(executor, lightning_nets.Momentum(), *loaders(), max_epochs=1)
    module, expected = lightning_nets.Momentum(lr=0.02), lightning_nets.Momentum(lr=0.02)
    expected.load_state_dict(module.state_dict())
    (result,) = executor.fit(module, metric="val_loss", configs=[{"epochs": EPOCHS, "batch_size": BATCH}])
    assert_equal(module.state_dict(), expected.state_dict())  # which stays as it is
    plain = plain_fit(executor, result, expected)
    hopped = torch.load(result.last_checkpoint, weights_only=True)
    assert_equal(hopped["state_dict"], plain.lightning_module.state_dict())
    assert hopped["hyper_parameters"] == expected.hparams
    again = lightning_nets.Momentum.load_from_checkpoint(result.last_checkpoint)
    assert_equal(again.state_dict(), expected.state_dict())
    with pytest.raises(ConfigurationError, match="A config has lr, but Momentum is given as an instance"):
        executor.fit(module, [{"lr": 0.1}])
    module.lock = threading.Lock()
    with pytest.raises(NotPicklableError, match="The module Momentum cannot be sent to the workers"):
        executor.fit(module)


SCRIPT = """
import {package} as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from cerebro_tune_lightning import HopStrategy

class Net(pl.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        {step}
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

pl.seed_everything(7)
x = torch.randn(200, 8)
data = TensorDataset(x, (x.sum(1) > 0).long())
class Ends(pl.Callback):
    def on_exception(self, trainer, module, error):
        print("on_exception", type(error).__name__, trainer.state.status.value)

trainer = pl.Trainer(strategy=HopStrategy(), max_epochs={epochs}, logger=False, callbacks=[Ends()])
trainer.fit(Net(), DataLoader(data, 16, shuffle=True), DataLoader(data, 16))
result = trainer.strategy.result
print("ended", result.status, trainer.current_epoch, len(result.visits))
print("loss", float(trainer.callback_metrics["val_loss"]), trainer.checkpoint_callback.best_model_path)
"""


def script(tmp_path: Path, **values: Any) -> subprocess.Popen[str]:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT.format(**{"package": "pytorch_lightning", "step": "pass", "epochs": 2} | values))
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(file)], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_an_unguarded_script_needs_no_executor(tmp_path: Path, package: str) -> None:
    said = []
    for _ in range(2 if package == "pytorch_lightning" else 1):
        process = script(tmp_path, package=package)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "ended finished 2 16" in out
        assert [line.partition(" ")[0] for line in out.splitlines()] == ["trial-0000", "trial-0000", "ended", "loss"], (
            "there is one display of progress, and workers say nothing"
        )
        told = [line for line in err.splitlines() if not line.startswith(("INFO: ", "Seed set", "GPU ", "TPU ", "💡"))]
        assert told == [], "of what Lightning says, only what the user's own Trainer does when it is made"
        said.append(out.split("loss ")[1].partition(" ")[0])
    assert len(set(said)) == 1, "seed_everything seeds what is drawn by hops, too"
    assert [path.name for path in sorted((tmp_path / "runs").glob("*/trial-0000/*"))]


def test_ctrl_c_ends_a_fit_cleanly(tmp_path: Path) -> None:
    process = script(tmp_path, epochs=100_000, step="print('training', flush=True) if batch_idx == 0 else None")
    assert process.stdout is not None
    children: list[psutil.Process] = []
    for line in process.stdout:
        if "training" in line:
            children = psutil.Process(process.pid).children(recursive=True)
            break
    assert children
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err  # Lightning's own
    assert "on_exception KeyboardInterrupt interrupted" in out
    assert "Traceback" not in err
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)


def test_the_example_beats_what_it_states(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "lightning_trainer.py"
    torchs = "ignore:`isinstance(treespec, LeafSpec)` is deprecated"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", torchs, str(example)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "[" not in done.stdout, f"a worker had something to say:\n{done.stdout}"
    scores = [float(line.split()[2]) for line in done.stdout.splitlines() if line.lstrip().startswith("0.")]
    assert len(scores) == 4
    assert "images" in done.stdout.splitlines()[-1]
