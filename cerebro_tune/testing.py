"""Contract tests to subclass, and faults to inject: a backend of one's own is tested with our tests.

    class TestMyWorkers(WorkersContract):
        def make(self, count):
            return MyWorkers(devices=("cpu",) * count, threads=1)

pytest collects the inherited tests. Set `kill` where the backend's workers are processes.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.feed import RunData
from cerebro_tune.loading import loading
from cerebro_tune.store import StateStore
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable, UnitWork
from cerebro_tune.units import Unit, WorkerId
from cerebro_tune.workers.base import Workers
from cerebro_tune.workers.messages import (
    Finished,
    Joined,
    Lost,
    Message,
    Output,
    Raised,
    Ready,
    Rest,
    RunSpec,
    Setup,
    Task,
)


class Counter(Trainable):
    """Adds up its rows, shard by shard; its state is one vector. The config may tell it to raise, print or die."""

    def start(self, config: Config, plan: Plan) -> None:  # noqa: D102
        import torch

        self.config, self.total = config, torch.zeros(int(config.get("size", 16)), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.total = state["total"]

    def run_unit(self, work: UnitWork) -> dict[str, float]:  # noqa: D102
        told = self.config.get("do", {}).get(work.shard)
        for batch in work.train:
            self.total += float(batch[0].sum())
            if told == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        if told == "raise":
            raise RuntimeError("told to raise")
        if told == "print":
            print("told to print")
        return {"train_loss": float(self.total[0])}


class CounterRecipe(Recipe):
    """Makes `Counter`s; exports nothing worth reading."""

    name, suffix = "Counter", ".txt"

    def create(self) -> Counter:  # noqa: D102
        return Counter()

    def export(self, state: dict[str, Any], path: Path) -> None:  # noqa: D102
        path.write_text(str(state["total"].tolist()))


class _Coordinator:
    """The least that can talk to workers: a store, and a queue of what was said."""

    def __init__(self, workers: Workers, folder: Path) -> None:
        rows = np.arange(40, dtype=np.float64)
        self.data = ShardedDataset.write(pa.table({"x": rows}), folder / "data", num_shards=4)
        self.workers, self.store = workers, StateStore(1 << 30, folder / "spill")
        self.said: list[Message] = []
        self.jobs = 0

    def setup(self, check: tuple[int, ...] = (0, 1, 2, 3)) -> Setup:
        spec = RunSpec(
            recipe=cloudpickle.dumps(CounterRecipe()),
            data=cloudpickle.dumps(RunData(self.data, loading({}, self.data))),
            validation_rows=None,
            report_every="unit",
            seed=0,
            shard_rows=tuple(self.data.rows(shard) for shard in range(4)),
        )
        return Setup(spec, check, check_validation=False)

    def until(self, kind: type[Message]) -> Any:
        """The next message of a kind; the others are kept in `said`."""
        while True:
            for index, message in enumerate(self.said):
                if isinstance(message, kind):
                    return self.said.pop(index)
            self.said += self.workers.wait(timeout_s=30)

    def begin(self, worker: WorkerId, shard: int, config: Config, trial: str = "trial") -> Unit:
        """Give a worker a unit."""
        self.jobs += 1
        unit = Unit(trial, 0, shard)
        committed, used, working = self.store.buffers(trial)
        digest = "" if committed is None else self.store.digest_of(trial)
        self.workers.send(
            worker,
            Task(self.jobs, unit, 0, cloudpickle.dumps(config), 1, 4, 0, False, committed, used, working, digest),
        )
        return unit

    def run(self, worker: WorkerId, shard: int, config: Config, trial: str = "trial") -> Finished:
        """Give a worker a unit, wait for it and commit it."""
        self.begin(worker, shard, config, trial)
        finished: Finished = self.until(Finished)
        self.store.commit(trial, finished.used, finished.digest)
        return finished

    def sum_of(self, *shards: int) -> float:
        """What a `Counter` has after these shards."""
        form = BatchForm()
        return sum(
            float(self.data.shard(shard).gather(np.arange(self.data.rows(shard)), form)[0].sum()) for shard in shards
        )


class WorkersContract(ABC):
    """What every backend must do. Override `make`."""

    kill = False
    """Whether the workers are processes, which a unit may take down."""

    @abstractmethod
    def make(self, count: int) -> Workers:
        """New workers, not started."""

    @contextmanager
    def _started(self, count: int, folder: Path) -> Iterator[_Coordinator]:
        workers = self.make(count)
        coordinator = _Coordinator(workers, folder)
        try:
            workers.start(coordinator.store.grow)
            for _ in range(count):
                coordinator.until(Joined)
            for worker in workers.ids:
                workers.send(worker, coordinator.setup())
                assert coordinator.until(Ready).error is None
            yield coordinator
        finally:
            workers.close()
            workers.close()  # twice is as good as once
            coordinator.store.close()

    def test_state_hops(self, tmp_path: Path) -> None:
        """Units of one trial on alternating workers add up."""
        with self._started(2, tmp_path) as coordinator:
            first, second = coordinator.workers.ids
            for worker, shard in ((first, 0), (second, 1), (second, 2), (first, 3)):
                finished = coordinator.run(worker, shard, {})
            assert finished.metrics["train_loss"] == coordinator.sum_of(0, 1, 2, 3) == float(sum(range(40)))

    def test_equal_units_give_equal_digests(self, tmp_path: Path) -> None:
        """A unit is a pure function: another worker, another trial name, the same digest."""
        with self._started(2, tmp_path) as coordinator:
            digests = {coordinator.run(worker, 2, {}, f"trial-{worker}").digest for worker in coordinator.workers.ids}
            assert len(digests) == 1

    def test_a_state_may_grow(self, tmp_path: Path) -> None:
        """A buffer of any size is asked for and granted in the middle of a unit."""
        with self._started(1, tmp_path) as coordinator:
            (worker,) = coordinator.workers.ids
            assert coordinator.run(worker, 0, {"size": 1_000_000}).used > 8_000_000
            assert coordinator.run(worker, 1, {"size": 1_000_000}).metrics["train_loss"] == coordinator.sum_of(0, 1)

    def test_what_user_code_raises_is_told(self, tmp_path: Path) -> None:
        """The traceback comes back, and the worker goes on."""
        with self._started(1, tmp_path) as coordinator:
            (worker,) = coordinator.workers.ids
            coordinator.begin(worker, 1, {"do": {1: "raise"}})
            raised = coordinator.until(Raised)
            assert "RuntimeError: told to raise" in raised.error
            assert "run_unit" in raised.error
            assert coordinator.run(worker, 0, {}, "other").metrics["train_loss"] == coordinator.sum_of(0)

    def test_damaged_data_is_told_before_training(self, tmp_path: Path) -> None:
        """A flipped bit in a shard that the worker is to check."""
        with self._started(1, tmp_path) as coordinator:
            (worker,) = coordinator.workers.ids
            file = coordinator.data.file(3)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            coordinator.workers.send(worker, coordinator.setup(check=(3,)))
            assert file.name in str(coordinator.until(Ready).error)

    def test_wake_ends_a_wait(self, tmp_path: Path) -> None:
        """A wait without a time limit returns when another thread wakes it."""
        from threading import Timer

        with self._started(1, tmp_path) as coordinator:
            timer = Timer(0.05, coordinator.workers.wake)
            timer.start()
            assert coordinator.workers.wait() == []
            timer.join()

    def test_a_run_after_a_run(self, tmp_path: Path) -> None:
        """After a rest and a new setup nothing of the former run is left."""
        with self._started(1, tmp_path) as coordinator:
            (worker,) = coordinator.workers.ids
            coordinator.run(worker, 0, {})
            coordinator.workers.send(worker, Rest())
            coordinator.store.drop("trial")
            coordinator.workers.send(worker, coordinator.setup())
            assert coordinator.until(Ready).error is None
            assert coordinator.run(worker, 1, {}).metrics["train_loss"] == coordinator.sum_of(1)

    def test_a_killed_worker_costs_its_unit_only(self, tmp_path: Path) -> None:
        """SIGKILL in the middle of a unit: the predecessor's state is whole, a replacement goes on from it."""
        if not self.kill:
            return
        with self._started(2, tmp_path) as coordinator:
            first, second = coordinator.workers.ids
            before = coordinator.run(first, 0, {})
            coordinator.begin(first, 1, {"do": {1: "die"}}, "doomed")
            lost = coordinator.until(Lost)
            assert lost.worker == first
            assert "SIGKILL" in lost.reason
            coordinator.store.abandon("doomed")
            assert coordinator.store.digest_of("trial") == before.digest
            coordinator.workers.send(first, Rest())  # to a worker that is gone: no error
            coordinator.workers.restart(first)
            assert coordinator.until(Joined).worker == first
            coordinator.workers.send(first, coordinator.setup())
            assert coordinator.until(Ready).error is None
            assert coordinator.run(second, 1, {}).metrics["train_loss"] == coordinator.sum_of(0, 1)
            assert coordinator.run(first, 2, {}).metrics["train_loss"] == coordinator.sum_of(0, 1, 2)

    def test_output_is_told_with_the_trial(self, tmp_path: Path) -> None:
        """What a unit prints arrives before its result."""
        if not self.kill:
            return
        with self._started(1, tmp_path) as coordinator:
            (worker,) = coordinator.workers.ids
            coordinator.run(worker, 0, {"do": {0: "print"}})
            output = coordinator.until(Output)
            assert (output.trial, output.stream, output.text) == ("trial", "stdout", "told to print")
