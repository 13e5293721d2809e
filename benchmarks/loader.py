"""Batches per second from a mapped shard, beside index_select on tensors in memory and beside a DataLoader."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, TensorDataset

from _report import Report
from cerebro_tune.data import BatchForm, ShardedDataset, batch_sizes, shard_order

ROWS = 24_000
ROUNDS = 15
BAR = 0.8

Batches = Callable[[], Iterable[object]]


def main() -> int:
    torch.set_num_threads(1)
    report = Report(f"{ROWS} rows of 28x28 and a label, one thread; medians of {ROUNDS} interleaved rounds")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("uint8", "float32"):
            images = np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28)).astype(name)
            labels = np.arange(ROWS) % 10
            table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "label": labels})
            shards = ShardedDataset.write(table, Path(folder, name), num_shards=1)
            for batch_size in (32, 128):
                measure(report, shards, batch_size, f"{name}, batch {batch_size}")
    return report.finish()


def measure(report: Report, shards: ShardedDataset, batch_size: int, name: str) -> None:
    """Time one pass over the shard in each of three ways, in turn."""
    shard, form = shards.shard(0), BatchForm()
    order, sizes = shard_order(0, 0, 0, ROWS), batch_sizes(ROWS, batch_size)
    images, labels = shard.gather(np.arange(ROWS), form)
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    ways: dict[str, Batches] = {
        "shard": lambda: shard.batches(order, sizes, form),
        "memory": lambda: from_memory(images, labels, order, sizes),
        "loader": lambda: loader,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way, batches in ways.items():
            if way == "loader" and round_ % 5:
                continue  # ten times slower, and only stated
            started = time.perf_counter()
            for _ in batches():
                pass
            if round_:  # the first touches the pages
                taken[way].append(time.perf_counter() - started)
    report.add(f"{name}: batches per second", len(sizes) / statistics.median(taken["shard"]), unit="/s")
    ratio = statistics.median(b / a for a, b in zip(taken["shard"], taken["memory"], strict=True))
    report.add(f"{name}: speed beside index_select in memory", ratio, BAR, at_most=False)
    report.add(
        f"{name}: speed beside DataLoader(TensorDataset)",
        statistics.median(taken["loader"]) / statistics.median(taken["shard"]),
    )


def from_memory(
    images: torch.Tensor, labels: torch.Tensor, order: npt.NDArray[np.int64], sizes: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loop that one would write by hand."""
    for rows in torch.from_numpy(order).split(sizes):
        yield torch.index_select(images, 0, rows), torch.index_select(labels, 0, rows)


if __name__ == "__main__":
    sys.exit(main())
