"""What happened to a trial, row by row: the debugger, and what an invariant error carries."""

from __future__ import annotations

from typing import NamedTuple

from cerebro_tune.events import Event
from cerebro_tune.instructions import Instruction
from cerebro_tune.units import Status


class Row(NamedTuple):
    """One move of one trial. `cause` is the number of the event that brought it about, counted from 1 by the machine.

    A job's start has two: the trial got ready and the worker got idle; `cause` is the later one.
    """

    cause: int
    move: str
    before: Status
    after: Status
    what: Event | Instruction | None

    def __str__(self) -> str:
        about = "" if self.what is None else f"   {self.what}"
        return f"{self.cause:>6}  {self.move:<9} {self.before.value:>8} -> {self.after.value:<8}{about}"
