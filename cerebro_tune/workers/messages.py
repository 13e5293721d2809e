"""What the coordinator and a worker say to each other. Small, frozen, and pickled only in flight.

Without slots, here and for what is in them: a frozen class that has them is pickled and read by Python code of its own,
which takes twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cerebro_tune.store import BufferRef
from cerebro_tune.units import Unit, WorkerId


@dataclass(frozen=True)
class RunSpec:
    """What a worker needs once per run.

    `recipe` and `data` (a `RunData`) are cloudpickled, so that classes of a script or a notebook travel by value.
    `validation_rows` are the rows measured after a unit in mid-epoch; None where there is no validation set.
    """

    recipe: bytes
    data: bytes
    validation_rows: int | None
    report_every: str
    seed: int
    shard_rows: tuple[int, ...]
    threads: int | None = None
    """What torch is to use, where it is not what the workers were started with: those of a run that is taken up."""


@dataclass(frozen=True)
class Setup:
    """Begin a run: open the data, and check these shards before anything trains on them."""

    spec: RunSpec
    check: tuple[int, ...]
    check_validation: bool


@dataclass(frozen=True)
class Export:
    """Write a checkpoint in the worker if this unit's report is the trial's best so far (or unconditionally)."""

    best_path: Path | None
    metric: str | None
    mode: str
    best_so_far: float | None
    last_path: Path | None
    durable: bool = False
    """Whether it is to outlive a loss of power, and its digest is wanted."""

    def place(self, metrics: Mapping[str, float]) -> tuple[Path | None, bool]:
        """Where the unit's one checkpoint goes (the best also serves as the last), and whether it is the best."""
        if self.best_path is not None and improves(self.metric, self.mode, metrics, self.best_so_far):
            return self.best_path, True
        return self.last_path, False


def improves(metric: str | None, mode: str, metrics: Mapping[str, float], best: float | None) -> bool:
    """Whether a report is better than the best so far; without a metric the latest always is, NaN never."""
    if metric is None:
        return True
    value = metrics.get(metric, math.nan)
    if math.isnan(value):
        return False
    return best is None or (value < best if mode == "min" else value > best)


@dataclass(frozen=True)
class Task:
    """One unit to run: from the state in `committed` (None: from a fresh build) into `working`.

    Configs are cloudpickled; they may hold classes and functions of a script, and weights. That of a trial is sent to
    a worker once, with the recipe of a trial that brings its own: both are None in the tasks that follow.
    """

    job: int
    unit: Unit
    trial_index: int
    config: bytes | None
    epochs: int
    batch_size: int
    position: int
    last: bool
    committed: BufferRef | None
    committed_bytes: int
    working: BufferRef | None
    digest: str = ""
    """Of the committed state, by which a worker elsewhere knows whether the copy that it kept is this one."""
    trained_under: bytes | None = None
    """The config the state was trained under, where it differs from `config`."""
    export: Export | None = None
    recipe: bytes | None = None


@dataclass(frozen=True)
class Grant:
    """The buffer that a `NeedBuffer` asked for; None when there is no memory, with the reason in `error`."""

    buffer: BufferRef | None
    error: str = ""


@dataclass(frozen=True)
class Forget:
    """These trials ended and these buffers were freed: let go of them."""

    trials: tuple[str, ...]
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class Rest:
    """The run is over: let go of everything of it."""


@dataclass(frozen=True)
class Exit:
    """Leave."""


Order = Setup | Task | Grant | Forget | Rest | Exit


@dataclass(frozen=True)
class Joined:
    """The worker is up."""

    worker: WorkerId


@dataclass(frozen=True)
class Ready:
    """The run's data is open and checked (`error` is None), or cannot be used."""

    worker: WorkerId
    error: Exception | None = None


@dataclass(frozen=True)
class NeedBuffer:
    """The state of the trial that runs here needs a working buffer of this size; answered by a `Grant`."""

    worker: WorkerId
    trial: str
    nbytes: int


@dataclass(frozen=True)
class Spans:
    """When the parts of a unit happened: monotonic seconds, one clock for all processes of a machine."""

    began: float
    loaded: float
    trained: float
    ended: float
    validation_s: float = 0.0
    build_s: float = 0.0
    """Making the trainable, the first time that the trial is on this worker."""

    @property
    def hop_s(self) -> float:
        """Seconds spent on the state: copy and load before the unit; write, digest and checkpoint after it."""
        return (self.loaded - self.began) - self.build_s + (self.ended - self.trained)

    @property
    def compute_s(self) -> float:
        """Seconds of training."""
        return self.trained - self.loaded - self.validation_s

    def ended_at(self, moment: float, sent: float) -> Spans:
        """The same by another machine's clock, on which the task was sent and the unit had come to its end there."""
        ahead = moment - self.ended
        return replace(self, began=sent, loaded=self.loaded + ahead, trained=self.trained + ahead, ended=moment)


@dataclass(frozen=True)
class Finished:
    """A unit is done and its state written: the working buffer holds `used` bytes with this digest."""

    worker: WorkerId
    job: int
    unit: Unit
    metrics: Mapping[str, float]
    used: int
    digest: str
    spans: Spans
    best_written: bool = False
    exported: str = ""
    """The digest of the checkpoint file that it has written; empty if there is none."""
    logged: Any = None
    """What `Trainable.take_log` gave."""
    should_stop: bool = False
    """Whether the trial itself found that it should end."""


@dataclass(frozen=True)
class Raised:
    """The unit raised; `error` is the traceback as text, `kinds` are the classes that the exception is of."""

    worker: WorkerId
    job: int
    unit: Unit
    error: str
    kinds: tuple[str, ...] = ()


def kinds_of(error: BaseException) -> tuple[str, ...]:
    """The names of the classes that an exception is of; its own class may not travel."""
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)


@dataclass(frozen=True)
class Output:
    """Text that user code printed in a worker."""

    worker: WorkerId
    trial: str | None
    stream: str
    text: str


@dataclass(frozen=True)
class Lost:
    """The worker is gone, with what is known of why, and whether its whole node is."""

    worker: WorkerId
    reason: str = field(default="")
    with_node: bool = False


@dataclass(frozen=True)
class Late:
    """A worker that was started is not up yet, and may not be for long: no node has room for it, say."""

    worker: WorkerId
    reason: str = field(default="")


@dataclass(frozen=True)
class Waiting:
    """The unit that the worker runs cannot go on for now: the disk is full, say. It says so again and again."""

    worker: WorkerId
    reason: str


Message = Joined | Ready | NeedBuffer | Finished | Raised | Output | Lost | Late | Waiting
