"""Studies in storages that outlive a process, that several processes share, and that are watched."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from cerebro_tune import Cerebro
from cerebro_tune.reading import RunReading
from cerebro_tune_optuna import optimize, pruners
from nets import Linear
from optuna_studies import COMPLETE, FAIL, PRUNED, RUNNING, a_study, linear, one_slow, states

pytestmark = [
    pytest.mark.usefixtures("quiet_optuna"),
    pytest.mark.filterwarnings("ignore:.*is experimental"),
]
TESTS = Path(__file__).parent

CHILD = """
import json, os, signal, sys, time
import optuna
sys.path.insert(0, {tests!r})
from cerebro_tune import Cerebro
from cerebro_tune.exporter import Exporter
from cerebro_tune.journal import Journal
from cerebro_tune_optuna import optimize, pruners
from optuna_studies import linear, one_slow
from test_optuna_storage import storage_of

options, kind, place, n_trials, kill_after, company = json.loads(sys.argv[1])

if kill_after == "export":
    Exporter.begin = lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL)

append = Journal.append

def die_early(self, kind, **body):
    append(self, kind, **body)
    if kind == "UnitFinished" and body["event"]["unit"]["trial"] == "trial-0001":
        os.kill(os.getpid(), signal.SIGKILL)

if kill_after == "early":
    Journal.append = die_early

def maybe_die(study, trial):
    if trial.number == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

sampler, pruner = optuna.samplers.RandomSampler(), pruners.MedianPruner(n_startup_trials=3)
study = optuna.load_study(study_name="s", storage=storage_of(kind, place), sampler=sampler, pruner=pruner)
study.set_user_attr(str(os.getpid()), "is here")
while len(study.user_attrs) < company:
    time.sleep(0.05)
with Cerebro(**options) as cerebro:
    objective = one_slow if kill_after == "early" else linear
    optimize(study, objective, n_trials, executor=cerebro, metric="val_loss", callbacks=[maybe_die])
"""


def storage_of(kind: str, folder: str | Path) -> Any:
    if kind == "SQLite":
        return f"sqlite:///{folder}/study.db"
    if kind == "JournalFile":
        return optuna.storages.JournalStorage(JournalFileBackend(f"{folder}/study.log"))
    return optuna.storages.InMemoryStorage()


def child(
    options: dict[str, Any], kind: str, folder: Path, n_trials: int, kill_after: int | str = -1, company: int = 1
) -> Any:
    """A process that optimizes the study "s", once so many are there."""
    paths = {name: str(options[name].path) for name in ("train", "validation")}
    given = [options | paths | {"run_dir": str(options["run_dir"])}, kind, str(folder), n_trials, kill_after, company]
    program = CHILD.format(tests=str(TESTS))
    return subprocess.Popen([sys.executable, "-c", program, json.dumps(given)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["SQLite", "JournalFile"])
def test_a_storage_holds_what_one_in_memory_does(options: dict[str, Any], tmp_path: Path, kind: str) -> None:
    outcomes = []
    for storage in (storage_of("InMemory", tmp_path), storage_of(kind, tmp_path)):
        study = a_study(pruner=pruners.MedianPruner(n_startup_trials=3), storage=storage)
        with Cerebro(**options | {"policy": "fixed"}) as cerebro:
            optimize(study, linear, 8, executor=cerebro, metric="val_loss")
        outcomes.append([(t.state, t.values, t.params, t.intermediate_values) for t in study.trials])
    assert outcomes[0] == outcomes[1]
    assert PRUNED in {state for state, *_ in outcomes[0]}


def left_running(options: dict[str, Any], kind: str, folder: Path) -> tuple[Any, list[int], int]:
    """A study whose process was killed, the numbers of the trials that it left running, and its pid."""
    study = a_study(study_name="s", storage=storage_of(kind, folder))
    killed = child(options, kind, folder, n_trials=20, kill_after=5)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    running = [trial.number for trial in study.trials if trial.state is RUNNING]
    assert len(running) >= 2, "those in flight"
    return study, running, killed.pid


@pytest.mark.parametrize("kind", ["SQLite", "JournalFile"])
def test_what_a_killed_process_left_running_goes_on(options: dict[str, Any], tmp_path: Path, kind: str) -> None:
    options |= {"resume": "auto", "durable_every": 3}
    study, running, _ = left_running(options, kind, tmp_path)
    before = {trial.number: trial for trial in study.trials}
    assert any(before[number].intermediate_values for number in running)
    with Cerebro(**options | {"run_dir": tmp_path / "other"}) as cerebro:
        optimize(study, linear, 1, executor=cerebro, metric="val_loss")
    assert [trial.number for trial in study.trials if trial.state is RUNNING] == running, "not this executor's"
    with Cerebro(**options) as cerebro:
        optimize(study, linear, 3, executor=cerebro, metric="val_loss")
        folders = {Path(study.trials[number].user_attrs["folder"]) for number in running}
        (run_dir,) = {folder.parent for folder in folders}
        assert Path(study.trials[-1].user_attrs["folder"]).parent == run_dir
        for folder in folders:
            assert cerebro.replay(run_dir, Linear, folder.name).differing == ()
    assert set(states(study)) <= {COMPLETE, PRUNED}
    assert len(study.trials) == len(before) + 4
    for number in running:
        trial = study.trials[number]
        assert trial.params == before[number].params
        assert trial.user_attrs["units"] == len(trial.intermediate_values)
        assert trial.intermediate_values.items() >= before[number].intermediate_values.items()
        assert trial.state is PRUNED or len(trial.intermediate_values) == 8
    ended = [trial for trial in before.values() if trial.number not in running]
    assert all(study.trials[trial.number] == trial for trial in ended), "told once"
    assert all(len(set(trial.visits)) == len(trial.visits) <= 8 for trial in RunReading(run_dir).trials.values())


@pytest.mark.parametrize("what", ["folder", "seed", "promotion"])
def test_what_cannot_go_on_is_told(options: dict[str, Any], tmp_path: Path, what: str) -> None:
    options |= {"resume": "auto"}
    study, running, pid = left_running(options, "SQLite", tmp_path)
    if what == "folder":
        shutil.rmtree(options["run_dir"])
    if what == "promotion":
        study.pruner = pruners.PromotionPruner(min_resource=2)
    with Cerebro(**options | ({"seed": 4} if what == "seed" else {})) as cerebro:
        optimize(study, linear, 3, executor=cerebro, metric="val_loss")
    assert RUNNING not in states(study)
    for number in running:
        assert study.trials[number].state is FAIL
        told = study.trials[number].user_attrs["error"]
        assert "seed was 0 and is 4" in told if what == "seed" else f"process {pid}, which trained it, has been" in told


def test_a_trial_that_was_pruned_stays_so_if_the_process_dies_before_it_has_told(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"resume": "auto"}
    study = a_study(study_name="s", storage=storage_of("SQLite", tmp_path))
    killed = child(options, "SQLite", tmp_path, n_trials=20, kill_after="export")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (pruned,) = [trial for trial in study.trials if trial.state is RUNNING and "pruned" in trial.user_attrs]
    with Cerebro(**options) as cerebro:
        optimize(study, linear, 1, executor=cerebro, metric="val_loss")
    after = study.trials[pruned.number]
    assert after.state is PRUNED
    assert after.intermediate_values == pruned.intermediate_values
    assert RUNNING not in states(study)


def test_a_result_that_waits_for_its_turn_is_of_no_use_when_its_trial_was_told_elsewhere(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"resume": "auto", "policy": "fixed", "backend": "local"}
    study = a_study(study_name="s", storage=storage_of("SQLite", tmp_path))
    killed = child(options, "SQLite", tmp_path, n_trials=4, kill_after="early")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert states(study) == [RUNNING] * 4
    study.tell(1, state=FAIL)
    with Cerebro(**options) as cerebro:
        optimize(study, one_slow, 1, executor=cerebro, metric="val_loss")
    assert states(study) == [COMPLETE, FAIL, COMPLETE, COMPLETE, COMPLETE]
    assert not study.trials[1].intermediate_values


def test_two_processes_share_a_study(options: dict[str, Any], tmp_path: Path) -> None:
    study = a_study(study_name="s", storage=storage_of("SQLite", tmp_path))
    both = [child(options, "SQLite", tmp_path, n_trials=6, company=2) for _ in range(2)]
    for process in both:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert len(study.trials) == 12
    assert set(states(study)) <= {COMPLETE, PRUNED}
    by_process = {
        process.pid: [t for t in study.trials if t.user_attrs["process"]["pid"] == process.pid] for process in both
    }
    assert [len(trials) for trials in by_process.values()] == [6, 6]
    spans = [(trials[0].datetime_start, trials[-1].datetime_complete) for trials in by_process.values()]
    assert max(began for began, _ in spans) < min(ended for _, ended in spans), "side by side"
    assert len({Path(trial.user_attrs["folder"]).parent for trial in study.trials}) == 2
    for trial in study.trials:
        assert len(trial.intermediate_values) == trial.user_attrs["units"]
        assert trial.state is PRUNED or trial.user_attrs["units"] == 8


def test_the_dashboard_shows_a_live_study(options: dict[str, Any]) -> None:
    from optuna_dashboard import wsgi

    class Silent(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    shown: list[Any] = []

    def look(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if not shown:
            with urlopen(f"http://127.0.0.1:{server.server_port}/api/studies/0?after=0", timeout=10) as answer:
                shown.append(json.load(answer))

    storage = storage_of("InMemory", "")
    study = a_study(storage=storage)
    with make_server("127.0.0.1", 0, wsgi(storage), handler_class=Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Cerebro(**options) as cerebro:
                optimize(study, linear, 4, executor=cerebro, metric="val_loss", callbacks=[look])
        finally:
            server.shutdown()
            thread.join()
    (page,) = shown
    assert {trial["state"] for trial in page["trials"]} == {"Complete", "Running"}
    assert all(trial["intermediate_values"] for trial in page["trials"] if trial["state"] == "Running")
    complete = next(trial for trial in page["trials"] if trial["state"] == "Complete")
    assert {"units", "seconds", "checkpoint"} <= {attribute["key"] for attribute in complete["user_attrs"]}
