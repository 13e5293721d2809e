"""`optimize`: stock studies whose trials advance side by side, told as Optuna's own loop tells them."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

import nets
from cerebro_tune import Cerebro, TorchTrainable
from cerebro_tune.errors import ConfigurationError, NotTrainableError, TrialFailedError, UnknownMetricError
from cerebro_tune_optuna import PromotionPruner, optimize, pruners
from nets import Deep, Linear
from optuna_studies import COMPLETE, FAIL, PRUNED, RUNNING, a_study, linear, states

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def told(study: optuna.Study) -> list[Any]:
    """All that must be equal between equal runs."""
    return [(t.state, t.values, t.params, t.intermediate_values, t.user_attrs["units"]) for t in study.trials]


@pytest.mark.parametrize("pruner", [pruners.MedianPruner(n_startup_trials=3), PromotionPruner()])
def test_a_seeded_study_under_the_fixed_policy_repeats(options: dict[str, Any], pruner: Any) -> None:
    def objective(trial: optuna.Trial) -> Any:
        return (Deep if trial.number % 3 == 0 else Linear), {"lr": trial.suggest_float("lr", 1e-4, 1.0, log=True)}

    outcomes = []
    for backend in ("inline", "local"):
        study = a_study(pruner=pruner)
        with Cerebro(**options | {"backend": backend, "policy": "fixed"}) as cerebro:
            optimize(study, objective, 12, executor=cerebro, metric="val_loss")
        outcomes.append(told(study))
    assert outcomes[0] == outcomes[1]
    assert {COMPLETE, PRUNED} == {state for state, *_ in outcomes[0]}
    assert all(state is COMPLETE or units < 8 for state, *_, units in outcomes[0])


def test_trials_are_those_that_a_list_of_configs_gives(options: dict[str, Any]) -> None:
    study = a_study()
    with Cerebro(**options | {"policy": "fixed"}) as cerebro:
        optimize(study, linear, 4, executor=cerebro, metric="val_loss")
        results = cerebro.fit(Linear, [trial.params for trial in study.trials], metric="val_loss")
    for trial, result in zip(study.trials, results, strict=True):
        assert trial.value == result.metrics["val_loss"]
        assert trial.intermediate_values == {r["training_iteration"]: r["val_loss"] for r in result.history}
        assert trial.user_attrs["trial_id"] == result.trial_id
        theirs = load_file(str(result.checkpoint))
        assert all(torch.equal(w, theirs[name]) for name, w in load_file(trial.user_attrs["checkpoint"]).items())


def test_attributes_tell_what_a_trial_took(options: dict[str, Any]) -> None:
    study = a_study()
    began = time.monotonic()
    with Cerebro(**options) as cerebro:
        optimize(study, linear, 5, executor=cerebro, metric="val_loss")
    elapsed_s = time.monotonic() - began
    for trial in study.trials:
        attrs = trial.user_attrs
        assert (attrs["units"], attrs["epochs"]) == (8, 2.0)
        assert Path(attrs["checkpoint"]).parent == Path(attrs["folder"])
        assert Path(attrs["folder"]).name == attrs["trial_id"]
        assert list(attrs["seconds"]) == ["training", "hopping", "validating", "waiting"]
        assert all(seconds > 0 for seconds in attrs["seconds"].values())
        assert sum(attrs["seconds"].values()) < elapsed_s
        assert "error" not in attrs
    assert len({trial.user_attrs["trial_id"] for trial in study.trials}) == 5


def test_as_many_are_in_flight_as_may_be_live(options: dict[str, Any]) -> None:
    running = []

    def objective(trial: optuna.Trial) -> Any:
        running.append(len(study.get_trials(states=(RUNNING,))))
        return linear(trial)

    study = a_study()
    with Cerebro(**options | {"live_trials": 3}) as cerebro:
        optimize(study, objective, 7, executor=cerebro, metric="val_loss")
    assert running == [1, 2, 3, 3, 3, 3, 3], "the next is asked for when one has ended"


def test_best_and_last(options: dict[str, Any]) -> None:
    def objective(trial: optuna.Trial) -> Any:
        return Linear, {"lr": trial.suggest_float("lr", 2.0, 4.0), "epochs": 4}

    values = {}
    for value in ("best", "last"):
        study = a_study(direction="maximize")
        with Cerebro(**options | {"policy": "fixed"}) as cerebro:
            optimize(study, objective, 3, executor=cerebro, metric="val_accuracy", value=value)
        values[value] = [trial.value for trial in study.trials]
        for trial in study.trials:
            ends = [score for step, score in trial.intermediate_values.items() if step % 4 == 0]
            assert trial.value == (max(ends) if value == "best" else ends[-1])
    assert values["best"] != values["last"]
    with pytest.raises(ConfigurationError, match="value is 'mean'; valid: 'best', 'last'"):
        optimize(study, objective, 1, executor=cerebro, metric="val_accuracy", value="mean")


def test_steps_are_epochs_where_the_executor_reports_epochs(options: dict[str, Any]) -> None:
    study = a_study()
    with Cerebro(**options | {"report_every": "epoch"}) as cerebro:
        optimize(study, linear, 3, executor=cerebro, metric="val_loss")
    assert all(set(trial.intermediate_values) == {1, 2} for trial in study.trials)
    assert all(trial.value == min(trial.intermediate_values.values()) for trial in study.trials)


# What Optuna's own loop does.


def test_callbacks_see_the_told_trial_and_may_stop_the_study(options: dict[str, Any]) -> None:
    seen = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert study.trials[trial.number] == trial
        seen.append(trial.number)
        if len(seen) == 2:
            study.stop()

    study = a_study()
    with Cerebro(**options) as cerebro:
        optimize(study, linear, executor=cerebro, metric="val_loss", callbacks=[callback])
        assert len(study.trials) in (4, 5), "those in flight end; when the first one ended, a fifth was asked for"
        assert sorted(seen) == [trial.number for trial in study.trials]
        assert set(states(study)) == {COMPLETE}
        with pytest.raises(RuntimeError, match="inside an objective function or a callback"):
            study.stop()

        def nested(trial: optuna.Trial) -> Any:
            optimize(study, linear, 1, executor=cerebro, metric="val_loss")

        with pytest.raises(RuntimeError, match="Nested invocation"):
            optimize(study, nested, 1, executor=cerebro, metric="val_loss")


def test_a_timeout_lets_those_in_flight_end(options: dict[str, Any]) -> None:
    def slow(trial: optuna.Trial) -> Any:
        time.sleep(0.5 * trial.number)
        return linear(trial)

    study = a_study()
    with Cerebro(**options) as cerebro:
        optimize(study, slow, timeout=0.4, executor=cerebro, metric="val_loss")
        assert states(study) == [COMPLETE, COMPLETE]
        optimize(study, slow, timeout=0, executor=cerebro, metric="val_loss")
    assert len(study.trials) == 2


def test_garbage_is_collected_and_the_bar_is_shown(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread of its own
    study, collected = a_study(), []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]) if phase == "stop" else None)
    try:
        with Cerebro(**options) as cerebro, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optimize(study, linear, 3, executor=cerebro, metric="val_loss", gc_after_trial=True, show_progress_bar=True)
    finally:
        gc.callbacks.pop()
    assert collected.count(2) >= 3
    assert "3/3" in capfd.readouterr().err


def test_what_the_objective_raises(options: dict[str, Any]) -> None:
    def objective(trial: optuna.Trial) -> Any:
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise ZeroDivisionError("not this one")
        return linear(trial)

    study = a_study()
    with Cerebro(**options) as cerebro:
        optimize(study, objective, 4, executor=cerebro, metric="val_loss", catch=ZeroDivisionError)
        assert states(study) == [COMPLETE, PRUNED, FAIL, COMPLETE]
        assert study.trials[2].user_attrs["error"] == "ZeroDivisionError('not this one')"
        study = a_study()
        with pytest.raises(ZeroDivisionError):
            optimize(study, objective, 9, executor=cerebro, metric="val_loss", catch=(ValueError,))
    assert states(study) == [COMPLETE, PRUNED, FAIL], "nothing new after it, and the one in flight has ended"


class Failing(nets.Raising):
    """Raises an exception of a class of its own."""

    class OddError(ArithmeticError):
        pass

    def training_step(self, model: Any, batch: Any) -> Any:
        if self._config.get("odd"):
            raise self.OddError("an odd batch")
        return super().training_step(model, batch)


def test_what_is_raised_in_training(options: dict[str, Any]) -> None:
    def objective(trial: optuna.Trial) -> Any:
        return Failing, {"lr": 0.1, "odd": trial.number == 1}

    with Cerebro(**options | {"backend": "local"}) as cerebro:
        for catch in ((Failing.OddError,), ArithmeticError, [ValueError, Exception], (TrialFailedError,)):
            study = a_study()
            optimize(study, objective, 3, executor=cerebro, metric="val_loss", catch=catch)  # type: ignore[arg-type]
            assert states(study) == [COMPLETE, FAIL, COMPLETE]
            assert study.trials[1].user_attrs["error"].endswith("OddError: an odd batch")
        study = a_study()
        with pytest.raises(TrialFailedError, match=r"(?s)Trial 1, trial-0001, failed:.*in training_step.*an odd batch"):
            optimize(study, objective, 9, executor=cerebro, metric="val_loss", catch=(ValueError,))
    assert RUNNING not in states(study)
    assert len(study.trials) < 9


class Unsteady(Linear):
    """Has a metric that may be NaN."""

    def build(self, config: Any, plan: Any) -> Any:
        self.f1 = float("nan") if config["nan"] else 1.0
        return super().build(config, plan)

    def validation_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return super().validation_step(model, batch) | {"val_f1": self.f1}


def test_nan_fails_the_trial_only(options: dict[str, Any]) -> None:
    def diverging(trial: optuna.Trial) -> Any:
        return (nets.Diverging if trial.number == 1 else Linear), {"lr": 0.1}

    def unsteady(trial: optuna.Trial) -> Any:
        return Unsteady, {"lr": 0.1, "nan": trial.number == 1}

    with Cerebro(**options) as cerebro:
        study, other = a_study(), a_study()
        optimize(study, diverging, 5, executor=cerebro, metric="val_loss")
        optimize(other, unsteady, 5, executor=cerebro, metric="val_f1")
    assert states(study) == states(other) == [COMPLETE, FAIL, COMPLETE, COMPLETE, COMPLETE]
    assert "NonFiniteLossError: The training loss of trial-0001 is nan in" in study.trials[1].user_attrs["error"]
    assert other.trials[1].user_attrs["error"] == "val_f1 of trial-0001 is NaN"
    assert all(math.isnan(value) for value in other.trials[1].intermediate_values.values())


def test_mistakes_are_told_before_and_leave_nothing_running(options: dict[str, Any]) -> None:
    study = a_study()
    with Cerebro(**options) as cerebro:
        with pytest.raises(ConfigurationError, match=r"The objective returned 0.5; .* is for study.optimize"):
            optimize(study, lambda trial: 0.5, 3, executor=cerebro, metric="val_loss")
        with pytest.raises(NotTrainableError, match="None cannot be trained"):
            optimize(study, lambda trial: None, 3, executor=cerebro, metric="val_loss")
        with pytest.raises(UnknownMetricError, match="No report has a metric 'loss_of_validation'"):
            optimize(study, linear, 3, executor=cerebro, metric="loss_of_validation")
        assert FAIL in states(study)
        assert RUNNING not in states(study)
        with pytest.raises(ConfigurationError, match="the study has 1 directions: give one name for each"):
            optimize(study, linear, 3, executor=cerebro, metric=["val_loss", "val_accuracy"])
        assert cerebro.current is None
        assert not list(Path(options["run_dir"]).glob("*/trial-*/best.[0-9]*"))


def test_ctrl_c_ends_the_search_with_what_there_is(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if not interrupted:
            interrupted.append(trial.number)
            os.kill(os.getpid(), signal.SIGINT)

    study, interrupted = a_study(), list[int]()
    with Cerebro(**options | {"progress": None}) as cerebro:
        optimize(study, linear, 9, executor=cerebro, metric="val_loss", callbacks=[interrupt])
    assert COMPLETE in states(study)
    assert set(states(study)) == {COMPLETE, FAIL}
    assert "cut short: the search was interrupted" in study.trials[-1].user_attrs["error"]
    assert re.search("^Interrupted; the results so far. compute", capfd.readouterr().out, re.M)


# Several objectives, constraints, instances, trials that end by themselves.


def test_several_objectives(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
        trial.set_constraint("rate", lr - 0.5)
        return Linear, {"lr": lr}

    study = a_study(directions=["minimize", "maximize"], pruner=pruners.MedianPruner(n_startup_trials=1))
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with Cerebro(**options | {"policy": "fixed"}) as cerebro:
        optimize(study, objective, 6, executor=cerebro, metric=["val_loss", "val_accuracy"])
        configs = [trial.params for trial in study.trials]
        results = cerebro.fit(Linear, configs[:4])
        with pytest.raises(UnknownMetricError, match=r"No report of trial-000. has a metric 'val_f1'"):
            optimize(study, objective, 2, executor=cerebro, metric=["val_loss", "val_f1"])
    assert "nothing will be pruned" in caplog.text
    for trial, result in zip(study.trials[:4], results, strict=True):
        assert trial.values == [result.last_metrics["val_loss"], result.last_metrics["val_accuracy"]]
    assert set(states(study)[:6]) == {COMPLETE}
    assert all(trial.constraints == {"rate": trial.params["lr"] - 0.5} for trial in study.trials[:6])


def test_an_instance_that_the_objective_makes_repeats(options: dict[str, Any]) -> None:
    from lightning_nets import Momentum

    def of_class(trial: optuna.Trial) -> Any:
        return Momentum, {"lr": trial.suggest_float("lr", 0.01, 0.1)}

    def instance(trial: optuna.Trial) -> Any:
        return Momentum(lr=trial.suggest_float("lr", 0.01, 0.1))

    before = torch.get_rng_state()
    outcomes = []
    for objective in (of_class, instance, instance):
        study = a_study()
        with Cerebro(**options | {"policy": "fixed", "epochs": 1}) as cerebro:
            optimize(study, objective, 6, executor=cerebro, metric="val_loss")
        outcomes.append(told(study))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert torch.equal(torch.get_rng_state(), before), "the user's own stream is left alone"


class Content(Linear):
    """Stops by itself after three units."""

    @property
    def should_stop(self) -> bool:
        return self.state.step >= 12


def test_a_trial_that_stops_by_itself_is_complete(options: dict[str, Any]) -> None:
    for pruner in (None, PromotionPruner(min_resource=3)):
        study = a_study(pruner=pruner)
        with Cerebro(**options) as cerebro:
            optimize(study, lambda trial: (Content, {"lr": 0.1}), 5, executor=cerebro, metric="val_loss")
        assert set(states(study)) == {COMPLETE}
        assert {trial.user_attrs["units"] for trial in study.trials} == {3}


def test_a_trial_whose_worker_died_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    def objective(trial: optuna.Trial) -> Any:
        die = {"marks": str(tmp_path), "times": 1, "die": [(0, 1)]} if trial.number == 1 else {}
        return (nets.Mortal if die else Deep), {"lr": 0.01, **die}

    outcomes = []
    with Cerebro(**options | {"backend": "local", "policy": "fixed"}) as cerebro:
        for kind in ("disturbed", "undisturbed"):
            study = a_study()
            optimize(study, objective, 4, executor=cerebro, metric="val_loss")
            assert set(states(study)) == {COMPLETE}
            assert len(list(tmp_path.glob("0-1-*"))) == 1, f"one death, before the {kind} run ended"
            outcomes.append(told(study))
    assert outcomes[0] == outcomes[1]


def test_trials_of_one_run_load_alike(options: dict[str, Any]) -> None:
    class Dropping(Linear):
        loader = {"last_batch": "drop"}  # noqa: RUF012  # as a user writes it

    def objective(trial: optuna.Trial) -> Any:
        return (Dropping if trial.number else Linear), {"lr": 0.1}

    with Cerebro(**options) as cerebro, pytest.raises(ConfigurationError, match=r"Dropping has loader=\{'last_batch'"):
        optimize(a_study(), objective, 2, executor=cerebro, metric="val_loss")


# Promotions.


class Scripted(TorchTrainable):
    """Reports what its config says."""

    def build(self, config: Any, plan: Any) -> Any:
        self.score = float(config["score"])
        model = torch.nn.Linear(8, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def training_step(self, model: Any, batch: Any) -> Any:
        return model(batch[0]).square().mean()

    def run_unit(self, work: Any) -> dict[str, float]:
        return super().run_unit(work) | {"score": self.score}


@pytest.mark.parametrize("live", [1, 3, 9])
def test_promotion_lets_the_best_of_a_rung_go_on(options: dict[str, Any], live: int) -> None:
    scores = [5, 8, 1, 7, 2, 9, 3, 6, 4]

    def objective(trial: optuna.Trial) -> Any:
        return Scripted, {"score": scores[trial.number]}

    study = a_study(direction="maximize", pruner=PromotionPruner(min_resource=1, reduction_factor=3))
    with Cerebro(**options | {"epochs": 3, "live_trials": live}) as cerebro:
        optimize(study, objective, 9, executor=cerebro, metric="score")
    units = {scores[trial.number]: trial.user_attrs["units"] for trial in study.trials}
    assert units[9] == 12, "the best goes on to the end"
    assert states(study)[scores.index(9)] is COMPLETE
    assert set(units.values()) <= {1, 3, 9, 12}
    at_least = [sum(done >= level for done in units.values()) for level in (1, 3, 9)]
    assert at_least[0] == 9
    assert 3 <= at_least[1] <= 5, "the best three, and who was among them at some time"
    assert {9, 8, 7} <= {score for score, done in units.items() if done >= 3}
    assert states(study).count(PRUNED) == 9 - sum(done == 12 for done in units.values())
    assert all(len(trial.intermediate_values) == trial.user_attrs["units"] for trial in study.trials)


def test_promotion_with_nan_and_a_stopped_study(options: dict[str, Any]) -> None:
    def objective(trial: optuna.Trial) -> Any:
        return Scripted, {"score": float("nan") if trial.number % 2 else trial.number}

    def stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 7:
            study.stop()

    study = a_study(pruner=PromotionPruner(min_resource=2, reduction_factor=2))
    with Cerebro(**options | {"live_trials": 2}) as cerebro:
        optimize(study, objective, executor=cerebro, metric="score", callbacks=[stop])
    assert {trial.user_attrs["units"] for trial in study.trials if trial.number % 2} == {2}
    assert RUNNING not in states(study)
    assert all(states(study)[number] is PRUNED for number in (1, 3, 5, 7))
