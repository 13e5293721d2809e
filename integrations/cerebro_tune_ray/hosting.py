"""How a call of Ray Tune gets our controller, and a user's function our session. Private to Ray, see `versions`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray.tune.tune
from pyarrow.fs import LocalFileSystem
from ray.train._internal import session
from ray.train._internal.storage import get_fs_and_path
from ray.tune.execution.tune_controller import TuneController

from cerebro_tune.seat import current
from cerebro_tune_ray.controller import Board, HopController
from cerebro_tune_ray.record import check_idle
from cerebro_tune_ray.riders import Riders
from cerebro_tune_ray.versions import check

_board: ContextVar[Board | None] = ContextVar("board", default=None)


def _make_controller(**kwargs: Any) -> TuneController:
    board = _board.get()
    return TuneController(**kwargs) if board is None else HopController(board, **kwargs)


class _Sessions:
    """Stands for Ray's session of a function trainable, which is one per process: here it is the call of the thread."""

    def __bool__(self) -> bool:
        return current() is not None

    def __getattr__(self, name: str) -> Any:
        return getattr(current(), name)


def check_folder(run_config: Any) -> None:
    """RunBusyError where another driver has the experiment in its hands, into whose folder a new Tuner writes."""
    if run_config is None or run_config.name is None:
        return
    filesystem, path = get_fs_and_path(run_config.storage_path, run_config.storage_filesystem)
    if isinstance(filesystem, LocalFileSystem):
        check_idle(Path(path, run_config.name))


@contextmanager
def hopping(board: Board) -> Iterator[None]:
    """Within, `ray.tune.run` on this thread runs its trials on this board."""
    check()
    ray.tune.tune.TuneController = _make_controller
    if session._session is None:
        session._session = _Sessions()
    controllers: list[HopController] = []

    def noted(controller: HopController) -> Riders:
        riders = board(controller)
        controllers.append(controller)
        return riders

    token = _board.set(noted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consider boosting PBT performance")  # there are no actors to reuse
            yield
    finally:
        _board.reset(token)
        for each in controllers:  # a second Ctrl-C leaves Ray's loop as it is
            each.let_go()
