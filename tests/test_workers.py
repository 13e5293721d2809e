"""The backends against the contract, and what only processes can do."""

from __future__ import annotations

from cerebro_tune.testing import WorkersContract
from cerebro_tune.workers.base import Workers
from cerebro_tune.workers.inline import InlineWorkers
from cerebro_tune.workers.local import LocalWorkers


class TestInline(WorkersContract):
    def make(self, count: int) -> Workers:
        return InlineWorkers(("cpu",) * count, threads=1)


class TestLocal(WorkersContract):
    kill = True

    def make(self, count: int) -> Workers:
        return LocalWorkers(("cpu",) * count, threads=1)


class TestFresh(WorkersContract):
    """Interpreters of their own, as CUDA asks for."""

    kill = True

    def make(self, count: int) -> Workers:
        return LocalWorkers(("cpu",) * count, threads=1, fork=False)
