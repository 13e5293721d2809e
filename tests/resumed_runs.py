"""Runs whose coordinator dies, and that are taken up: for the tests of both, and for the processes that die."""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import nets
from cerebro_tune import Cerebro, Plan, Results
from cerebro_tune.journal import Journal
from cerebro_tune.workers import base

CONFIGS = [{"lr": 0.01}, {"lr": 0.1, "stop_at": 5}, {"lr": 0.05, "raise_in": [1, 2]}, {"lr": 0.2, "epochs": 1}]


class Mixed(nets.Deep):
    """Ends as the config says: by itself after some units, by an error, or when it is trained."""

    def build(self, config: Any, plan: Plan) -> Any:
        self.stop_at, self.raise_in = config.get("stop_at"), config.get("raise_in")
        return super().build(config, plan)

    def run_unit(self, work: Any) -> dict[str, float]:
        if [work.epoch, work.shard] == self.raise_in:
            raise RuntimeError("this unit was told to raise")
        self.units = work.epoch * 4 + work.position + 1
        return super().run_unit(work)

    @property
    def should_stop(self) -> bool:
        return self.units == self.stop_at


def fit(folder: Path, configs: Any = CONFIGS, **options: Any) -> Results:
    """The run, or what is left of it; the folder around `folder` has the sets."""
    given: dict[str, Any] = {
        "epochs": 2,
        "workers": 2,
        "policy": "fixed",
        "durable_every": 3,
        "backend": "inline",
    } | options
    with one_thread(), Cerebro(
        folder.parent / "train", folder.parent / "validation", batch_size=16, run_dir=folder, progress=False, **given
    ) as cerebro:  # fmt: skip
        return cerebro.fit(Mixed, configs, metric="val_loss")


@contextmanager
def one_thread() -> Iterator[None]:
    """Workers compute with one thread, however many cores there are: a fork has not the threads of torch's pool."""
    with patch.object(base, "cores", lambda: [0]):
        yield


def die_at(row: int, before: bool) -> None:
    """From here on this process dies when it writes this row of a journal: before it does, or after."""
    append = Journal.append

    def dying(self: Journal, kind: str, **body: Any) -> None:
        if before and self.count + 1 == row:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, kind, **body)
        if self.count == row:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = dying  # type: ignore[method-assign]


def in_child(call: Callable[[], object]) -> int:
    """Make a call in a fork of this process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(started(call), 0)[1])


def started(call: Callable[[], object]) -> int:
    """The fork of this process that makes a call."""
    pid = os.fork()
    if pid == 0:
        code = 1
        gc.freeze()  # mappings of the parent are not in the fork: to collect them here would unmap what has their place
        try:
            torch.set_num_threads(1)  # the threads of the pool are not in the fork
            call()
            code = 0
        except BaseException:  # noqa: BLE001  # nothing of it may go on as the parent would
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid
