"""Compute-bound efficiency: what of two workers' time goes into training that plain Lightning would do as well.

8 configs of a CNN x 2 epochs x 60,000 images of Fashion-MNIST in 8 shards, batches of 128. Plain is one `Trainer.fit`
per config over batches gathered by index, one after another in a process that has imported everything and loaded the
data; ours is `Cerebro.fit` on two workers. Both validate the 10,000 images once an epoch, and each process has one
thread. The figure is plain's time / (2 x our wall clock).

Two cores of one machine share caches and memory, and are slower side by side than one alone: what that leaves is what
two plain processes reach that share nothing, with the configs dealt out between them. It stands beside ours.

Start-up excluded: the workers have trained before. Included: from `Cerebro(...)` until it is closed again. Default
validation: also on a subset after each unit, with plain still validating once an epoch. What has no bar has one turn.

The CNN has two strided convolutions: one with 16 and 32 channels takes about 70 microseconds per image here, so that
plain takes a minute and ours half of one, three times over; the demo's takes three times as long and says no more.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import _cnn
from _cnn import FASHION, Grid, Task, of_fashion
from _report import Report
from _sizes import sized
from _turns import Contender, Opened, started

GRID: Grid = {"lr": sized([1e-3, 3e-3], [3e-4, 1e-3, 3e-3, 1e-2]), "width": [16], "dropout": [0.0, 0.2]}
ROUNDS = sized(1, 3, 5)
WORKERS = 2
# how ours is run -> (what it is called, bar)
OURS = {
    "warm": ("start-up excluded", 0.96),
    "fresh": ("start-up included", 0.90),
    "unit": ("default validation on top", None),
}


@contextmanager
def ours(task: Task) -> Iterator[Callable[[Grid, str], int]]:
    """One executor that reports each epoch, one that reports each unit, and whenever asked for a fresh one."""
    _cnn.quiet()
    with (
        _cnn.written(task) as executor,
        executor(workers=WORKERS, report_every="epoch") as epochwise,
        executor(workers=WORKERS) as unitwise,
    ):

        def train(grid: Grid, how: str) -> int:
            if how == "fresh":
                with executor(workers=WORKERS, report_every="epoch") as fresh:
                    return _cnn.fit_by_hops(fresh, task, grid)
            return _cnn.fit_by_hops(epochwise if how == "warm" else unitwise, task, grid)

        yield train


def main() -> int:
    report = Report("8 CNNs x 2 epochs of Fashion-MNIST: plain / (2 x ours)")
    if _cnn.NO_FASHION:
        for name, _ in OURS.values():
            report.not_run(f"efficiency, {name}", _cnn.NO_FASHION, row=1)
        return report.finish()
    found: dict[str, list[float]] = {how: [] for how in OURS}
    apart: list[float] = []
    task = sized(of_fashion(12_000), FASHION)
    opened: dict[str, Opened] = {
        "plain": partial(_cnn.one_after_another, task),
        "apart": partial(_cnn.two_processes, task),
        "ours": partial(ours, task),
    }
    with started(opened) as contenders:
        warm_up(contenders)
        for number in range(ROUNDS):
            alone = contenders["plain"].turn(GRID).wall_s
            for how, efficiencies in found.items():
                if not number or OURS[how][1] is not None:
                    efficiencies.append(alone / (WORKERS * contenders["ours"].turn(GRID, how).wall_s))
            if not number:
                apart.append(alone / (WORKERS * contenders["apart"].turn(GRID).wall_s))
    for how, (name, bar) in OURS.items():
        figure = statistics.median(found[how])
        report.add(f"efficiency, {name}", figure, bar, at_most=False, row=1, runs=found[how])
    report.add("efficiency of two plain processes", statistics.median(apart), at_most=False, row=1, runs=apart)
    return report.finish()


def warm_up(contenders: dict[str, Contender]) -> None:
    """Each has trained before: the first fit of a process is slower."""
    one: Grid = {"lr": [1e-3], "width": [16], "dropout": [0.0]}
    few: Grid = {**one, "lr": [1e-3, 3e-3]}
    contenders["plain"].turn(one)
    contenders["apart"].turn(few)
    contenders["ours"].turn(few, "warm")
    contenders["ours"].turn(few, "unit")


if __name__ == "__main__":
    sys.exit(main())
