"""A tuner's stream of 32 trials x 10 epochs: how much workers idle, and what task parallelism makes of the same stream.

Units of the trials differ 4x in cost. Hops have 2 x workers live trials, or 1.5 x, and the 16th result is looked at as
well as the last one: a searcher learns from results, and hops give the first of them later. 1.5 x on pinned shards is
simulated with FULL=1 only.

Simulated: 8 workers and 8 shards, the machine is the real one, its clock is not; units vary by +-5 %, hops take no
time. Task parallelism has the same durations, first come, first served, and all the data on every worker.

Real: 2 workers and 2 shards, a unit is a sleep of 16 to 64 ms, so that a busy machine is no part of what is compared,
and the searcher is Optuna's TPE: by hops through `optimize`, in turns with its own loop in two threads, in which a
trial sleeps for as long in all. What a trial costs depends on its number, so that both have the same work. From the
call to the result; workers are up.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import torch

from _report import Report
from _seeds import of_each
from _sizes import SIZE, sized
from _streams import EPOCHS, RESULT, TRIALS, half_time, idle_share, make_trials, simulated, task_parallel
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.simulate import Outcome, log_uniform_costs
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable, UnitWork
from cerebro_tune_optuna import optimize

SEEDS = range(sized(2, 10, 100))
REAL_SEEDS, PAIRED_SEEDS = range(sized(1, 10, 20)), range(sized(1, 5, 20))
SIMULATED_WORKERS, REAL_WORKERS = 8, 2
UNIT_S = 0.016  # of the cheapest trial
SHARES = (2.0, 1.5)  # live trials per worker
FULL_ONLY = {("pinned", 1.5)}


# Simulated.


def simulate_all(report: Report) -> None:
    workers = SIMULATED_WORKERS
    for placement in ("shared", "pinned"):
        for share in SHARES:
            live = int(share * workers)
            case = f"simulated, {workers} workers, {placement}, {live} live"
            if (placement, share) in FULL_ONLY and SIZE != "full":
                report.not_run(f"{case}: *", "FULL=1 measures it", row=10)
                continue
            outcomes = of_each(partial(simulated, workers=workers, live=live, placement=placement), SEEDS)
            if share == SHARES[0]:
                spans = [[(span.start, span.end) for span in outcome.spans] for outcome in outcomes]
                filled = [outcome.result(TRIALS - live) for outcome in outcomes]  # its place is the last one's
                to_last = [idle_share(busy, workers, until) for busy, until in zip(spans, filled, strict=True)]
                add_idle(report, case, to_last, [outcome.idle_share for outcome in outcomes])
                least = [100 * least_idle(one, until) for one, until in zip(outcomes, filled, strict=True)]
                report.add(
                    f"{case}: idle whole run, the least from then on", fmean(least), None, "%", row=9, runs=least
                )
            walls = [outcome.makespan / task_parallel(outcome)[-1] for outcome in outcomes]
            add_times(report, case, walls, [half_time(outcome) for outcome in outcomes])


def least_idle(outcome: Outcome, admitted: float) -> float:
    """The share that no schedule could do without, once the last trial is in: the longest rest of a trial sets it."""
    rests = dict.fromkeys(outcome.ends, 0.0)
    for span in outcome.spans:
        rests[span.unit.trial] += max(0.0, span.end - max(span.start, admitted))
    share = outcome.work / outcome.workers
    return 1 - share / max(share, admitted + max(rests.values()))


def add_idle(report: Report, case: str, to_last: Sequence[float], whole: Sequence[float]) -> None:
    for when, shares, bar in (("until the last trial is admitted", to_last, 1.0), ("whole run", whole, 3.0)):
        percent = [100 * share for share in shares]
        report.add(f"{case}: idle {when}", fmean(percent), bar, "%", row=9, runs=percent)


def add_times(report: Report, case: str, walls: Sequence[float], halves: Sequence[float]) -> None:
    report.add(f"{case}: wall clock / task-parallel's", fmean(walls), 1.0, row=10, runs=walls)
    report.add(f"{case}: result {RESULT} / task-parallel's", fmean(halves), 1.1, row=10, runs=halves)


# Real.


class Sleeper(Trainable):
    def start(self, config: Config, plan: Plan) -> None:
        self.config, self.units = config, torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {"units": self.units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.units = state["units"]

    def run_unit(self, work: UnitWork) -> dict[str, float]:
        time.sleep(self.config["unit_s"])
        self.units += 1
        return {"train_loss": 0.0, "loss": loss(self.config["x"], float(self.units))}


class SleeperRecipe(Recipe):
    name, suffix = "Sleeper", ".none"

    def create(self) -> Sleeper:
        return Sleeper()

    def export(self, state: dict[str, Any], path: Path) -> None:
        raise AssertionError("keep='none' exports nothing")


def loss(x: float, units: float) -> float:
    return (x - 0.3) ** 2 + 1 / (1 + units)


def unit_costs(seed: int) -> list[float]:
    """Seconds that a unit of each trial takes."""
    return [UNIT_S * cost for cost in log_uniform_costs(make_trials(TRIALS, EPOCHS), seed).values()]


@dataclass
class Ends:
    """An Optuna callback that notes when results arrive."""

    began: float
    at: list[float]

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        self.at.append(perf_counter() - self.began)


def new_study(seed: int) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.NopPruner())


def in_threads(seed: int) -> list[float]:
    """When results arrive in Optuna's own loop, a thread per worker."""
    costs = unit_costs(seed)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(REAL_WORKERS * costs[trial.number])  # a shard per worker
            trial.report(loss(x, epoch * REAL_WORKERS), epoch)
        return loss(x, EPOCHS * REAL_WORKERS)

    ends = Ends(perf_counter(), [])
    new_study(seed).optimize(objective, n_trials=TRIALS, n_jobs=REAL_WORKERS, callbacks=[ends])
    return ends.at


def by_hops(cerebro: Cerebro, seed: int) -> list[float]:
    """When results arrive from `optimize`."""
    costs = unit_costs(seed)

    def objective(trial: optuna.Trial) -> Any:
        return SleeperRecipe(), {"x": trial.suggest_float("x", 0.0, 1.0), "unit_s": costs[trial.number]}

    ends = Ends(perf_counter(), [])
    optimize(new_study(seed), objective, TRIALS, executor=cerebro, metric="loss", callbacks=[ends])
    return ends.at


def idle_shares(folder: Path) -> tuple[float, float]:
    """Until the last trial begins, and whole: from the trace of the latest run in the folder."""
    trace = max(folder.glob("*/trace.json"), key=lambda path: path.stat().st_mtime)
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X" and e["name"] != "idle"]
    busy = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    last = f"trial-{TRIALS - 1:04d}"
    begun = min(event["ts"] for event in events if event["args"]["trial"] == last)
    return idle_share(busy, REAL_WORKERS, begun), idle_share(busy, REAL_WORKERS, max(end for _, end in busy))


@contextmanager
def executors(folder: Path) -> Iterator[dict[int, Cerebro]]:
    """One for each number of live trials, with its workers up and a run behind them."""
    data = ShardedDataset.write(pa.table({"x": np.zeros(4, "float32")}), folder / "data", num_shards=REAL_WORKERS)
    with ExitStack() as stack:
        made = {}
        for live in (int(share * REAL_WORKERS) for share in SHARES):
            made[live] = stack.enter_context(
                Cerebro(data, epochs=EPOCHS, workers=REAL_WORKERS, devices="cpu", live_trials=live, keep="none",
                        run_dir=folder / str(live), progress=False, trace=True)
            )  # fmt: skip
            made[live].fit(SleeperRecipe(), [{"x": 0.0, "unit_s": 0.0, "epochs": 1}] * REAL_WORKERS, metric="loss")
        yield made


def run_all(report: Report) -> None:
    ours: dict[int, list[list[float]]] = {}
    theirs: list[list[float]] = []
    idle: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, executors(Path(folder)) as made:
        twice, *_ = made
        for seed in REAL_SEEDS:
            if seed in PAIRED_SEEDS:
                theirs.append(in_threads(seed))
            for live in made if seed in PAIRED_SEEDS else [twice]:
                ours.setdefault(live, []).append(by_hops(made[live], seed))
                if live == twice:
                    idle.append(idle_shares(Path(folder) / str(live)))
    for live in made:
        case = f"real, {REAL_WORKERS} workers, {live} live"
        if live == twice:
            to_last, whole = zip(*idle, strict=True)
            add_idle(report, case, to_last, whole)
            units = TRIALS * EPOCHS * REAL_WORKERS
            gaps = [REAL_WORKERS * o[-1] * share / units for o, (_, share) in zip(ours[live], idle, strict=True)]
            report.add(f"{case}: a worker's idle time per unit", 1e3 * fmean(gaps), None, "ms", row=9)
        pairs = list(zip(ours[live], theirs, strict=False))
        walls, halves = ([o[at] / t[at] for o, t in pairs] for at in (-1, RESULT - 1))
        add_times(report, case, walls, halves)


def main() -> int:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    report = Report(f"A stream of {TRIALS} trials x {EPOCHS} epochs:")
    simulate_all(report)
    run_all(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
