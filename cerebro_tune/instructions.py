"""Orders, in the imperative, that the state machine gives: the shell around it carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cerebro_tune.units import Status, Unit, WorkerId


@dataclass(frozen=True, slots=True)
class StartJob:
    """Let an idle worker train these units, which are all of one shard.

    `versions[i]` is the state that `units[i]` must start from: the number of units its trial had committed.
    `hops[i]` says that this state was last committed elsewhere; a trial's first unit starts from nothing: no hop.
    """

    job: int
    worker: WorkerId
    units: tuple[Unit, ...]
    versions: tuple[int, ...]
    hops: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ReportUnit:
    """Hand the metrics of this unit, now committed, to the tuner; the trial stands until it has decided.

    `units_done` counts the trial's units, this one included; `last` says that none is left.
    """

    job: int
    unit: Unit
    units_done: int
    epoch_done: bool
    last: bool


@dataclass(frozen=True, slots=True)
class DropState:
    """The trial has ended thus; its state is needed no more. Given exactly once for every trial that ends."""

    trial: str
    status: Status


Instruction: TypeAlias = StartJob | ReportUnit | DropState
