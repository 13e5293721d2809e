"""Runs under a virtual clock in which everything goes wrong end as they should, and one seed gives one journal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import pytest

import soak
from cerebro_tune import Results, ShardedDataset
from cerebro_tune.journal import read_journal
from cerebro_tune.reading import RunReading
from conftest import points
from simulation import EPOCHS, SHARDS, World, linked

SEEDS = 2000
SEEDS_TWICE = 100
"""Of which the journals are compared, row for row."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a place: deaths here lose nothing that a disk was to have."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return ShardedDataset.write(points(40), tmp_path_factory.mktemp("simulated") / "train", num_shards=SHARDS)


def simulated(seed: int, folder: Path, data: ShardedDataset, undisturbed: bool = False) -> tuple[World, Results]:
    folder.mkdir(parents=True)
    world = World(seed, folder, data, undisturbed)
    return world, world.run()


def chains(reading: RunReading, results: Results) -> dict[str, list[str]]:
    """What the state of each trial must be after each of its units, by the order of its visits alone."""
    found: dict[str, list[str]] = {}
    for index, result in enumerate(results):
        trial = reading.trials[result.trial_id]
        chain = [] if trial.source is None else found[trial.source][: trial.inherited]
        for epoch, shard, _ in result.visits:
            chain.append(linked(chain[-1] if chain else "", index, epoch, shard))
        found[trial.id] = chain
    return found


def check(world: World, results: Results) -> None:
    reading = RunReading(results.run_dir)
    expected, ended = chains(reading, results), {result.trial_id: result.status for result in results}
    for result in results:
        chain, visits = expected[result.trial_id], [visit[:2] for visit in result.visits]
        assert len(visits) == len(set(visits))
        assert len(chain) == EPOCHS * SHARDS or result.status != "finished"
        if result.last_checkpoint is not None and chain:
            assert result.last_checkpoint.read_text() == chain[-1]
    for what, trial, units, before in world.acknowledged:
        undone = (("resume", trial) in world.asked[before:]) if what == "pause" else what not in ("stop", "pause")
        assert undone or ended[trial] in (["stopped", "failed", "finished"] + ["paused"] * (what == "pause"))
        assert undone or len(expected[trial]) <= units + 1
    assert reading.verify() == []
    files = {path.relative_to(results.run_dir) for path in results.run_dir.rglob("*") if path.is_file()}
    trials = {Path(trial, f"{name}.txt") for trial in ended for name in ("best", "last")}
    states = {
        Path("states", trial.state) for trial in reading.trials.values() if trial.status == "paused" and trial.state
    }
    assert files - trials - states <= {Path("journal.sqlite"), Path("lock")}


@pytest.mark.timeout(1200)
def test_whatever_happens_a_run_ends_as_it_should(
    folder: Path, small: ShardedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    longer, deaths = soak.Loop(), 0
    for seed in takewhile(lambda seed: seed < SEEDS or longer, count()):
        try:
            world, results = simulated(seed, folder / "run", small)
            check(world, results)
            if seed % (SEEDS // SEEDS_TWICE) == 0:
                _, again = simulated(seed, folder / "again", small)
                assert rows(again) == rows(results)
            if world.repeats:
                _, undisturbed = simulated(seed, folder / "undisturbed", small, undisturbed=True)
                assert outcome(results) == outcome(undisturbed)
        except BaseException as error:
            error.add_note(f"in the simulation of seed {seed}")
            raise
        deaths += world.deaths
        for each in folder.iterdir():
            shutil.rmtree(each)
        capsys.readouterr()
    soak.tell(f"{seed + 1} runs simulated, with {deaths} deaths of their coordinators: every one ended as it should")


def rows(results: Results) -> list[str]:
    return [f"{row.kind} {row.body}" for row in read_journal(results.run_dir)]


def outcome(results: Results) -> list[object]:
    return [
        (result.status, result.visits, result.metrics["train_loss"] if result.metrics else None) for result in results
    ]


def test_a_seed_gives_one_journal_in_every_process(folder: Path, small: ShardedDataset) -> None:
    code = """
import sys
from pathlib import Path
from cerebro_tune import ShardedDataset
from test_simulation import rows, simulated

data = ShardedDataset.open(sys.argv[2])
for seed in range(20):
    print(rows(simulated(seed, Path(sys.argv[1], str(seed)), data)[1]))
"""
    told = []
    for number in ("1", "2"):
        command = [sys.executable, "-c", code, str(folder / number), str(small.path)]
        environment = os.environ | {"PYTHONHASHSEED": number, "PYTHONPATH": os.pathsep.join(sys.path)}
        told.append(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    assert told[0] == told[1]
    assert told[0].count(b"UnitFinished") > 100
