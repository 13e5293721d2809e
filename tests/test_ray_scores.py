"""Results without a score, handed to Ray's own schedulers: none survives where trials are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
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

from cerebro_tune_ray import PromotionASHA
from cerebro_tune_ray.schedulers import lacking
from cerebro_tune_ray.score import Judged, fill_score, loss_of
from ray_stand_in import Member, StandInController, StandInTrial

Curve = Sequence[Any]
SCORES = st.sampled_from([0.0, 0.5, 1.0, math.nan, math.nan, None, math.inf]) | st.floats(-2, 2)
CURVES = st.lists(st.lists(SCORES, min_size=8, max_size=8), min_size=1, max_size=16)
PICKS = st.lists(st.integers(0, 5), min_size=1, max_size=30)
COMPARED = {"metric": "loss", "mode": "min"}


def unscored(score: float | None) -> bool:
    return score is None or not math.isfinite(score)


class Search(StandInController):
    """Has its scheduler judged, and the searcher that BOHB's scheduler talks to."""

    def __init__(self, scheduler: TrialScheduler, curves: Sequence[Curve], slots: int, **options: Any) -> None:
        super().__init__(Judged(scheduler), curves, slots, **options)
        self.search_alg.searcher = SimpleNamespace(on_pause=lambda trial_id: None, on_unpause=lambda trial_id: None)

    def last_result(self, trial: StandInTrial) -> dict[str, Any]:
        """A score of None stands for a metric that is not there."""
        return {name: value for name, value in super().last_result(trial).items() if value is not None}


@given(CURVES, PICKS, st.integers(1, 5))
def test_none_survives_a_rung_of_asha(curves: list[Curve], picks: list[int], slots: int) -> None:
    search = Search(AsyncHyperBandScheduler(max_t=8, reduction_factor=2, **COMPARED), curves, slots)
    search.end(picks)
    for trial in search.trials:
        assert not any(unscored(trial.curve[rung - 1]) for rung in (1, 2, 4, 8) if rung < trial.units)


@pytest.mark.parametrize("kind", [HyperBandScheduler, HyperBandForBOHB])
@given(CURVES, PICKS, st.integers(1, 5))
def test_none_survives_a_rung_of_hyperband(
    kind: type[HyperBandScheduler], curves: list[Curve], picks: list[int], slots: int
) -> None:
    """Neither by waiting for the others of its bracket, nor as the one whose result ends their waiting."""

    class Asked(Search):
        def ask(self, trial: StandInTrial, result: dict[str, Any]) -> str:
            bracket = scheduler._trial_info[trial][0]
            milestone = bracket._cumul_r
            decision = super().ask(trial, result)
            if unscored(trial.curve[trial.units - 1]):
                assert decision == "STOP" or (decision == "CONTINUE" and bracket._cumul_r == milestone > trial.units)
            return decision

    scheduler = kind(max_t=8, reduction_factor=2, **COMPARED)
    search = Asked(scheduler, curves, slots)
    search.end(picks)
    assert {trial.status for trial in search.trials} == {Trial.TERMINATED}


@given(CURVES, PICKS, st.integers(1, 5))
def test_none_survives_the_grace_period_of_the_median_rule(curves: list[Curve], picks: list[int], slots: int) -> None:
    rule = MedianStoppingRule(time_attr="training_iteration", grace_period=3, min_samples_required=2, **COMPARED)
    search = Search(rule, curves, slots, stop=8)
    search.end(picks)
    for trial in search.trials:
        assert not any(unscored(score) for score in trial.curve[2 : trial.units - 1])


@pytest.mark.parametrize("missing", [math.nan, None, math.inf])
def test_the_first_at_a_rung_and_the_only_one_there_do_not_survive_it(missing: float | None) -> None:
    """With stock Ray's reading of NaN the first would train to the end: nothing is there to compare it with."""
    search = Search(AsyncHyperBandScheduler(max_t=8, reduction_factor=2, **COMPARED), [[missing] * 8], slots=1)
    search.end()
    assert [trial.units for trial in search.trials] == [1]


def test_a_score_may_be_missing_before_the_first_rung_and_between_rungs() -> None:
    curve = [math.nan, 1.0, math.nan, 1.0, math.nan, math.nan, math.nan, 1.0]
    search = Search(AsyncHyperBandScheduler(max_t=8, grace_period=2, reduction_factor=2, **COMPARED), [curve], slots=1)
    search.end()
    assert [trial.units for trial in search.trials] == [8]


@given(st.lists(st.lists(st.floats(-2, 2), min_size=8, max_size=8), min_size=1, max_size=16), PICKS, st.integers(1, 5))
def test_results_with_scores_are_left_alone(curves: list[Curve], picks: list[int], slots: int) -> None:
    def asha() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(max_t=8, reduction_factor=2, **COMPARED)

    ours, stock = Search(asha(), curves, slots), StandInController(asha(), curves, slots)
    ours.end(picks)
    stock.end(picks)
    assert ours.log == stock.log
    assert [trial.units for trial in ours.trials] == [trial.units for trial in stock.trials]


@pytest.mark.parametrize("score", [math.nan, None])
def test_schedulers_that_do_not_compare_see_what_was_reported(score: float | None) -> None:
    """FIFO has no use for scores, and PromotionASHA has a rule of its own."""
    promotion = PromotionASHA(**COMPARED)
    for scheduler in (FIFOScheduler(), promotion):
        result = {"training_iteration": 1, "loss": score}
        assert not fill_score(scheduler, result)
        assert result["loss"] is score
    assert (
        Judged(promotion).on_trial_result(None, StandInTrial("a", []), {"training_iteration": 1, "loss": score})
        == "STOP"
    )


@pytest.mark.parametrize(
    ("value", "mode", "loss"),
    [
        (2, "min", 2.0),
        (2, "max", -2.0),
        (math.nan, "max", math.inf),
        (-math.inf, "max", math.inf),
        (None, "min", math.inf),
    ],
)
def test_losses(value: float | None, mode: str, loss: float) -> None:
    assert loss_of({"metric": value}, "metric", mode) == loss_of({"metric": value, "other": 0}, "metric", mode) == loss
    assert loss_of({}, "metric", mode) == math.inf


class Population(Search):
    make = Member

    def _schedule_trial_save(self, trial: Member, result: dict[str, Any]) -> str:
        return f"checkpoint of {trial.trial_id}"

    def pause_trial(self, trial: Member, should_checkpoint: bool) -> None:
        trial.status = Trial.PAUSED


@pytest.mark.parametrize("kind", ["PBT", "PB2"])
def test_a_member_without_a_score_takes_over_a_better_one(kind: str) -> None:
    """Two of four diverge; neither is exploited, and both are members of the better half's making in the end."""
    common: dict[str, Any] = COMPARED | {
        "time_attr": "training_iteration", "perturbation_interval": 2, "quantile_fraction": 0.5, "log_config": False,
    }  # fmt: skip
    scheduler = (
        PopulationBasedTraining(hyperparam_mutations={"lr": [0.1, 0.2, 0.3, 0.4]}, **common)
        if kind == "PBT"
        else PB2(hyperparam_bounds={"lr": [0.1, 1.0]}, **common)
    )
    curves = [[math.nan] * 40, [1 / unit for unit in range(1, 41)], [None] * 40, [2 / unit for unit in range(1, 41)]]
    population = Population(scheduler, curves, slots=4)
    for step in range(40):
        population.step(step)
    assert {member.config["member"] for member in population.trials} == {"1", "3"}
    assert scheduler._num_perturbations >= 2


@pytest.mark.parametrize(
    "scheduler",
    [
        AsyncHyperBandScheduler(), HyperBandScheduler(), HyperBandForBOHB(), MedianStoppingRule(),
        PopulationBasedTraining(hyperparam_mutations={"lr": [1]}), PB2(hyperparam_bounds={"lr": [0, 1]}),
    ],
)  # fmt: skip
def test_this_ray_keeps_what_is_read_of_its_schedulers(scheduler: TrialScheduler) -> None:
    assert lacking(scheduler) == []
