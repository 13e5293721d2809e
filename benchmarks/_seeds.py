"""Many seeds at a time, where no clock is part of what is measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from typing import TypeVar

Seed = TypeVar("Seed")
Found = TypeVar("Found")


def of_each(act: Callable[[Seed], Found], seeds: Iterable[Seed]) -> list[Found]:
    """What a function gives for each, on all cores. It forks, which must be before torch has threads."""
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(act, seeds, chunksize=1)
