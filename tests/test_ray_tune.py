"""Ray Tune by hops: the life of a trial as stock Ray has it, with real training and a real Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, ResourceChangingScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Repeater
from ray.tune.search.hyperopt import HyperOptSearch
from ray.tune.search.optuna import OptunaSearch
from safetensors.torch import load_file

import lightning_nets
import nets
from cerebro_tune import Cerebro, current_shard
from cerebro_tune.errors import ConfigurationError, NotTrainableError, UnknownMetricError
from cerebro_tune_ray import PromotionASHA, tune

pytestmark = pytest.mark.usefixtures("ray_session")

SPACE = {"lr": tune.loguniform(1e-3, 1.0)}


@pytest.fixture
def executor(options: dict[str, Any]) -> Any:
    """Two inline workers, 4 shards, 2 epochs: 8 units a trial."""
    with Cerebro(**options) as cerebro:
        yield cerebro


@pytest.fixture
def asked(tmp_path: Path, executor: Cerebro, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What most calls of `tune.run` here have in common.

    Without Ray's own loggers, which leave files open and threads behind when an experiment is cut short.
    """
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return {
        "metric": "val_loss", "mode": "min", "verbose": 0, "storage_path": str(tmp_path / "ray"), "executor": executor,
    }  # fmt: skip


def statuses(analysis: Any) -> list[str]:
    return [trial.status for trial in analysis.trials]


def iterations(analysis: Any) -> list[int]:
    return [trial.last_result["training_iteration"] for trial in analysis.trials]


def weights_of(analysis: Any) -> list[dict[str, Any]]:
    return [load_file(f"{trial.checkpoint.path}/checkpoint.safetensors") for trial in analysis.trials]


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# What is trained, and what is left of it.


def test_trials_are_those_of_fit_bit_for_bit(options: dict[str, Any], asked: dict[str, Any]) -> None:
    rates = [0.003, 0.03, 0.3]
    analysis = tune.run(nets.Deep, config={"lr": tune.grid_search(rates)}, **asked)
    with Cerebro(**options) as other:
        expected = other.fit(nets.Deep, [{"lr": rate} for rate in rates], metric="val_loss")
    for trial, one, weights in zip(analysis.trials, expected, weights_of(analysis), strict=True):
        assert trial.status == "TERMINATED"
        assert trial.last_result["training_iteration"] == trial.last_result["units"] == 8
        assert trial.last_result["val_loss"] == one.last_metrics["val_loss"]
        assert_same_weights(weights, load_file(str(one.last_checkpoint)))


def test_result_grid_loggers_and_reports(tmp_path: Path, executor: Cerebro) -> None:
    tuner = tune.Tuner(
        nets.Linear,
        param_space=SPACE,
        tune_config=tune.TuneConfig(num_samples=3, metric="val_loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), name="grid", verbose=0),
        executor=executor,
    )
    grid = tuner.fit()
    assert isinstance(grid, ray.tune.ResultGrid)
    assert grid.num_errors == 0
    best = grid.get_best_result()
    losses = [result.metrics["val_loss"] for result in grid]
    assert best.metrics["val_loss"] == min(losses)
    assert os.listdir(best.checkpoint.path) == ["checkpoint.safetensors"]
    assert len(grid.get_dataframe()) == 3
    assert len(best.metrics_dataframe) == 8
    assert list(best.metrics_dataframe["epoch"]) == [0.25 * unit for unit in range(1, 9)]
    lines = Path(best.path, "result.json").read_text().splitlines()
    assert [json.loads(line)["training_iteration"] for line in lines] == list(range(1, 9))
    assert {"progress.csv", "params.json", "params.pkl"} <= set(os.listdir(best.path))
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(best.path))


class Arrays(ray.tune.Trainable):
    """Has arrays, objects and keys that JSON has not in its config and in its results."""

    def step(self) -> dict[str, Any]:
        weights = self.config["weights"]
        return {"val_loss": weights.sum(), "weights": weights, "seen": {1: torch.ones(2), "net": nets.Deep}}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        return


def test_arrays_and_objects_in_configs_and_results(asked: dict[str, Any]) -> None:
    config = {"weights": np.arange(3.0), "net": nets.Deep, "sizes": {1: [2, 3]}}
    analysis = tune.run(Arrays, config=config, stop={"training_iteration": 2}, scheduler=ASHAScheduler(), **asked)
    assert statuses(analysis) == ["TERMINATED"]
    assert analysis.trials[0].last_result["seen"]["net"] is nets.Deep
    assert analysis.trials[0].last_result["val_loss"] == 3.0


def test_without_an_executor_it_is_stock_ray(asked: dict[str, Any]) -> None:
    analysis = tune.run(Halving, config={"lr": 0.5}, stop={"training_iteration": 2}, **asked | {"executor": None})
    assert statuses(analysis) == ["TERMINATED"]
    assert "shard" not in analysis.trials[0].last_result
    assert tune.uniform is ray.tune.uniform


class Halving(ray.tune.Trainable):
    """A loss without a model, for any Ray."""

    def setup(self, config: dict[str, Any]) -> None:
        self.steps = 0

    def step(self) -> dict[str, Any]:
        self.steps += 1
        return {"val_loss": self.config["lr"] / 2**self.steps}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]


# Ray's checkpoints.


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [8]),
        ({"checkpoint_at_end": False}, []),
        ({"checkpoint_frequency": 3}, [3, 6, 8]),
        ({"checkpoint_frequency": 2, "checkpoint_at_end": False, "num_to_keep": 2}, [6, 8]),
        (
            {
                "checkpoint_frequency": 1, "num_to_keep": 2, "checkpoint_score_attribute": "training_iteration",
                "checkpoint_score_order": "min",
            },
            [1, 2, 8],  # the two best by this score, and the last one in any case
        ),
    ],
)  # fmt: skip
def test_checkpoints_are_written_when_asked_for(asked: dict[str, Any], config: Any, expected: list[int]) -> None:
    analysis = tune.run(nets.Linear, config={"lr": 0.1}, checkpoint_config=tune.CheckpointConfig(**config), **asked)
    (trial,) = analysis.trials
    kept = trial.run_metadata.checkpoint_manager._checkpoint_results
    assert sorted(result.metrics["training_iteration"] for result in kept) == expected
    folders = [folder for folder in os.listdir(trial.path) if folder.startswith("checkpoint_")]
    assert len(folders) == len(expected)
    assert all(os.listdir(Path(trial.path, folder)) == ["checkpoint.safetensors"] for folder in folders)


# Ends.


def test_stop_conditions_and_stoppers(asked: dict[str, Any]) -> None:
    def enough(trial_id: str, result: dict[str, Any]) -> bool:
        return bool(result["units"] >= 5)

    by_dict = tune.run(nets.Linear, config=SPACE, num_samples=3, stop={"training_iteration": 4}, **asked)
    by_function = tune.run(nets.Linear, config=SPACE, num_samples=2, stop=enough, **asked)
    by_epoch = tune.run(nets.Linear, config={"lr": 0.1}, stop={"epoch": 1}, **asked)
    assert (iterations(by_dict), iterations(by_function), iterations(by_epoch)) == ([4, 4, 4], [5, 5], [4])
    assert {*statuses(by_dict), *statuses(by_function), *statuses(by_epoch)} == {"TERMINATED"}


def test_a_run_that_may_resume_begins_where_there_is_nothing_to_resume(asked: dict[str, Any]) -> None:
    asked |= {"name": "again", "resume": "AUTO", "config": {"lr": 0.1}}
    first = tune.run(nets.Linear, **asked)
    assert iterations(first) == [8]
    again = tune.run(nets.Linear, **asked)
    assert [trial.trial_id for trial in again.trials] == [trial.trial_id for trial in first.trials]


def test_a_report_per_epoch_is_an_iteration(options: dict[str, Any], asked: dict[str, Any]) -> None:
    with Cerebro(**options | {"report_every": "epoch"}) as executor:
        analysis = tune.run(nets.Linear, config={"lr": 0.1}, **asked | {"executor": executor})
    assert [(t.last_result["training_iteration"], t.last_result["units"]) for t in analysis.trials] == [(2, 8)]


def test_a_time_budget_ends_the_experiment(options: dict[str, Any], asked: dict[str, Any]) -> None:
    with Cerebro(**options | {"epochs": 100_000}) as executor:
        analysis = tune.run(nets.Linear, config=SPACE, num_samples=2, time_budget_s=1, **asked | {"executor": executor})
    assert statuses(analysis) == ["TERMINATED"] * 2
    assert all(0 < count < 400_000 for count in iterations(analysis))


class Live(tune.Callback):
    """Notes how many trials run at once."""

    most = 0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.most = max(self.most, sum(trial.status == "RUNNING" for trial in trials))


def test_how_many_trials_run_at_once(options: dict[str, Any], asked: dict[str, Any]) -> None:
    free, limited, searcher = Live(), Live(), Live()
    with Cerebro(**options | {"live_trials": 3}) as executor:
        asked |= {"executor": executor, "config": SPACE, "num_samples": 6}
        tune.run(nets.Linear, callbacks=[free], **asked)
        tune.run(nets.Linear, callbacks=[limited], max_concurrent_trials=2, **asked)
        limiter = ConcurrencyLimiter(OptunaSearch(seed=0), max_concurrent=2)
        tune.run(nets.Linear, callbacks=[searcher], search_alg=limiter, **asked)
    assert (free.most, limited.most, searcher.most) == (3, 2, 2)


def test_searchers(asked: dict[str, Any]) -> None:
    points = [{"lr": 0.02}, {"lr": 0.2}]
    known = tune.run(
        nets.Linear, config=SPACE, num_samples=3, search_alg=BasicVariantGenerator(points_to_evaluate=points), **asked
    )
    assert [trial.config["lr"] for trial in known.trials[:2]] == [0.02, 0.2]
    crossed = tune.run(nets.Linear, config={"lr": tune.grid_search([0.1, 0.2])}, num_samples=2, **asked)
    assert sorted(trial.config["lr"] for trial in crossed.trials) == [0.1, 0.1, 0.2, 0.2]
    for searcher in (OptunaSearch(seed=0), HyperOptSearch(random_state_seed=0)):
        found = tune.run(nets.Linear, config=SPACE, num_samples=4, search_alg=searcher, **asked)
        assert iterations(found) == [8] * 4
        assert len({trial.config["lr"] for trial in found.trials}) == 4
    measured = {name: asked.pop(name) for name in ("metric", "mode")}
    repeater = Repeater(HyperOptSearch(random_state_seed=0, **measured), repeat=2, set_index=False)
    repeated = tune.run(nets.Linear, config=SPACE, num_samples=4, search_alg=repeater, **asked)
    assert len({trial.config["lr"] for trial in repeated.trials}) == 2


# Errors.


class Flaky(nets.Deep):
    """Raises once, in the unit that the config says; a mark in a folder tells that it has."""

    def training_step(self, model: Any, batch: Any) -> Any:
        mark = Path(self._config["marks"], str(self._config["lr"]))
        if self.place == tuple(self._config["raise_in"]) and not mark.exists():
            mark.touch()
            raise RuntimeError("told to raise")
        return super().training_step(model, batch)

    def run_unit(self, work: Any) -> dict[str, float]:
        self.place = (work.epoch, work.position)
        return super().run_unit(work)


@pytest.mark.parametrize("raise_in", [(1, 1), (0, 0)])
def test_a_trial_that_is_tried_again_gives_what_it_would_have_given(
    asked: dict[str, Any], tmp_path: Path, raise_in: tuple[int, int]
) -> None:
    def run(folder: str, **more: Any) -> Any:
        marks = tmp_path / folder
        marks.mkdir()
        space = {"lr": tune.grid_search([0.01, 0.1]), "marks": str(marks), "raise_in": raise_in}
        return marks, tune.run(Flaky, config=space, **asked, **more)

    _, failed = run("failing", raise_on_failed_trial=False)
    assert statuses(failed) == ["ERROR", "ERROR"]
    assert "told to raise" in str(failed.trials[0].get_error())
    marks, retried = run("retried", max_failures=1)
    assert statuses(retried) == ["TERMINATED"] * 2
    assert len(os.listdir(marks)) == 2
    assert [trial.num_failures for trial in retried.trials] == [1, 1]
    undisturbed = tune.run(nets.Deep, config={"lr": tune.grid_search([0.01, 0.1])}, **asked)
    by_rate = {trial.config["lr"]: trial for trial in retried.trials}
    for trial in undisturbed.trials:
        again = by_rate[trial.config["lr"]]
        assert again.last_result["val_loss"] == trial.last_result["val_loss"]
        assert again.last_result["training_iteration"] == 8


def test_a_trial_that_fails_in_its_first_unit_after_a_pause_goes_on_from_where_it_stood(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    units: dict[str, list[int]] = {}

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            units.setdefault(trial.trial_id, []).append(result["units"])

    marks = tmp_path / "marks"
    marks.mkdir()
    space = {"lr": tune.grid_search([0.003, 0.03, 0.3]), "marks": str(marks), "raise_in": (1, 0)}
    scheduler = PromotionASHA(max_t=8, grace_period=4, reduction_factor=2)
    analysis = tune.run(Flaky, config=space, scheduler=scheduler, callbacks=[Watch()], max_failures=1, **asked)
    assert sum(trial.num_failures for trial in analysis.trials) == len(os.listdir(marks)) >= 1
    assert sorted(units.values())[-1] == list(range(1, 9))
    assert all(each == list(range(1, len(each) + 1)) for each in units.values())


def test_failed_trials_end_the_run_as_in_ray(asked: dict[str, Any], tmp_path: Path) -> None:
    space = {"lr": tune.grid_search([0.1, 0.2, 0.3, 0.4, 0.5]), "marks": str(tmp_path), "raise_in": (0, 1)}
    with pytest.raises(ray.tune.TuneError, match="did not complete"):
        tune.run(Flaky, config=space, **asked)
    for mark in tmp_path.glob("0.*"):
        mark.unlink()
    fast = tune.run(Flaky, config=space, fail_fast=True, raise_on_failed_trial=False, **asked)
    assert "ERROR" in statuses(fast)
    assert "TERMINATED" in statuses(fast)  # cut short by the first error
    assert len([trial for trial in fast.trials if trial.status == "TERMINATED" and trial.last_result]) < 5


def test_a_loss_that_is_no_number_ends_its_trial_without_an_error(asked: dict[str, Any]) -> None:
    analysis = tune.run(nets.Diverging, config=SPACE, num_samples=2, scheduler=ASHAScheduler(grace_period=4), **asked)
    assert statuses(analysis) == ["TERMINATED"] * 2
    assert all(trial.last_result["val_loss"] != trial.last_result["val_loss"] for trial in analysis.trials)


def test_a_worker_that_dies_costs_its_unit(options: dict[str, Any], asked: dict[str, Any], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    mortal = {"lr": 0.1, "die": [(0, 2), (1, 1)], "times": 1, "marks": str(marks)}
    with Cerebro(**options | {"backend": "local"}) as executor:
        hurt = tune.run(nets.Mortal, config=mortal, **asked | {"executor": executor})
    with Cerebro(**options) as executor:
        whole = tune.run(nets.Deep, config={"lr": 0.1}, **asked | {"executor": executor})
    assert len(os.listdir(marks)) == 2
    assert [trial.num_failures for trial in hurt.trials] == [0]
    assert hurt.trials[0].last_result["val_loss"] == pytest.approx(whole.trials[0].last_result["val_loss"], rel=1e-4)


def test_ctrl_c_ends_with_the_results_so_far(options: dict[str, Any], asked: dict[str, Any]) -> None:
    class Interrupting(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if result["training_iteration"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with Cerebro(**options | {"epochs": 1000}) as executor:
        asked |= {"executor": executor}
        analysis = tune.run(nets.Linear, config=SPACE, num_samples=2, callbacks=[Interrupting()], **asked)
        assert all(trial.last_result for trial in analysis.trials[:1])
        assert executor.current is None
        again = tune.run(nets.Linear, config={"lr": 0.1}, stop={"training_iteration": 4}, **asked)
    assert statuses(again) == ["TERMINATED"]


def test_a_second_ctrl_c_leaves_the_executor_free(asked: dict[str, Any], executor: Cerebro) -> None:
    class Interrupting(tune.Callback):
        def on_trial_result(self, **info: Any) -> None:
            raise KeyboardInterrupt  # as Python does while Ray cleans up after the first one

    with pytest.raises(KeyboardInterrupt):
        tune.run(nets.Linear, config=SPACE, callbacks=[Interrupting()], **asked)
    assert executor.current is None
    assert iterations(tune.run(nets.Linear, config={"lr": 0.1}, **asked)) == [8]


# Hooks.


class Recorded(tune.Callback):
    """Notes every hook about a trial."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("on_trial", "on_checkpoint", "on_experiment", "setup")):
            return lambda *args, **info: self.hooks.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("frequency", [0, 2])
def test_callbacks_hear_what_they_hear_in_stock_ray(asked: dict[str, Any], frequency: int) -> None:
    heard = []
    for executor in (asked["executor"], None):
        callback = Recorded()
        tune.run(
            Halving, config={"lr": 0.5}, stop={"training_iteration": 3}, callbacks=[callback],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=frequency, checkpoint_at_end=True),
            **asked | {"executor": executor},
        )  # fmt: skip
        heard.append(callback.hooks)
    assert heard[0] == heard[1]


# What cannot be.


def test_what_cannot_be_trained_is_refused_by_name(asked: dict[str, Any], executor: Cerebro) -> None:
    with pytest.raises(ConfigurationError, match="executor is 'cerebro'; it must be a cerebro_tune"):
        tune.run(nets.Linear, **asked | {"executor": "cerebro"})
    with pytest.raises(NotTrainableError, match="cannot be trained on an executor: give what is to be trained"):
        tune.run([nets.Linear], **asked)
    with pytest.raises(NotTrainableError, match="Valid are"):
        tune.run(3, **asked)
    resources = ResourceChangingScheduler(ASHAScheduler())
    with pytest.raises(ConfigurationError, match="give its base_scheduler"):
        tune.run(nets.Linear, config=SPACE, scheduler=resources, **asked)
    with pytest.raises(ConfigurationError, match=r"restore='.*there' is not read by hops"):
        tune.run(nets.Linear, restore="there", config={"lr": 0.1}, **asked)
    with pytest.warns(UserWarning, match="log_to_file=.* has no effect"):
        tune.run(nets.Linear, log_to_file=True, config={"lr": 0.1}, **asked)
    with pytest.raises(ConfigurationError, match="no current shard"):
        current_shard()
    assert executor.current is None


def test_a_metric_of_epochs_ends_wants_a_report_per_epoch(options: dict[str, Any], asked: dict[str, Any]) -> None:
    asked |= {"metric": "at_the_end", "config": {"lr": 0.1}}
    with pytest.raises(UnknownMetricError, match=r"Cerebro\(report_every='epoch'\)"):
        tune.run(nets.AtEpochsEnd, **asked)
    with Cerebro(**options | {"report_every": "epoch"}) as executor:
        (trial,) = tune.run(nets.AtEpochsEnd, **asked | {"executor": executor}).trials
    assert trial.last_result["at_the_end"] == 1


def test_lengths_below_an_epoch_are_told_once(asked: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"max_t=3 is 0\.75.*max_t=cerebro\.units\(3\)") as told:
        tune.run(nets.Linear, config=SPACE, num_samples=2, scheduler=ASHAScheduler(max_t=3, grace_period=1), **asked)
    assert len(told) == 1


def test_a_config_that_the_model_refuses_fails_its_trial(asked: dict[str, Any]) -> None:
    analysis = tune.run(
        lightning_nets.Momentum,
        config={"lr": 0.1, "depth": tune.grid_search([1, 2])},
        raise_on_failed_trial=False,
        **asked,
    )
    assert statuses(analysis) == ["ERROR"] * 2
    assert "does not take 'depth'" in str(analysis.trials[0].get_error())
