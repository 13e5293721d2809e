"""PromotionASHA against the paper's Algorithm 2, and in stock Ray."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from ray.tune.experiment import Trial

from cerebro_tune.errors import ConfigurationError
from cerebro_tune_ray import PromotionASHA
from ray_stand_in import StandInController, StandInTrial

Curve = Sequence[float]


class Paper:
    """Algorithm 2 of Li et al., MLSys 2020, for given numbers of workers and a given order of completions.

    `resources[k]` is r * eta^(s + k); the last is R. Random configurations are `curves`, and may run out. Workers come
    and go, one number for each step in turn: with a fixed number there is never more than one to be promoted.
    """

    def __init__(self, curves: Sequence[Curve], resources: Sequence[int], eta: float) -> None:
        self.curves, self.resources, self.eta = curves, resources, eta
        self.rungs: list[dict[int, float]] = [{} for _ in resources]  # rung k: configuration -> loss
        self.promoted: list[set[int]] = [set() for _ in resources]
        self.drawn = 0

    def top_k(self, rung: dict[int, float], k: int) -> list[int]:
        ranked = sorted(rung, key=lambda t: math.inf if math.isnan(rung[t]) else rung[t])  # stable: ties as they came
        return [t for t in ranked[:k] if not math.isnan(rung[t])]

    def get_job(self) -> tuple[int, int] | None:
        for k in range(len(self.resources) - 2, -1, -1):
            candidates = self.top_k(self.rungs[k], math.floor(len(self.rungs[k]) / self.eta))
            promotable = [t for t in candidates if t not in self.promoted[k]]
            if promotable:
                self.promoted[k].add(promotable[0])
                return promotable[0], k + 1
        if self.drawn == len(self.curves):
            return None
        self.drawn += 1
        return self.drawn - 1, 0

    def run(self, workers: Sequence[int], picks: Sequence[int]) -> list[tuple[str, int]]:
        """All jobs in the order in which they were given, each as (configuration, resource that it starts from)."""
        jobs: list[tuple[str, int]] = []
        busy: dict[int, tuple[int, int]] = {}  # configuration -> (rung, units done)
        step = 0
        while True:
            while len(busy) < workers[step % len(workers)] and (job := self.get_job()) is not None:
                t, k = job
                busy[t] = (k, self.resources[k - 1] if k else 0)
                jobs.append((str(t), busy[t][1]))
            if not busy:
                return jobs
            t = sorted(busy)[picks[step % len(picks)] % len(busy)]
            k, units = busy[t][0], busy[t][1] + 1
            busy[t] = (k, units)
            if units == self.resources[k]:
                self.rungs[k][t] = self.curves[t][units - 1]
                del busy[t]
            step += 1


def schedule(r: int, eta: int, top: int) -> list[int]:
    return [r * eta**k for k in range(top + 1)]


# Few different losses, so that there are ties; and curves that diverge.
LOSSES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, -1.0, math.nan]) | st.floats(-2, 2)


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[Curve], list[int], int]:
    resources = schedule(
        draw(st.integers(1, 2)), eta := draw(st.integers(2, 4)), draw(st.integers(0, 3 if eta == 2 else 2))
    )
    curve = st.lists(LOSSES, min_size=resources[-1], max_size=resources[-1])
    return draw(st.lists(curve, min_size=1, max_size=24)), resources, eta


@given(
    searches(),
    st.lists(st.integers(1, 6), min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.sampled_from(["min", "max"]),
)
def test_it_gives_the_jobs_of_algorithm_2(
    search: tuple[list[Curve], list[int], int], workers: list[int], picks: list[int], mode: str
) -> None:
    curves, resources, eta = search
    paper = Paper(curves, resources, eta)
    jobs = paper.run(workers, picks)

    scheduler = PromotionASHA(
        metric="loss", mode=mode, max_t=resources[-1], grace_period=resources[0], reduction_factor=eta
    )
    scores = curves if mode == "min" else [[-loss for loss in curve] for curve in curves]
    controller = StandInController(scheduler, scores, workers[0])
    controller.end(picks, workers)

    assert controller.log == jobs
    assert {trial.status for trial in controller.trials} == {Trial.TERMINATED}
    assert [trial.units for trial in controller.trials] == [
        resources[max(k for k, rung in enumerate(paper.rungs) if t in rung)] for t in range(len(curves))
    ]
    for trial, curve in zip(controller.trials, curves, strict=True):
        assert not any(math.isnan(curve[unit - 1]) for unit in resources if unit < trial.units)


def asha(**options: Any) -> PromotionASHA:
    return PromotionASHA(**({"metric": "loss", "mode": "min", "max_t": 9, "reduction_factor": 3} | options))


def flat(losses: Sequence[float], units: int = 9) -> list[Curve]:
    return [[loss] * units for loss in losses]


def test_of_equal_results_those_that_came_first_are_promoted() -> None:
    controller = StandInController(asha(), flat([0.5] * 9), slots=1)
    controller.end()
    assert [trial.units for trial in controller.trials] == [9, 3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("missing", [math.nan, None, math.inf])
def test_a_trial_without_a_score_is_stopped_at_its_rung_and_still_counts_there(missing: float | None) -> None:
    """Two of three diverge, and the third is promoted: it is the best of three."""
    controller = StandInController(asha(), [[missing] * 9, [missing] * 9, [2.0] * 9], slots=1)
    controller.end()
    assert [trial.units for trial in controller.trials] == [1, 1, 3]


def test_a_score_may_be_missing_between_rungs() -> None:
    controller = StandInController(asha(), [[1.0, math.nan, 1.0], *flat([2.0, 3.0])], slots=1)
    controller.end()
    assert [trial.units for trial in controller.trials] == [3, 1, 1]


def test_a_last_leg_leads_to_a_max_t_that_is_no_rung_of_its_own() -> None:
    """Rungs at 1, 3 and 9, and the end at 10: what Ray's max_t means."""
    controller = StandInController(asha(max_t=10), flat([float(n) for n in range(27)], units=10), slots=1)
    controller.end()
    assert sorted(trial.units for trial in controller.trials) == [1] * 18 + [3] * 6 + [9] * 2 + [10]


def test_rungs_may_be_parts_of_an_epoch() -> None:
    """Eight shards, rungs at 1/4, 1/2, 1 and 2 epochs."""
    controller = StandInController(
        asha(time_attr="epoch", max_t=2, grace_period=0.25, reduction_factor=2),
        flat([float(n) for n in range(8)], units=16),
        slots=1,
        report=lambda unit, score: {"epoch": unit / 8, "loss": score},
    )
    controller.end()
    assert sorted(trial.units for trial in controller.trials) == [2] * 4 + [4] * 2 + [8, 16]


def test_a_result_that_has_passed_several_rungs_counts_at_the_highest() -> None:
    """Reports every four units, rungs at 1, 3 and 9: nobody is recorded at 1, and all meet at 3."""
    controller = StandInController(
        asha(max_t=12),
        flat([1.0, 2.0, 3.0], units=3),
        slots=1,
        report=lambda unit, score: {"training_iteration": 4 * unit, "loss": score},
    )
    controller.end()
    assert [trial.units for trial in controller.trials] == [3, 1, 1]


def test_results_without_the_time_go_on() -> None:
    trial = StandInTrial("a", [])
    assert asha().on_trial_result(None, trial, {"loss": math.nan}) == "CONTINUE"


def test_asking_again_gives_the_same_trial() -> None:
    controller = StandInController(asha(), flat([3.0, 2.0, 1.0]), slots=1)
    for _ in range(3):
        controller.step(0)
    scheduler = controller.scheduler
    assert (
        scheduler.choose_trial_to_run(controller) is scheduler.choose_trial_to_run(controller) is controller.trials[2]
    )


def test_a_promoted_trial_that_waits_for_a_slot_is_not_followed_by_another() -> None:
    """Stock Ray asks in every step, and makes what it is given PENDING until there is a slot."""
    controller = StandInController(asha(), flat([float(n) for n in range(9)]), slots=9)
    controller.fill()
    controller.slots = 0
    while controller.of(Trial.RUNNING):
        controller.step(0)
    promoted = controller.scheduler.choose_trial_to_run(controller)
    promoted.status = Trial.PENDING
    assert controller.scheduler.choose_trial_to_run(controller) is promoted is controller.trials[0]
    promoted.status = Trial.RUNNING
    assert controller.scheduler.choose_trial_to_run(controller) is controller.trials[1]


def test_a_trial_that_a_stop_condition_ends_at_a_rung_counts_there() -> None:
    controller = StandInController(asha(), flat([1.0, 2.0, 3.0, 4.0]), slots=1)
    controller.fill()
    stopped = controller.trials[0]
    stopped.units = 1
    controller.stop_trial(stopped)  # Ray does not ask the scheduler then
    controller.end()
    # Four results at the rung: the best was stopped, and its place in the best third is not given away.
    assert [trial.units for trial in controller.trials] == [1, 1, 1, 1]


def test_a_trial_that_comes_back_after_an_error_keeps_its_place() -> None:
    controller = StandInController(asha(), flat([1.0, 2.0, 3.0]), slots=1)
    for _ in range(4):
        controller.step(0)
    broken = controller.trials[0]
    assert (broken.status, broken.units) == (Trial.RUNNING, 2)
    controller.scheduler.on_trial_error(controller, broken)
    broken.status, broken.units = Trial.PENDING, 1  # back at its last checkpoint
    controller.scheduler.on_trial_add(controller, broken)
    controller.end()
    assert [trial.units for trial in controller.trials] == [3, 1, 1]
    assert controller.log[-2:] == [("0", 1), ("0", 1)]


def test_a_failed_trial_is_not_waited_for() -> None:
    controller = StandInController(asha(), flat([1.0, 2.0, 3.0, 4.0]), slots=1)
    for _ in range(4):
        controller.step(0)
    controller.scheduler.on_trial_error(controller, controller.trials[0])
    controller.trials[0].status = Trial.ERROR
    controller.end()
    assert [(trial.status, trial.units) for trial in controller.trials[1:]] == [(Trial.TERMINATED, 1)] * 3


@given(st.lists(LOSSES, min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 6))
def test_a_searcher_that_counts_paused_trials_as_live_still_gives_all_of_them(
    losses: list[float], limit: int, slots: int
) -> None:
    controller = StandInController(asha(), flat(losses), slots, limit=limit)
    controller.end()
    assert len(controller.trials) == len(losses)
    assert {trial.status for trial in controller.trials} == {Trial.TERMINATED}


def test_the_least_promising_trial_makes_room_in_a_limited_search() -> None:
    controller = StandInController(asha(), flat([3.0, 5.0, 4.0, 1.0]), slots=1, limit=2)
    controller.end()
    # 1 goes when the limit is met; 0 is the best of three; 2 goes, and 3 turns out to be the best of four.
    assert controller.log == [("0", 0), ("1", 0), ("2", 0), ("0", 1), ("3", 0), ("3", 1)]


@given(searches(), st.integers(1, 4), st.integers(0, 30), st.sampled_from([copy.deepcopy, pickle.loads]))
def test_a_copy_goes_on_as_the_original(
    search: tuple[list[Curve], list[int], int], workers: int, steps: int, way: Callable[..., Any]
) -> None:
    curves, resources, eta = search
    scheduler = asha(max_t=resources[-1], grace_period=resources[0], reduction_factor=eta)
    straight, copied = (StandInController(copy.deepcopy(scheduler), curves, workers) for _ in range(2))
    straight.end()
    for _ in range(steps):
        copied.step(0)
    copied.scheduler = way(pickle.dumps(copied.scheduler) if way is pickle.loads else copied.scheduler)
    copied.end()
    assert copied.log == straight.log


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grace_period": 0}, "grace_period is 0; it must be above 0, and at most max_t=9"),
        ({"grace_period": 10}, "grace_period is 10; it must be above 0, and at most max_t=9"),
        ({"reduction_factor": 1}, "reduction_factor is 1; it must be above 1"),
        ({"mode": "lowest"}, 'mode is \'lowest\'; valid: "min", "max"'),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        asha(**options)


def test_metric_and_mode_come_from_the_scheduler_or_the_run() -> None:
    scheduler = PromotionASHA(mode="min")
    with pytest.raises(ConfigurationError, match="metric=None and mode='min': give both"):
        scheduler.on_trial_add(None, StandInTrial("a", []))
    assert not scheduler.set_search_properties(None, "max")
    assert scheduler.set_search_properties("val_loss", None)
    assert scheduler.metric == "val_loss"
    assert not scheduler.set_search_properties("train_loss", None)


class Curves(tune.Trainable):  # type: ignore[misc]
    def setup(self, config: dict[str, Any]) -> None:
        self.units = 0

    def step(self) -> dict[str, Any]:
        self.units += 1
        return {"loss": self.config["loss"], "seen": self.units}

    def save_checkpoint(self, folder: str) -> None:
        (Path(folder) / "units").write_text(str(self.units))

    def load_checkpoint(self, folder: str) -> None:
        self.units = int((Path(folder) / "units").read_text())

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.config, self.units = config, 0
        return True


class Watched(PromotionASHA):
    """Checks each promotion against the results that Ray has brought so far."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.results: dict[int, dict[str, float]] = {1: {}, 3: {}, 9: {}}
        self.promotions: dict[int, set[str]] = {1: set(), 3: set(), 9: set()}

    def best_third(self, rung: int) -> list[str]:
        ranked = sorted(self.results[rung], key=self.results[rung].__getitem__)
        return [trial for trial in ranked[: len(ranked) // 3] if math.isfinite(self.results[rung][trial])]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Any) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if result["training_iteration"] in self.results:
            loss = result["loss"]
            self.results[result["training_iteration"]][trial.trial_id] = math.inf if math.isnan(loss) else loss
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trial = super().choose_trial_to_run(tune_controller)
        if trial is not None and trial.status == Trial.PAUSED:
            rung = max(units for units, results in self.results.items() if trial.trial_id in results)
            assert trial.trial_id in self.best_third(rung)
            self.promotions[rung].add(trial.trial_id)
        return trial


@pytest.mark.usefixtures("ray_session")
def test_stock_ray_promotes_by_it_and_ends(tmp_path: Path) -> None:
    scheduler = Watched(metric="loss", mode="min", max_t=9, reduction_factor=3)
    losses = [9.0, 2.0, 7.0, math.nan, 1.0, 5.0, 3.0, 4.0, 8.0, 6.0, 0.0, 2.5]
    results = tune.Tuner(
        Curves,
        param_space={"loss": tune.grid_search(losses)},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()

    assert not results.errors
    assert len(scheduler.results[1]) == len(losses)
    for rung, higher in ((1, 3), (3, 9)):
        assert set(scheduler.best_third(rung)) <= scheduler.promotions[rung] == set(scheduler.results[higher])
    assert {result.metrics["training_iteration"] for result in results} == {1, 3, 9}
    # Nothing was trained twice or from scratch: a resumed trial went on from its checkpoint.
    assert all(result.metrics["seen"] == result.metrics["training_iteration"] for result in results)
