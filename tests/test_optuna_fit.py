"""Objectives that train by hops under Optuna's own loop, from one thread or many: `fit`, `HopStrategy`, callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import optuna
import pytest
import torch
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader, TensorDataset

import nets
import unified_nets
from cerebro_tune import Cerebro
from cerebro_tune.errors import ConfigurationError, TrialFailedError
from cerebro_tune_lightning import HopStrategy, LightningTrainable
from cerebro_tune_optuna import CerebroCallback, PromotionPruner, fit, optimize, pruners
from nets import Linear
from optuna_studies import COMPLETE, FAIL, PRUNED, a_study, linear, states

pl = lightning.pytorch
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}

pytestmark = [
    pytest.mark.usefixtures("quiet_optuna"),
    # torch about Lightning's own CombinedLoader; Lightning about the machine's cores.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def fitting(cerebro: Cerebro, **kwargs: Any) -> Callable[[optuna.Trial], Any]:
    def objective(trial: optuna.Trial) -> Any:
        return fit(trial, *linear(trial), executor=cerebro, **{"metric": "val_loss"} | kwargs)

    return objective


def test_one_thread_trains_what_a_plain_fit_does(options: dict[str, Any]) -> None:
    study = a_study()
    with Cerebro(**options) as cerebro:
        study.optimize(fitting(cerebro), n_trials=3)
        for trial in study.trials:
            (result,) = cerebro.fit(Linear, [trial.params], metric="val_loss")
            assert trial.value == result.metrics["val_loss"]
            assert trial.intermediate_values == {r["training_iteration"]: r["val_loss"] for r in result.history}
            assert trial.user_attrs["units"] == 8


@pytest.mark.parametrize("threads", [8, 64])
def test_many_threads_share_a_run(options: dict[str, Any], threads: int) -> None:
    study = a_study(pruner=pruners.MedianPruner(n_startup_trials=3))
    with Cerebro(**options | {"epochs": 1}) as cerebro:
        study.optimize(fitting(cerebro), n_trials=threads, n_jobs=threads)
        assert cerebro.current is None
    assert set(states(study)) == {COMPLETE, PRUNED}
    assert len({trial.user_attrs["trial_id"] for trial in study.trials}) == threads, "they are of one run"
    for trial in study.trials:
        assert len(trial.intermediate_values) == trial.user_attrs["units"] <= 4
        assert trial.state is PRUNED or trial.value == trial.intermediate_values[4]
        assert Path(trial.user_attrs["checkpoint"]).exists()


def test_several_objectives_and_what_goes_wrong(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        study = a_study(directions=["minimize", "maximize"])
        study.optimize(fitting(cerebro, metric=["val_loss", "val_accuracy"]), n_trials=4, n_jobs=2)
        assert set(states(study)) == {COMPLETE}
        assert all(len(trial.values) == 2 and 0 <= trial.values[1] <= 1 for trial in study.trials)

        study = a_study()
        study.optimize(lambda trial: fit(trial, nets.Diverging, {"lr": 0.1}, executor=cerebro, metric="val_loss"), 2)
        assert states(study) == [FAIL, FAIL], "and goes on"
        assert "The training loss of trial-0000 is nan" in study.trials[0].user_attrs["error"]

        def raising(trial: optuna.Trial) -> Any:
            return fit(trial, nets.Raising, {"lr": 0.1, "raise_in": (0, 1)}, executor=cerebro, metric="val_loss")

        with pytest.raises(TrialFailedError, match=r"(?s)trial-0000 failed:.*this unit was told to raise"):
            study.optimize(raising, 2)
        with pytest.raises(ConfigurationError, match="PromotionPruner lets trials wait"):
            a_study(pruner=PromotionPruner()).optimize(fitting(cerebro), 2)
        with pytest.raises(ConfigurationError, match="valid: 'best', 'last'"):
            study.optimize(fitting(cerebro, value="median"), 2)


def test_a_trial_that_somebody_else_has_told_stops(options: dict[str, Any]) -> None:
    def meddle(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        for other in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(other.number, 0.5)

    study = a_study()
    with Cerebro(**options | {"policy": "fixed"}) as cerebro:
        optimize(study, linear, 4, executor=cerebro, metric="val_loss", callbacks=[meddle])
    assert states(study) == [COMPLETE] * 4
    assert [trial.value == 0.5 for trial in study.trials].count(True) == 3
    assert all(trial.intermediate_values for trial in study.trials)


# A Trainer of the objective's own.


def points(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x @ torch.arange(1.0, 9.0) > 0).long())


def loaders() -> tuple[Any, Any]:
    return DataLoader(points(202, 0), 16, shuffle=True), DataLoader(points(100, 1), 25)


def test_trainers_in_threads_report_to_their_trials(tmp_path: Path) -> None:
    histories: dict[int, Any] = {}

    def objective(trial: optuna.Trial) -> float:
        strategy = HopStrategy(cerebro, trial, metric="val_loss")
        trainer = pl.Trainer(strategy=strategy, max_epochs=2, enable_checkpointing=False, **QUIET)
        try:
            trainer.fit(unified_nets.Momentum(lr=trial.suggest_float("lr", 1e-3, 0.5, log=True)), *loaders())
        finally:
            histories[trial.number] = strategy.result
        return float(trainer.callback_metrics["val_loss"])

    study = a_study(pruner=pruners.PercentilePruner(25.0, n_startup_trials=2))
    with Cerebro(workers=2, backend="inline", num_shards=4, run_dir=tmp_path, progress=False, keep="last") as cerebro:
        study.optimize(objective, n_trials=6, n_jobs=6, callbacks=[CerebroCallback(cerebro, keep_best=1)])
    assert set(states(study)) == {COMPLETE, PRUNED}
    for trial in study.trials:
        result = histories[trial.number]
        assert trial.intermediate_values == {r["training_iteration"]: r["val_loss"] for r in result.history}
        assert trial.user_attrs["trial_id"] == result.trial_id
        assert (result.status == "stopped") is (trial.state is PRUNED and trial.user_attrs["units"] < 8)
        assert trial.state is PRUNED or trial.value == pytest.approx(result.last_metrics["val_loss"])
    checkpoints = {trial.number for trial in study.trials if Path(trial.user_attrs["checkpoint"]).exists()}
    assert checkpoints == {study.best_trial.number}


def test_an_optuna_trial_needs_an_executor_and_a_metric(tmp_path: Path) -> None:
    def fit_with(strategy: Any, **kwargs: Any) -> Any:
        trainer = pl.Trainer(strategy=strategy, max_epochs=1, **QUIET | {"enable_checkpointing": False} | kwargs)
        trainer.fit(unified_nets.Momentum(), *loaders())

    trial = a_study().ask()
    cerebro = Cerebro(workers=2, backend="inline", run_dir=tmp_path, progress=False)
    for strategy in (HopStrategy(trial=trial, metric="val_loss"), HopStrategy(cerebro, trial)):
        with pytest.raises(ConfigurationError, match="An Optuna trial knows neither what trains it nor"):
            fit_with(strategy)
    with pytest.raises(ConfigurationError, match="trial is 7, which is no trial of a tuner"):
        fit_with(HopStrategy(cerebro, 7))
    with cerebro:
        saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
        fit_with(HopStrategy(cerebro, trial), callbacks=[saver], enable_checkpointing=True)
    assert trial.user_attrs["units"] == 8


def test_the_pruning_callback_is_named(options: dict[str, Any]) -> None:
    what = (
        r"is trained with PyTorchLightningPruningCallback\(trial, monitor='val_f1'\), .* take that callback out, and "
        r"give .* HopStrategy\(cerebro, trial, metric='val_f1'\)"
    )

    def trainer(trial: optuna.Trial) -> Any:
        callbacks = [PyTorchLightningPruningCallback(trial, monitor="val_f1")]
        strategy = HopStrategy(cerebro, trial, metric="val_f1")
        pl.Trainer(strategy=strategy, max_epochs=1, enable_checkpointing=False, callbacks=callbacks, **QUIET).fit(
            unified_nets.Momentum(), *loaders()
        )

    def wrapped(trial: optuna.Trial) -> Any:
        callbacks = [PyTorchLightningPruningCallback(trial, monitor="val_f1")]
        return LightningTrainable(unified_nets.Momentum, trainer_kwargs={"callbacks": callbacks})

    with Cerebro(**options) as cerebro:
        with pytest.raises(ConfigurationError, match=what):
            a_study().optimize(trainer, 1)
        with pytest.raises(ConfigurationError, match=what):
            optimize(a_study(), wrapped, 1, executor=cerebro, metric="val_f1")


# The callback of the study.


def test_the_callback_keeps_the_best_and_stops_at_the_budget(options: dict[str, Any]) -> None:
    with Cerebro(**options | {"policy": "fixed"}) as cerebro:
        for way in ("optimize", "threads"):
            study = a_study(direction="maximize")
            callback = CerebroCallback(cerebro, keep_best=2, max_units=cerebro.units(6))
            if way == "optimize":
                optimize(study, linear, executor=cerebro, metric="val_accuracy", callbacks=[callback])
            else:
                study.optimize(fitting(cerebro, metric="val_accuracy"), n_jobs=2, callbacks=[callback])
            units = [trial.user_attrs["units"] for trial in study.trials]
            assert 24 <= sum(units) <= 24 + 8 * 4, "3 trials are 24 units, and those in flight end"
            assert set(states(study)) == {COMPLETE}
            kept = [trial for trial in study.trials if Path(trial.user_attrs["checkpoint"]).exists()]
            assert len(kept) == 2
            assert sorted(trial.value for trial in kept) == sorted(trial.value for trial in study.trials)[-2:]


def test_the_callback_deletes_nothing_of_others(options: dict[str, Any], tmp_path: Path) -> None:
    study = a_study(directions=["minimize", "maximize"])
    with Cerebro(**options) as cerebro:
        callback = CerebroCallback(cerebro, keep_best=0)
        optimize(study, linear, 4, executor=cerebro, metric=["val_loss", "val_accuracy"], callbacks=[callback])
        kept = {trial.number for trial in study.trials if Path(trial.user_attrs["checkpoint"]).exists()}
        assert kept == {trial.number for trial in study.best_trials}
        for folder in (tmp_path / "elsewhere" / "run" / "trial-0000", Path(str(cerebro.run_dir), "run-0000", "..")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "precious").touch()
            trial = study.ask()
            trial.set_user_attr("folder", str(folder))
            callback(study, study.tell(trial, state=FAIL))
            assert (folder / "precious").exists()
    with pytest.raises(ConfigurationError, match="max_units is 0"):
        CerebroCallback(cerebro, max_units=0)


# Habits of trials that run one after another.


def warned(study: optuna.Study, options: dict[str, Any], n_jobs: int = 0, **kwargs: Any) -> list[str]:
    """What a search warns of: by `optimize`, or by `fit` in threads."""
    with Cerebro(**options | kwargs) as cerebro, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if n_jobs:
            study.optimize(fitting(cerebro), n_trials=4, n_jobs=n_jobs)
        else:
            optimize(study, linear, 6, executor=cerebro, metric="val_loss")
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(
    ("pruner", "instead"),
    [
        (optuna.pruners.MedianPruner(), "pruners.MedianPruner()"),
        (optuna.pruners.PercentilePruner(25.0), "pruners.PercentilePruner(...)"),
        (optuna.pruners.HyperbandPruner(), "pruners.HyperbandPruner(cerebro)"),
        (optuna.pruners.SuccessiveHalvingPruner(), "pruners.SuccessiveHalvingPruner(cerebro)"),
    ],
)
def test_a_pruner_that_would_be_inert_is_told_of_once(options: dict[str, Any], pruner: Any, instead: str) -> None:
    (message,) = warned(a_study(pruner=pruner), options)
    assert f"Use create_study(pruner=cerebro_tune_optuna.{instead}), which compares all" in message
    assert warned(a_study(pruner=pruner), options) == [], "once"


def test_a_pruner_that_works_is_not_told_of(options: dict[str, Any]) -> None:
    assert warned(a_study(pruner=optuna.pruners.HyperbandPruner(max_resource=8)), options) == []
    assert warned(a_study(pruner=pruners.MedianPruner()), options) == []
    one_by_one = optuna.pruners.MedianPruner()
    assert warned(a_study(pruner=one_by_one), options, n_jobs=1) == [], "one after another it works"
    assert len(warned(a_study(pruner=one_by_one), options, n_jobs=4)) == 1


def test_steps_that_are_meant_as_epochs_are_told_of_once(options: dict[str, Any]) -> None:
    pruner = pruners.MedianPruner(n_warmup_steps=2)
    (message,) = warned(a_study(pruner=pruner), options)
    assert message.startswith("MedianPruner: A step counts units, 4 to an epoch. In epochs, n_warmup_steps=2 is 0.5.")
    assert "If epochs were meant, write n_warmup_steps=cerebro.units(2);" in message
    assert "If units were meant, n_warmup_steps=cerebro.units(0.5) says so." in message
    assert warned(a_study(pruner=pruner), options) == []
    for fine in (0, 1, 4):
        assert warned(a_study(pruner=pruners.MedianPruner(n_warmup_steps=fine)), options) == []
    with Cerebro(**options) as cerebro:
        meant = pruners.MedianPruner(n_warmup_steps=cerebro.units(0.5))
    assert warned(a_study(pruner=meant), options) == []
    epochs = pruners.MedianPruner(n_warmup_steps=2)
    assert warned(a_study(pruner=epochs), options, report_every="epoch") == []
    (message,) = warned(a_study(pruner=optuna.pruners.HyperbandPruner(max_resource=3)), options)
    assert "max_resource=3" in message
