"""Where every random stream of a run comes from.

Random state is not carried between workers. A unit is made repeatable by seeding Python, NumPy and torch from what the
unit *is* (run seed, trial index, epoch, shard): at its start, again when its first batch is fetched, and once more
before validation. A row's random transform is seeded by (run seed, epoch, row), whoever reads it.
`cerebro_tune.VisitLoader` gives a plain training loop the same streams, for comparison.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
import xxhash

Streams = tuple[Any, Any, Any]
_STREAMS = RLock()
"""The generators are everybody's: threads that want them to stand somewhere take turns."""
_BUILD, _UNIT, _VALIDATION, _DATA, _ROW, _BATCHES, _COLLATE = range(7)


def _seed(purpose: int, run_seed: int, *identity: int) -> int:
    """A 64-bit seed from the purpose and the numbers that identify what is being seeded."""
    numbers = (purpose, run_seed, *identity)
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(numbers)}q", *numbers))


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (its CUDA ones where CUDA is in use)."""
    _seed_host(seed)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _seed_host(seed: int) -> None:
    """Seed the generators on the CPU, and leave those of devices, of which the model's dropout draws, alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # NumPy's legacy generator takes 32 bits
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(seed)


def seed_build(run_seed: int, trial_index: int) -> None:
    """Seed the generators as they are when a trial's model is built."""
    seed_generators(_seed(_BUILD, run_seed, trial_index))


def seed_unit(run_seed: int, trial_index: int, epoch: int, shard: int) -> None:
    """Seed the generators as they are at the start of a unit and when its first batch is fetched."""
    seed_generators(_seed(_UNIT, run_seed, trial_index, epoch, shard))


def seed_validation(run_seed: int, trial_index: int, epoch: int, shard: int) -> None:
    """Seed the generators as they are when the validation after a unit begins."""
    seed_generators(_seed(_VALIDATION, run_seed, trial_index, epoch, shard))


def seed_data(run_seed: int) -> None:
    """Seed the generators as they are when a Dataset is made, so that a random split is the same in every worker."""
    _seed_host(_seed(_DATA, run_seed))


def seed_row(run_seed: int, epoch: int, row: int) -> None:
    """Seed the generators as they are when a row is read."""
    _seed_host(_seed(_ROW, run_seed, epoch, row))


def seed_collate(run_seed: int, epoch: int, row: int) -> None:
    """Seed the generators as they are when a batch that begins with this row is put together."""
    _seed_host(_seed(_COLLATE, run_seed, epoch, row))


def seed_batches(run_seed: int, epoch: int, shard: int) -> None:
    """Seed the generators as they are when a batch sampler deals out the rows of a shard."""
    _seed_host(_seed(_BATCHES, run_seed, epoch, shard))


@contextmanager
def kept_streams() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch (on the CPU) back as they were before; one thread at a time."""
    with _STREAMS:
        before = _streams()
        try:
            yield
        finally:
            _exchange(before)


class OwnStreams:
    """A thread's own streams: the process's generators stand at them while they are entered, by one thread at a time.

    A call of a user's function that is one of several at once enters them, and draws as if it had a process of its own.
    """

    def __init__(self, run_seed: int, trial_index: int) -> None:
        with kept_streams():
            seed_build(run_seed, trial_index)
            self._own = _streams()

    def __enter__(self) -> None:
        _STREAMS.acquire()
        self._others = _exchange(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _exchange(self._others)
        _STREAMS.release()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Let other threads have the generators meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _streams() -> Streams:
    torch = sys.modules.get("torch")
    return random.getstate(), np.random.get_state(), None if torch is None else torch.get_rng_state()


def _exchange(streams: Streams) -> Streams:
    """Have the generators go on from there; returns where they were."""
    before = _streams()
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    if streams[2] is not None:
        sys.modules["torch"].set_rng_state(streams[2])
    return before


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as in a loader process: several may give other bits."""
    torch = sys.modules.get("torch")
    threads = 1 if torch is None else torch.get_num_threads()
    if torch is None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
