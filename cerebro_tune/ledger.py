"""How a run writes its journal, where it keeps one: events with their facts, and waiting while a disk is full."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import sleep
from typing import Any, TypeVar

from cerebro_tune.eventcodec import to_plain
from cerebro_tune.events import Event
from cerebro_tune.journal import Journal, Row

T = TypeVar("T")

_DISK_FULL_S = 1.0
"""Between two looks whether the disk has room again, of which no file system tells."""


class Ledger:
    """The journal of a run, or none; `trouble` tells the user, `interrupted` says that he wants no more of it."""

    def __init__(
        self, journal: Journal | None, trouble: Callable[[str], object], interrupted: Callable[[], bool]
    ) -> None:
        self._journal, self._trouble, self._interrupted = journal, trouble, interrupted

    @property
    def kept(self) -> bool:
        """Whether there is a journal."""
        return self._journal is not None

    @property
    def rows(self) -> list[Row]:
        """What was in it when the run began."""
        return [] if self._journal is None else self._journal.rows

    def event(self, event: Event, facts: dict[str, Any]) -> None:
        """Write an event that the state machine has taken in, with what it does not look at."""
        if self._journal is not None:
            self.note(type(event).__name__, event=to_plain(event), **facts)

    def note(self, kind: str, **body: Any) -> None:
        """Write a row, patiently."""
        if self._journal is not None:
            self.patiently(partial(self._journal.append, kind, **body))

    def patiently(self, write: Callable[[], T]) -> T:
        """Write something; on a full disk stand still until there is room, or an interrupt."""
        told = False
        while True:
            try:
                return write()
            except OSError as error:
                if self._interrupted():
                    raise
                if not told:
                    self._trouble(f"the run stands still: {error}. It goes on when there is room")
                told = True
                sleep(_DISK_FULL_S)

    def sync(self) -> None:
        """Return when what was written survives a loss of power."""
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        """Let go of it."""
        if self._journal is not None:
            self._journal.close()
