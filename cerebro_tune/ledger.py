"""How a run writes its journal, where it keeps one: events with their facts, and what may follow when they are safe."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from cerebro_tune.clock import Clock
from cerebro_tune.eventcodec import to_plain
from cerebro_tune.events import Event
from cerebro_tune.journal import Journal, Row
from cerebro_tune.wholefile import LOOK_AGAIN_S, once_there_is_room, told

T = TypeVar("T")

_TELL_AGAIN_S = 60.0


class FullDisk:
    """What a run does on a full disk: it stands still and says so, until there is room or an interrupt.

    `trouble` tells the user, `interrupted` says that he wants no more of it.
    """

    def __init__(self, clock: Clock, trouble: Callable[[str], object], interrupted: Callable[[], bool]) -> None:
        self._clock, self._trouble, self._interrupted = clock, trouble, interrupted
        self._told_s = -_TELL_AGAIN_S
        self._given_up = threading.Event()

    def stand_still(self, error: OSError) -> None:
        """Wait a little; raise the error again when the run was interrupted, or is being closed."""
        if self._interrupted() or self._given_up.is_set():
            raise error
        self.tell(f"the run stands still: {told(error)}")
        self._clock.sleep(LOOK_AGAIN_S, unless=self._given_up)

    def give_up(self) -> None:
        """Nobody is to wait any more."""
        self._given_up.set()

    def tell(self, what: str) -> None:
        """Tell it, if that was not done a moment ago."""
        if self._clock.now() - self._told_s >= _TELL_AGAIN_S:
            self._told_s = self._clock.now()
            self._trouble(f"{what}. It goes on when there is room")

    def wait_out(self, act: Callable[[], T]) -> T:
        """Do this as soon as there is room."""
        return once_there_is_room(act, self.stand_still)


class Ledger:
    """The journal of a run, or none."""

    def __init__(self, journal: Journal | None, disk: FullDisk) -> None:
        self._journal, self._disk = journal, disk
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()
        self._unwritten: deque[tuple[str, dict[str, Any]]] = deque()

    @property
    def kept(self) -> bool:
        """Whether there is a journal."""
        return self._journal is not None

    @property
    def rows(self) -> list[Row]:
        """What was in it when the run began."""
        return [] if self._journal is None else self._journal.rows

    def event(self, event: Event, facts: dict[str, Any], *, soon: bool = False) -> None:
        """Write an event that the state machine has taken in, with what it does not look at."""
        if self._journal is not None:
            self.note(type(event).__name__, soon=soon, event=to_plain(event), **facts)

    def note(self, kind: str, *, soon: bool = False, **body: Any) -> None:
        """Write a row; on a full disk stand still until there is room, or an interrupt.

        One that need only be there `soon` is written with the next that is not, or by `write`.
        """
        if self._journal is not None:
            self._unwritten.append((kind, body))
            if not soon:
                self.write()

    def write(self) -> None:
        """Write the rows that were left for soon."""
        if (journal := self._journal) is not None and self._unwritten:
            try:
                while self._unwritten:
                    kind, body = self._unwritten.popleft()
                    self._disk.wait_out(partial(journal.append, kind, **body))
            finally:
                self._unwritten.clear()  # of rows that cannot be written none may follow
            self._follow_up(journal)

    def when_safe(self, call: Callable[[], object]) -> None:
        """Make a call that destroys what was before: not until what was written so far survives a loss of power."""
        if self._journal is None:
            call()
        else:
            self.write()
            self._waiting.append((self._journal.count, call))

    def sync(self) -> None:
        """Return when what was written survives a loss of power."""
        if self._journal is not None:
            self.write()
            self._journal.sync()
            self._follow_up(self._journal)

    def close(self) -> None:
        """Let go of it."""
        if self._journal is not None:
            try:
                self.sync()
            finally:
                self._journal.close()

    def _follow_up(self, journal: Journal) -> None:
        while self._waiting and self._waiting[0][0] <= journal.synced:
            self._waiting[0][1]()
            self._waiting.popleft()
