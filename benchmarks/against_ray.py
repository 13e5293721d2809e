"""A search of 8 CNNs on Fashion-MNIST in Ray Tune: by hops beside stock Ray, wall clock of `tune.run`, taking turns.

2 epochs of 60,000 images, batches of 128, one thread per worker, two CPUs. Ours has default settings: a report after
each of the 8 shards with a validation on a subset, and on all 10,000 images at the end of an epoch. Stock has a
function trainable, which reports and validates once an epoch, with an actor for each trial or two that are handed on
(`reuse_actors=True`). Each of its trials loads the data for itself, and has a DataLoader over images that are made
tensors and normalized one by one, as in the examples of Ray (those with Lightning start 4 loader processes per trial,
for which two cores have no room), or batches that are gathered by index, as ours are.

What Ray and the executor take to start is in no figure: each has had a turn before. Neither is that the data is
written as shards, once, before that; stock's trials read files that are not compressed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _cnn
import _ray_cnn
from _cnn import Grid, of_fashion
from _report import Report
from _sizes import sized
from _turns import Opened, started

GRID: Grid = {"lr": sized([1e-3, 3e-3], [3e-4, 1e-3, 3e-3, 1e-2]), "width": [16], "dropout": [0.0, 0.2]}
FEW: Grid = {"lr": [1e-3, 3e-3], "width": [16], "dropout": [0.0]}  # to warm up
ROUNDS = sized(1, 3, 5)
# what is called -> (arguments of the stock contender's turn, bar)
STOCK: dict[str, tuple[tuple[Any, ...], float]] = {
    "a DataLoader": (("DataLoader", False), 0.5),
    "a DataLoader, reuse_actors": (("DataLoader", True), 0.8),
    "batches by index": (("by index", False), 0.75),
    "batches by index, reuse_actors": (("by index", True), 1.0),
}


def main() -> int:
    report = Report("8 CNNs x 2 epochs of Fashion-MNIST in Ray Tune: ours / stock")
    if _cnn.NO_FASHION:
        for name in STOCK:
            report.not_run(f"wall clock beside stock Ray Tune, {name}", _cnn.NO_FASHION, row=2)
        return report.finish()
    found: dict[str, list[float]] = {name: [] for name in STOCK}
    with tempfile.TemporaryDirectory() as folder, started(contenders_in(Path(folder))) as contenders:
        stock, ours = contenders["stock"], contenders["ours"]
        stock.turn(FEW, "by index", False)
        ours.turn(FEW)
        for _ in range(ROUNDS):
            mine = ours.turn(GRID).wall_s
            for name, (arguments, _) in STOCK.items():
                found[name].append(mine / stock.turn(GRID, *arguments).wall_s)
    for name, (_, bar) in STOCK.items():
        figure = statistics.median(found[name])
        report.add(f"wall clock beside stock Ray Tune, {name}", figure, bar, row=2, runs=found[name])
    return report.finish()


def contenders_in(folder: Path) -> dict[str, Opened]:
    """Stock and ours, with the data in this folder."""
    _cnn.unpack(folder)
    rows = sized(12_000, 60_000)
    task = replace(of_fashion(rows), load=partial(_cnn.fashion, rows, folder=folder))
    return {"stock": partial(_ray_cnn.stock_function, task), "ours": partial(_ray_cnn.ours, task)}


if __name__ == "__main__":
    sys.exit(main())
