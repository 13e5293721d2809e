"""One trial's failure is its own, and a full disk or full memory costs nothing but time."""

from __future__ import annotations

import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import nets
import soak
from cerebro_tune import Cerebro, Results, ShardedDataset, statefile
from cerebro_tune.buffers import Buffer
from cerebro_tune.clock import Clock
from cerebro_tune.errors import CerebroError, DamagedStateError, StateMemoryError
from cerebro_tune.journal import Journal, read_journal
from cerebro_tune.ledger import FullDisk
from cerebro_tune.wholefile import LOOK_AGAIN_S
from conftest import points
from resumed_runs import fit, in_child
from runs import outcome, weights

BAD = 3
"""Which of eight trials misbehaves."""


class Misbehaving(nets.Hoarding):
    """Does what its config says, in its third unit."""

    def run_unit(self, work: Any) -> dict[str, float]:
        metrics = super().run_unit(work)
        if work.epoch == 2:
            self._misbehave()
            if self._config.get("do") == "diverge":
                metrics["train_loss"] = math.nan
        return metrics

    def _misbehave(self) -> None:
        match self._config.get("do"):
            case "raise":
                raise RuntimeError("told to raise")
            case "exit":
                sys.exit(3)
            case "abort":
                os.abort()
            case "be killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exhaust memory":
                with _little_memory():
                    bytearray(1 << 40)
            case "exhaust torch's memory":
                with _little_memory():
                    torch.zeros(1 << 40)
            case "grow beyond all states":
                self.hoard.append(torch.zeros(30_000_000))


@contextmanager
def _little_memory() -> Iterator[None]:
    """What a process may have at most, as a container has it; given back, because others are to train here."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


FAULTS = {
    "diverge": "The training loss of trial-0003 is nan",
    "raise": "RuntimeError: told to raise",
    "exit": "SystemExit: 3",
    "abort": "it was killed by SIGABRT",
    "be killed": "it was killed by SIGKILL",
    "exhaust memory": "MemoryError",
    "exhaust torch's memory": "can't allocate memory",
    "grow beyond all states": "one state needs",
}


def trained(results: Results) -> list[Any]:
    """What of each trial must not depend on where and when its units ran."""
    times = ("unit_time_s", "hop_time_s", "validation_time_s", "worker")
    ended = [result for result in results if result.last_checkpoint is not None]
    history = [[{k: v for k, v in each.items() if k not in times} for each in result.history] for result in ended]
    return list(zip(history, map(weights, ended), strict=True))


def test_one_trial_of_eight_fails_alone(tmp_path: Path) -> None:
    train = ShardedDataset.write(points(202), tmp_path / "train", num_shards=1)  # so that all orders of visits are one
    validation = ShardedDataset.write(points(100, seed=1), tmp_path / "validation", num_shards=1)
    configs: list[dict[str, Any]] = [{"lr": 0.01 * (number + 1)} for number in range(8)]
    with Cerebro(
        train, validation, epochs=4, workers=2, batch_size=16, max_failures=1, progress=False, resume="never",
        run_dir=tmp_path / "runs", state_memory="100MB",
    ) as cerebro:  # fmt: skip
        all_well = trained(cerebro.fit(Misbehaving, configs, metric="val_loss"))
        for do, told in FAULTS.items():
            configs[BAD]["do"] = do
            results = cerebro.fit(Misbehaving, configs, metric="val_loss")
            bad = results[BAD]
            assert (bad.status, len(bad.visits), told in str(bad.error)) == ("failed", 2, True), do
            assert [result.status for result in results].count("finished") == 7, do
            assert trained(results) == [each for index, each in enumerate(all_well) if index != BAD], do
    soak.tell(f"{len(FAULTS)} ways for one trial of eight to fail: the other seven were as without it, bit for bit")


# Full disks and full memory.


@pytest.fixture(scope="module")
def undisturbed(sets: Path) -> Any:
    return ended(run(sets / "undisturbed"))


def run(folder: Path) -> Results:
    """A small run: one trial goes to its end, one is stopped, and one fails."""
    return fit(
        folder, [{"lr": 0.01}, {"lr": 0.1, "stop_at": 3}, {"lr": 0.05, "raise_in": [0, 2]}], epochs=1, durable_every=2
    )


def ended(results: Results) -> list[Any]:
    return outcome([result for result in results if result.last_checkpoint])


def limit_files(nbytes: int | None) -> None:
    """Make the disk full for this process: no file may have more bytes."""
    infinite = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (infinite if nbytes is None else nbytes, infinite))


class Room(Clock):
    """Makes room on the disk when somebody waits for it."""

    def __init__(self) -> None:
        self.waited = 0

    def sleep(self, seconds: float, unless: threading.Event | None = None) -> None:
        if seconds == LOOK_AGAIN_S:
            self.waited += 1
            limit_files(None)
        else:
            super().sleep(seconds, unless)


def full_at(row: int, folder: Path) -> None:
    """The run, with a disk that is full when it comes to this row of its journal."""
    append = Journal.append

    def appending(self: Journal, kind: str, **body: Any) -> None:
        if self.count + 1 == row and not room.waited:
            wal = folder / "run-0000" / "journal.sqlite-wal"
            limit_files(wal.stat().st_size)
        append(self, kind, **body)

    room = Room()
    with patch.object(Journal, "append", appending), patch("cerebro_tune.workers.base.Workers.clock", room):
        run(folder)
    assert room.waited == 1, f"the disk was full {room.waited} times"


def test_a_full_disk_at_every_row_of_the_journal_loses_nothing(
    sets: Path, undisturbed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = len(read_journal(sets / "undisturbed" / "run-0000"))
    for row in range(2, rows + 1):  # on a full disk no run begins
        assert in_child(lambda row=row: full_at(row, sets / f"row-{row}")) == 0
        assert ended(run(sets / f"row-{row}")) == undisturbed
        assert "the run stands still: the run's journal could not be written: " in capfd.readouterr().err
        shutil.rmtree(sets / f"row-{row}")
    soak.tell(f"{rows - 1} full disks, one at each row of a run's journal: each stood still and lost nothing")


NO_MORE = 9
"""The exit code of a child that found that it does not write so many files."""


def full_for(number: int, folder: Path) -> None:
    """The run, with a disk that is full when it writes this file of its own: a checkpoint, or a state."""
    written, written_to = count(1), Path.open

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "xb" and next(written) == number:
            limit_files(16)
            threading.Timer(0.1, limit_files, (None,)).start()
        return written_to(self, mode, *args, **kwargs)

    waits = count()

    def waiting(stand_still: Any) -> Any:
        return lambda self, error: (next(waits), stand_still(self, error))

    with (
        patch.object(Path, "open", opening),
        patch.object(FullDisk, "stand_still", waiting(FullDisk.stand_still)),
    ):
        run(folder)
    if next(written) <= number:
        os._exit(NO_MORE)
    assert next(waits) > 0, "nobody has waited"


def test_a_full_disk_at_every_file_that_a_run_writes_loses_nothing(sets: Path, undisturbed: Any) -> None:
    for number in count(1):
        folder = sets / f"file-{number}"
        code = in_child(lambda number=number, folder=folder: full_for(number, folder))
        if code == NO_MORE:
            break
        assert code == 0
        assert ended(run(folder)) == undisturbed
    soak.tell(f"{number - 1} full disks, one at each checkpoint and state that a run writes: nothing was lost")
    assert number > 5


def no_memory_at(number: int, folder: Path) -> None:
    """The run, with no memory for one of its buffers."""
    reserve, reserved = Buffer._reserve, count(1)

    def reserving(self: Buffer) -> None:
        if next(reserved) == number:
            limit_files(16)
        try:
            reserve(self)
        finally:
            limit_files(None)

    with patch.object(Buffer, "_reserve", reserving), pytest.raises(StateMemoryError, match="no room for a state"):
        run(folder)


def test_full_memory_at_every_buffer_is_told_and_the_run_goes_on_another_time(sets: Path, undisturbed: Any) -> None:
    for number in count(1):
        folder = sets / f"memory-{number}"
        if in_child(lambda number=number, folder=folder: no_memory_at(number, folder)):
            break
        assert ended(run(folder)) == undisturbed
    assert number > 5
    soak.tell(
        f"{number - 1} times no memory for a state, at each buffer of a run: it was told, and the run went on later"
    )


# Damage.


def test_damaged_states_and_shards_are_refused(tmp_path: Path, sets: Path) -> None:
    state, chance, longer = tmp_path / "state.safetensors", random.Random(6), soak.Loop()
    statefile.save({"weights": torch.randn(40, 40), "more": list(range(100))}, state)
    data = ShardedDataset.open(shutil.copytree(sets / "train", tmp_path / "train"))
    cases = [
        (state, lambda: statefile.load(state), DamagedStateError),
        *((data.file(shard), lambda shard=shard: data.check((shard,)), CerebroError) for shard in range(4)),
    ]
    whole = {path: path.read_bytes() for path, _, _ in cases}
    for number in takewhile(lambda number: number < 250 or longer, count()):  # noqa: B007
        path, read, refused = chance.choice(cases)
        content = bytearray(whole[path])
        if chance.random() < 0.5:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(refused):
            read()
        path.write_bytes(whole[path])
    soak.tell(f"{number + 1} states and shards cut, or with a bit flipped: every one refused")
