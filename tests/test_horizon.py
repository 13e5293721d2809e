"""Lengths that count units and look as if epochs were meant, and schedulers that count in parts of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.stopper import MaximumIterationStopper

from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.horizon import told_in_epochs
from cerebro_tune_ray import PromotionASHA
from cerebro_tune_ray.horizons import horizon_warning
from cerebro_tune_ray.schedulers import check_lengths
from ray_stand_in import Member, StandInController

UNITS: dict[str, Any] = {"time_attr": "training_iteration"}
MUTATIONS: dict[str, Any] = {"hyperparam_mutations": {"lr": [0.1, 0.2]}}


def told(scheduler: TrialScheduler | None = None, stop: Any = None, report_every: str = "unit") -> str | None:
    return horizon_warning(scheduler, stop, shards=8, report_every=report_every)


def test_the_text() -> None:
    assert told(AsyncHyperBandScheduler(max_t=10, grace_period=1)) == (
        "training_iteration counts units, 8 to an epoch. In epochs, max_t=10 is 1.25 and grace_period=1 is 0.125. "
        "If epochs were meant, write max_t=cerebro.units(10), grace_period=cerebro.units(1); "
        'or give Cerebro report_every="epoch", and every report is an epoch. '
        "If units were meant, max_t=cerebro.units(1.25), grace_period=cerebro.units(0.125) says so."
    )


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (AsyncHyperBandScheduler(max_t=64), {"grace_period=1"}),
        (AsyncHyperBandScheduler(max_t=64, grace_period=2, brackets=2), {"grace_period=2"}),
        (AsyncHyperBandScheduler(max_t=64, grace_period=8), set()),
        (PromotionASHA(max_t=64), {"grace_period=1"}),
        (PromotionASHA(max_t=4), {"max_t=4", "grace_period=1"}),
        (PromotionASHA(max_t=64, grace_period=8), set()),
        (HyperBandScheduler(max_t=7), {"max_t=7"}),
        (HyperBandForBOHB(max_t=7), {"max_t=7"}),
        (HyperBandScheduler(max_t=81), set()),
        (MedianStoppingRule(grace_period=3, **UNITS), {"grace_period=3"}),
        (MedianStoppingRule(grace_period=8, min_time_slice=2, **UNITS), {"min_time_slice=2"}),
        (MedianStoppingRule(grace_period=3), set()),  # seconds
        (PopulationBasedTraining(perturbation_interval=4, **UNITS, **MUTATIONS), {"perturbation_interval=4"}),
        (
            PopulationBasedTraining(perturbation_interval=8, burn_in_period=5, **UNITS, **MUTATIONS),
            {"burn_in_period=5"},
        ),
        (PB2(perturbation_interval=4, hyperparam_bounds={"lr": [0, 1]}, **UNITS), {"perturbation_interval=4"}),
        (FIFOScheduler(), set()),
        (None, set()),
    ],
)
def test_lengths_below_an_epoch_are_told(scheduler: TrialScheduler | None, names: set[str]) -> None:
    text = told(scheduler)
    assert (text is None) == (not names)
    if text is not None:
        assert {word for word in text.split(". In epochs")[1].split(". If")[0].split() if "=" in word} == names


@pytest.mark.parametrize("stop", [{"training_iteration": 5, "loss": 0.1}, MaximumIterationStopper(5)])
def test_a_stop_condition_below_an_epoch_is_told(stop: Any) -> None:
    assert "=5 is 0.625" in str(told(FIFOScheduler(), stop))
    assert "=5 is 0.625" in str(told(AsyncHyperBandScheduler(max_t=2, grace_period=0.5, time_attr="epoch"), stop))
    assert told(stop=stop, report_every="epoch") is None


@pytest.mark.parametrize("stop", [{"training_iteration": 16}, {"epoch": 1}, {"loss": 0.1}, lambda trial, result: True])
def test_other_stop_conditions_are_not(stop: Any) -> None:
    assert told(FIFOScheduler(), stop) is None


def test_epochs_are_what_they_say() -> None:
    scheduler = AsyncHyperBandScheduler(max_t=10, grace_period=1)
    assert told(scheduler, {"training_iteration": 4}, report_every="epoch") is None
    assert told(AsyncHyperBandScheduler(max_t=10, grace_period=1, time_attr="epoch")) is None


def test_what_is_to_be_written_is_right(train: ShardedDataset) -> None:
    """The expression of the text, evaluated, is as many epochs."""
    cerebro = Cerebro(train, backend="inline", workers=1)
    text = told_in_epochs("step", {"n_warmup_steps": 3}, shards=4)
    assert text is not None
    written = text.split("write n_warmup_steps=")[1].split(";")[0]
    units = eval(written, {"cerebro": cerebro})
    assert units == 12
    assert told_in_epochs("step", {"n_warmup_steps": units}, shards=4) is None


def in_epochs(unit: int, score: Any) -> dict[str, Any]:
    return {"epoch": unit / 8, "training_iteration": unit, "loss": score}


@pytest.mark.parametrize(
    "make",
    [
        lambda **lengths: AsyncHyperBandScheduler(reduction_factor=2, **lengths),
        lambda **lengths: PromotionASHA(reduction_factor=2, **lengths),
        lambda max_t, grace_period, **options: MedianStoppingRule(
            grace_period=grace_period, min_samples_required=2, **options
        ),
    ],
)
@pytest.mark.parametrize("grace", [1, 2, 8])
def test_parts_of_an_epoch_decide_as_units_do(make: Callable[..., TrialScheduler], grace: int) -> None:
    """ASHA, PromotionASHA and the median rule compare times as they are: 8 shards, lengths in 8ths of an epoch."""
    curves = [[loss / 8] * 16 for loss in (5, 3, 4, 1, 2, 6, 0, 7)]
    runs = []
    for time_attr, unit in (("training_iteration", 1), ("epoch", 1 / 8)):
        scheduler = make(time_attr=time_attr, max_t=16 * unit, grace_period=grace * unit, metric="loss", mode="min")
        controller = StandInController(scheduler, curves, slots=2, stop=16, report=in_epochs)
        controller.end(range(100))
        runs.append([trial.units for trial in controller.trials])
    assert runs[0] == runs[1]
    assert min(runs[0]) < 16


@pytest.mark.parametrize(("max_t", "rungs"), [(4, {8, 16, 32}), (2.5, {8, 16})])
def test_hyperband_has_rungs_at_whole_epochs(max_t: float, rungs: set[int]) -> None:
    """It rounds them down, max_t included."""
    scheduler = HyperBandScheduler(time_attr="epoch", max_t=max_t, reduction_factor=2, metric="loss", mode="min")
    controller = StandInController(scheduler, [[float(n)] * 40 for n in range(12)], slots=12, report=in_epochs)
    controller.end()
    assert {trial.units for trial in controller.trials} == rungs


@pytest.mark.parametrize("kind", [HyperBandScheduler, HyperBandForBOHB])
def test_hyperband_below_one_epoch_is_refused(kind: type[HyperBandScheduler]) -> None:
    with pytest.raises(ConfigurationError, match=r"max_t=0\.9 of 'epoch'; it must be at least 1"):
        check_lengths(kind(time_attr="epoch", max_t=0.9))
    check_lengths(kind(time_attr="epoch", max_t=1))
    check_lengths(AsyncHyperBandScheduler(time_attr="epoch", max_t=0.9, grace_period=0.5))


@pytest.mark.parametrize(("shards", "interval", "perturbed"), [(8, 0.5, [4, 8, 12, 16]), (3, 1, [3, 6, 9, 12])])
def test_pbt_perturbs_at_parts_of_an_epoch(shards: int, interval: float, perturbed: list[int]) -> None:
    """To the unit, where the parts are powers of 1/2 or whole epochs; others may come one unit late by rounding."""
    pbt = PopulationBasedTraining(
        time_attr="epoch", perturbation_interval=interval, metric="loss", mode="min", **MUTATIONS
    )
    member = Member("0", [])
    controller = StandInController(pbt, [], slots=1)
    pbt.on_trial_add(controller, member)
    times = []
    for unit in range(1, perturbed[-1] + 1):
        pbt.on_trial_result(controller, member, {"epoch": unit / shards, "loss": 1.0})
        times.append(pbt._trial_state[member].last_perturbation_time * shards)
    assert [unit for unit, time in enumerate(times, start=1) if time == unit] == perturbed
