"""Record learning curves for the benchmarks of searches: writes recorded_curves.json beside this file.

320 configs of a perceptron on Fashion-MNIST (the Debian package dataset-fashion-mnist), drawn at random from a space of
learning rate, optimizer, batch size, width, depth, dropout and weight decay, each trained for 9 epochs on 16,000 of the
images, in 8 shards, as a trial trains by hops: shard by shard, in an order of its own in each epoch. After every unit
the accuracy on 2,000 other images is noted, and on a subset of 256 of them, which is what an executor with default
settings would measure in mid-epoch. Good and bad configs alike are kept, those that diverge too. Beside the curves
stands what a unit and the two validations took, in seconds of one core, medians.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

IMAGES = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parent / "recorded_curves.json"
CONFIGS, EPOCHS, SHARDS = 320, 9, 8
TRAIN, VALIDATION, SUBSET = 16_000, 2_000, 256
Rows = tuple[torch.Tensor, torch.Tensor]


def draw(index: int) -> dict[str, Any]:
    """A config, a function of the index alone."""
    rng = np.random.default_rng((0, index))
    return {
        "lr": float(10 ** rng.uniform(-4.5, -0.5)),
        "adam": bool(rng.integers(2)),
        "batch_size": int(2 ** rng.integers(5, 9)),
        "width": int(2 ** rng.integers(4, 9)),
        "depth": int(rng.integers(1, 4)),
        "dropout": float(rng.uniform(0, 0.6)),
        "weight_decay": float(10 ** rng.uniform(-6, -2)),
    }


@cache
def images() -> tuple[Rows, Rows]:
    """Training and validation rows, apart."""
    pixels = gzip.decompress((IMAGES / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((IMAGES / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    order = np.random.default_rng(0).permutation(len(labels))[: TRAIN + VALIDATION]
    x = torch.tensor(np.frombuffer(pixels, np.uint8).reshape(-1, 784)[order]).float() / 255
    y = torch.tensor(np.frombuffer(labels, np.uint8)[order]).long()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def build(config: Mapping[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    layers: list[nn.Module] = []
    width = 784
    for _ in range(config["depth"]):
        layers += [nn.Linear(width, config["width"]), nn.ReLU(), nn.Dropout(config["dropout"])]
        width = config["width"]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    if config["adam"]:
        return model, torch.optim.AdamW(model.parameters(), config["lr"], weight_decay=config["weight_decay"])
    decay = config["weight_decay"]
    return model, torch.optim.SGD(model.parameters(), config["lr"], momentum=0.9, weight_decay=decay)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, order: torch.Tensor, size: int) -> None:
    model.train()
    for index in order.split(size):
        optimizer.zero_grad()
        F.cross_entropy(model(rows[0][index]), rows[1][index]).backward()
        optimizer.step()


@torch.no_grad()
def right(model: nn.Module, rows: Rows) -> int:
    """How many rows the model gets right."""
    model.eval()
    return int((model(rows[0]).argmax(1) == rows[1]).sum())


def record(index: int) -> dict[str, Any]:
    """The curves of one config, in rows that were got right."""
    torch.set_num_threads(1)
    training, validation = images()
    subset = validation[0][:SUBSET], validation[1][:SUBSET]
    config, rng = draw(index), np.random.default_rng((1, index))
    torch.manual_seed(index)
    model, optimizer = build(config)
    curves: dict[str, list[int]] = {"whole": [], "subset": []}
    times: dict[str, list[float]] = {"unit_s": [], "whole_s": [], "subset_s": []}
    for _ in range(EPOCHS):
        for shard in rng.permutation(SHARDS):
            order = torch.tensor(rng.permutation(np.arange(shard, TRAIN, SHARDS)))
            began = thread_time()
            train(model, optimizer, training, order, config["batch_size"])
            trained = thread_time()
            curves["whole"].append(right(model, validation))
            measured = thread_time()
            curves["subset"].append(right(model, subset))
            times["unit_s"].append(trained - began)
            times["whole_s"].append(measured - trained)
            times["subset_s"].append(thread_time() - measured)
    rounded = {k: float(f"{value:.3g}") if isinstance(value, float) else value for k, value in config.items()}
    return {"config": rounded, **{name: round(median(each), 5) for name, each in times.items()}, **curves}


def main() -> int:
    with get_context("spawn").Pool(int(sys.argv[1]) if len(sys.argv) > 1 else None) as pool:
        trials = pool.map(record, range(CONFIGS), chunksize=1)
    about = {"epochs": EPOCHS, "shards": SHARDS, "whole_rows": VALIDATION, "subset_rows": SUBSET}
    lines = ",\n".join(json.dumps(trial, separators=(",", ":")) for trial in trials)
    TARGET.write_text(f'{{"about":{json.dumps(about)},"trials":[\n{lines}\n]}}\n')
    best = max(max(trial["whole"]) for trial in trials)
    print(f"{len(trials)} curves, {math.ceil(TARGET.stat().st_size / 1000)} kB; the best is right in {best} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
