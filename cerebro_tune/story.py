"""What happened to a trial, row by row, and what may happen, as a diagram: both come from the machine's one table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from cerebro_tune.events import Event
from cerebro_tune.instructions import StartJob
from cerebro_tune.units import Status


class Move(Enum):
    """What can happen to a trial."""

    ADMIT = "admit"
    START = "start"
    COMMIT = "commit"  # the unit is committed, no report is due
    REPORT = "report"  # the unit is committed, the tuner is asked
    LOSE = "lose"  # the worker died in the unit
    GIVE_UP = "give up"  # ... once too often
    RAISE = "raise"  # the user's code raised
    CONTINUE = "continue"
    PAUSE = "pause"
    STOP = "stop"
    END = "end"  # CONTINUE or STOP with no unit left


class Row(NamedTuple):
    """One move of one trial. `cause` is the number of the event that brought it about, counted from 1 by the machine.

    A start has two causes, the trial got ready and the worker got idle: `cause` is the later one.
    """

    cause: int
    move: Move
    before: Status
    after: Status
    what: Event | StartJob | None

    def __str__(self) -> str:
        about = "" if self.what is None else f"   {self.what}"
        return f"{self.cause:>6}  {self.move.value:<8}  {self.before.value:>8} -> {self.after.value:<8}{about}"


def diagram(transitions: Mapping[Status, Mapping[Move, Status]]) -> str:
    """Draw the table as a Mermaid state diagram; moves between the same two states share an arrow."""
    lines = ["stateDiagram-v2", "    [*] --> queued"]
    for before, moves in transitions.items():
        arrows: dict[Status, list[str]] = {}
        for move, after in moves.items():
            arrows.setdefault(after, []).append(move.value)
        lines += [f"    {before.value} --> {after.value}: {', '.join(names)}" for after, names in arrows.items()]
        lines += [] if moves else [f"    {before.value} --> [*]"]
    return "\n".join(lines)
