"""What the state machine remembers of trials, workers and jobs, and the order in which ready trials are looked at."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence

from cerebro_tune.events import UnitFailed, UnitFinished
from cerebro_tune.policy import Candidate, Ready
from cerebro_tune.story import Row
from cerebro_tune.units import Decision, Status, Trial, Unit, WorkerId

_STORY_ROWS = 64  # rows kept per trial: the last dozen units or so
_RECENT_UNITS = 5  # the moving average is the plain mean up to here, and forgets at this rate after
_PACE_RATE = 0.05


class TrialRecord(Candidate):
    """One trial."""

    __slots__ = (
        "cause",
        "deaths",
        "epoch",
        "job",
        "kept",
        "key",
        "listed",
        "state_at",
        "status",
        "story",
        "trial",
        "units_done",
        "wish",
    )

    def __init__(self, trial: Trial, shards: int, turn: int, unit_s: float) -> None:
        super().__init__(turn, left=(1 << shards) - 1, units_left=trial.epochs * shards, unit_s=unit_s)
        self.trial = trial
        self.status = Status.QUEUED
        self.epoch = 0
        self.units_done = 0  # the version of the committed state
        self.deaths = 0  # workers that died in units of this trial
        self.wish: Decision | None = None  # a decision that came during a unit
        self.job: Job | None = None  # the job that it runs in, or (logical clock) is promised to
        self.kept = 0  # bits of the shards whose holder waits for it
        self.state_at: WorkerId | None = None
        self.key = 0.0
        self.listed = False  # among the ready trials that are on offer
        self.cause = 0  # number of the event of its last move
        self.story: deque[Row] = deque(maxlen=_STORY_ROWS)

    def continue_from(self, source: TrialRecord, shards: int) -> None:
        """Take over the committed progress of `source`, which has fewer units behind it than this trial has in all."""
        self.epoch, self.units_done = source.epoch, source.units_done
        self.units_left = self.trial.epochs * shards - source.units_done
        self.left = source.left or (1 << shards) - 1
        self.state_at, self.home, self.last = source.state_at, source.home, source.last


class Seat:
    """One worker. Under the logical clock its seat stays, empty, when it is lost."""

    __slots__ = ("cause", "fresh", "held", "id", "job", "own", "pace", "present", "running")

    def __init__(self, worker: WorkerId) -> None:
        self.id = worker
        self.own = 0  # bit s is set when it said to hold shard s
        self.held = 0  # its own, and those of workers that stay away which it stands in for
        self.present = False
        self.job: Job | None = None
        self.running: Job | None = None  # `job` once begun or, for a worker that stays away, that one's
        self.fresh = True  # to be offered all ready trials, not only the new ones
        self.pace = 1.0  # moving average of its unit times over those trials' own averages
        self.cause = 0  # number of the event that made it idle


class Job:
    """Units of one shard, given to one worker together."""

    __slots__ = ("early", "held", "number", "open", "orphans", "records", "runner", "seat", "shard")

    def __init__(self, seat: Seat, shard: int, records: Sequence[TrialRecord]) -> None:
        self.number = 0  # 0: promised, and not begun
        self.seat = seat
        self.runner = seat  # who has begun it: another, when the worker of the seat stays away
        self.held = seat.held  # when it was promised
        self.shard = shard
        self.records = {record.trial.id: record for record in records}
        self.open = [Unit(record.trial.id, record.epoch, shard) for record in records]  # not ended yet
        self.early: list[UnitFinished | UnitFailed] = []  # results that wait for their turn on the logical clock
        self.orphans: set[str] = set()  # trials of early results whose worker has been lost since


class Offers:
    """The ready trials that may be given to a worker, sorted by the policy's key."""

    __slots__ = ("_news", "ready")

    def __init__(self) -> None:
        self.ready: list[tuple[float, int, TrialRecord]] = []
        self._news: list[TrialRecord] = []

    def add(self, record: TrialRecord, key: float) -> None:
        """Offer a trial, as news."""
        record.key = key
        record.listed = True
        insort(self.ready, (key, record.order, record))
        self._news.append(record)

    def remove(self, record: TrialRecord) -> None:
        """Take back the offer."""
        record.listed = False
        del self.ready[bisect_left(self.ready, (record.key, record.order))]

    def sort(self, key: Callable[[TrialRecord], float]) -> None:
        """Sort anew by another key."""
        for _, _, record in self.ready:
            record.key = key(record)
        self.ready = sorted((record.key, order, record) for _, order, record in self.ready)

    def take_news(self) -> list[TrialRecord]:
        """Return the trials offered since the last call, and forget that they are new."""
        news, self._news = self._news, []
        return news

    @staticmethod
    def still_offered(records: Sequence[TrialRecord]) -> Ready:
        """Return those of the trials that are still on offer, sorted."""
        return sorted({(record.key, record.order, record) for record in records if record.listed})


def learn(record: TrialRecord, seat: Seat, elapsed_s: float) -> None:
    """Move the trial's and the worker's averages; their product is the time a unit is expected to take."""
    sample = elapsed_s / seat.pace
    seen = min(record.units_done, _RECENT_UNITS)
    record.unit_s = record.unit_s + (sample - record.unit_s) / seen if record.unit_s else sample
    if record.unit_s > 0:
        seat.pace += _PACE_RATE * (elapsed_s / record.unit_s - seat.pace)
