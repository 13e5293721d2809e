"""Loader processes: kept from unit to unit, replaced when they die, and gone when their worker is."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.data import get_worker_info

from cerebro_tune import Cerebro, Decision, ShardedDataset
from map_datasets import (
    ROWS,
    Augmented,
    Killing,
    Printing,
    Processes,
)
from nets import Deep, Raising
from runs import Script, outcome


@pytest.fixture
def indexed(options: dict[str, Any]) -> dict[str, Any]:
    """A run on an augmented Dataset that repeats exactly."""
    return options | {
        "train": ShardedDataset.index(Augmented(), 4),
        "validation": Augmented(20),
        "policy": "fixed",
        "placement": "pinned",
    }


# What torch is at when a process dies is cut off by an exception out of its signal handler, in mid-socket even.
dying = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_processes_are_kept_between_units_and_gone_after(indexed: dict[str, Any]) -> None:
    with Cerebro(**indexed | {"backend": "local", "workers": 1}, loader={"num_workers": 1}) as cerebro:
        results = cerebro.fit(Processes, [{"lr": 0.1}, {"lr": 0.2}])
        found = {(report["children"], report["pids"]) for result in results for report in result.history}
        assert len(found) == 1, "others came in mid-run"
        assert found.pop()[0] == 2, "one for each set, there before the first unit"
        (worker,) = cerebro._workers.pids.values()  # type: ignore[union-attr]
        kept = psutil.Process(worker).children()
        failed = cerebro.fit(Raising, [{"lr": 0.1, "raise_in": (0, 1)}])
        assert failed[0].status == "failed"
        _, alive = psutil.wait_procs(kept + psutil.Process(worker).children(), timeout=5)
        assert alive == []


def test_a_killed_worker_takes_its_processes_with_it_at_once(indexed: dict[str, Any]) -> None:
    ended: list[bool] = []

    def kill(trial_id: str, report: Any) -> Decision:
        if not ended:
            victim = psutil.Process(next(iter(cerebro._workers.pids.values())))  # type: ignore[union-attr]
            children = victim.children()
            handles = [os.pidfd_open(child.pid) for child in children]
            victim.kill()
            ended.extend(bool(select.select([handle], [], [], 1)[0]) for handle in handles)
            for handle in handles:
                os.close(handle)
        return Decision.CONTINUE

    with Cerebro(**indexed | {"backend": "local"}, loader={"num_workers": 2}) as cerebro:
        run = cerebro.run(Deep, Script(kill), metric="val_loss")
        run.add({"lr": 0.03})
        run.end_search()
        disturbed = cerebro.drive(run)
        calm = cerebro.fit(Deep, [{"lr": 0.03}], metric="val_loss")
    assert ended == [True] * 4, "ended, that is, if not yet reaped by whoever inherits them"
    assert outcome(disturbed) == outcome(calm)


@dying
def test_a_process_that_is_killed_costs_its_unit_and_changes_no_bit(indexed: dict[str, Any], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    killing = indexed | {"train": ShardedDataset.index(Killing(marks, 1), 4), "backend": "local"}
    with Cerebro(**killing, loader={"num_workers": 1}) as cerebro:
        disturbed = cerebro.fit(Deep, [{"lr": 0.03}, {"lr": 0.1}], metric="val_loss")
        assert len(list(marks.iterdir())) == 1
        calm = cerebro.fit(Deep, [{"lr": 0.03}, {"lr": 0.1}], metric="val_loss")
    assert [result.error for result in disturbed] == [None, None]
    assert outcome(disturbed) == outcome(calm)


@dying
@pytest.mark.parametrize("backend", ["inline", "local"])
def test_a_process_killed_between_units_is_replaced(indexed: dict[str, Any], backend: str) -> None:
    killed: list[int] = []

    def kill(trial_id: str, report: Any) -> Decision:
        if len(killed) < 2:
            pids = [os.getpid()] if backend == "inline" else cerebro._workers.pids.values()  # type: ignore[union-attr]
            loaders = [child for pid in pids for child in psutil.Process(pid).children() if child.pid not in others]
            killed.append(loaders[0].pid)
            loaders[0].kill()
            if backend == "inline":
                os.waitid(os.P_PID, loaders[0].pid, os.WEXITED | os.WNOWAIT)  # its end is not ours to take notice of
            else:
                psutil.wait_procs(loaders[:1], timeout=2)
        return Decision.CONTINUE

    others = {child.pid for child in psutil.Process().children()}
    with Cerebro(**indexed | {"backend": backend, "max_failures": 0}, loader={"num_workers": 1}) as cerebro:
        run = cerebro.run(Deep, Script(kill), metric="val_loss")
        run.add({"lr": 0.03})
        run.end_search()
        disturbed = cerebro.drive(run)
        calm = cerebro.fit(Deep, [{"lr": 0.03}], metric="val_loss")
    assert len(killed) == 2
    assert disturbed[0].error is None
    assert outcome(disturbed) == outcome(calm)


@dying
def test_a_row_that_always_kills_its_process_fails_the_trial(indexed: dict[str, Any], tmp_path: Path) -> None:
    killing = indexed | {"train": ShardedDataset.index(Killing(tmp_path / "marks", 99), 4)}
    (tmp_path / "marks").mkdir()
    with Cerebro(**killing, loader={"num_workers": 1}) as cerebro:
        results = cerebro.fit(Deep, [{"lr": 0.03}, {"lr": 0.1}], metric="val_loss")
    for result in results:
        assert result.status == "failed"
        assert "LoaderError: A loader process of worker-" in str(result.error)
        assert f"when {result.trial_id} ran epoch 0, shard" in str(result.error)
        assert "SIGKILL" in str(result.error)
        assert 'loader={"num_workers": 0}' in str(result.error)
    assert len(list((tmp_path / "marks").iterdir())) == 4


def test_a_loader_that_times_out_fails_its_trial_only(indexed: dict[str, Any], tmp_path: Path) -> None:
    class Hanging(Augmented):
        def __getitem__(self, row: int) -> Any:
            if row == 17 and not (tmp_path / "hung").exists():
                (tmp_path / "hung").touch()
                signal.pause()
            return super().__getitem__(row)

    data = ShardedDataset.index(Hanging(), 4)
    with Cerebro(**indexed | {"train": data, "workers": 1}, loader={"num_workers": 1, "timeout": 1}) as cerebro:
        results = cerebro.fit(Deep, [{"lr": 0.03}, {"lr": 0.1}, {"lr": 0.2}], metric="val_loss")
        calm = cerebro.fit(Deep, [{"lr": 0.03}, {"lr": 0.1}, {"lr": 0.2}], metric="val_loss")
    failed = [result.trial_id for result in results if result.status == "failed"]
    assert len(failed) == 1
    for one, other in zip(results, calm, strict=True):
        if one.trial_id not in failed:
            assert [report["val_loss"] for report in one.history] == [report["val_loss"] for report in other.history]


def test_what_processes_print_disturbs_nothing(indexed: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    printing = indexed | {"train": ShardedDataset.index(Printing(), 4), "backend": "local", "epochs": 1}
    with Cerebro(**printing, loader={"num_workers": 2}) as cerebro:
        (result,) = cerebro.fit(Deep, [{"lr": 0.03}])
    assert result.error is None
    out = capfd.readouterr().out
    # Without the ends of lines, which two processes may write at once.
    assert set(map(int, re.findall(r"row (\d+) was read", out))) == set(range(ROWS))


ENDLESS = """
import time
from cerebro_tune import Cerebro
from map_datasets import Augmented, Processes

class Slow(Processes):
    def training_step(self, model, batch):
        time.sleep(0.02)
        return super().training_step(model, batch)

cerebro = Cerebro(Augmented(), epochs=1000, workers=2, run_dir={runs!r}, loader={{"num_workers": 1}})
cerebro.start()
print("pids", *cerebro._workers.pids.values(), flush=True)
cerebro.fit(Slow, [{{"lr": 0.1}}, {{"lr": 0.2}}])
"""


def test_a_killed_coordinator_takes_all_processes_with_it(tmp_path: Path) -> None:
    code = ENDLESS.format(runs=str(tmp_path / "runs"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()[1:]]
        assert "epoch 1" in process.stdout.readline()
        everything = [child for worker in workers for child in (worker, *worker.children())]
        assert len(everything) == 4
        process.kill()
        _, alive = psutil.wait_procs(everything, timeout=2)
    # Who inherits the dead may take a while to reap them.
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_worker_init_fn_that_raises_is_told_before_training(indexed: dict[str, Any]) -> None:
    def fail(number: int) -> None:
        raise RuntimeError(f"process {number} has no licence")

    with (
        Cerebro(**indexed, loader={"num_workers": 1, "worker_init_fn": fail}) as cerebro,
        pytest.raises(Exception, match="process 0 has no licence"),
    ):
        cerebro.fit(Deep, [{"lr": 0.03}])


MAIN = """
from collections import namedtuple
import torch
from torch.nn import functional as F
from cerebro_tune import Cerebro, TorchTrainable
from map_datasets import Plain

Point = namedtuple("Point", "x y")

class Points(Plain):
    def __getitem__(self, row):
        return Point(*super().__getitem__(row))

class Net(TorchTrainable):
    def build(self, config, plan):
        model = torch.nn.Linear(8, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def training_step(self, model, batch):
        return F.cross_entropy(model(batch.x), batch.y)

with Cerebro(Points(), workers=1, run_dir={runs!r}, progress=False, loader={{"num_workers": 1}}) as cerebro:
    print(cerebro.fit(Net)[0].error)
"""


def test_samples_of_a_type_of_the_script_arrive(tmp_path: Path) -> None:
    code = MAIN.format(runs=str(tmp_path / "runs"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60, check=True
    )
    assert done.stdout.strip() == "None", done.stderr


def test_a_batch_that_cannot_travel_is_told(indexed: dict[str, Any]) -> None:
    def with_a_lock(samples: list[Any]) -> Any:
        return [threading.Lock() for _ in samples]

    with Cerebro(**indexed, loader={"num_workers": 1, "collate_fn": with_a_lock}) as cerebro:
        (result,) = cerebro.fit(Deep, [{"lr": 0.03}])
    assert "trial-0000, epoch 0, shard" in str(result.error)
    assert "A batch cannot be sent from its loader process: TypeError" in str(result.error)


def test_a_worker_init_fn_finds_the_dataset_where_torch_has_it(indexed: dict[str, Any]) -> None:
    def look(number: int) -> None:
        info: Any = get_worker_info()
        if not isinstance(info.dataset, Augmented) or len(info.dataset) not in (ROWS, 20):
            raise TypeError(f"found {info.dataset!r}")

    with Cerebro(**indexed, loader={"num_workers": 1, "worker_init_fn": look}) as cerebro:
        (result,) = cerebro.fit(Deep, [{"lr": 0.03}])
    assert result.error is None


@dying
def test_a_process_that_dies_at_the_start_is_started_again(indexed: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def die_once(number: int) -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with Cerebro(**indexed, loader={"num_workers": 1, "worker_init_fn": die_once}) as cerebro:
        (result,) = cerebro.fit(Deep, [{"lr": 0.03}])
    assert mark.exists()
    assert result.error is None
