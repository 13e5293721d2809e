"""Workers on a Ray cluster: the contract, equal bits, nodes that go and come, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cerebro_tune import Cerebro, Decision, ShardedDataset, TrialResult
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import ConfigurationError, DataError
from cerebro_tune.settings import Report
from cerebro_tune.testing import WorkersContract
from cerebro_tune.workers.base import Workers
from cerebro_tune_ray.copies import Copies
from cerebro_tune_ray.workers import RayWorkers
from nets import Deep, Linear, Unhurried
from runs import CONFIGS, outcome

pytestmark = pytest.mark.usefixtures("ray_cluster")

ON_ITS_OWN = {"CPU": 1, "apart": 1}
"""Of a worker that is to have a node for itself: only nodes that the tests here add are such."""


class TestRay(WorkersContract):
    kill = True

    def make(self, count: int) -> Workers:
        return RayWorkers(("cpu",) * count, threads=1)

    def test_the_worker_that_had_it_last_goes_on_from_its_own_copy(self, tmp_path: Path) -> None:
        """What the coordinator has of the state does not matter there; elsewhere it does."""
        with self._started(2, tmp_path) as coordinator:
            first, second = coordinator.workers.ids
            coordinator.run(first, 0, {})
            committed, used, _ = coordinator.store.buffers("trial")
            assert committed is not None
            memory = Mapped.open(committed).memory
            kept = bytes(memory[:used])
            memory[:used] = bytes(used)
            finished = coordinator.run(first, 1, {})
            assert finished.metrics["train_loss"] == coordinator.sum_of(0, 1)
            memory[:used] = kept
            assert coordinator.run(second, 2, {}).metrics["train_loss"] == coordinator.sum_of(0, 1, 2)
            assert coordinator.run(first, 3, {}).metrics["train_loss"] == coordinator.sum_of(0, 1, 2, 3)


def test_copies_give_way_to_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cerebro_tune_ray.copies._KEPT_BYTES", 10)
    copies = Copies()
    for trial in "abc":
        copies.add(trial, f"digest of {trial}", 5)
    assert all(copies.has(trial, f"digest of {trial}") for trial in "abc")
    assert not copies.has("a", "another digest")
    copies.add("b", "newer", 5)
    copies.add("d", "huge", 99)
    assert copies.take_stale() == ("a",)
    assert copies.take_stale() == ()
    copies.add("e", "small", 1)
    assert set(copies.take_stale()) == {"b", "c", "d"}
    assert copies.has("e", "small")


def test_equal_bits_on_ray_and_inline(options: dict[str, Any]) -> None:
    fixed = options | {"policy": "fixed", "placement": "pinned"}
    with Cerebro(**fixed) as inline:
        expected = inline.fit(Deep, CONFIGS, metric="val_loss")
    with Cerebro(**fixed | {"backend": "ray"}) as cerebro:
        found = cerebro.fit(Deep, CONFIGS, metric="val_loss")
        again = cerebro.fit(Deep, CONFIGS, metric="val_loss")
    assert outcome(found) == outcome(again) == outcome(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.checkpoint is not None
        assert theirs.checkpoint is not None
        assert ours.checkpoint.read_bytes() == theirs.checkpoint.read_bytes()


@pytest.fixture
def nodes(ray_cluster: Any) -> Iterator[Callable[[], Any]]:
    """Adds nodes with one CPU, which are gone when the test has ended."""
    added = []

    def add() -> Any:
        added.append(ray_cluster.add_node(num_cpus=1, resources={"apart": 1}))
        return added[-1]

    yield add
    for node in added:
        if node in ray_cluster.worker_nodes:
            ray_cluster.remove_node(node)


class Meddler:
    """A tuner that lets everything go on, and does something after so many reports."""

    def __init__(self, acts: dict[int, Callable[[], object]]) -> None:
        self._acts, self._reports = acts, 0

    def on_report(self, trial_id: str, report: Report) -> Decision:
        self._reports += 1
        if act := self._acts.get(self._reports):
            act()
        return Decision.CONTINUE

    def on_end(self, result: TrialResult) -> None:
        return


def trained(cerebro: Cerebro, trainable: type[Deep], acts: dict[int, Callable[[], object]]) -> Any:
    run = cerebro.run(trainable, Meddler(acts), metric="val_loss")
    for config in CONFIGS:
        run.add(config)
    run.end_search()
    return cerebro.drive(run)


def places(results: Any) -> list[Any]:
    return [[(epoch, shard) for epoch, shard, _ in result.visits] for result in results]


def numbers(results: Any) -> list[Any]:
    """The reports, without times, and without who made them."""
    apart = ("unit_time_s", "hop_time_s", "validation_time_s", "worker")
    return [[{k: v for k, v in report.items() if k not in apart} for report in result.history] for result in results]


def weights(results: Any) -> list[bytes]:
    return [result.last_checkpoint.read_bytes() for result in results]


def test_a_node_goes_and_a_node_comes(
    options: dict[str, Any],
    ray_cluster: Any,
    nodes: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of runs, the second of which begins without one of its workers: no bit differs."""
    fixed = options | {"policy": "fixed", "epochs": 4}
    with Cerebro(**fixed | {"placement": "pinned"}) as inline:
        expected = inline.fit(Deep, CONFIGS, metric="val_loss")
    _, doomed = nodes(), nodes()
    late = "cerebro_tune_ray.workers._LATE_S"

    def lose_it() -> None:
        monkeypatch.setattr(late, 1.0)
        ray_cluster.remove_node(doomed, allow_graceful=False)

    def bring_another() -> None:
        monkeypatch.setattr(late, 60.0)
        nodes()

    with Cerebro(**fixed | {"backend": "ray", "resources_per_worker": ON_ITS_OWN}) as cerebro:
        first = trained(cerebro, Unhurried, {7: lose_it})
        told = capsys.readouterr().err
        assert "is lost: The actor died because its node has died" in told
        assert "is not up: no node has had {'CPU': 1.0, 'apart': 1.0} for it in 1 s. The others do its part" in told
        second = trained(cerebro, Deep, {5: bring_another})
        third = trained(cerebro, Deep, {})
    for results in (first, second, third):
        assert places(results) == places(expected)
        assert numbers(results) == numbers(expected)
        assert weights(results) == weights(expected)
    assert {worker for result in third for *_, worker in result.visits} == {"worker-0", "worker-1"}
