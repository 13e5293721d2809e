"""Workers on a Ray cluster: the contract, equal bits, nodes that go and come, and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cerebro_tune import Cerebro, Decision, ShardedDataset, TrialResult
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import ConfigurationError, DataError
from cerebro_tune.settings import Report
from cerebro_tune.testing import WorkersContract
from cerebro_tune.workers.base import Workers
from cerebro_tune_ray import tune
from cerebro_tune_ray.copies import Copies
from cerebro_tune_ray.workers import RayWorkers
from lightning_nets import Busy
from nets import Deep, Linear, Unhurried
from runs import CONFIGS, outcome
from trees import same

pytestmark = pytest.mark.usefixtures("ray_session")

ON_ITS_OWN = {"CPU": 1, "apart": 1}
"""Of a worker that is to have a node for itself: only nodes that the tests here add are such."""


LATE = "cerebro_tune_ray.workers._LATE_S"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a worker takes its time, and who does what is part of what these tests compare."""
    monkeypatch.setattr(LATE, 100.0)


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
def nodes(ray_session: Any) -> Iterator[Callable[[], Any]]:
    """Adds nodes with one CPU, which are gone when the test has ended."""
    added = []

    def add() -> Any:
        added.append(ray_session.add_node(num_cpus=1, resources={"apart": 1}))
        return added[-1]

    yield add
    for node in added:
        if node in ray_session.worker_nodes:
            ray_session.remove_node(node)


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
    ray_session: Any,
    nodes: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of runs, the second of which begins without one of its workers: no bit differs."""
    fixed = options | {"policy": "fixed", "epochs": 4}
    with Cerebro(**fixed | {"placement": "pinned"}) as inline:
        expected = inline.fit(Deep, CONFIGS, metric="val_loss")
    _, doomed = nodes(), nodes()

    def lose_it() -> None:
        monkeypatch.setattr(LATE, 1.0)
        ray_session.remove_node(doomed, allow_graceful=False)

    def bring_another() -> None:
        monkeypatch.setattr(LATE, 100.0)
        nodes()

    with Cerebro(**fixed | {"backend": "ray", "resources_per_worker": ON_ITS_OWN}) as cerebro:
        first = trained(cerebro, Unhurried, {7: lose_it})
        told = capsys.readouterr().err
        assert "is lost: The actor died because its node has died" in told
        assert "is not up: no node has {'CPU': 1.0, 'apart': 1.0} for it, for 1 s now. The others do its part" in told
        second = trained(cerebro, Deep, {5: bring_another})
        third = trained(cerebro, Deep, {})
    for results in (first, second, third):
        assert places(results) == places(expected)
        assert numbers(results) == numbers(expected)
        assert weights(results) == weights(expected)
    assert {worker for result in third for *_, worker in result.visits} == {"worker-0", "worker-1"}


def test_lightning_on_ray_and_inline(options: dict[str, Any]) -> None:
    with Cerebro(**options | {"policy": "fixed"}) as inline:
        expected = inline.fit(Busy, CONFIGS[:2], metric="val_loss")
    with Cerebro(**options | {"policy": "fixed", "backend": "ray"}) as cerebro:
        found = cerebro.fit(Busy, CONFIGS[:2], metric="val_loss")
    assert [result.status for result in found] == ["finished", "finished"], found[0].error
    assert (places(found), numbers(found)) == (places(expected), numbers(expected))
    for ours, theirs in zip(found, expected, strict=True):
        for mine, its in ((ours.checkpoint, theirs.checkpoint), (ours.last_checkpoint, theirs.last_checkpoint)):
            assert same(torch.load(str(mine), weights_only=True), torch.load(str(its), weights_only=True))


def test_each_worker_fetches_its_shards_from_a_uri(options: dict[str, Any], tmp_path: Path) -> None:
    there = Path(options["train"].path)
    remote = ShardedDataset.open(there.as_uri(), cache_dir=tmp_path / "cache")
    with Cerebro(**options | {"train": remote, "backend": "ray", "placement": "pinned"}) as cerebro:
        results = cerebro.fit(Linear, CONFIGS, metric="val_loss")
    assert [result.status for result in results] == ["finished"] * 3
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*.arrow")}
    assert fetched == {path.name: path.read_bytes() for path in there.glob("*.arrow")}


def test_data_that_a_node_does_not_have_is_told_with_the_node(options: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(options["train"].path, tmp_path / "here only")
    with Cerebro(**options | {"train": tmp_path / "here only", "backend": "ray"}) as cerebro:
        shutil.rmtree(tmp_path / "here only")
        with pytest.raises(DataError, match="here only") as caught:
            cerebro.fit(Linear, CONFIGS)
    assert f"is on the node {socket.gethostname()}" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resources_per_worker": {"CPU": 1}, "backend": "local"}, 'only backend="ray" takes it'),
        ({"resources_per_worker": {"CPU": "all"}}, "resources_per_worker has 'CPU': 'all'"),
        ({"resources_per_worker": {"CPU": 0}}, "asks for nothing"),
        ({"devices": "cuda"}, "devices='cuda', workers_per_device=1: with backend=\"ray\" the resources say"),
        ({"workers_per_device": 2}, "workers_per_device=2"),
        ({"workers": 99}, r"99 workers of \{'CPU': 1.0\} each .* has room for 4: CPU 4 on 1 node"),
        ({"workers": 1, "resources_per_worker": {"TPU": 1}}, r"has room for 0: CPU 4"),
    ],
)
def test_what_cannot_be_had_is_told_at_once(options: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cerebro(**options | {"backend": "ray"} | changed).start()


def test_as_many_workers_as_there_is_room_for(options: dict[str, Any]) -> None:
    asked = {"workers": None, "backend": "ray"}
    assert Cerebro(**options | asked).devices == ("cpu",) * 4
    assert Cerebro(**options | asked | {"resources_per_worker": {"CPU": 0.5}}).devices == ("cpu",) * 8


SCRIPT = """
import nets, ray
from cerebro_tune import Cerebro

cerebro = Cerebro({train!r}, epochs=1000, workers=1, backend="ray", run_dir={runs!r})
results = cerebro.fit(nets.Unhurried, [{{"lr": 0.1}}, {{"lr": 0.2}}], metric="train_loss")
print("statuses", [result.status for result in results], [bool(result.last_checkpoint) for result in results])
cerebro.close()
print("Ray runs:", ray.is_initialized())
"""


@contextmanager
def endless(address: str, train: ShardedDataset, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A search that would go on for hours, its units begun, on the Ray at this address ("local": its own)."""
    script = SCRIPT.format(train=str(train.path), runs=str(tmp_path / "runs"))
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent, env=os.environ | {"RAY_ADDRESS": address},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert any("epoch 1" in line for line in process.stdout)
        yield process
        process.kill()


def test_ctrl_c_ends_with_the_results_so_far_and_ends_its_own_ray(train: ShardedDataset, tmp_path: Path) -> None:
    with endless("local", train, tmp_path) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "statuses ['stopped', 'stopped'] [True, True]" in out
    assert "Ray runs: False" in out
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_a_killed_driver_leaves_nothing_on_the_cluster(ray_session: Any, train: ShardedDataset, tmp_path: Path) -> None:
    with endless(ray_session.address, train, tmp_path) as process:
        children = psutil.Process().children(recursive=True)
        workers = [child for child in children if "cerebro_tune.workers.child" in " ".join(child.cmdline())]
        assert len(workers) == 1
        process.kill()
        assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_ray_tune_on_workers_of_the_same_ray(options: dict[str, Any], tmp_path: Path) -> None:
    """A search of Ray Tune, whose driver it is that trains nothing."""
    asked = {"metric": "val_loss", "mode": "min", "verbose": 0, "storage_path": str(tmp_path / "ray")}
    rates = [config["lr"] for config in CONFIGS]
    with Cerebro(**options | {"backend": "ray"}) as cerebro:
        analysis = tune.run(Deep, config={"lr": tune.grid_search(rates)}, executor=cerebro, **asked)
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 3
    assert [trial.last_result["units"] for trial in analysis.trials] == [8] * 3
    assert {trial.last_result["worker"] for trial in analysis.trials} <= {"worker-0", "worker-1"}
