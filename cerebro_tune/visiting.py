"""The unit that is being trained, for user code that the worker does not hand it to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cerebro_tune.errors import ConfigurationError
from cerebro_tune.trainable import UnitWork


class _Current(threading.local):
    work: UnitWork | None = None


_current = _Current()


def current_shard() -> UnitWork:
    """The unit that the calling code is to train: `epoch`, `shard`, and its batches, `train` and `validation`.

    For a class-API trainable of Ray Tune, in `step`. ConfigurationError outside of a unit.
    """
    if _current.work is None:
        raise ConfigurationError("There is no current shard here: only what trains a unit has one, such as step().")
    return _current.work


@contextmanager
def visiting(work: UnitWork) -> Iterator[None]:
    """Make this the current unit of the calling thread."""
    before, _current.work = _current.work, work
    try:
        yield
    finally:
        _current.work = before
