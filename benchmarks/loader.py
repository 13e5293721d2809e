"""Batches from a mapped shard beside index_select and a DataLoader; units of an indexed Dataset beside a DataLoader."""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from _report import Report
from _sizes import sized
from cerebro_tune.data import BatchForm, ShardedDataset, batch_sizes, shard_order
from cerebro_tune.feed import Feed, RunData
from cerebro_tune.loading import loading

ROWS = 24_000
ROUNDS = sized(5, 15, 45)
SLOW_EVERY = 3  # rounds: a pass of a DataLoader over single rows takes ten times as long
BY_BATCH = "whole batches"

UNITS, UNIT_ROWS, UNIT_BATCH = 4, 35 * 32, 32
EPOCHS = sized(1, 5)
UNIT_BAR = 0.9
PICTURES = sized([(72, 1)], [(72, 1)], [(72, 1), (72, 2), (108, 1), (108, 2)])
"""Side, and loader processes."""

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
    for side, num_workers in product((72, 108), (1, 2)):
        if (side, num_workers) in PICTURES:
            measure_units(report, side, num_workers)
        else:
            report.not_run(f"{pictures(side, num_workers)}: *", "FULL=1 measures it", row=14)
    return report.finish()


def measure(report: Report, shards: ShardedDataset, batch_size: int, name: str) -> None:
    """Time one pass over the shard in each way, in turn."""
    shard, form = shards.shard(0), BatchForm()
    order, sizes = shard_order(0, 0, 0, ROWS), batch_sizes(ROWS, batch_size)
    images, labels = shard.gather(np.arange(ROWS), form)
    by_row = data_loaders(TensorDataset(images, labels), batch_size)
    ways: dict[str, Batches] = {
        "shard": lambda: shard.batches(order, sizes, form),
        "memory": lambda: from_memory(images, labels, order, sizes),
        BY_BATCH: partial(iter, whole_batches(TensorDataset(images, labels), batch_size)),
        **{setting: partial(iter, loader) for setting, loader in by_row.items()},
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way, batches in ways.items():
            if way not in by_row:
                seconds(batches())  # each finds what it reads where it has left it: two of them read the same memory
            elif round_ % SLOW_EVERY:
                continue
            passed = seconds(batches())
            if round_:  # the first touches the pages, and starts processes
                taken[way].append(passed)
    shard_s = statistics.median(taken["shard"])
    report.add(f"{name}: batches per second", len(sizes) / shard_s, unit="/s", row=14)
    for way, what, bar in (
        ("memory", "index_select in memory", 0.9),
        (BY_BATCH, "a DataLoader that is given whole batches of indices", 5.0),
    ):
        ratios = [b / a for a, b in zip(taken["shard"], taken[way], strict=True)]
        median = statistics.median(ratios)
        report.add(f"{name}: speed beside {what}", median, bar, at_most=False, row=14, runs=ratios)
    best = min(by_row, key=lambda setting: statistics.median(taken[setting]))
    print(f"{name}: the best setting of a DataLoader over rows is {best}")
    ratios = [passed / shard_s for passed in taken[best]]
    what = "the best DataLoader over rows"
    report.add(f"{name}: speed beside {what}", statistics.median(ratios), 5.0, at_most=False, row=14, runs=ratios)


def data_loaders(rows: Dataset[Any], batch_size: int) -> dict[str, Iterable[Any]]:
    """A DataLoader over rows with each of its settings that may be the best here."""
    loaders: dict[str, Iterable[Any]] = {"no process": DataLoader(rows, batch_size, shuffle=True)}
    for count in (1, 2):
        loaders[f"{count} kept, 8 batches ahead"] = DataLoader(
            rows, batch_size, shuffle=True, num_workers=count, persistent_workers=True, prefetch_factor=8
        )
    return loaders


def whole_batches(rows: TensorDataset, batch_size: int) -> Iterable[Any]:
    """A DataLoader that hands the indices of a batch to the data set, as few people know it can."""
    return DataLoader(rows, batch_size=None, sampler=BatchSampler(RandomSampler(rows), batch_size, drop_last=False))


def from_memory(
    images: torch.Tensor, labels: torch.Tensor, order: npt.NDArray[np.int64], sizes: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loop that one would write by hand."""
    for rows in torch.from_numpy(order).split(sizes):
        yield torch.index_select(images, 0, rows), torch.index_select(labels, 0, rows)


class Pictures(Dataset[Any]):
    """PNG files in memory, decoded, cropped and flipped at random in each epoch."""

    def __init__(self, rows: int, side: int) -> None:
        rng = np.random.default_rng(0)
        self.crop = side * 8 // 9
        self.files = [png(rng.integers(0, 256, (8, 8, 3)).astype("uint8"), side) for _ in range(200)]
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self.files[row % len(self.files)])) as image:
            pixels = torch.from_numpy(np.array(image))
        top, left, flip = torch.randint(0, len(pixels) - self.crop + 1, (3,)).tolist()
        cut = pixels[top : top + self.crop, left : left + self.crop].permute(2, 0, 1).float() / 255
        return cut.flip(2) if flip % 2 else cut, row % 10


def png(pixels: npt.NDArray[np.uint8], side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(file, "png")
    return file.getvalue()


def pictures(side: int, num_workers: int) -> str:
    return f"{side}x{side} PNG, {num_workers} loader process" + "es" * (num_workers > 1)


def measure_units(report: Report, side: int, num_workers: int) -> None:
    """Time the units of an epoch through kept processes beside an epoch of one DataLoader, in turn."""
    source = Pictures(UNITS * UNIT_ROWS, side)
    row_ms = 1000 * seconds(source[row] for row in range(500)) / 500
    name = pictures(side, num_workers)
    report.add(f"{name}: decoding and augmenting one", row_ms, unit="ms", row=14)
    data = ShardedDataset.index(source, UNITS)
    feed = Feed(RunData(data, loading({"num_workers": num_workers}, data)), 0, "cpu")
    feed.start()
    plain = DataLoader(source, UNIT_BATCH, shuffle=True, num_workers=num_workers, persistent_workers=True)
    seconds(islice(plain, 1))  # its processes are up
    taken: dict[str, list[float]] = {"kept": [], "plain": [], "fresh": []}
    for epoch in range(EPOCHS):
        taken["kept"].append(sum(seconds(unit(feed, epoch, shard)) for shard in range(UNITS)))
        taken["plain"].append(seconds(plain))
        fresh = Feed(feed.data, 0, "cpu")
        taken["fresh"].append(UNITS * seconds(unit(fresh, epoch, 0)))
        fresh.close()
    feed.close()
    report.add(f"{name}: units per second", UNITS / statistics.median(taken["kept"]), unit="/s", row=14)
    for way, what, bar in (
        ("kept", "speed beside a DataLoader that lives for the epoch", UNIT_BAR),
        ("fresh", "the same with fresh processes per unit", None),
    ):
        ratio = statistics.median(b / a for a, b in zip(taken[way], taken["plain"], strict=True))
        report.add(f"{name}: {what}", ratio, bar, at_most=False, row=14)


def unit(feed: Feed, epoch: int, shard: int) -> Iterable[object]:
    return feed.train(epoch, shard, UNIT_BATCH, lambda: None)


def seconds(batches: Iterable[object]) -> float:
    started = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
