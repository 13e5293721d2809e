"""Trials fed and decided from outside while a run goes, as the integrations do it."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cerebro_tune import Cerebro, Decision
from cerebro_tune.errors import (
    ConfigurationError,
)
from cerebro_tune.run import Run
from cerebro_tune.settings import Report
from cerebro_tune.trainable import as_recipe
from lightning_nets import Momentum
from nets import Deep, Linear, Mortal, Raising, Remembering
from runs import CONFIGS, Script


def test_stop_pause_and_resume(options: dict[str, Any]) -> None:
    run: Run

    def answer(trial_id: str, report: Report) -> Decision:
        if trial_id == "trial-0001" and report["units"] == 3:
            return Decision.STOP
        if trial_id == "trial-0002" and report["units"] == 2:
            return Decision.PAUSE
        if trial_id == "trial-0000" and report["units"] == 8:
            run.resume("trial-0002")
        return Decision.CONTINUE

    with Cerebro(**options) as cerebro:
        tuner = Script(answer)
        run = cerebro.run(Linear, tuner, metric="val_loss")
        for config in CONFIGS:
            run.add(config)
        run.end_search()
        results = cerebro.drive(run)
    assert [(r.status, len(r.visits)) for r in results] == [("finished", 8), ("stopped", 3), ("finished", 8)]
    assert sorted(tuner.ended) == [("trial-0000", "finished"), ("trial-0001", "stopped"), ("trial-0002", "finished")]
    assert results[1].last_checkpoint is not None
    assert results[1].metrics["units"] == 3
    assert set(load_file(results[1].last_checkpoint)) == {"weight", "bias"}


@pytest.mark.parametrize(("wish", "status"), [("stop", "stopped"), ("pause", "paused")])
def test_a_wish_while_the_tuner_decides_is_joined_with_its_answer(
    options: dict[str, Any], wish: str, status: str
) -> None:
    """A user's stop that comes just before the tuner's CONTINUE is neither lost nor the end of the run."""
    run: Run

    def answer(trial_id: str, report: Report) -> Decision:
        if trial_id == "trial-0000" and report["units"] == 2:
            thread = threading.Thread(target=getattr(run, wish), args=(trial_id,))
            thread.start()  # from another thread it waits for the loop ...
            getattr(run, wish)(trial_id)  # ... and from here it does not
            threads.append(thread)
        return Decision.CONTINUE

    threads: list[threading.Thread] = []
    with Cerebro(**options) as cerebro:
        run = cerebro.run(Linear, Script(answer), metric="val_loss")
        for config in CONFIGS[:2]:
            run.add(config)
        run.end_search()
        first, second = cerebro.drive(run)
    threads[0].join()
    assert (first.status, len(first.visits)) == (status, 2)
    assert second.status == "finished"


def test_a_run_after_one_that_failed_with_a_worker_lost_unheard(options: dict[str, Any]) -> None:
    """An idle worker dies in the moment in which the tuner raises; the next run has all workers again."""
    with Cerebro(**options | {"backend": "local", "workers": 3}) as cerebro:
        workers: Any = cerebro._workers
        wait = workers.wait

        def raise_with_a_death(trial_id: str, report: Report) -> Decision:
            raise RuntimeError("the tuner's own defect")

        def slow_wait(timeout_s: float | None = None) -> Any:
            said = wait(timeout_s)
            if any(type(message).__name__ == "Finished" for message in said):  # with it comes the news of a death
                busy = {message.worker for message in said}
                victim = next(worker for worker in workers.ids if worker not in busy)
                os.kill(workers.pids[victim], signal.SIGKILL)
                said += wait()
            return said

        workers.wait = slow_wait
        run = cerebro.run(Linear, Script(raise_with_a_death))
        run.add(CONFIGS[0])
        run.end_search()
        with pytest.raises(RuntimeError, match="own defect"):
            cerebro.drive(run)
        workers.wait = wait
        assert [result.status for result in cerebro.fit(Linear, CONFIGS)] == ["finished"] * 3


def test_a_replacement_that_dies_before_it_is_ready_is_replaced(options: dict[str, Any], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    configs = [{"lr": 0.01, "marks": str(marks), "times": 1, "die": [(0, 1)]}, {"lr": 0.02}]
    with Cerebro(**options | {"backend": "local"}) as cerebro:
        workers: Any = cerebro._workers
        restart, killed = workers.restart, []

        def restart_and_kill(worker: Any) -> None:
            restart(worker)
            if not killed:
                killed.append(worker)
                os.kill(workers.pids[worker], signal.SIGKILL)

        workers.restart = restart_and_kill
        results = cerebro.fit(Mortal, configs, metric="val_loss")
    assert killed
    assert [result.status for result in results] == ["finished", "finished"]


def test_a_trial_left_paused_has_its_last_checkpoint(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        run = cerebro.run(
            Linear, Script(lambda _, report: Decision.PAUSE if report["units"] == 5 else Decision.CONTINUE)
        )
        run.add(CONFIGS[0])
        run.end_search()
        (result,) = cerebro.drive(run)
        assert (result.status, len(result.visits)) == ("paused", 5)
        assert set(load_file(str(result.last_checkpoint))) == {"weight", "bias"}
        with pytest.raises(ConfigurationError, match="The run is over"):
            run.resume(result.trial_id)


def test_decisions_from_another_thread(options: dict[str, Any]) -> None:
    """The tuner answers later, from a thread of its own, and adds trials while the run goes."""
    reports: Any = __import__("queue").SimpleQueue()
    with Cerebro(**options | {"backend": "local"}) as cerebro:
        tuner = Script(lambda *report: reports.put(report))
        run = cerebro.run(Linear, tuner, metric="val_loss")
        run.add(CONFIGS[0])

        def decide() -> None:
            late = False
            while (said := reports.get()) is not None:
                if not late:
                    late = bool(run.add(CONFIGS[1]))
                    run.end_search()
                with pytest.raises(ConfigurationError, match="no trial 'trial-9999'; there are: trial-0000"):
                    run.stop("trial-9999")
                run.decide(said[0], Decision.CONTINUE)

        thread = threading.Thread(target=decide)
        thread.start()
        results = cerebro.drive(run)
        reports.put(None)
        thread.join()
    assert [(r.status, len(r.visits)) for r in results] == [("finished", 8), ("finished", 8)]


def test_a_clone_goes_on_from_its_source_under_its_own_config(options: dict[str, Any]) -> None:
    run: Run

    def answer(trial_id: str, report: Report) -> Decision:
        if trial_id == "trial-0000" and report["units"] == 3:
            run.clone("trial-0000")
            run.clone("trial-0000", {"lr": 0.5})
        return Decision.CONTINUE

    with Cerebro(**options | {"policy": "fixed", "workers": 1}) as cerebro:
        run = cerebro.run(Linear, Script(answer), metric="val_loss")
        run.add({"lr": 0.05})
        run.end_search()
        source, same, changed = cerebro.drive(run)
    assert len(source.visits) == 8
    assert len(same.visits) == len(changed.visits) == 5
    assert {shard for epoch, shard, _ in same.visits if epoch == 0} == {s for e, s, _ in source.visits[3:] if e == 0}
    assert same.history[0]["units"] == 4
    assert changed.history[-1]["train_loss"] != same.history[-1]["train_loss"]


def test_clones_under_the_logical_clock_start_where_their_source_was_committed(options: dict[str, Any]) -> None:
    """A result that came early waits for its turn, and until then a clone must not see its state."""
    run: Run
    cloned: list[str] = []

    def answer(trial_id: str, report: Report) -> Decision:
        if len(cloned) < 8 and report["units"] > 2:
            others = [f"trial-{number:04d}" for number in range(3) if f"trial-{number:04d}" != trial_id]
            cloned.extend(run.clone(other) for other in others if run.status(other) == "running")
        return Decision.CONTINUE

    fixed = options | {"policy": "fixed", "backend": "local", "epochs": 4}
    with Cerebro(**fixed) as cerebro:
        run = cerebro.run(Remembering, Script(answer))
        for config in CONFIGS:
            run.add(config)
        run.end_search()
        results = cerebro.drive(run)
    assert len(results) == 3 + len(cloned) >= 11
    for result in results:
        assert result.status == "finished", result.error
        assert [report["seen"] for report in result.history] == [report["units"] for report in result.history]


def test_a_trial_may_bring_a_recipe_of_its_own(options: dict[str, Any]) -> None:
    def answer(trial_id: str, report: Report) -> Decision:
        return Decision.STOP if trial_id == "trial-0002" and report["units"] == 3 else Decision.CONTINUE

    brought = [None, Deep, Momentum, Raising]
    with Cerebro(**options | {"policy": "fixed", "backend": "local"}) as cerebro:
        tuner = Script(answer)
        run = cerebro.run(Linear, tuner, metric="val_loss")
        for kind in brought:
            config = {"lr": 0.03} | ({"raise_in": (1, 1)} if kind is Raising else {})
            run.add(config, None if kind is None else as_recipe(kind))
        assert [run.units_of(f"trial-{number:04d}") for number in range(4)] == [8] * 4
        run.end_search()
        results = cerebro.drive(run)
        alike = [cerebro.fit(kind, [{"lr": 0.03}] * 2, metric="val_loss") for kind in (Linear, Deep)]
    assert [result.status for result in results] == ["finished", "finished", "stopped", "failed"]
    for number, same in enumerate(alike):
        mine, theirs = results[number], same[number]
        # A trial's shards come in the order that its index gives; the bits depend on nothing else.
        assert mine.visits[0][:2] == theirs.visits[0][:2]
        assert mine.history[0]["val_loss"] == theirs.history[0]["val_loss"]
        assert set(load_file(str(mine.checkpoint))) == set(load_file(str(theirs.checkpoint)))
    assert str(results[2].last_checkpoint).endswith("last.ckpt")
    assert results[3].raised[:2] == ("builtins.RuntimeError", "builtins.Exception")
    assert all(seconds > 0 for seconds in results[0].seconds.values())


def test_threads_may_train_different_things_side_by_side(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro, ThreadPoolExecutor(3) as pool:
        kinds = [Linear, Deep, Momentum]
        results = list(pool.map(lambda kind: cerebro.train_one(kind, {"lr": 0.03}, metric="val_loss"), kinds))
    assert [result.status for result in results] == ["finished"] * 3
    assert [str(result.checkpoint).rpartition(".")[2] for result in results] == ["safetensors", "safetensors", "ckpt"]


def test_a_changed_key_that_nothing_reads_fails_the_clone_by_name(options: dict[str, Any]) -> None:
    run: Run

    def answer(trial_id: str, report: Report) -> Decision:
        if trial_id == "trial-0000" and report["units"] == 1:
            run.clone("trial-0000", {"lr": 0.05, "tempo": 3})
        return Decision.CONTINUE

    with Cerebro(**options) as cerebro:
        run = cerebro.run(Linear, Script(answer))
        run.add({"lr": 0.05})
        run.end_search()
        source, clone = cerebro.drive(run)
    assert (source.status, clone.status) == ("finished", "failed")
    assert "The config changes tempo, which neither" in str(clone.error)
