"""The rules: which trial and shard an idle worker gets."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebro_tune.policy import (
    NO_SHARD,
    AutoPolicy,
    Board,
    Candidate,
    Choice,
    RandomPolicy,
    Ready,
    Regime,
    best_of_equals,
    next_on_ring,
    ring_of,
    rotate,
    shard_behind,
    turns,
)
from cerebro_tune.roster import Seat, TrialRecord, learn
from cerebro_tune.simulate import Outcome, log_uniform_costs, noisy, simulate
from cerebro_tune.units import Trial, WorkerId


def candidate(turn: int = 0, *, left: int = 0b1111, time_left: float = 1.0, home: int = 9, last: int = 3) -> Candidate:
    units = left.bit_count()
    return Candidate(turn, left=left, units_left=units, unit_s=time_left / units, home=home, last=last)


def ready(regime: Regime, *trials: Candidate) -> Ready:
    policy = AutoPolicy()
    return sorted((policy.key(regime, trial), order, trial) for order, trial in enumerate(trials))


def board(shards: int = 4) -> Board:
    return Board(shards=shards, workers=2, live=5)


@pytest.mark.parametrize(
    ("pinned", "live", "admitting", "queued", "regime"),
    [
        (True, 4, True, 0, Regime.ROTATION),
        (True, 4, False, 3, Regime.ROTATION),
        (False, 4, False, 0, Regime.LONGEST),
        (True, 5, True, 0, Regime.SHORTEST),
        (True, 5, False, 1, Regime.SHORTEST),
        (True, 5, False, 0, Regime.LONGEST),
    ],
)
def test_regimes(pinned: bool, live: int, admitting: bool, queued: int, regime: Regime) -> None:
    there = Board(shards=4, workers=4, live=live, admitting=admitting, queued=queued, pinned=pinned)
    assert AutoPolicy().regime(there) is regime


@pytest.mark.parametrize(("regime", "best"), [(Regime.LONGEST, 8.0), (Regime.SHORTEST, 1.0)])
def test_the_longest_or_the_shortest_goes_first(regime: Regime, best: float) -> None:
    trials = [candidate(time_left=time_left) for time_left in (4.0, 8.0, 1.0)]
    choice = AutoPolicy().choose(regime, board(), 0, 0b1111, ready(regime, *trials))
    assert choice is not None
    assert choice.trials[0].time_left == best


@pytest.mark.parametrize("regime", [Regime.LONGEST, Regime.SHORTEST])
def test_a_trial_of_unknown_cost_goes_first(regime: Regime) -> None:
    unknown = Candidate(0, left=0b1111, units_left=4)
    choice = AutoPolicy().choose(regime, board(), 0, 0b1111, ready(regime, candidate(time_left=5), unknown))
    assert choice is not None
    assert choice.trials == (unknown,)


def test_an_overdue_trial_goes_before_shorter_ones() -> None:
    late = candidate(time_left=50.0)
    late.overdue = True
    choice = AutoPolicy().choose(
        Regime.SHORTEST, board(), 0, 0b1111, ready(Regime.SHORTEST, candidate(time_left=1.0), late)
    )
    assert choice is not None
    assert choice.trials == (late,)


def test_among_equals_the_one_whose_state_is_here_wins() -> None:
    far, here, shorter = candidate(time_left=10.0), candidate(time_left=9.2, home=1), candidate(time_left=8.0, home=1)
    regime = Regime.LONGEST
    choice = AutoPolicy().choose(regime, board(), 1, 0b1111, ready(regime, far, shorter, here))
    assert choice is not None
    assert choice.trials == (here,)
    choice = AutoPolicy().choose(regime, board(), 1, 0b1111, ready(regime, far, shorter))
    assert choice is not None
    assert choice.trials == (far,)


def test_among_equals_the_trial_nearest_behind_the_shard_is_next() -> None:
    trials = [candidate(turn) for turn in range(4)]
    for shard in range(4):
        choice = best_of_equals(board(), 0, 1 << shard, ready(Regime.LONGEST, *trials), 0.9)
        assert choice == Choice((trials[shard],), shard)


def test_equals_are_equal_to_the_best_not_to_each_other() -> None:
    trials = [candidate(2, time_left=10.0), candidate(1, time_left=9.1), candidate(0, time_left=8.9)]
    choice = best_of_equals(board(), 0, 0b0001, ready(Regime.LONGEST, *trials), 0.9)
    assert choice == Choice((trials[1],), 0)


def test_a_trial_that_needs_nothing_of_a_worker_is_passed_over() -> None:
    regime = Regime.LONGEST
    long, short = candidate(left=0b0001, time_left=9.0), candidate(left=0b0010, time_left=1.0)
    choice = AutoPolicy().choose(regime, board(), 0, 0b0010, ready(regime, long, short))
    assert choice == Choice((short,), 1)
    assert AutoPolicy().choose(regime, board(), 0, 0b1000, ready(regime, long, short)) is None


def test_the_last_holder_of_the_longest_trials_epoch_waits_for_it() -> None:
    policy, there = AutoPolicy(), board()
    there.seat([0b0101, 0b1010])
    there.time_left = 10.0
    critical = candidate(left=0b1010, time_left=6.0)
    assert policy.keep(Regime.LONGEST, there, critical, 1) == 0b1000
    assert policy.keep(Regime.SHORTEST, there, critical, 1) == 0
    assert policy.keep(Regime.LONGEST, there, candidate(left=0b1010, time_left=4.0), 1) == 0  # ends before the others
    assert policy.keep(Regime.LONGEST, there, candidate(left=0b1110, time_left=6.0), 1) == 0  # two workers to go to
    assert policy.keep(Regime.LONGEST, there, candidate(left=0b0010, time_left=6.0), 1) == 0  # anywhere, next epoch
    there.kept = 0b1000
    others = ready(Regime.LONGEST, candidate(time_left=1.0))
    assert policy.choose(Regime.LONGEST, there, 1, 0b1010, others) is None
    assert policy.choose(Regime.LONGEST, there, 0, 0b0101, others) is not None


def test_the_ring_goes_from_worker_to_worker() -> None:
    assert ring_of([0b0011, 0b1100], 4) == [0, 2, 1, 3]
    assert ring_of([0b0001, 0b0010, 0b1100], 4) == [0, 1, 2, 3]


def test_rotation_waits_for_the_next_shard_on_the_ring() -> None:
    there = board()
    there.seat([0b0001, 0b0010, 0b0100, 0b1000])
    walker = candidate(left=0b1101, last=1)
    assert next_on_ring(there.ring, walker) == 2
    assert rotate(there, 0b1000, [(0.0, 0, walker)]) is None
    assert rotate(there, 0b0100, [(0.0, 0, walker)]) == Choice((walker,), 2)
    newcomer = candidate(turn=2, last=NO_SHARD)
    assert rotate(there, 0b1000, [(0.0, 0, newcomer), (0.0, 1, walker)]) == Choice((newcomer,), 3)
    assert rotate(there, 0b0100, [(0.0, 0, newcomer), (0.0, 1, walker)]) == Choice((walker,), 2)


def test_rotation_passes_over_shards_that_nobody_holds() -> None:
    there = board()
    there.seat([0b0001, 0b1000])
    assert next_on_ring(there.ring, candidate(left=0b1101, last=1)) == 0
    assert next_on_ring(there.ring, candidate(left=0b0110, last=3)) == NO_SHARD


@given(st.integers(1, 300), st.data())
def test_shard_behind_is_the_tie_rule(shards: int, data: st.DataObject) -> None:
    turn = data.draw(st.integers(0, shards - 1))
    mask = data.draw(st.integers(1, (1 << shards) - 1))
    held = [shard for shard in range(shards) if mask >> shard & 1]
    assert shard_behind(turn, mask) == min(held, key=lambda shard: (turn - shard) % shards)


@given(st.integers(1, 50), st.integers())
def test_seeded_turns_are_a_permutation(shards: int, seed: int) -> None:
    assert sorted(turns(shards, seed, shuffled=True)) == turns(shards, seed, shuffled=False) == list(range(shards))


def test_pinned_means_one_holder_per_shard() -> None:
    there = board()
    for held, pinned in [([0b0011, 0b1100], True), ([0b0111, 0b1100], False), ([0b1111], False), ([], False)]:
        there.seat(held)
        assert there.pinned is pinned


def test_random_takes_every_runnable_trial_equally_often() -> None:
    policy, trials = RandomPolicy(seed=1), [candidate(left=0b0110) for _ in range(4)]
    counts: dict[tuple[int, int], int] = {}
    for _ in range(4_000):
        queue = sorted((policy.key(Regime.RANDOM, trial), order, trial) for order, trial in enumerate(trials))
        choice = policy.choose(Regime.RANDOM, board(), 0, 0b0111, queue)
        assert choice is not None
        at = trials.index(choice.trials[0]), choice.shard
        counts[at] = counts.get(at, 0) + 1
    assert len(counts) == 8
    assert all(400 < count < 600 for count in counts.values())


def test_costs_are_learned_apart_from_the_pace_of_the_workers() -> None:
    random = Random(3)
    records = [TrialRecord(Trial(str(index), index, 100), 8, 0, 0.0) for index in range(6)]
    seats = [Seat(WorkerId(number)) for number in range(4)]
    costs, paces = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], [1.0, 1.0, 2.0, 0.5]
    for step in range(600):
        trial, worker = random.randrange(6), random.randrange(4)
        records[trial].units_done = 1 + step // 6
        learn(records[trial], seats[worker], costs[trial] * paces[worker] * random.uniform(0.95, 1.05))
    for index in range(6):
        assert records[index].unit_s / records[0].unit_s == pytest.approx(costs[index], rel=0.15)
    for number in range(4):
        assert seats[number].pace / seats[0].pace == pytest.approx(paces[number], rel=0.15)


def stream(placement: str, trials: int = 96) -> Outcome:
    everyone = [Trial(f"t{index}", index, 4) for index in range(trials)]
    cost = noisy(log_uniform_costs(everyone, 0), 0)
    return simulate(everyone, cost, shards=4, workers=4, placement=placement, live_trials=8, ahead=8)


@pytest.mark.parametrize("placement", ["pinned", "shared"])
def test_no_trial_of_a_long_stream_is_left_behind(placement: str) -> None:
    ends = stream(placement).ends
    ranks = {trial: rank for rank, trial in enumerate(sorted(ends, key=ends.__getitem__))}
    overtaken = [sum(ranks[f"t{later}"] < ranks[f"t{i}"] for later in range(i + 1, 96)) for i in range(96)]
    assert max(overtaken) <= 3 * 8
