"""Ray's schedulers by hops: the same decisions as in stock Ray, and exploits that take effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.tune
import torch
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    PopulationBasedTrainingReplay,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search.bohb import TuneBOHB
from torch import nn

import lightning_nets
import nets
from cerebro_tune import Cerebro
from cerebro_tune_ray import PromotionASHA, tune

pytestmark = pytest.mark.usefixtures("ray_session", "no_loggers")


@pytest.fixture
def no_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own leave files open when a trial's actor or experiment is cut short."""
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


class Curve(ray.tune.Trainable):
    """A loss that falls with the steps, and for some configs crosses that of others; it takes no time."""

    def setup(self, config: dict[str, Any]) -> None:
        self.steps = 0

    def step(self) -> dict[str, Any]:
        self.steps += 1
        k = self.config["k"]
        return {"loss": ((k * 37) % 17 + 1) / self.steps**0.5 + ((k * self.steps * 13) % 7) * 0.05 + self.config["lr"]}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        self.config = new_config
        return True


def recording(kind: type[TrialScheduler], log: list[Any], **arguments: Any) -> Any:
    """A scheduler that writes down what it is told and what it answers; trials are named by their k."""

    class Recording(kind):  # type: ignore[misc, valid-type]
        def on_trial_result(self, controller: Any, trial: Any, result: Any) -> Any:
            decision = super().on_trial_result(controller, trial, result)
            log.append((trial.config["k"], result["training_iteration"], result["loss"], decision))
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: Any) -> None:
            log.append((trial.config["k"], "complete"))
            super().on_trial_complete(controller, trial, result)

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            log.append((trial.config["k"], "remove"))
            super().on_trial_remove(controller, trial)

    return Recording(metric="loss", mode="min", **arguments)


BY_UNITS = {"time_attr": "training_iteration"}
MUTATIONS = {"lr": tune.uniform(0.0, 1.0)}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ASHAScheduler, {"max_t": 8, "grace_period": 1, "reduction_factor": 2}),
        (HyperBandScheduler, {"max_t": 8, "reduction_factor": 2}),
        (MedianStoppingRule, {"grace_period": 2, "min_samples_required": 2}),
        (PopulationBasedTraining, {**BY_UNITS, "perturbation_interval": 2, "hyperparam_mutations": MUTATIONS}),
        (
            PopulationBasedTraining,
            {**BY_UNITS, "perturbation_interval": 2, "hyperparam_mutations": MUTATIONS, "synch": True},
        ),
        (PromotionASHA, {"max_t": 8, "grace_period": 1, "reduction_factor": 2}),
    ],
    ids=["asha", "hyperband", "median", "pbt", "pbt-synchronous", "promotion"],
)
def test_decisions_are_those_of_stock_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TrialScheduler], arguments: dict[str, Any]
) -> None:
    """One trial at a time, so that the order of results is forced."""
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "1")
    logs: list[list[Any]] = []
    with Cerebro(workers=1, backend="inline", live_trials=1, run_dir=tmp_path / "runs", progress=False) as cerebro:
        for executor in (cerebro, None):
            logs.append([])
            random.seed(7)
            np.random.seed(7)
            tune.run(
                Curve, config={"k": tune.grid_search([5, 3, 4, 0, 1, 2]), "lr": 0.1}, stop={"training_iteration": 8},
                scheduler=recording(kind, logs[-1], **arguments), resources_per_trial={"cpu": 3}, verbose=0,
                reuse_actors=True, storage_path=str(tmp_path / "ray"), executor=executor,
            )  # fmt: skip
    ours, stock = logs
    assert len(stock) > 15
    assert ours == stock


class Rated(nets.Linear):
    """Tells the rate that its optimizer has, and the base rate of its schedule, after each unit."""

    schedule = "epoch"

    def build(self, config: Any, plan: Any) -> Any:
        model = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def run_unit(self, work: Any) -> dict[str, float]:
        rate = self.state.optimizer.param_groups[0]["lr"]
        base = self.state.scheduler.base_lrs[0]
        return super().run_unit(work) | {"rate": rate, "base": base, "passed": work.epoch}


class LitRated(lightning_nets.Momentum):
    """Likewise, for Lightning; its rate falls by half with every epoch."""

    def on_train_epoch_end(self) -> None:
        return

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        self.log("base", self.lr_schedulers().base_lrs[0])
        self.log("passed", float(self.current_epoch))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("net", [Rated, LitRated])
def test_an_exploit_trains_at_its_new_rate(options: dict[str, Any], tmp_path: Path, net: type) -> None:
    """The first unit after an exploit too: a state loaded into a new build would go on at the old rate."""
    changed = 0

    class Watch(tune.Callback):
        def __init__(self) -> None:
            self.rates: dict[str, float] = {}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            nonlocal changed
            rate = result["config"]["lr"]  # the trial's own may be new by now
            changed += self.rates.setdefault(trial.trial_id, rate) != rate
            self.rates[trial.trial_id] = rate
            assert result["base"] == pytest.approx(rate)
            assert result["rate"] == pytest.approx(rate * 0.5 ** result["passed"])

    scheduler = PopulationBasedTraining(
        **BY_UNITS,
        perturbation_interval=4,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 0.3)},
        quantile_fraction=0.5,
    )
    random.seed(3)
    with Cerebro(**options | {"epochs": 4}) as executor:
        analysis = tune.run(
            net, config={"lr": tune.loguniform(1e-3, 0.3)}, num_samples=4, scheduler=scheduler, callbacks=[Watch()],
            metric="val_loss", mode="min", verbose=0, storage_path=str(tmp_path / "ray"), executor=executor,
        )  # fmt: skip
    assert changed >= 2
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 4
    if net is LitRated:
        saved = torch.load(f"{analysis.trials[0].checkpoint.path}/checkpoint.ckpt", weights_only=True)
        assert saved["hyper_parameters"]["lr"] == pytest.approx(analysis.trials[0].config["lr"])


def test_an_exploit_goes_on_from_the_state_that_was_good(options: dict[str, Any], tmp_path: Path) -> None:
    """A trial that exploits another at its n-th unit has from then on the weights of that one, not its own."""
    seen: dict[str, list[tuple[int, int]]] = {}

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            seen.setdefault(trial.trial_id, []).append((result["training_iteration"], result["seen"]))

    scheduler = PopulationBasedTraining(
        **BY_UNITS, perturbation_interval=4, hyperparam_mutations={"lr": [0.001, 0.01, 0.1]}
    )
    with Cerebro(**options | {"live_trials": 2}) as executor:
        tune.run(
            nets.Remembering, config={"lr": tune.grid_search([0.001, 0.01, 0.1, 0.3])}, scheduler=scheduler,
            callbacks=[Watch()], metric="val_loss", mode="min", verbose=0, storage_path=str(tmp_path / "ray"),
            executor=executor,
        )  # fmt: skip
    for reports in seen.values():
        assert all(iteration == units for iteration, units in reports)  # Remembering asserts that no unit is run twice
        assert reports[-1] == (8, 8)


def test_a_trial_that_was_paused_in_mid_unit_is_heard_while_another_is_answered(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The one that reports is paused, and not told to go on as the one that waits is."""
    log: list[tuple[int, int]] = []

    class Pausing(FIFOScheduler):
        """The first trial pauses the second in mid-unit, lets it go on at its 5th report, and then waits a while."""

        held: Any = None

        def on_trial_result(self, controller: Any, trial: Any, result: Any) -> str:
            first, second = controller.get_trials()
            at = result["training_iteration"]
            log.append((int(trial is second), at))
            if trial is first and at == 2:
                self.held = second
                controller.pause_trial(second)
            if trial is first and at == 5:
                self.held = first
                return str(TrialScheduler.PAUSE)
            return str(TrialScheduler.CONTINUE)

        def choose_trial_to_run(self, controller: Any) -> Any:
            others = [trial for trial in controller.get_trials() if trial is not self.held]
            waiting = [trial for trial in others if trial.status in ("PENDING", "PAUSED")]
            if self.held is not None and all(trial.is_finished() for trial in others):
                return self.held
            return waiting[0] if waiting else None

    with Cerebro(**options) as executor:
        analysis = tune.run(
            nets.Remembering, config={"lr": tune.grid_search([0.1, 0.2])}, scheduler=Pausing(), metric="val_loss",
            mode="min", verbose=0, storage_path=str(tmp_path / "ray"), executor=executor,
        )  # fmt: skip
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 2
    paused = log.index((0, 5)) + 1
    assert [trial for trial, _ in log[paused:]] == [1] * (len(log) - paused - 2) + [0] * 2  # 8th reports end by "done"


class Optimistic(nets.Linear):
    """Reports how many units it has behind it as its score."""

    def run_unit(self, work: Any) -> dict[str, float]:
        return super().run_unit(work) | {"rate": self.state.optimizer.param_groups[0]["lr"]}


@pytest.mark.parametrize("clock", ["training_iteration", "epoch"])
@pytest.mark.parametrize(
    "make",
    [
        lambda clock, unit: ASHAScheduler(time_attr=clock, max_t=8 * unit, grace_period=4 * unit, reduction_factor=2),
        lambda clock, unit: MedianStoppingRule(time_attr=clock, grace_period=4 * unit, min_samples_required=2),
        lambda clock, unit: PromotionASHA(time_attr=clock, max_t=8 * unit, grace_period=4 * unit, reduction_factor=2),
        lambda clock, unit: HyperBandScheduler(time_attr=clock, max_t=8 * unit, reduction_factor=2),
        lambda clock, unit: PopulationBasedTraining(
            time_attr=clock, perturbation_interval=4 * unit, hyperparam_mutations={"lr": tune.loguniform(0.01, 1)}
        ),
    ],
    ids=["asha", "median", "promotion", "hyperband", "pbt"],
)
def test_schedulers_that_count_units_or_epochs(
    options: dict[str, Any], tmp_path: Path, clock: str, make: Callable[[str, float], Any]
) -> None:
    unit = 1 if clock == "training_iteration" else 0.25
    with Cerebro(**options) as executor:
        analysis = tune.run(
            Optimistic, config={"lr": tune.loguniform(0.01, 1)}, num_samples=6, scheduler=make(clock, unit),
            metric="val_loss", mode="min", verbose=0, storage_path=str(tmp_path / "ray"), executor=executor,
        )  # fmt: skip
    assert {trial.status for trial in analysis.trials} == {"TERMINATED"}
    assert max(trial.last_result["training_iteration"] for trial in analysis.trials) == 8


@pytest.mark.filterwarnings("ignore")  # what their models use is full of deprecated calls
def test_pb2_and_bohb_and_a_replay(options: dict[str, Any], tmp_path: Path) -> None:
    asked = {"metric": "val_loss", "mode": "min", "verbose": 0, "storage_path": str(tmp_path / "ray")}
    space = {"lr": tune.uniform(0.01, 1.0)}
    with Cerebro(**options | {"epochs": 3}) as executor:
        bounded = PB2(**BY_UNITS, perturbation_interval=2, quantile_fraction=0.5, hyperparam_bounds={"lr": [0.01, 1.0]})
        pb2 = tune.run(Rated, config=space, num_samples=4, name="pb2", scheduler=bounded, executor=executor, **asked)
        assert [trial.last_result["training_iteration"] for trial in pb2.trials] == [12] * 4
        bohb = tune.run(
            Rated, config=space, num_samples=6, scheduler=HyperBandForBOHB(max_t=8, reduction_factor=2),
            search_alg=TuneBOHB(seed=1), executor=executor, **asked,
        )  # fmt: skip
        assert {trial.status for trial in bohb.trials} == {"TERMINATED"}
        policies = sorted((tmp_path / "ray" / "pb2").glob("pbt_policy_*.txt"))
        assert policies
        replay = PopulationBasedTrainingReplay(str(policies[0]))
        replayed = tune.run(Rated, scheduler=replay, executor=executor, **asked)
        (trial,) = replayed.trials
        assert trial.last_result["training_iteration"] == 12
        assert trial.last_result["base"] == pytest.approx(trial.config["lr"])


def test_many_parked_trials_stay_within_their_memory(options: dict[str, Any], tmp_path: Path) -> None:
    """40 trials of 4 MB wait at their rung in 48 MB; the rest of them is on disk."""
    with Cerebro(**options | {"state_memory": "48MB"}) as executor:
        most = 0

        class Watch(tune.Callback):
            def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
                nonlocal most
                if executor.current is not None:
                    most = max(most, executor.current._store.bytes_in_use)

        analysis = tune.run(
            Wide, config={"lr": tune.loguniform(0.001, 1)}, num_samples=40, callbacks=[Watch()],
            scheduler=PromotionASHA(max_t=8, grace_period=4, reduction_factor=4), metric="val_loss", mode="min",
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False), verbose=0,
            storage_path=str(tmp_path / "ray"), executor=executor,
        )  # fmt: skip
    assert 0 < most <= 48 << 20
    counts = [trial.last_result["training_iteration"] for trial in analysis.trials]
    assert counts.count(4) >= 25
    assert max(counts) == 8


class Wide(nets.Linear):
    """Four million bytes of weights that are not used."""

    def build(self, config: Any, plan: Any) -> Any:
        model = nn.Linear(8, 2)
        model.register_buffer("ballast", torch.zeros(1_000_000))
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
