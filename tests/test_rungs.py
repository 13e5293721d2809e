"""Promotions against a direct transcription of the paper's algorithm."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from cerebro_tune.rungs import Rungs

Value = st.one_of(st.integers(0, 5).map(float), st.floats(allow_infinity=False), st.just(math.nan))


def get_job(rungs: list[list[tuple[int, float]]], promoted: list[set[int]], factor: int) -> int | None:
    """Algorithm 2 of Li et al., MLSys 2020, lines 11 to 20: rungs hold (trial, loss) in the order of arrival."""
    for k in reversed(range(len(rungs))):
        top_k = sorted((loss, i, trial) for i, (trial, loss) in enumerate(rungs[k]) if not math.isnan(loss))
        candidates = [trial for _, _, trial in top_k[: len(rungs[k]) // factor]]
        for trial in candidates:
            if trial not in promoted[k]:
                return trial
    return None


@given(
    st.lists(st.lists(Value, min_size=4, max_size=4), max_size=40), st.integers(2, 4), st.sampled_from(["min", "max"])
)
def test_promotions_are_those_of_the_paper(curves: list[list[float]], factor: int, mode: str) -> None:
    rungs = Rungs(1, factor, mode)
    theirs: list[list[tuple[int, float]]] = [[] for _ in range(4)]
    promoted: list[set[int]] = [set() for _ in range(4)]
    height = [0] * len(curves)

    def arrive(trial: int) -> None:
        rung = height[trial]
        assert rungs.is_due(str(trial), factor**rung)
        assert not rungs.is_due(str(trial), factor**rung - 1)
        rungs.record(str(trial), curves[trial][rung])
        theirs[rung].append((trial, curves[trial][rung] * (1 if mode == "min" else -1)))
        height[trial] += 1

    for new in range(len(curves)):
        arrive(new)
        while (chosen := get_job(theirs, promoted, factor)) is not None:
            assert rungs.promotable() == str(chosen)
            rungs.promote(str(chosen))
            promoted[height[chosen] - 1].add(chosen)
            if height[chosen] < 4:
                arrive(chosen)
        assert rungs.promotable() is None


def test_the_best_of_the_highest_rung_may_go_on_at_the_end() -> None:
    rungs = Rungs(2, 3, "max")
    for trial, value in (("a", 0.5), ("b", 0.9), ("c", math.nan)):
        rungs.record(trial, value)
    assert rungs.promotable() == "b"
    rungs.promote("b")
    assert rungs.promotable(least=1) is None
    rungs.record("b", 0.1)
    assert rungs.promotable() is None
    assert rungs.promotable(least=1) == "b"


def test_who_has_ended_is_not_promoted_but_counts() -> None:
    rungs = Rungs(1, 2, "min")
    rungs.record("a", 1.0)
    rungs.drop("a")
    rungs.record("b", 2.0)
    assert rungs.promotable() is None
    rungs.record("c", 1.5)
    rungs.record("d", 3.0)
    assert rungs.promotable() == "c"
    rungs.drop("never seen")
