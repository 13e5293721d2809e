"""An Optuna study on two cores: stock, in threads and in processes, and by hops, with the same objective and budget.

Equal epochs: the demo's CNN, 4 configs (FULL=1: 12) x 3 epochs of 4,000 images in 8 shards, the whole validation set
once an epoch, start-up excluded, 3 seeds. Stock is run as its documentation shows, with a DataLoader over a
TensorDataset and a Trainer per trial, and with batches by index in that Trainer.

With pruners, FULL=1 only: how long a study by hops takes to find what stock, with its median pruner, has found in the
end.

Analytic curves: best value at an equal budget of units, 20 seeds, for stock one after another in two lanes and for hops
with 2, 3, 4 and 8 live trials.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np
import optuna
import psutil
import pyarrow as pa
from optuna.trial import TrialState

import _optuna_stock as stock
from _report import Report
from _seeds import of_each
from _sizes import sized
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune_optuna import optimize, pruners

CONFIGS, SEEDS, LIVE = sized(4, 4, 12), sized(1, 3, 5), sized((4,), (4,), (2, 3, 4, 8))
OURS = 2 * stock.WORKERS
PRUNED_TRIALS, PRUNED_SEEDS = sized(8, 32), sized(1, 0, 5)
CURVE_LIVE, CURVE_SEEDS, CURVE_STEPS, CURVE_BUDGET = (2, 3, 4, 8), 20, stock.EPOCHS * stock.SHARDS, 16
UNTIL = "until hops have stock's final best / stock's time"
_T_95 = 2.093  # Student's t for 20 - 1 degrees of freedom


def main() -> int:
    stock.quiet()
    report = Report("A study of analytic curves, and of CNNs on 2 cores:")
    on_curves(report)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        equal_epochs(report, folder)
        if PRUNED_SEEDS:
            with_pruners(report, folder)
        else:
            report.not_run(UNTIL, "FULL=1 measures it")
    return report.finish()


# The CNN.


def write_data(folder: str) -> None:
    pixels, digits, order = stock.images()
    train, validation, _ = np.split(order, [stock.TRAIN, stock.TRAIN + stock.VALIDATION])
    for name, part, shards in (("train", train, stock.SHARDS), ("validation", validation, 1)):
        flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels[part].ravel()), 784)
        column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (28, 28)), flat)
        table = pa.table({"image": column, "digit": digits[part]})
        ShardedDataset.write(table, f"{folder}/{name}", num_shards=shards)


def executor(folder: str, live: int, report_every: str) -> Cerebro:
    return Cerebro(
        f"{folder}/train", f"{folder}/validation", epochs=stock.EPOCHS, batch_size=stock.BATCH, workers=stock.WORKERS,
        devices="cpu", live_trials=live, report_every=report_every, keep="none", run_dir=f"{folder}/runs",
        resume="never", progress=False,
    )  # fmt: skip


def by_hops(cerebro: Cerebro, path: str, seed: int, n_trials: int, pruner: Any) -> float:
    """Seconds of `optimize`, after the workers have seen a unit."""
    warm = {"lr": 1e-3, "width": 4, "dropout": 0.0, "epochs": 1}
    cerebro.fit(stock.LitNet, [warm] * 4, metric="val_loss")
    study = stock.open_study(path, seed, pruner)
    began = perf_counter()
    optimize(study, lambda t: (stock.LitNet, stock.suggest(t)), n_trials, executor=cerebro, metric="val_loss")
    return perf_counter() - began


Variant = Callable[[str, int, int, Any], float]
"""(path of the study, seed, trials, pruner) -> seconds."""


def stock_variants() -> dict[str, Variant]:
    def variant(run: Callable[..., float], plain: bool) -> Variant:
        return lambda path, seed, n_trials, pruner: run(path, seed, plain, n_trials, pruner)

    return {
        f"stock, 2 {name}, {batches}": variant(run, batches == "DataLoader")
        for batches in ("DataLoader", "batches by index")
        for name, run in (("threads", stock.in_threads), ("processes", stock.in_processes))
    }


@dataclass
class Measured:
    """What a variant took: seconds and best values by seed, MB."""

    seconds: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    memory: float = 0.0


def equal_epochs(report: Report, folder: str) -> None:
    """The same configs, which are enqueued, in every variant."""
    measured: dict[str, Measured] = {}
    for seed in range(SEEDS):
        for name, run in stock_variants().items():
            _measure(measured.setdefault(name, Measured()), run, f"{folder}/{name}-{seed}", seed)
        for live in LIVE:
            with executor(folder, live, "epoch") as cerebro:
                name, run = f"hops, {live} live", partial(by_hops, cerebro)
                _measure(measured.setdefault(name, Measured()), run, f"{folder}/{name}-{seed}", seed)
    units = CONFIGS * stock.EPOCHS * stock.SHARDS
    for name, one in measured.items():
        report.add(f"{name}: {units} units", statistics.mean(one.seconds), None, "s")
        report.add(f"{name}: best val_loss", statistics.mean(one.best), None, "")
        report.add(f"{name}: peak memory", one.memory, None, "MB")
    ours = measured[f"hops, {OURS} live"].seconds
    for batches, bar in (("DataLoader", 0.6), ("batches by index", 1.10)):
        stocks = [one.seconds for name, one in measured.items() if name.endswith(batches)]
        ratios = [mine / theirs for mine, theirs in zip(ours, min(stocks, key=statistics.median), strict=True)]
        report.add(f"hops, {OURS} live / the better stock with {batches}", statistics.median(ratios), bar, runs=ratios)


def _measure(measured: Measured, run: Variant, path: str, seed: int) -> None:
    study = _enqueued(f"{path}.log", seed, CONFIGS)
    measured.seconds.append(run(f"{path}.log", seed, CONFIGS, optuna.pruners.NopPruner()))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * CONFIGS
    measured.best.append(study.best_value)
    if seed == 0:  # apart, for looking at the pages of processes takes time
        _enqueued(f"{path}-memory.log", seed, OURS)
        with peak_memory() as peak:
            run(f"{path}-memory.log", seed, OURS, optuna.pruners.NopPruner())
        measured.memory = max(peak)


def _enqueued(path: str, seed: int, configs: int) -> optuna.Study:
    study, rng = stock.open_study(path, seed, None), np.random.default_rng(seed)
    for _ in range(configs):
        width, lr = int(rng.choice([4, 8, 16])), 10 ** rng.uniform(-4, -1.5)
        study.enqueue_trial({"lr": lr, "width": width, "dropout": rng.uniform(0, 0.5)})
    return study


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Samples of what this process and those it started hold together, in MB, shared pages counted once."""
    samples, over = [0.0], threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not over.wait(0.2):
            total = 0.0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss / 1e6
                except psutil.Error:  # it has just ended
                    continue
            samples.append(total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def with_pruners(report: Report, folder: str) -> None:
    """Seconds until hops, pruned at every unit, have what two stock processes with batches by index have in the end."""
    shares, ratios = [], []
    for seed in range(PRUNED_SEEDS):
        path = f"{folder}/pruned-{seed}"
        total = stock.in_processes(f"{path}-stock.log", seed, False, PRUNED_TRIALS, optuna.pruners.MedianPruner())
        target = stock.open_study(f"{path}-stock.log", seed, None).best_value
        with executor(folder, OURS, "unit") as cerebro:
            pruner = pruners.MedianPruner(n_warmup_steps=cerebro.units(0.5))
            spent = by_hops(cerebro, f"{path}-hops.log", seed, PRUNED_TRIALS, pruner)
        study = stock.open_study(f"{path}-hops.log", seed, None)
        began = min(trial.datetime_start for trial in study.trials)
        reached = [t.datetime_complete for t in study.trials if t.state is TrialState.COMPLETE and t.value <= target]
        found = (min(reached) - began).total_seconds() if reached else math.inf
        shares.append(found / total)
        ratios.append(spent / total)
    report.add(f"hops with pruning, {PRUNED_TRIALS} trials / stock with pruning", statistics.mean(ratios), None)
    report.add(UNTIL, statistics.median(shares), 0.9, runs=shares)


# Analytic curves, in units in place of seconds.


def curve(trial: optuna.Trial, seed: int) -> Callable[[int], float]:
    """Losses that fall to a floor which depends on the distance from an optimum, at a rate of their own."""
    x = [trial.suggest_float(f"x{i}", -3.0, 3.0) for i in range(3)]
    rng = np.random.default_rng((seed, trial.number))
    floor = 0.1 + 0.15 * sum((value - best) ** 2 for value, best in zip(x, (0.5, -1.0, 1.5), strict=True))
    rate, noise = rng.uniform(0.1, 0.5), rng.normal(0, 0.02, CURVE_STEPS)
    return lambda step: floor + 2.0 * math.exp(-rate * step) + noise[step - 1]


def play(seed: int, live: int, pruner: Any) -> float:
    """The best value after a budget of units, of which each live trial has one in its turn."""
    study = optuna.create_study(study_name="s", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    playing: list[tuple[optuna.Trial, Callable[[int], float], Iterator[int]]] = []
    best = math.inf
    for unit in range(CURVE_BUDGET * CURVE_STEPS):
        if len(playing) < live:
            trial = study.ask()
            playing.append((trial, curve(trial, seed), count(1)))
        one = playing[unit % len(playing)]
        trial, loss, steps = one
        step = next(steps)
        trial.report(loss(step), step)
        best = min(best, loss(step)) if step == CURVE_STEPS else best
        if step == CURVE_STEPS:
            study.tell(trial, loss(step))
            playing.remove(one)
        elif trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            playing.remove(one)
    return best


def on_curves(report: Report) -> None:
    seeds = range(CURVE_SEEDS)
    values = {"stock, median, 2 lanes": of_each(partial(play, live=2, pruner=optuna.pruners.MedianPruner()), seeds)}
    for live in CURVE_LIVE:
        one = partial(play, live=live, pruner=pruners.MedianPruner())
        values[f"hops, median, {live} live"] = of_each(one, seeds)
    for name, found in values.items():
        report.add(f"curves: {name}: best, mean of {CURVE_SEEDS}", statistics.mean(found), None, "")
        report.add(f"curves: {name}: 95 % interval, +-", _half_width(found), None, "")
    ours, theirs = values[f"hops, median, {OURS} live"], values["stock, median, 2 lanes"]
    worse = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    mean, half = statistics.mean(worse), _half_width(worse)
    report.add("curves: hops' best - stock's", mean, 0.0, "", interval=(mean - half, mean + half))


def _half_width(values: list[float]) -> float:
    return _T_95 * statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    sys.exit(main())
