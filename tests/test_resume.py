"""A run whose coordinator is killed goes on as if nothing had happened, and only as what it was."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import lightning_nets
import nets
import soak
from cerebro_tune import Cerebro, Decision
from cerebro_tune.configtext import config_text
from cerebro_tune.errors import ConfigurationError, NotPicklableError, RunBusyError
from cerebro_tune.journal import Journal, read_journal
from cerebro_tune.reading import RunReading
from cerebro_tune.recovery import MOVED, RELEASED, Replayed
from cerebro_tune.settings import TrainAll
from cerebro_tune.trainable import as_recipe
from cerebro_tune_lightning import LightningTrainable
from resumed_runs import CONFIGS, Mixed, die_at, fit, in_child, one_thread, started
from runs import outcome, weights

KILLS = 40
"""Of coordinators with processes, in all."""


@pytest.fixture(scope="module")
def undisturbed(sets: Path) -> Any:
    results = fit(sets / "undisturbed")
    assert [result.status for result in results] == ["finished", "stopped", "failed", "finished"]
    return results


def ended(results: Any) -> list[Any]:
    """What must be equal; a trial that failed leaves no weights."""
    return outcome([result for result in results if result.last_checkpoint])


def journal_of(folder: Path) -> Any:
    return read_journal(folder / "run-0000")


def units_once(folder: Path) -> None:
    rows = [row.body["event"]["unit"] for row in journal_of(folder) if row.kind in ("UnitFinished", "UnitFailed")]
    seen = [(unit["trial"], unit["epoch"], unit["shard"]) for unit in rows]
    assert len(seen) == len(set(seen))


def test_a_death_at_every_row_of_the_journal(sets: Path, undisturbed: Any) -> None:
    # How many rows there are is not the same each time: a state is not saved that is outrun by the next.
    for row in count(1):
        folder = sets / f"row-{row}"
        died = in_child(lambda row=row, folder=folder: (die_at(row, row % 2 == 0), fit(folder)))
        results = fit(folder)
        assert ended(results) == ended(undisturbed), f"after a death at row {row}"
        assert [result.status for result in results] == ["finished", "stopped", "failed", "finished"]
        assert "told to raise" in str(results[2].error)
        units_once(folder)
        left = {path.name for path in (folder / "run-0000").iterdir()}
        assert left == {"journal.sqlite", "lock", *(f"trial-{number:04d}" for number in range(4))}
        if died == 0:  # it had no such row
            break
        assert died == -9
    assert row > 80
    soak.tell(f"{row - 1} deaths, one at each row of a run's journal: each ended as the undisturbed run, bit for bit")


def test_further_deaths_in_the_middle_of_the_recovery(sets: Path, undisturbed: Any) -> None:
    rows, deaths, longer, chance = len(journal_of(sets / "undisturbed")), 0, soak.Loop(), random.Random(4)
    first = range(5, rows, 9)
    for number, row in enumerate(chain(first, iter(lambda: chance.randrange(rows), None))):
        if number >= len(first) and not longer:
            break
        folder = sets / f"again-{number}"
        for further in (row, row + 1, row + 4, row + 5):
            died = in_child(lambda row=further, folder=folder: (die_at(row, False), fit(folder)))
            assert died in (-9, 0)
            deaths += died == -9
        assert ended(fit(folder)) == ended(undisturbed)
        units_once(folder)
        shutil.rmtree(folder)
    soak.tell(f"{deaths} deaths within recoveries, none of which changed a bit")


@pytest.mark.timeout(1200)
def test_kills_at_random_moments_with_worker_processes(sets: Path, undisturbed: Any) -> None:
    chance, kills, runs, longer = random.Random(3), 0, 0, soak.Loop()
    rows = len(journal_of(sets / "undisturbed"))
    while kills < KILLS or longer:
        folder = sets / f"killed-{runs}"
        runs += 1
        goal = 0
        while goal < rows:
            goal += chance.randint(4, 20)
            kills += killed(folder, goal, workers=2, spare_workers=chance.random() < 0.5)
        assert ended(fit(folder)) == ended(undisturbed)
        units_once(folder)
    told = f"{kills} coordinators killed, half of them with all their processes, in {runs} runs"
    soak.tell(f"{told}: every one ended as the undisturbed one, bit for bit")


def test_it_goes_on_with_other_numbers_of_workers(sets: Path) -> None:
    folder = sets / "numbers"
    for goal, workers in ((15, 1), (40, 3), (60, 2)):
        assert killed(folder, goal, workers)
    results = fit(folder, workers=1)
    assert [result.status for result in results] == ["finished", "stopped", "failed", "finished"]
    units_once(folder)
    with one_thread(), Cerebro(
        sets / "train", sets / "validation", epochs=2, batch_size=16, workers=2, policy="fixed", progress=False
    ) as cerebro:  # fmt: skip
        for result in results:
            assert cerebro.replay(results.run_dir, Mixed, result.trial_id).differing == ()


def killed(folder: Path, rows: int, workers: int, spare_workers: bool = True) -> bool:
    """Kill a coordinator when its journal has so many rows, alone or with all its processes; false if it has ended."""
    pid = started(lambda: fit(folder, backend="local", workers=workers))
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and _count(folder) < rows:
        time.sleep(0.01)
    if ended == (0, 0):
        for child in [] if spare_workers else psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code in (0, -9)
    return code == -9


def _count(folder: Path) -> int:
    return len(journal_of(folder)) if (folder / "run-0000" / "journal.sqlite").exists() else 0


@pytest.mark.parametrize("row", [0, 1, 40])
def test_states_of_a_time_that_is_undone_are_cleared_away(sets: Path, undisturbed: Any, row: int) -> None:
    folder = sets / f"undone-{row}"
    assert in_child(lambda: (die_at(max(row, 1), not row), fit(folder))) == -9
    assert len(journal_of(folder)) == row
    states = folder / "run-0000" / "states"
    states.mkdir(exist_ok=True)
    for name in ("trial-0000-2.safetensors.6301c6d6.partial", "trial-0003-9.safetensors"):
        (states / name).write_bytes(b"cut")
    assert ended(fit(folder)) == ended(undisturbed)
    assert not states.exists()


@pytest.mark.parametrize("policy", ["auto", "random"])
def test_with_other_policies_every_unit_is_trained_once(sets: Path, policy: str) -> None:
    folder = sets / policy
    for row in (12, 30, 55, 70):
        in_child(lambda row=row: (die_at(row, False), fit(folder, policy=policy)))
    results = fit(folder, policy=policy)
    assert [result.status for result in results] == ["finished", "stopped", "failed", "finished"]
    units_once(folder)
    visits = [(epoch, shard) for epoch, shard, _ in results[0].visits]
    assert sorted(visits) == [(epoch, shard) for epoch in range(2) for shard in range(4)]


def test_a_finished_run_gives_its_results_and_trains_nothing(sets: Path, undisturbed: Any) -> None:
    folder = sets / "undisturbed"
    before = journal_of(folder)
    again = fit(folder)
    assert outcome_with_times(again) == outcome_with_times(undisturbed)
    assert journal_of(folder) == before
    assert again[0].checkpoint == undisturbed[0].checkpoint


def outcome_with_times(results: Any) -> Any:
    return [(result.status, result.history, result.metrics, result.seconds, result.visits) for result in results]


def searched(folder: Path, tuner: Any, trainable: Any = nets.Deep, **options: Any) -> Any:
    """A run of one config by a tuner, which is made for its executor."""
    with one_thread(), Cerebro(
        folder.parent / "train", epochs=2, workers=1, policy="fixed", backend="inline", progress=False, run_dir=folder,
        **options,
    ) as cerebro:  # fmt: skip
        run = cerebro.run(trainable, tuner(cerebro), given=[{"lr": 0.1}])
        if not run.taken_up:
            run.add({"lr": 0.1})
        run.end_search()
        return cerebro.search(run)


def test_a_wish_that_was_acknowledged_outlives_the_death_that_follows(sets: Path) -> None:
    class Stopper(TrainAll):
        def __init__(self, cerebro: Cerebro, dies: bool = True) -> None:
            self.cerebro, self.dies = cerebro, dies

        def on_report(self, trial_id: str, report: Any) -> Decision:
            if report["units"] == 2 and self.dies and self.cerebro.current is not None:
                self.cerebro.current.stop(trial_id)
                os.kill(os.getpid(), signal.SIGKILL)
            return Decision.CONTINUE

    folder = sets / "wished"
    assert in_child(lambda: searched(folder, Stopper)) == -9
    (result,) = searched(folder, lambda cerebro: Stopper(cerebro, dies=False))
    assert (result.status, len(result.visits)) == ("stopped", 2)


def test_states_that_are_damaged_are_never_trained_on(sets: Path, undisturbed: Any, capsys: Any) -> None:
    folder = sets / "damaged"
    assert in_child(lambda: (die_at(60, False), fit(folder))) == -9
    states = sorted((folder / "run-0000" / "states").glob("*.safetensors"))
    assert states
    for path in states:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with one_thread(), Cerebro(
        sets / "train", sets / "validation", batch_size=16, epochs=2, workers=2, policy="fixed", durable_every=3,
        backend="inline", run_dir=folder,
    ) as cerebro:  # fmt: skip
        results = cerebro.fit(Mixed, CONFIGS, metric="val_loss")
    assert ended(results) == ended(undisturbed)
    assert "is trained again from its beginning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 3}, "epochs was 2 and is 3"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"report_every": "epoch"}, "report_every was 'unit' and is 'epoch'"),
        ({"policy": "auto"}, "policy was 'fixed' and is 'auto'"),
    ],
)
def test_it_is_taken_up_only_as_what_it_was(sets: Path, undisturbed: Any, options: Any, told: str) -> None:
    before = journal_of(sets / "undisturbed")
    with pytest.raises(ConfigurationError, match=told) as refused:
        fit(sets / "undisturbed", **options)
    assert "resume='never'" in str(refused.value)
    assert journal_of(sets / "undisturbed") == before


@pytest.mark.parametrize(
    ("kind", "configs", "validation", "told"),
    [
        (
            Mixed,
            [CONFIGS[0], {"lr": 3}, *CONFIGS[2:]],
            "validation",
            r'configs\[1\] was {.*"stop_at": 5} and is {"lr": 3}',
        ),
        (Mixed, [*CONFIGS, {"lr": 3}], "validation", "configs was 4 and is 5"),
        (nets.Deep, CONFIGS, "validation", "trainable was 'Mixed' and is 'Deep'\n  source was"),
        (Mixed, CONFIGS, "train", "validation was"),
    ],
)
def test_other_configs_data_and_sources_are_refused(
    sets: Path, undisturbed: Any, kind: Any, configs: Any, validation: str, told: str
) -> None:
    with (
        Cerebro(
            sets / "train", sets / validation, batch_size=16, epochs=2, workers=2, policy="fixed", backend="inline",
            progress=False, run_dir=sets / "undisturbed",
        ) as cerebro,
        pytest.raises(ConfigurationError, match=told),
    ):  # fmt: skip
        cerebro.fit(kind, configs, metric="val_loss")


def test_never_begins_a_run_beside_it_and_must_does_not_begin_one(sets: Path, undisturbed: Any) -> None:
    results = fit(sets / "undisturbed", resume="never", epochs=1)
    assert results.run_dir.name == "run-0001"
    with pytest.raises(ConfigurationError, match="there is no run in"):
        fit(sets / "nowhere", resume="must")
    with (
        Cerebro(sets / "train", backend="inline", resume="must", progress=False) as cerebro,
        pytest.raises(ConfigurationError, match="needs the run_dir"),
    ):
        cerebro.fit(nets.Deep, [{"lr": 0.1}])


def test_on_another_machine_it_goes_on_and_says_so(
    sets: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sets / "moved"
    assert in_child(lambda: (die_at(50, False), fit(folder))) == -9
    monkeypatch.setattr("cerebro_tune.manifest.instruction_set", lambda: "another")
    with pytest.warns(UserWarning, match="not comparable bit for bit.*instructions was .* and is 'another'"):
        results = fit(folder)
    assert [result.status for result in results] == ["finished", "stopped", "failed", "finished"]
    assert [row.kind for row in journal_of(folder)].count(MOVED) == 1


def test_a_trial_trained_again_alone_gives_the_same_states(sets: Path, undisturbed: Any) -> None:
    given: Any = {"epochs": 2, "batch_size": 16, "workers": 1, "policy": "fixed", "progress": False}
    with one_thread(), Cerebro(sets / "train", sets / "validation", **given) as cerebro:  # in a process of its own
        for result in undisturbed:
            replayed = cerebro.replay(undisturbed.run_dir, Mixed, result.trial_id)
            assert replayed == Replayed(result.trial_id, len(result.visits), ())
        with pytest.raises(ConfigurationError, match="trainable was 'Mixed' and is 'Deep'"):
            cerebro.replay(undisturbed.run_dir, nets.Deep, "trial-0000")
        with pytest.raises(ConfigurationError, match="There is no trial 'trial-9'"):
            cerebro.replay(undisturbed.run_dir, Mixed, "trial-9")


def test_what_is_no_function_of_its_seeds_is_found_out(sets: Path) -> None:
    class Wobbly(nets.Deep):
        def training_step(self, model: Any, batch: Any) -> Any:
            return super().training_step(model, batch) * (1 + os.getpid() * 1e-4)  # a child has another

    folder = sets / "wobbly"
    go_on = partial(searched, folder, lambda _: TrainAll(), Wobbly, durable_every=99)
    assert in_child(lambda: (die_at(18, False), go_on())) == -9
    (result,) = go_on()
    assert (result.status, len(result.visits)) == ("finished", 8)
    with one_thread(), Cerebro(
        sets / "train", epochs=2, workers=1, policy="fixed", backend="inline", progress=False
    ) as cerebro:  # fmt: skip
        replayed = cerebro.replay(folder / "run-0000", Wobbly, "trial-0000")
    assert replayed.differing[0] == result.visits[0][:2]


def test_a_paused_trial_stands_where_it_stood_in_the_next_call(sets: Path) -> None:
    class Pausing(TrainAll):
        def on_report(self, trial_id: str, report: Any) -> Decision:
            return Decision.PAUSE if report["units"] == 5 else Decision.CONTINUE

    folder = sets / "paused"
    first, second, third = (searched(folder, lambda _: Pausing(), durable_every=2) for _ in range(3))
    assert [(result.status, len(result.visits)) for result in first] == [("paused", 5)]
    assert outcome(first) == outcome(second) == outcome(third)
    assert RunReading(folder / "run-0000").verify() == []


def test_a_run_that_never_began_is_in_nobodys_way(sets: Path) -> None:
    def run(kind: Any) -> Any:
        with Cerebro(
            sets / "train", epochs=1, workers=1, backend="inline", progress=False, run_dir=sets / "never"
        ) as cerebro:  # fmt: skip
            return cerebro.fit(kind, [{"lr": 0.1}])

    class Unpicklable(nets.Deep):
        lock = threading.Lock()

    with pytest.raises(NotPicklableError):
        run(Unpicklable)
    assert list((sets / "never").iterdir()) == []
    (sets / "never" / "run-0000").mkdir()
    assert run(nets.Deep).run_dir.name == "run-0000"


@dataclass
class Choice:
    """What a user may have in a config."""

    lr: float


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": Choice(1.0)}, {"x": Choice(2.0)}),
        ({"x": torch.zeros(1000)}, {"x": torch.ones(1000)}),
        ({"x": np.float32}, {"x": np.float64}),
        ({"x": {0: 1, "y": (2, 3)}}, {"x": {0: 1, "y": (2, 4)}}),
        ({"x": {(1, 2): Path("a")}}, {"x": {(1, 2): Path("b")}}),
        ({"x": {"a", "b"}}, {"x": {"a", "c"}}),
        ({"x": np.float32(0.5)}, {"x": 0.25}),
        ({"x": nn.ReLU}, {"x": nn.Tanh}),
    ],
)
def test_configs_that_differ_are_told_apart(one: Any, other: Any) -> None:
    texts = [config_text(one), config_text(other)]
    assert texts[0] != texts[1]
    assert texts[0] == config_text(pickle.loads(pickle.dumps(one)))
    assert max(map(len, texts)) < 200


def test_modules_that_differ_are_told_apart() -> None:
    class Wide(lightning_nets.Momentum):
        pass

    def told(module: Any, **kwargs: Any) -> str:
        return as_recipe(LightningTrainable(module, trainer_kwargs=kwargs) if kwargs else module).identity

    torch.manual_seed(1)
    one, other = lightning_nets.Momentum(width=8), lightning_nets.Momentum(width=8)
    assert told(one) == told(pickle.loads(pickle.dumps(one)))
    apart = [told(one), told(other), told(Wide), told(lightning_nets.Momentum), told(Wide, gradient_clip_val=1.0)]
    assert len(set(apart)) == len(apart)


def test_two_coordinators_do_not_share_a_run(sets: Path, undisturbed: Any) -> None:
    journal = Journal(sets / "undisturbed" / "run-0000")
    try:
        with pytest.raises(RunBusyError, match=r"in the hands of process \d+ on "):
            fit(sets / "undisturbed")
    finally:
        journal.close()
    assert outcome_with_times(fit(sets / "undisturbed")) == outcome_with_times(undisturbed)


def test_each_run_of_an_executor_is_taken_up_in_its_turn(sets: Path) -> None:
    def two_runs() -> list[Any]:
        with Cerebro(
            sets / "train", epochs=1, workers=1, policy="fixed", backend="inline", progress=False,
            run_dir=sets / "two",
        ) as cerebro:  # fmt: skip
            return [cerebro.fit(nets.Deep, [{"lr": lr}]) for lr in (0.1, 0.2)]

    first, second = two_runs(), two_runs()
    assert [results.run_dir.name for results in first] == ["run-0000", "run-0001"]
    assert [weights(results[0]) for results in first] == [weights(results[0]) for results in second]
    assert [row.kind for row in read_journal(second[1].run_dir)].count(RELEASED) == 1


def test_a_clone_goes_on_as_well(sets: Path) -> None:
    class Cloner(TrainAll):
        def __init__(self, cerebro: Cerebro) -> None:
            self.cerebro = cerebro

        def on_report(self, trial_id: str, report: Any) -> Decision:
            run = self.cerebro.current
            if report["units"] == 3 and run is not None and len(run.unended) == 1:  # it is asked again after a death
                run.clone(trial_id, {"lr": 0.5})
            return Decision.CONTINUE

    whole = searched(sets / "clone-whole", Cloner, durable_every=5)
    assert [len(result.visits) for result in whole] == [8, 5]
    rows = journal_of(sets / "clone-whole")
    cloned = next(row.number for row in rows if row.kind == "TrialCloned")
    for row in (*range(cloned, cloned + 5), *range(cloned + 5, len(rows), 3)):
        folder = sets / f"clone-{row}"
        assert (
            in_child(lambda row=row, folder=folder: (die_at(row, False), searched(folder, Cloner, durable_every=5)))
            == -9
        )
        assert outcome(searched(folder, Cloner, durable_every=5)) == outcome(whole)
