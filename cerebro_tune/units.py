"""The nouns of model hopper parallelism: what is trained, on what, by whom, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Trial:
    """One configuration to train for `epochs` passes over all shards; `index` is its rank in the run, from 0."""

    id: str
    index: int
    epochs: int


@dataclass(frozen=True)
class Shard:
    """One partition of the training set, number `index` of them, with `rows` examples."""

    index: int
    rows: int


@dataclass(frozen=True)
class Unit:
    """One pass of the trial with id `trial` over the shard with index `shard`, in the epoch `epoch` (from 0)."""

    trial: str
    epoch: int
    shard: int


class Units(int):
    """A number of units that is meant as such: nobody need ask whether it was written for epochs."""


@dataclass(frozen=True, order=True)
class WorkerId:
    """The name of a worker; one that was lost may come back under it."""

    number: int

    def __str__(self) -> str:
        return f"worker-{self.number}"


class Decision(Enum):
    """A tuner's answer to a report, or a wish out of turn."""

    CONTINUE = "continue"
    PAUSE = "pause"
    STOP = "stop"

    def joined(self, other: Decision) -> Decision:
        """The firmer of two: STOP beats PAUSE beats CONTINUE."""
        return max(self, other, key=_BY_FIRMNESS.index)


_BY_FIRMNESS = (Decision.CONTINUE, Decision.PAUSE, Decision.STOP)


class Status(Enum):
    """Where a trial is in its life; the moves between them are the table in `hopper.py`."""

    QUEUED = "queued"
    READY = "ready"
    RUNNING = "running"
    DECIDING = "deciding"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing can happen to the trial any more."""
        return self in _ENDED


_ENDED = frozenset({Status.FINISHED, Status.STOPPED, Status.FAILED})
