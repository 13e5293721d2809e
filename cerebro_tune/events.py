"""Facts, in the past tense, that the state machine is told: `Hopper.apply` takes one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cerebro_tune.units import Decision, Trial, Unit, WorkerId


@dataclass(frozen=True, slots=True)
class TrialAdded:
    """The tuner asked for a new trial, which starts from nothing."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialCloned:
    """The tuner asked for a new trial that goes on from what the trial `source` last committed."""

    trial: Trial
    source: str


@dataclass(frozen=True, slots=True)
class TrialRestored:
    """The tuner brought a trial back that another run had trained: so many units, the last of them on these shards.

    `visited` are the shards of the epoch that it is in.
    """

    trial: Trial
    units: int
    visited: frozenset[int]


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker that holds the shards with these indices is there and idle; it may be one that was lost."""

    worker: WorkerId
    shards: frozenset[int]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, and whatever it was running with it; that it went with its node is nobody's failure."""

    worker: WorkerId
    with_node: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStayedAway:
    """A worker that was lost has not come back, and may never: the others do its part until it joins again."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class RunResumed:
    """The coordinator died, and another goes on in its place: all workers are gone, which is nobody's failure."""


@dataclass(frozen=True, slots=True)
class UnitFinished:
    """A worker trained one unit of its job to the end, in `elapsed_s` seconds."""

    job: int
    unit: Unit
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """The user's own code raised in a unit; running it again would only raise again."""

    job: int
    unit: Unit
    reason: str


@dataclass(frozen=True, slots=True)
class TrialDecided:
    """The tuner answered a report, or spoke of a trial out of turn."""

    trial: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """The tuner has no more trials to add; one added later all the same is welcome."""


Event: TypeAlias = (
    TrialAdded
    | TrialCloned
    | TrialRestored
    | WorkerJoined
    | WorkerLost
    | WorkerStayedAway
    | RunResumed
    | UnitFinished
    | UnitFailed
    | TrialDecided
    | SearchEnded
)
