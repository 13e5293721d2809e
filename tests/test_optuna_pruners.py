"""Pruners on recorded curves, one trial after another and side by side, with Optuna's own loop of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from cerebro_tune import Cerebro
from cerebro_tune.errors import ConfigurationError
from cerebro_tune_optuna import PromotionPruner, pruners

stock = optuna.pruners
CURVES: list[list[float]] = json.loads((Path(__file__).parent / "recorded_curves.json").read_text())
"""val_loss of the demo's CNN under 16 configs drawn at random, on 500 images, after each of 3 epochs x 8 shards."""
BEST = min(range(len(CURVES)), key=lambda trial: min(CURVES[trial]))


def replay(pruner: Any, order: Sequence[int], live: int, curves: list[list[float]] = CURVES) -> dict[int, int]:
    """Play the curves in this order, `live` of them side by side; returns after how many reports each was pruned."""
    study = optuna.create_study(study_name="replay", pruner=pruner)
    waiting, pruned = list(order), {}
    playing: list[tuple[int, optuna.Trial, Any]] = []
    while waiting or playing:
        while waiting and len(playing) < live:
            playing.append((waiting[0], study.ask(), count(1)))
            curve = waiting.pop(0)
        for one in list(playing):
            curve, trial, steps = one
            step = next(steps)
            trial.report(curves[curve][step - 1], step)
            if trial.should_prune():
                pruned[curve] = step
                study.tell(trial, state=TrialState.PRUNED)
            elif step == len(curves[curve]):
                study.tell(trial, min(curves[curve]))
            else:
                continue
            playing.remove(one)
    return pruned


@pytest.fixture
def three_epochs_of_eight(options: dict[str, Any]) -> Any:
    """What pruners ask an executor: 24 reports a trial."""

    class Eight(Cerebro):
        def units(self, epochs: float) -> int:
            return round(8 * epochs)

    return Eight(**options | {"epochs": 3})


COUNTS: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "Optuna's median": (lambda _: stock.MedianPruner(), 8, 0),
    "Optuna's percentile": (lambda _: stock.PercentilePruner(25.0), 9, 0),
    "Optuna's Hyperband": (lambda _: stock.HyperbandPruner(), 10, 0),
    "Optuna's successive halving": (lambda _: stock.SuccessiveHalvingPruner(), 12, 0),
    "median": (lambda _: pruners.MedianPruner(), 8, 8),
    "percentile": (lambda _: pruners.PercentilePruner(25.0), 10, 10),
    "Hyperband": (pruners.HyperbandPruner, 11, 11),
    "successive halving": (pruners.SuccessiveHalvingPruner, 14, 14),
}
"""How many of the 16 are pruned before their end: one after another, and all side by side."""


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_are_pruned(three_epochs_of_eight: Any, name: str) -> None:
    make, *expected = COUNTS[name]
    played = [replay(make(three_epochs_of_eight), range(len(CURVES)), live) for live in (1, len(CURVES))]
    assert [sum(step < 24 for step in pruned.values()) for pruned in played] == expected


@pytest.mark.parametrize("live", [1, 4, 16])
def test_the_best_trial_is_never_pruned_by_the_median_rule(live: int) -> None:
    saved = []
    for seed in range(20):
        order = Random(seed).sample(range(len(CURVES)), len(CURVES))
        pruned = replay(pruners.MedianPruner(), order, live)
        assert BEST not in pruned
        saved.append(sum(24 - step for step in pruned.values()))
    assert min(saved) > 24 * 4, "more than 4 trials' worth of units is saved in every order"


def test_peers_are_all_that_have_reported_at_the_step() -> None:
    study = optuna.create_study(pruner=pruners.MedianPruner(n_startup_trials=3))
    running, complete, pruned, elsewhere, judged = [study.ask() for _ in range(5)]
    for trial, value in ((running, 1.0), (complete, 2.0), (pruned, 3.0)):
        trial.report(value, 1)
    elsewhere.report(0.0, 2)
    study.tell(complete, 2.0)
    study.tell(pruned, state=TrialState.PRUNED)
    judged.report(2.5, 1)
    assert judged.should_prune(), "the median of 1, 2 and 3 is 2"
    assert not running.should_prune(), "has two peers, of the three that it takes: the judged one counts, too"
    elsewhere.report(9.0, 3)
    assert not elsewhere.should_prune(), "nobody else is there"


@pytest.mark.parametrize(("direction", "good"), [("minimize", 1.0), ("maximize", 3.0)])
def test_warm_up_interval_and_minimum_are_those_of_optuna(direction: str, good: float) -> None:
    def judge(pruner: Any) -> list[int]:
        study = optuna.create_study(direction=direction, pruner=pruner)
        peers = [study.ask() for _ in range(4)]
        judged, pruned_at = study.ask(), []
        for step in range(1, 13):
            for peer in peers[: 2 if step < 6 else 4]:
                peer.report(good, step)
            judged.report(2.0, step)
            if judged.should_prune():
                pruned_at.append(step)
        return pruned_at

    assert judge(pruners.MedianPruner(n_startup_trials=0)) == [*range(1, 13)]
    assert judge(pruners.MedianPruner(n_startup_trials=0, n_warmup_steps=4)) == [*range(4, 13)]
    assert judge(pruners.MedianPruner(n_startup_trials=0, n_warmup_steps=4, interval_steps=3)) == [4, 7, 10]
    assert judge(pruners.PercentilePruner(50.0, 0, n_min_trials=3)) == [*range(6, 13)]
    assert judge(pruners.PercentilePruner(50.0, n_startup_trials=4)) == [*range(6, 13)]


def test_nan_is_pruned_and_is_nobodys_peer() -> None:
    study = optuna.create_study(pruner=pruners.MedianPruner(n_startup_trials=0))
    lost, good, other = [study.ask() for _ in range(3)]
    good.report(1.0, 1)
    lost.report(float("nan"), 1)
    other.report(1.0, 1)
    assert lost.should_prune()
    assert not other.should_prune()


def test_the_resource_is_that_of_the_run(three_epochs_of_eight: Any, options: dict[str, Any]) -> None:
    every_epoch = Cerebro(**options | {"epochs": 9, "report_every": "epoch"})
    for executor, reports in ((three_epochs_of_eight, 24), (every_epoch, 9)):
        played = replay(pruners.HyperbandPruner(executor), range(16), 16)
        assert played == replay(stock.HyperbandPruner(max_resource=reports), range(16), 16)
    with pytest.raises(ConfigurationError, match="nothing to train on"):
        pruners.HyperbandPruner(Cerebro())


def test_promotion_is_for_optimize() -> None:
    study = optuna.create_study(pruner=PromotionPruner())
    trial = study.ask()
    trial.report(1.0, 1)
    with pytest.raises(ConfigurationError, match=r"only cerebro_tune_optuna\.optimize can do that"):
        trial.should_prune()
    with pytest.raises(ConfigurationError, match="reduction_factor is 1"):
        PromotionPruner(reduction_factor=1)
