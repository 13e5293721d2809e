"""What is logged by hops over two processes: for each trial the files that one plain `Trainer.fit` would write."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import lightning_nets
import unified_nets
from cerebro_tune import Cerebro, Decision, ShardedDataset, VisitLoader
from cerebro_tune.errors import ConfigurationError, TrialFailedError
from cerebro_tune.seeding import seed_build
from cerebro_tune_lightning import HopStrategy, LightningTrainable, ReseedCallback
from runs import Script, outliving
from test_hop_strategy import datamodule, loaders, made
from test_lightning_parity import ValidationLoader

EPOCHS, BATCH, SEED = 3, 16, 5

pytestmark = [
    # torch about Lightning's own CombinedLoader; Lightning about the machine's cores, and about what modules override.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*overriding `LightningModule.optimizer_step`"),
]


def talking(nets: Any) -> Any:
    class Talking(nets.Busy):
        """Logs whatever can be logged: by step and epoch, in validation, and to the logger itself."""

        def on_train_start(self) -> None:
            self.logger.log_metrics({"started": torch.tensor(1.0)}, step=0)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val_first", batch[0][0, 0], on_step=True, on_epoch=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 4 == 3:
                self.loggers[0].experiment.add_histogram("weights", self.net[0].weight, self.global_step)
                self.loggers[1].experiment.log_metrics({"largest": batch[0].max()}, self.global_step)
            return super().training_step(batch, batch_idx)

        def on_fit_end(self) -> None:
            for logger in self.loggers:
                logger.log_metrics({"ended": 2.0}, step=self.global_step)

    return Talking


def loggers(nets: Any, folder: Path, version: str | None = None) -> list[Any]:
    made = import_module(f"{nets.HOST}.loggers")
    return [
        made.TensorBoardLogger(folder, name="board", version=version),
        made.CSVLogger(folder, name="table", version=version, flush_logs_every_n_steps=7),
    ]


def events(folder: Path) -> list[Any]:
    """All that is in the event files of a folder, in order, without the time of writing."""
    found = []
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            event.wall_time = 0
            found.append(event.SerializeToString(deterministic=True))
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.tensor.float_val[0])
        for path in sorted(folder.glob("events.*"))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tensor.float_val
    ]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_files(folder: Path, hopped: str, plain: str) -> None:
    for name in ("table", "board"):
        one, other = folder / name / hopped, folder / name / plain
        assert (one / "hparams.yaml").read_text() == (other / "hparams.yaml").read_text()
    assert (folder / "table" / hopped / "metrics.csv").read_bytes() == (
        folder / "table" / plain / "metrics.csv"
    ).read_bytes()
    assert scalars(folder / "board" / hopped) == scalars(folder / "board" / plain)
    assert events(folder / "board" / hopped) == events(folder / "board" / plain)


def pinned(train: Any, validation: Any, folder: Path, **options: Any) -> Cerebro:
    """Two workers, both of which every trial visits."""
    return Cerebro(
        train, validation, **{"epochs": EPOCHS, "batch_size": BATCH, "workers": 2, "placement": "pinned",
        "report_every": "epoch", "progress": False, "seed": SEED, "run_dir": folder} | options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cerebro(
    train: ShardedDataset, validation: ShardedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cerebro]:
    with pinned(train, validation, tmp_path_factory.mktemp("runs")) as executor:
        yield outliving(executor)


def options_of(nets: Any) -> dict[str, Any]:
    monitor = nets.pl.callbacks.LearningRateMonitor()
    return {"log_every_n_steps": 3, "accumulate_grad_batches": 2, "callbacks": [monitor]}


def plain_fit(nets: Any, module: Any, loader: Any, validation: Any, visits: Any, index: int, **kwargs: Any) -> None:
    torch.set_num_threads(1)
    callbacks = [ReseedCallback(SEED, index, visits), *kwargs.pop("callbacks")]
    nets.pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=callbacks, **kwargs,
    ).fit(module, loader, validation)  # fmt: skip


@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_each_trial_writes_what_a_plain_fit_writes(cerebro: Cerebro, tmp_path: Path, nets: Any, capfd: Any) -> None:
    kind = talking(nets)
    trainable = LightningTrainable(kind, trainer_kwargs=options_of(nets) | {"logger": loggers(nets, tmp_path)})
    results = cerebro.fit(trainable, [{"lr": 0.05}, {"lr": 0.01}], metric="val_loss")
    assert capfd.readouterr() == ("", "")
    assert [result.error for result in results] == [None, None]
    for index, result in enumerate(results):
        assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
        loader = VisitLoader(cerebro.train, result.visits, batch_size=BATCH, seed=SEED, trial_index=index)
        seed_build(SEED, index)
        plain_fit(
            nets, kind(**result.config), loader, ValidationLoader(cerebro.validation, {}), result.visits, index,
            **options_of(nets), logger=loggers(nets, tmp_path, f"plain-{index}"),
        )  # fmt: skip
        assert_same_files(tmp_path, result.trial_id, f"plain-{index}")
    logged = scalars(tmp_path / "board" / "trial-0000")
    tags = {tag for _, tag, _ in logged}
    assert tags >= {"hp_metric", "lr-AdamW", "loss_step", "loss_epoch", "val_first_step", "started", "ended", "epoch"}
    assert len([tag for _, tag, _ in logged if tag in ("hp_metric", "started", "ended")]) == 3
    steps = [step for step, tag, _ in logged if tag == "loss_step"]
    assert steps == list(range(2, 24, 3)), "of 24 steps each third is logged, over all hops"
    measured = [step for step, tag, _ in logged if tag == "val_first_step"]
    assert measured == list(range(EPOCHS * 7)), "Lightning counts the batches of all validations"


def test_a_run_begun_again_writes_beside_the_files_of_the_first(options: dict[str, Any], tmp_path: Path) -> None:
    trainable = LightningTrainable(
        lightning_nets.Busy, trainer_kwargs={"logger": loggers(lightning_nets, tmp_path), "log_every_n_steps": 1}
    )
    with Cerebro(**options) as executor:
        executor.fit(trainable, [{"lr": 0.05}])
        executor.fit(trainable, [{"lr": 0.05}])
    assert {path.name for path in (tmp_path / "table").iterdir()} == {"trial-0000", "trial-0000-1"}
    assert_same_files(tmp_path, "trial-0000", "trial-0000-1")
    assert len([row for row in table(tmp_path / "table" / "trial-0000") if row["val_loss"]]) == 8, "one a unit"


def test_a_version_that_was_given_is_the_folder_of_the_trials(options: dict[str, Any], tmp_path: Path) -> None:
    for version in ("first", 7):
        both = loggers(lightning_nets, tmp_path, version)  # type: ignore[arg-type]  # Lightning takes numbers, too
        with Cerebro(**options) as executor:
            executor.fit(LightningTrainable(lightning_nets.Busy, trainer_kwargs={"logger": both}), [{}, {}])
    for folder in ("first", "version_7"):
        for kind in ("table", "board"):
            assert {path.name for path in (tmp_path / kind / folder).iterdir()} == {"trial-0000", "trial-0001"}


class Dies(lightning_nets.Busy):  # type: ignore[misc]
    """Kills its worker in the second unit, the first time; raises in the fifth when told to."""

    def __init__(self, marker: str, raises: bool = False) -> None:
        super().__init__()
        self.marker, self.raises = Path(marker), raises

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 0 and batch_idx == 6 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        if self.raises and self.current_epoch == 1:
            raise RuntimeError("as told")
        return super().training_step(batch, batch_idx)


class Noted(import_module("pytorch_lightning.loggers.logger").DummyLogger):  # type: ignore[misc]
    """A logger of the user's own, that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told += [(step, name) for name in metrics if name in ("loss_step", "val_loss")]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append(params)

    def finalize(self, status: str) -> None:
        self.told.append(status)


def test_units_that_are_run_again_are_logged_once_and_failed_trials_end_as_failed(
    train: ShardedDataset, tmp_path: Path
) -> None:
    kept: dict[str, Noted] = {}

    def make(trial_id: str) -> Noted:
        return kept.setdefault(trial_id, Noted())

    configs = [{"marker": str(tmp_path / str(number)), "raises": number == 1} for number in range(2)]
    trainable = LightningTrainable(Dies, trainer_kwargs={"logger": make, "log_every_n_steps": 1})
    with pinned(train, None, tmp_path, epochs=2) as executor:
        well, ill = executor.fit(trainable, configs)
    assert (well.status, ill.status) == ("finished", "failed")
    hparams = {"lr": 0.05, "width": 8, "dropout": 0.3}
    logged = [[(step, "loss_step") for step in range(steps)] for steps in (32, 16)]
    assert kept["trial-0000"].told == [hparams | configs[0], *logged[0], "success"]
    assert kept["trial-0001"].told == [hparams | configs[1], *logged[1], "failed"]


class NoLogger(lightning_nets.Busy):  # type: ignore[misc]
    def on_train_start(self) -> None:
        assert self.logger is None


class OneLogger(lightning_nets.Busy):  # type: ignore[misc]
    def on_train_start(self) -> None:
        assert len(self.loggers) == 1
        self.logger.experiment.add_text("who", "cares")


@pytest.mark.parametrize(
    ("kind", "given"),
    [(NoLogger, {"logger": False}), (NoLogger, {"logger": []}), (OneLogger, {}), (OneLogger, {"logger": None})],
)
def test_a_module_has_a_logger_where_it_has_one_in_a_plain_fit(
    options: dict[str, Any], kind: Any, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Cerebro(**options) as executor:
        (result,) = executor.fit(LightningTrainable(kind, trainer_kwargs=given))
    assert result.error is None
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_true_is_lightnings_default(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Cerebro(**options) as executor:
        executor.fit(LightningTrainable(OneLogger, trainer_kwargs={"logger": True, "log_every_n_steps": 5}))
    logged = scalars(tmp_path / "lightning_logs" / "trial-0000")
    assert [step for step, tag, _ in logged if tag == "loss_step"] == [4, 9, 14, 19, 24, 29]


def test_stopped_and_paused_trials_are_finalized(options: dict[str, Any]) -> None:
    kept: dict[str, Noted] = {}
    answers = {"trial-0000": Decision.STOP, "trial-0001": Decision.PAUSE}
    trainable = LightningTrainable(
        lightning_nets.Busy, trainer_kwargs={"logger": lambda trial: kept.setdefault(trial, Noted())}
    )
    with Cerebro(**options) as executor:
        run = executor.run(trainable, Script(lambda trial_id, report: answers[trial_id]))
        run.add({})
        run.add({})
        run.end_search()
        executor.drive(run)
    assert [kept[trial].told[-1] for trial in answers] == ["success", "success"]


class Full(Noted):
    def save(self) -> None:
        raise OSError("no space left")


def test_a_logger_that_fails_is_told_no_more_and_trials_go_on(options: dict[str, Any]) -> None:
    kept: dict[str, Any] = {}

    def make(trial_id: str) -> Any:
        return kept.setdefault(trial_id, Full() if trial_id == "trial-0000" else Noted())

    trainable = LightningTrainable(lightning_nets.Busy, trainer_kwargs={"logger": make, "log_every_n_steps": 1})
    with (
        Cerebro(**options) as executor,
        pytest.warns(UserWarning, match="The Full of trial-0000 hears no more .* OSError: no space left") as warned,
    ):
        results = executor.fit(trainable, [{}, {}])
    assert len(warned) == 1
    assert [result.status for result in results] == ["finished", "finished"]
    assert "success" not in kept["trial-0000"].told
    assert kept["trial-0001"].told[-1] == "success"


def test_what_cannot_be_a_logger_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    made = import_module("pytorch_lightning.loggers")
    for given, wrong in [
        (Noted(), r"The Noted given as logger is one run .* logger=lambda trial_id: Noted\("),
        ("tensorboard", "logger is 'tensorboard'; valid: a CSVLogger"),
        ([made.CSVLogger(tmp_path), 3], "logger is 3; valid"),
        (made.TensorBoardLogger(tmp_path, log_graph=True), "The TensorBoardLogger has log_graph=True"),
    ]:
        with pytest.raises(ConfigurationError, match=wrong):
            LightningTrainable(lightning_nets.Busy, trainer_kwargs={"logger": given})
    shared = made.WandbLogger.__new__(made.WandbLogger)  # as it is made where wandb is installed
    shared._experiment = None
    for each, wrong in [(None, "made None for trial-0000; it must"), (shared, "made a WandbLogger without a run")]:
        trainable = LightningTrainable(OneLogger, trainer_kwargs={"logger": lambda trial_id, each=each: each})
        with Cerebro(**options) as executor, pytest.raises(ConfigurationError, match=wrong):
            executor.fit(trainable)


class Odd(lightning_nets.Busy):  # type: ignore[misc]
    """Tells the logger itself of hyper-parameters, one of which cannot travel."""

    def on_train_start(self) -> None:
        self.logger.log_hyperparams(Namespace(stream=(each for each in ()), width=7), {"hp/loss": 0.0})


def test_hyper_parameters_that_cannot_travel_are_logged_as_text(options: dict[str, Any]) -> None:
    kept = Noted()
    trainable = LightningTrainable(Odd, trainer_kwargs={"logger": [lambda trial_id: kept]})
    with Cerebro(**options) as executor:
        (result,) = executor.fit(trainable)
    assert result.error is None
    saved, told = (told for told in kept.told if isinstance(told, dict))
    assert saved["width"] == 8
    assert told["width"] == 7
    assert told["stream"].startswith("<generator object")


# With a DataModule, and with a Trainer of the user's own.


@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_a_trainable_brings_its_data(tmp_path: Path, nets: Any) -> None:
    given = datamodule(nets)
    given.save_hyperparameters({"shuffled": True})
    trainable = LightningTrainable(nets.OneCycle, trainer_kwargs={"logger": loggers(nets, tmp_path)}, datamodule=given)
    assert cloudpickle.loads(cloudpickle.dumps(trainable)).datamodule is None, "it travels with the data"
    with made(tmp_path, backend="inline", epochs=2) as executor:
        results = executor.fit(trainable, [{"lr": 0.05}, {"lr": 0.01}])
        again = executor.fit(trainable, [{"lr": 0.05}])
    assert [result.error for result in [*results, *again]] == [None] * 3
    assert again[0].last_metrics["val_loss"] == results[0].last_metrics["val_loss"]
    assert "shuffled: true" in (tmp_path / "table" / "trial-0000" / "hparams.yaml").read_text()


@pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)
def test_a_users_own_trainer_logs_what_a_plain_fit_logs(tmp_path: Path, nets: Any) -> None:
    kind = talking(nets)
    strategy = HopStrategy()
    with made(tmp_path / "runs") as strategy.executor:
        seed_build(SEED, 0)
        hopped = nets.pl.Trainer(
            strategy=strategy, max_epochs=EPOCHS, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options_of(nets),
            logger=loggers(nets, tmp_path, "hopped"),
        )  # fmt: skip
        hopped.fit(kind(), *loaders())
        visits = strategy.result.visits
        loader = VisitLoader(strategy.executor.train, visits, batch_size=BATCH, seed=SEED, trial_index=0)
    seed_build(SEED, 0)
    own = loggers(nets, tmp_path, "plain")
    plain_fit(nets, kind(), loader, loaders()[1], visits, 0, **options_of(nets), logger=own)
    assert_same_files(tmp_path, "hopped", "plain")


class Failing(lightning_nets.Busy):  # type: ignore[misc]
    def on_train_epoch_end(self) -> None:
        raise RuntimeError("as told")


def test_the_loggers_of_a_users_own_trainer_are_finalized(tmp_path: Path) -> None:
    for kind, ending in ((lightning_nets.Busy, "success"), (Failing, "failed")):
        kept = Noted()
        with made(tmp_path, backend="inline") as executor:
            trainer = lightning_nets.pl.Trainer(
                strategy=HopStrategy(executor), max_epochs=1, accelerator="cpu", enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False, enable_autolog_hparams=False, logger=kept,
                log_every_n_steps=1,
            )  # fmt: skip
            if ending == "success":
                trainer.fit(kind(), *loaders())
            else:
                with pytest.raises(TrialFailedError, match="as told"):
                    trainer.fit(kind(), *loaders())
        assert kept.told[-1] == ending
        assert kept.told.count(ending) == 1
        assert not [told for told in kept.told if isinstance(told, dict)], "as the Trainer was told"


# Services, where their packages are installed.


class Telling(lightning_nets.Busy):  # type: ignore[misc]
    """Logs through the run itself."""

    def on_train_epoch_end(self) -> None:
        self.logger.experiment.log({"mine": self.current_epoch})


def test_runs_of_weights_and_biases_are_continuous(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # which has threads that outlive it
    wandb = pytest.importorskip("wandb")
    runs: dict[str, Any] = {}

    def make(trial_id: str) -> Any:
        runs[trial_id] = wandb.init(
            project="p", name=trial_id, dir=str(tmp_path), mode="offline", reinit="create_new",
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
        return import_module("pytorch_lightning.loggers").WandbLogger(experiment=runs[trial_id])

    trainable = LightningTrainable(Telling, trainer_kwargs={"logger": make, "log_every_n_steps": 5})
    with Cerebro(**options) as executor:
        executor.fit(trainable, [{"lr": 0.05}, {"lr": 0.01}])
    for run in runs.values():
        assert (run.summary["mine"], run.summary["trainer/global_step"]) == (1, 31)
        run.finish()
    wandb.teardown()


def test_runs_of_mlflow_are_continuous(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    kept: dict[str, Any] = {}

    def make(trial_id: str) -> Any:
        made = import_module("pytorch_lightning.loggers").MLFlowLogger
        return kept.setdefault(trial_id, made("e", run_name=trial_id, tracking_uri=f"file:{tmp_path}/mlflow"))

    trainable = LightningTrainable(lightning_nets.Busy, trainer_kwargs={"logger": make, "log_every_n_steps": 4})
    with Cerebro(**options) as executor:
        executor.fit(trainable, [{"lr": 0.05}, {"lr": 0.01}])
    for logger in kept.values():
        steps = [metric.step for metric in logger.experiment.get_metric_history(logger.run_id, "loss_step")]
        assert steps == list(range(3, 32, 4))
        assert logger.experiment.get_run(logger.run_id).info.status == "FINISHED"
