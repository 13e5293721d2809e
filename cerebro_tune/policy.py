"""Which (trial, shard) an idle worker gets: the rules, apart from the machine that asks them.

"auto", the default, has three regimes.

ROTATION, with no more live trials than workers and one holder per shard: shards form a ring, every trial walks it, and
waits for its next shard rather than take another. There is no spare trial to fill the gap with, and a trial that leaves
the order collides with others from then on: with 2-10 % of noise in the unit times greedy rules end at 1.1-1.2 of the
lower bound, rotation at 1.01-1.03.

SHORTEST, while trials remain to be admitted: the shortest remaining time first. A tuner is a stream. Ending trials
early lets new ones in early, and the run's last trial cannot begin before its place is free; so this shortens the run
as well as the wait for results (32 trials of 4x different cost, 16 live, 8 workers: 1.05 of work / workers when pinned,
against 1.08 for oldest first and 1.23 for longest first). A trial after which twice as many were admitted as are live
is overdue and goes before all that are not: without that the costliest of a long stream would wait for its end.

LONGEST, once all trials are in: the longest remaining time first, so that no trial is left to run alone at the end. A
trial with more time left than there is work for each worker sets the end of the run: while it trains the last but one
shard of an epoch, the only worker that it can go to next takes nothing else.

ABREAST, for tuners that compare trials, knows no SHORTEST: the trial with the most units left goes first, whatever its
units take, so that all live ones are at the same point when they are compared, and none of a population falls behind.

Remaining time is units left times the trial's moving average of unit times, put on a common scale by the moving average
of each worker's pace. A trial that has not run yet comes first: running it tells its cost.

Among equals (remaining times within 10 % of the longest, 20 % of the shortest: the end of a run needs the finer rank) a
trial whose state is already here wins, then the smallest (trial - shard) mod shards, which sends the trials round the
shards in step.

Everything here is a function of its arguments, apart from the generator that "random" owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Protocol, TypeAlias

from cerebro_tune.errors import ConfigurationError

NOWHERE = -1  # the home of a state that no worker has; no worker has this number
NO_SHARD = -1
_EQUAL_TO_LONGEST = 0.9
_EQUAL_TO_SHORTEST = 1.2
# More equals than this are not compared: it costs time (1,000 trials of one cost are all equals) and gains nothing.
_EQUALS_COMPARED = 64
_INFINITY = float("inf")


@dataclass(slots=True, eq=False)
class Candidate:
    """What a rule may know of a trial."""

    turn: int  # the shard it would like to visit first; the trial of the tie rule
    order: int = -1  # rank of its first admission
    left: int = 0  # bit s is set while shard s is to be visited in this epoch
    units_left: int = 0
    unit_s: float = 0.0  # moving average on the common scale; 0 before the first unit
    home: int = NOWHERE  # number of the worker that committed last
    last: int = NO_SHARD  # shard visited last
    overdue: bool = False

    @property
    def time_left(self) -> float:
        """Expected time of the units left; 0 when nothing is known."""
        return self.units_left * self.unit_s


# (key, order of admission, trial), smallest first. `order` is unique, so trials themselves are never compared.
Ready: TypeAlias = Sequence[tuple[float, int, Candidate]]


@dataclass(slots=True, eq=False)
class Board:
    """What a rule may know of the run as a whole."""

    shards: int
    workers: int = 0
    live: int = 0
    admitting: bool = True  # the tuner may add more trials
    queued: int = 0
    pinned: bool = False  # every shard that is held has one holder
    held: list[int] = field(default_factory=list)  # per worker: bit s is set when it holds shard s
    ring: list[int] = field(default_factory=list)  # pinned: shards in the order of rotation, worker after worker
    kept: int = 0  # bit s is set while the holder of shard s waits for a trial that sets the end of the run
    time_left: float = 0.0  # of all live trials

    def seat(self, held: list[int]) -> None:
        """Take note of who holds what, in the order of the workers' numbers."""
        everything = sum(1 << shard for shard in range(self.shards) if any(bits >> shard & 1 for bits in held))
        self.held = held
        self.workers = len(held)
        self.pinned = self.workers > 1 and sum(bits.bit_count() for bits in held) == everything.bit_count()
        self.ring = ring_of(held, self.shards) if self.pinned else []


class Regime(Enum):
    """Which of the rules holds now."""

    ROTATION = "rotation"
    SHORTEST = "shortest"
    LONGEST = "longest"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Choice:
    """One job: these trials visit this shard."""

    trials: tuple[Candidate, ...]
    shard: int


class Policy(Protocol):
    """A rule book. The machine keeps ready trials sorted by `key`, and sorts anew when the regime changes.

    A worker for which `choose` found nothing is next asked with only the trials that got ready since; with all again
    when the regime, the workers or the kept shards change.
    """

    learns: bool  # unit times are measured; otherwise every unit counts as 1
    logical: bool  # the run goes by the logical clock

    def regime(self, board: Board) -> Regime:
        """Return which rules hold now."""

    def key(self, regime: Regime, trial: Candidate) -> float:
        """Return the trial's rank among the ready ones: the smallest is first."""

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """Pick a job for the idle worker of this number, which holds the shards whose bits are set in `held`."""

    def keep(self, regime: Regime, board: Board, trial: Candidate, shard: int) -> int:
        """Return the shards (as bits) whose holder is to wait for the trial while it visits `shard`."""


class AutoPolicy:
    """The default, see the module's head. With `logical` it looks at nothing that was measured.

    With `abreast` live trials advance side by side.
    """

    def __init__(self, *, logical: bool = False, abreast: bool = False) -> None:
        self.learns = not logical and not abreast
        self.logical, self._abreast = logical, abreast

    def regime(self, board: Board) -> Regime:
        """Rotate when there is nothing to choose from; else serve the stream, or its end."""
        if board.pinned and board.live <= board.workers:
            return Regime.ROTATION
        stream = (board.admitting or board.queued) and not self._abreast
        return Regime.SHORTEST if stream else Regime.LONGEST

    def key(self, regime: Regime, trial: Candidate) -> float:
        """Remaining time, or its negative; the overdue, then the unknown, before all."""
        if regime is Regime.SHORTEST:
            return -_INFINITY if trial.overdue else trial.time_left
        return -trial.time_left if trial.unit_s else -_INFINITY

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """Take the trial whose turn it is, or the best of the equals."""
        if regime is Regime.ROTATION:
            return rotate(board, held, ready)
        if regime is Regime.SHORTEST:
            return best_of_equals(board, worker, held, ready, _EQUAL_TO_SHORTEST)
        if held & board.kept:
            return None
        return best_of_equals(board, worker, held, ready, _EQUAL_TO_LONGEST)

    def keep(self, regime: Regime, board: Board, trial: Candidate, shard: int) -> int:
        """Keep the last holder that a trial which sets the end of the run can go to in this epoch."""
        if regime is not Regime.LONGEST or not board.pinned or trial.time_left * board.workers < board.time_left:
            return 0
        rest = trial.left & ~(1 << shard)
        one_holder = trial.unit_s and any(not rest & ~held for held in board.held)
        return rest if one_holder else 0


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
        """Draw a place in the queue, anew each time the trial gets ready."""
        return self._random.random()

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        """Take the first that still needs one of this worker's shards."""
        for _, _, trial in ready:
            if here := trial.left & held:
                return Choice((trial,), self._random.choice([s for s in range(board.shards) if here >> s & 1]))
        return None

    def keep(self, regime: Regime, board: Board, trial: Candidate, shard: int) -> int:
        """No worker waits."""
        return 0


def best_of_equals(board: Board, worker: int, held: int, ready: Ready, share: float) -> Choice | None:
    """Take the first runnable trial, or the one that the tie rule prefers among those up to `share` times its key."""
    limit = _INFINITY
    best: Candidate | None = None
    best_gap = best_shard = board.shards
    compared = 0
    for key, _, trial in ready:
        if key > limit:
            break
        here = trial.left & held
        if not here:
            continue
        if not compared:
            limit = key * share
        shard = shard_behind(trial.turn, here)
        if trial.home == worker:
            return Choice((trial,), shard)
        gap = (trial.turn - shard) % board.shards
        if gap < best_gap:
            best, best_gap, best_shard = trial, gap, shard
        compared += 1
        if compared == _EQUALS_COMPARED:
            break
    return None if best is None else Choice((best,), best_shard)


def shard_behind(turn: int, mask: int) -> int:
    """Return the shard s in `mask` (not empty) with the smallest (turn - s) modulo the number of shards."""
    below = mask & ((2 << turn) - 1)
    return (below or mask).bit_length() - 1


def rotate(board: Board, held: int, ready: Ready) -> Choice | None:
    """Take the trial whose next shard on the ring is here; else let one start that has no place on the ring yet."""
    newcomer: Choice | None = None
    newcomer_gap = board.shards
    for _, _, trial in ready:
        if trial.last == NO_SHARD:
            if here := trial.left & held:
                shard = shard_behind(trial.turn, here)
                gap = (trial.turn - shard) % board.shards
                if gap < newcomer_gap:
                    newcomer, newcomer_gap = Choice((trial,), shard), gap
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
    return next((shard for shard in ring[:start] if trial.left >> shard & 1), NO_SHARD)


def ring_of(holdings: Sequence[int], shards: int) -> list[int]:
    """Deal out the shards, one from each worker in turn: neighbours on the ring are on different workers."""
    piles = [[shard for shard in range(shards) if held >> shard & 1] for held in holdings]
    return [pile[turn] for turn in range(shards) for pile in piles if turn < len(pile)]


def make_policy(policy: str | Policy, seed: int) -> Policy:
    """Return the policy of this name, or the one given."""
    if not isinstance(policy, str):
        return policy
    if policy not in {"auto", "random", "fixed"}:
        raise ConfigurationError(f'unknown policy {policy!r}; choose "auto", "random" or "fixed"')
    return RandomPolicy(seed) if policy == "random" else AutoPolicy(logical=policy == "fixed")


def abreast(policy: str | Policy) -> str | Policy:
    """The policy as it is for a tuner that compares trials: "auto" and "fixed" let them advance side by side."""
    return AutoPolicy(logical=policy == "fixed", abreast=True) if policy in ("auto", "fixed") else policy


def turns(shards: int, seed: int, *, shuffled: bool) -> list[int]:
    """Return the first shards that trials 0, 1, ... would like: in order, or in a seeded order."""
    return Random(seed).sample(range(shards), shards) if shuffled else list(range(shards))
