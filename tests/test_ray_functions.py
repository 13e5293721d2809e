"""Function trainables by hops: the form that most scripts with Ray and Lightning have."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

import lightning_nets
from cerebro_tune import Cerebro
from cerebro_tune.seeding import OwnStreams
from cerebro_tune_lightning import HopStrategy
from cerebro_tune_ray import PromotionASHA, tune
from test_hop_strategy import loaders

pl = lightning_nets.pl
pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
QUIET = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "enable_checkpointing": False,
}  # fmt: skip


@pytest.fixture
def executor(tmp_path: Path) -> Any:
    with Cerebro(workers=2, backend="inline", num_shards=4, run_dir=tmp_path / "runs", progress=False) as cerebro:
        yield cerebro


@pytest.fixture
def asked(tmp_path: Path, executor: Cerebro, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return {
        "metric": "val_loss", "mode": "min", "verbose": 0, "storage_path": str(tmp_path / "ray"), "executor": executor,
    }  # fmt: skip


def fit(config: dict[str, Any], epochs: int = 2, **kwargs: Any) -> Any:
    """What a user's function does first."""
    trainer = pl.Trainer(strategy=HopStrategy(), max_epochs=epochs, **QUIET | kwargs)
    torch.manual_seed(0)
    time.sleep(0.01)  # so that another call would draw in between, if it could
    module = lightning_nets.Momentum(config["lr"])
    trainer.fit(module, *loaders())
    return trainer, module


def test_units_are_reports_and_the_module_comes_back_trained(asked: dict[str, Any], tmp_path: Path) -> None:
    weights: dict[float, Any] = {}

    def train(config: dict[str, Any]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert ray.tune.get_context().get_trial_id()
        assert ray.tune.get_checkpoint() is None
        trainer, module = fit(config)
        weights[config["lr"]] = {name: value.clone() for name, value in module.state_dict().items()}
        assert trainer.global_step > 0
        (validated,) = trainer.validate(module, loaders()[1], verbose=False)
        ray.tune.report({"val_loss": validated["val_loss"], "own": True})

    analysis = tune.run(train, config={"lr": tune.grid_search([0.01, 0.1])}, **asked)
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 2
    for number, trial in enumerate(analysis.trials):
        assert trial.last_result["own"]
        assert trial.last_result["training_iteration"] == 9  # 2 epochs of 4 shards, and the function's own
        saved = torch.load(f"{trial.checkpoint.path}/checkpoint.ckpt", weights_only=True)
        trained = weights[trial.config["lr"]]
        assert all(torch.equal(saved["state_dict"][name], trained[name]) for name in trained)
        if number == 0:  # the first trial of any run draws the same random numbers
            with Cerebro(workers=2, backend="inline", num_shards=4, run_dir=tmp_path / "b", progress=False) as other:
                torch.manual_seed(0)
                alone = lightning_nets.Momentum(trial.config["lr"])
                trainer = pl.Trainer(strategy=HopStrategy(other), max_epochs=2, **QUIET)
                trainer.fit(alone, *loaders())
            assert all(torch.equal(value, trained[name]) for name, value in alone.state_dict().items())


def test_each_call_draws_as_a_process_of_its_own_would(asked: dict[str, Any]) -> None:
    drawn: dict[float, list[float]] = {}

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def train(config: dict[str, Any]) -> None:
        mine = [draw()]
        time.sleep(0.02)
        mine.append(draw())
        fit(config, epochs=1)
        mine.append(draw())
        time.sleep(0.02)
        drawn[config["lr"]] = [*mine, draw()]

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    rates = [0.1, 0.2, 0.3, 0.4]
    tune.run(train, config={"lr": tune.grid_search(rates)}, **asked)
    after = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert after[2] == draw()[2]  # Ray itself may draw from the other two
    for index, rate in enumerate(rates):
        streams = OwnStreams(0, index)
        with streams:
            assert drawn[rate][:2] == [draw(), draw()]
            torch.manual_seed(0)
            lightning_nets.Momentum(rate)
            assert [draws[2] for draws in drawn[rate][2:]] == [draw()[2], draw()[2]]


@pytest.mark.parametrize("how", ["returned", "yielded"])
def test_what_a_function_returns_or_yields_is_a_report(asked: dict[str, Any], how: str) -> None:
    def returning(config: dict[str, Any]) -> dict[str, float]:
        trainer, _ = fit(config, epochs=1)
        return {"val_loss": float(trainer.callback_metrics["val_loss"]), "last": 1}

    def yielding(config: dict[str, Any]) -> Any:
        trainer, _ = fit(config, epochs=1)
        yield {"val_loss": float(trainer.callback_metrics["val_loss"]), "last": 0}
        yield {"val_loss": 0.5, "last": 1}

    analysis = tune.run(returning if how == "returned" else yielding, config={"lr": 0.1}, **asked)
    (trial,) = analysis.trials
    assert trial.last_result["last"] == 1
    assert trial.last_result["training_iteration"] == (5 if how == "returned" else 6)


def test_a_checkpoint_of_its_own_is_rays(asked: dict[str, Any], tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        fit(config, epochs=1)
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "note.txt").write_text("hello")
        ray.tune.report({"val_loss": 0.0}, checkpoint=ray.tune.Checkpoint.from_directory(str(folder)))

    (trial,) = tune.run(train, config={"lr": 0.1}, **asked).trials
    assert Path(trial.checkpoint.path, "note.txt").read_text() == "hello"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ASHAScheduler(max_t=8, grace_period=4, reduction_factor=4),
        lambda: PromotionASHA(max_t=8, grace_period=4, reduction_factor=4),
    ],
    ids=["stopping", "pausing"],
)
def test_a_stop_ends_the_fit_and_a_pause_blocks_it(asked: dict[str, Any], make: Any) -> None:
    ended: dict[float, tuple[int, bool]] = {}

    def train(config: dict[str, Any]) -> None:
        trainer, _ = fit(config)
        ended[config["lr"]] = trainer.global_step, trainer.should_stop
        if trainer.should_stop:
            ray.tune.report({"val_loss": -1.0})  # nobody listens any more: the function ends here
            raise AssertionError("unreachable")

    rates = [0.3, 0.1, 0.03, 0.01, 0.003, 0.001]  # the worst come last, so that a rule that only stops stops some
    analysis = tune.run(train, config={"lr": tune.grid_search(rates)}, scheduler=make(), **asked)
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 6
    lengths = {trial.config["lr"]: trial.last_result["training_iteration"] for trial in analysis.trials}
    assert set(lengths.values()) == {4, 8}
    assert sorted(ended) == sorted(rates)
    assert all(stopped == (lengths[rate] == 4) or lengths[rate] == 8 for rate, (_, stopped) in ended.items())
    assert all(trial.checkpoint is not None for trial in analysis.trials)
    assert not any(thread.name.startswith("cerebro-") for thread in threading.enumerate())


def test_an_exploit_calls_the_function_again_on_the_good_state(asked: dict[str, Any]) -> None:
    begun: list[float] = []
    changed = 0

    class Watch(tune.Callback):
        def __init__(self) -> None:
            self.rates: dict[str, float] = {}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            nonlocal changed
            rate = result["config"]["lr"]
            changed += self.rates.setdefault(trial.trial_id, rate) != rate
            self.rates[trial.trial_id] = rate
            assert result["rate"] == pytest.approx(rate * 0.5 ** result["passed"])
            assert result["base"] == pytest.approx(rate)
            assert result["training_iteration"] == result["units"]

    def train(config: dict[str, Any]) -> None:
        from test_ray_schedulers import LitRated

        begun.append(config["lr"])
        trainer = pl.Trainer(strategy=HopStrategy(), max_epochs=4, **QUIET)
        trainer.fit(LitRated(config["lr"]), *loaders())

    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=4, quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 0.3)},
    )  # fmt: skip
    random.seed(3)
    analysis = tune.run(
        train,
        config={"lr": tune.loguniform(1e-3, 0.3)},
        num_samples=4,
        scheduler=scheduler,
        callbacks=[Watch()],
        **asked,
    )
    assert [trial.last_result["training_iteration"] for trial in analysis.trials] == [16] * 4
    assert changed >= 2
    assert len(begun) == 4 + scheduler._num_perturbations


def test_a_function_that_raises_fails_its_trial_and_goes_on_when_tried_again(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    units: list[int] = []

    class Breaking(pl.Callback):
        """Raises once in the second epoch, in the worker."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            mark = tmp_path / "raised"
            if trainer.current_epoch == 1 and not mark.exists():
                mark.touch()
                raise RuntimeError("told to raise")

    def train(config: dict[str, Any]) -> None:
        fit(config, callbacks=[Breaking()])

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            units.append(result["units"])

    failed = tune.run(train, config={"lr": 0.1}, raise_on_failed_trial=False, **asked)
    assert failed.trials[0].status == "ERROR"
    assert "told to raise" in str(failed.trials[0].get_error())
    (tmp_path / "raised").unlink()
    (trial,) = tune.run(train, config={"lr": 0.1}, max_failures=1, callbacks=[Watch()], **asked).trials
    assert trial.status == "TERMINATED"
    assert units == list(range(1, 9))  # the first epoch is not trained again


def test_a_function_that_fits_twice_goes_on_with_the_fit_that_failed(asked: dict[str, Any], tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []

    class Breaking(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            mark = tmp_path / "raised"
            if trainer.current_epoch == 1 and not mark.exists():
                mark.touch()
                raise RuntimeError("told to raise")

    def train(config: dict[str, Any]) -> None:
        fit(config, epochs=1)
        fit(config, epochs=2, callbacks=[Breaking()])

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            reports.append((result["training_iteration"], result["units"]))

    (trial,) = tune.run(train, config={"lr": 0.1}, max_failures=1, callbacks=[Watch()], **asked).trials
    assert trial.status == "TERMINATED"
    first, second = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]
    assert [units for _, units in reports] == [*first, *second[:4], *first, *second[4:]]  # the first is trained again
    assert [iteration for iteration, _ in reports] == list(range(1, 17))


def test_rays_own_callbacks_are_left_out_and_their_names_hold(asked: dict[str, Any]) -> None:
    from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

    import unified_nets  # the module is of the package that Ray's callback is of

    def train(config: dict[str, Any]) -> None:
        callback = TuneReportCheckpointCallback({"loss": "val_loss"}, save_checkpoints=False, on="validation_end")
        trainer = unified_nets.pl.Trainer(strategy=HopStrategy(), max_epochs=1, callbacks=[callback], **QUIET)
        trainer.fit(unified_nets.Momentum(config["lr"]), *loaders())

    (trial,) = tune.run(train, config={"lr": 0.1}, **asked | {"metric": "loss"}).trials
    assert trial.last_result["training_iteration"] == 4
    assert trial.last_result["loss"] == trial.last_result["val_loss"]


def test_a_function_that_trains_by_itself_gets_the_sentence(asked: dict[str, Any]) -> None:
    def train(config: dict[str, Any]) -> None:
        for loss in (3.0, 2.0, 1.0):
            ray.tune.report({"val_loss": loss})

    analysis = tune.run(train, config={"lr": 0.1}, raise_on_failed_trial=False, **asked)
    assert analysis.trials[0].status == "ERROR"
    assert "Give its Trainer strategy=HopStrategy()" in str(analysis.trials[0].get_error())


def test_an_experiment_that_is_cut_short_ends_its_functions(asked: dict[str, Any]) -> None:
    def train(config: dict[str, Any]) -> None:
        fit(config, epochs=10_000)

    analysis = tune.run(train, config={"lr": tune.grid_search([0.01, 0.1])}, time_budget_s=1, **asked)
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 2
    assert not any(thread.name.startswith("cerebro-") for thread in threading.enumerate())
