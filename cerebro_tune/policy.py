"""Which (trial, shard) an idle worker gets: the rules, apart from the machine that asks them.

"auto", the default, has three regimes.

ROTATION, with no more live trials than workers and one holder per shard: shards form a ring, every trial walks it,
and waits for its next shard rather than take another. Nothing can be gained by filling the gap: there is no spare
trial to fill it with, and a trial that leaves the ring's order collides with others from then on (with 2-10 % of
noise in the unit times greedy rules end at 1.1-1.2 of the lower bound, rotation at 1.004-1.033).

OLDEST, while trials remain to be admitted: a tuner is a stream, and the longest remaining trial is always the newest;
first come, first served gives the tuner its results early and keeps every worker fed.

LONGEST, once all trials are in: the longest remaining time first, so that no trial is left to run alone at the end.
Remaining time is units left times the trial's moving average of unit times, which are put on a common scale by the
moving average of each worker's pace. A trial that has not run yet counts as the longest: running it tells its cost.

Among equals, a trial whose state is already here wins, then the smallest (trial - shard) mod shards, which sends the
trials round the shards in step. Equals are trials within 10 % of the longest, and the oldest as many as there are
workers.

Everything here is a function of its arguments, apart from the generator that "random" owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Protocol, TypeAlias

from cerebro_tune.errors import ConfigurationError

NOWHERE = -1  # the home of a trial that no worker holds the state of; no worker has this number
NO_SHARD = -1
# Trials compared for the tie rule: more cost time (1,000 trials of one cost are all equals) and gain nothing.
_EQUALS_COMPARED = 64
_EQUAL_SHARE = 0.9


@dataclass(slots=True, eq=False)
class Candidate:
    """What a rule may know of a trial."""

    index: int
    order: int = -1  # rank of first admission
    left: int = 0  # bit s is set while shard s is to be visited in this epoch
    units_left: int = 0
    unit_s: float = 0.0  # moving average on the common scale; 0 before the first
    home: int = NOWHERE  # number of the worker that committed last
    last: int = NO_SHARD


# (key, order of admission, trial), smallest first: `order` is unique, so trials themselves are never compared.
Ready: TypeAlias = Sequence[tuple[float, int, Candidate]]


@dataclass(slots=True)
class Board:
    """What a rule may know of the run as a whole."""

    shards: int
    workers: int = 0
    live: int = 0
    admitting: bool = True  # more trials are queued, or may come
    pinned: bool = False  # every shard that is held has one holder
    ring: list[int] = field(default_factory=list)  # shards in the order of rotation: round and round the workers
    elders: int = -1  # order of admission of the youngest among the `workers` oldest live trials


class Regime(Enum):
    """Which of the rules holds now."""

    ROTATION = "rotation"
    OLDEST = "oldest"
    LONGEST = "longest"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Choice:
    """One job: these trials visit this shard."""

    trials: tuple[Candidate, ...]
    shard: int


class Policy(Protocol):
    """A rule book. The machine keeps ready trials sorted by `key`, and sorts anew when the regime changes.

    A worker for which `choose` found nothing is next asked with only the trials that became ready since.
    """

    learns: bool  # unit times are kept up to date for it
    logical: bool  # the run goes by the logical clock, in which every unit lasts 1

    def regime(self, board: Board) -> Regime: ...  # noqa: D102
    def key(self, regime: Regime, trial: Candidate) -> float: ...  # noqa: D102
    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """Pick for the idle worker with this number, which holds the shards whose bits are set in `held`."""


class AutoPolicy:
    """The default; with `logical`, every unit counts the same and nothing measured is looked at."""

    def __init__(self, *, logical: bool = False) -> None:
        self.learns = not logical
        self.logical = logical

    def regime(self, board: Board) -> Regime:
        """See the module's head."""
        if board.pinned and board.live <= board.workers:
            return Regime.ROTATION
        return Regime.OLDEST if board.admitting else Regime.LONGEST

    def key(self, regime: Regime, trial: Candidate) -> float:
        """Admission order, or minus the remaining time."""
        if regime is Regime.OLDEST:
            return trial.order
        if self.logical:
            return -trial.units_left
        return -trial.units_left * trial.unit_s if trial.unit_s else -float("inf")

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """See the module's head."""
        if regime is Regime.ROTATION:
            return rotate(board, held, ready)
        return best_of_equals(board, worker, held, ready, oldest=regime is Regime.OLDEST)


class RandomPolicy:
    """The paper's default: the first runnable trial of a shuffled queue, on a random shard of the worker's."""

    learns = False
    logical = False

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def regime(self, board: Board) -> Regime:
        """There is but one."""
        return Regime.RANDOM

    def key(self, regime: Regime, trial: Candidate) -> float:
        """A place in the queue, drawn anew each time the trial gets ready."""
        return self._random.random()

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """Take the first that still needs one of this worker's shards."""
        for _, _, trial in ready:
            if here := trial.left & held:
                return Choice((trial,), self._random.choice([s for s in range(board.shards) if here >> s & 1]))
        return None


def best_of_equals(board: Board, worker: int, held: int, ready: Ready, *, oldest: bool) -> Choice | None:
    """Take the first runnable trial, or the one among its equals that the tie rule prefers."""
    limit: float | None = None
    best: Choice | None = None
    best_turn = board.shards
    compared = 0
    for key, _, trial in ready:
        if limit is not None and (key > limit or compared == _EQUALS_COMPARED):
            break
        here = trial.left & held
        if not here:
            continue
        if limit is None:
            limit = max(key, board.elders) if oldest else key * _EQUAL_SHARE
        compared += 1
        shard = shard_behind(trial.index % board.shards, here)
        if trial.home == worker:
            return Choice((trial,), shard)
        turn = (trial.index - shard) % board.shards
        if turn < best_turn:
            best, best_turn = Choice((trial,), shard), turn
    return best


def shard_behind(start: int, mask: int) -> int:
    """Return the shard s in `mask` (not empty) with the smallest (start - s) modulo the number of shards."""
    below = mask & ((2 << start) - 1)
    return (below or mask).bit_length() - 1


def rotate(board: Board, held: int, ready: Ready) -> Choice | None:
    """Take the trial whose next shard on the ring is here; else let one that has no place on the ring yet start."""
    newcomer: Choice | None = None
    for _, _, trial in ready:
        if trial.last == NO_SHARD:
            if newcomer is None and (here := trial.left & held):
                newcomer = Choice((trial,), next(s for s in board.ring if here >> s & 1))
            continue
        shard = next_on_ring(board.ring, trial)
        if shard != NO_SHARD and held >> shard & 1:
            return Choice((trial,), shard)
    return newcomer


def next_on_ring(ring: list[int], trial: Candidate) -> int:
    """Return the first shard on the ring, after the trial's last, that is to be visited, or NO_SHARD."""
    start = ring.index(trial.last) + 1 if trial.last in ring else 0
    for shard in ring[start:]:
        if trial.left >> shard & 1:
            return shard
    return next((s for s in ring[:start] if trial.left >> s & 1), NO_SHARD)


def make_policy(policy: str | Policy, seed: int) -> Policy:
    """Return the policy of this name, or the one given."""
    if not isinstance(policy, str):
        return policy
    if policy not in {"auto", "random", "fixed"}:
        raise ConfigurationError(f'unknown policy {policy!r}; choose "auto", "random" or "fixed"')
    return RandomPolicy(seed) if policy == "random" else AutoPolicy(logical=policy == "fixed")
