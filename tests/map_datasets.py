"""Datasets and functions of loading that tests use; importable in workers, as the tests' folder is on their path."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from nets import Deep

ROWS = 70


def point(row: int) -> torch.Tensor:
    """The same eight numbers for a row, without drawing."""
    return torch.sin(torch.arange(8) * (row + 1.0))


class Plain(Dataset[Any]):
    """Rows that are always the same, with labels as `targets`."""

    def __init__(self, rows: int = ROWS) -> None:
        self.targets = [row % 3 % 2 for row in range(rows)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        return point(row), self.targets[row]


class Numbered(Plain):
    """Gives its rows' numbers."""

    def __getitem__(self, row: int) -> Any:
        return row


class Augmented(Plain):
    """Draws from all three generators for each row, and a different amount for odd rows."""

    def __getitem__(self, row: int) -> Any:
        noise = torch.randn(8 + row % 2)[:8] + random.random() + float(np.random.rand())
        return point(row) + 0.1 * noise, self.targets[row]


class Threaded(Plain):
    """A sum that more than one thread rounds differently."""

    def __getitem__(self, row: int) -> Any:
        return torch.randn(200_000).add(row).sum()


class Folder(Dataset[Any]):
    """A file per row; `order` is as the file system of some machine might list them."""

    def __init__(self, path: Path, order: Any = sorted) -> None:
        self.files = order(path.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Any:
        return self.files[row].read_text()


class OneFile(Dataset[Any]):
    """Rows in one file that is opened when the first is read, as users of HDF5 do: the handle must not be shared."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()

    @staticmethod
    def write(path: Path, rows: int = ROWS) -> None:
        path.write_bytes(b"".join(b"%08d" % row * 512 for row in range(rows)))

    def __len__(self) -> int:
        return self.path.stat().st_size // 4096

    def __getitem__(self, row: int) -> Any:
        if self.file is None:
            self.file: Any = self.path.open("rb", buffering=0)
        self.file.seek(row * 4096)
        parts = [self.file.read(64) for _ in range(64)]  # another process that shares the offset would come between
        return torch.tensor([int(b"".join(parts)[start : start + 8]) for start in range(0, 4096, 8)])


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(10))


class Unsized(Dataset[Any]):
    def __getitem__(self, row: int) -> Any:
        return row


class OwnGenerator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def __getitem__(self, row: int) -> Any:
        return self.generator.random()


class Bad(Augmented):
    """Raises for some rows."""

    def __init__(self, rows: int = ROWS, bad: Any = (13,)) -> None:
        super().__init__(rows)
        self.bad = set(bad)

    def __getitem__(self, row: int) -> Any:
        if row in self.bad:
            raise OSError(f"image {row} is truncated")
        return super().__getitem__(row)


class Killing(Augmented):
    """A row ends its loader process, as many times as `times` says; a mark in a folder counts each."""

    def __init__(self, marks: Path, times: int) -> None:
        super().__init__()
        self.marks, self.times = marks, times

    def __getitem__(self, row: int) -> Any:
        if row == 17 and get_worker_info() is not None:
            number = len(list(self.marks.iterdir()))
            if number < self.times:
                (self.marks / str(number)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


class Printing(Augmented):
    def __getitem__(self, row: int) -> Any:
        print(f"row {row} was read", flush=True)
        return super().__getitem__(row)


class PerProcess(Augmented):
    """Opens something per loader process, as code with `get_worker_info` does."""

    opened: Any = None

    def __getitem__(self, row: int) -> Any:
        info = get_worker_info()
        key = None if info is None else info.id
        if self.opened is None:
            self.opened = key
        assert self.opened == key, f"a process that another one's state came to: {self.opened}, {key}"
        return super().__getitem__(row)


class Words(Dataset[Any]):
    """Rows of varying length."""

    def __init__(self, rows: int = ROWS) -> None:
        self.lengths = [2 + row * 7 % 23 for row in range(rows)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Any:
        return torch.full((self.lengths[row],), row)


def noisy(samples: list[Any]) -> Any:
    """A collate function that draws from all three generators."""
    x, y = default_collate(samples)
    return x.float() + 0.1 * (torch.randn(x.shape) + random.random() + float(np.random.rand())), y


def shifted(batch: Any) -> Any:
    """A transform that draws."""
    return batch[0] + 0.1 * torch.rand(8) + random.random(), batch[1]


def seed_by_process(number: int) -> None:
    """What tutorials have as `worker_init_fn`."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class ByLength:
    """A batch sampler that puts rows of like length together and shuffles the batches."""

    def __init__(self, rows: list[int], batch_size: int, drop_last: bool) -> None:
        near = sorted(rows, key=lambda row: Words().lengths[row])
        self.batches = [near[start : start + batch_size] for start in range(0, len(near), batch_size)]
        random.shuffle(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Processes(Deep):
    """Reports the processes that its worker has when a unit begins, by their count and the sum of their numbers."""

    def run_unit(self, work: Any) -> dict[str, float]:
        children = [child.pid for child in psutil.Process().children()]
        return super().run_unit(work) | {"children": len(children), "pids": sum(children)}


class Drawing(Plain):
    """A row is one number drawn."""

    def __getitem__(self, row: int) -> Any:
        return random.random()
