"""`Cerebro.fit` with real training: results, faults, and order."""

from __future__ import annotations

import gc
import importlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cerebro_tune import Cerebro, Decision
from cerebro_tune.errors import TrialFailedError
from cerebro_tune.sharedrun import Caller
from nets import AtEpochsEnd, Counting, Deep, Diverging, Exiting, Hoarding, Linear, Mortal, Raising, Talking
from runs import CONFIGS, InOrder, Script, outcome, weights


@pytest.mark.parametrize("backend", ["inline", "local"])
def test_fit_trains_every_config_on_every_shard(options: dict[str, Any], backend: str) -> None:
    with Cerebro(**options | {"backend": backend}) as cerebro:
        results = cerebro.fit(Linear, CONFIGS, metric="val_accuracy", mode="max")
    assert [result.trial_id for result in results] == ["trial-0000", "trial-0001", "trial-0002"]
    for result in results:
        assert result.status == "finished"
        for epoch in range(2):
            assert sorted(shard for e, shard, _ in result.visits if e == epoch) == [0, 1, 2, 3]
        assert [report["training_iteration"] for report in result.history] == list(range(1, 9))
        assert result.history[-1]["epoch"] == 2
        assert result.metrics["val_accuracy"] == max(r["val_accuracy"] for r in result.history if r["epoch"] in (1, 2))
        assert result.checkpoint is not None
        assert result.checkpoint.exists()
    assert results.best.metrics["val_accuracy"] > 0.85
    assert {path.name for path in results.run_dir.rglob("*.safetensors")} <= {"best.safetensors", "last.safetensors"}
    table = results.to_table()
    assert table.num_rows == 3
    assert table["config/lr"].to_pylist() == [0.001, 0.03, 0.3]
    shares = results.shares
    assert math.isclose(shares.compute + shares.validate + shares.hop + shares.idle, 1)


def test_backends_and_placements_give_equal_weights(options: dict[str, Any]) -> None:
    """With policy "fixed" and the same placement, inline and local runs are equal; trials do not disturb each other."""
    fixed = options | {"policy": "fixed", "placement": "pinned"}
    with Cerebro(**fixed) as cerebro:
        inline = cerebro.fit(Deep, CONFIGS, metric="val_loss")
    with Cerebro(**fixed | {"backend": "local"}) as cerebro:
        local = cerebro.fit(Deep, CONFIGS, metric="val_loss")
        again = cerebro.fit(Deep, CONFIGS, metric="val_loss")
    assert outcome(inline) == outcome(local) == outcome(again)


@pytest.mark.parametrize("backend", ["inline", "local"])
def test_a_checkpoint_has_the_weights_also_when_the_state_has_grown(options: dict[str, Any], backend: str) -> None:
    with Cerebro(**options | {"policy": "fixed", "backend": backend}) as cerebro:
        plain, hoarding = (cerebro.fit(kind, CONFIGS, metric="val_loss") for kind in (Linear, Hoarding))
    for one, other in zip(plain, hoarding, strict=True):
        assert weights(one) == weights(other)
        assert one.checkpoint is not None
        assert other.checkpoint is not None
        assert one.checkpoint.read_bytes() == other.checkpoint.read_bytes()


def test_a_unit_that_raises_fails_its_trial_only(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    configs = [{"lr": 0.1}, {"lr": 0.1, "raise_in": (1, 2)}, {"lr": 0.2}]
    with Cerebro(**options) as cerebro:
        results = cerebro.fit(Raising, configs, metric="val_loss")
    assert [result.status for result in results] == ["finished", "failed", "finished"]
    assert "RuntimeError: this unit was told to raise" in str(results[1].error)
    assert "nets.py" in str(results[1].error)
    assert results[1].metrics["epoch"] == 1
    assert "trial-0001 failed in epoch 1, shard 2" in capsys.readouterr().err


def test_a_loss_that_is_nan_fails_the_trial_by_unit(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        (result,) = cerebro.fit(Diverging, [{"lr": 0.1}])
    assert result.status == "failed"
    assert "The training loss of trial-0000 is nan in epoch 0, shard" in str(result.error)


def test_plain_attributes_hop(options: dict[str, Any]) -> None:
    """What a model counts in `self.n += 1` is the same however many workers there are."""
    fixed = options | {"policy": "fixed", "report_every": "epoch"}
    with Cerebro(**fixed | {"placement": "pinned"}) as two:
        hopped = two.fit(Counting, CONFIGS[:2], metric="val_loss")
    for result in hopped:
        assert [report["rows"] for report in result.history] == [202, 404], result.error
        assert [report["steps"] for report in result.history] == [16, 32]
        with Cerebro(**fixed | {"workers": 1, "policy": InOrder(result.visits), "live_trials": 1}) as one:
            (alone,) = one.fit(Counting, [result.config], metric="val_loss")
        means = [[report["mean"] for report in r.history] for r in (alone, result)]
        if result.trial_id == "trial-0000":  # the other's index seeds it otherwise
            assert weights(alone) == weights(result)
        assert means[0] == means[1]


def test_dead_workers_cost_their_unit_and_change_no_bit(options: dict[str, Any], tmp_path: Path) -> None:
    fixed = options | {"policy": "fixed", "backend": "local", "placement": "pinned"}
    marks = tmp_path / "marks"
    marks.mkdir()
    calm = [{"lr": 0.01, "marks": str(marks), "times": 0, "die": []}, {"lr": 0.02}]
    doomed = [calm[0] | {"times": 2, "die": [(0, 1), (1, 3)]}, {"lr": 0.02}]
    with Cerebro(**fixed, max_failures=4) as cerebro:
        undisturbed = cerebro.fit(Mortal, calm, metric="val_loss")
        disturbed = cerebro.fit(Mortal, doomed, metric="val_loss")
    assert len(list(marks.iterdir())) == 4
    assert outcome(undisturbed) == outcome(disturbed)


def test_a_trial_that_kills_too_many_workers_fails(options: dict[str, Any], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    configs = [{"lr": 0.01, "marks": str(marks), "times": 99, "die": [(0, 1)]}, {"lr": 0.02}]
    with Cerebro(**options | {"backend": "local"}, max_failures=1) as cerebro:
        results = cerebro.fit(Mortal, configs)
    assert [result.status for result in results] == ["failed", "finished"]
    assert "SIGKILL" in str(results[0].error)
    assert "max_failures=1" in str(results[0].error)
    assert len(list(marks.iterdir())) == 2


def test_output_of_workers_comes_with_the_trial(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with Cerebro(**options | {"backend": "local", "epochs": 1}) as cerebro:
        cerebro.fit(Talking, [{"lr": 0.1}])
    out, err = capfd.readouterr()
    assert out.count("[trial-0000] hello from a unit") == 4
    assert err.count("[trial-0000] to stderr") == 4
    assert "UserWarning: a warning of user code" in err


def test_a_metric_of_an_epochs_end_is_waited_for(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with Cerebro(**options) as cerebro:
        results = cerebro.fit(AtEpochsEnd, CONFIGS, metric="at_the_end", mode="max")
    assert [result.metrics["epoch"] for result in results] == [2, 2, 2]
    assert (
        capsys.readouterr().err.count("The first report has no metric 'at_the_end', but train_loss, val_accuracy") == 1
    )


def test_an_edited_module_is_trained_as_edited(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook user works: change the model's file, reload it, fit again on the same executor."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    file = tmp_path / "edited_model.py"
    text = """
import nets

class M(nets.Linear):
    def run_unit(self, work):
        return super().run_unit(work) | {"version": VERSION}
"""
    with Cerebro(**options | {"backend": "local"}) as cerebro:
        versions = []
        for version in (1, 22):
            file.write_text(text.replace("VERSION", str(version)))
            importlib.invalidate_caches()
            module = importlib.reload(importlib.import_module("edited_model"))
            versions.append(cerebro.fit(module.M, CONFIGS[:1])[0].metrics["version"])
    assert versions == [1, 22]


def test_an_executor_that_nobody_has_ends_its_workers(options: dict[str, Any]) -> None:
    """As in a notebook cell that is run again: no `with`, no `close`."""
    cerebro = Cerebro(**options | {"backend": "local"})
    assert cerebro.fit(Linear, CONFIGS[:1])[0].status == "finished"
    children = psutil.Process().children(recursive=True)
    assert len(children) == 3  # two workers and their server
    del cerebro
    assert psutil.wait_procs(children, timeout=3)[1] == []


def test_one_whose_last_tuner_knew_it_ends_them_too(options: dict[str, Any]) -> None:
    """As a tuner does that asks for `cerebro.current`; workers outlive a run, and keep nothing of it."""

    def trained() -> list[psutil.Process]:
        cerebro = Cerebro(**options | {"backend": "local"})
        run = cerebro.run(Linear, Script(lambda *_: Decision.CONTINUE if cerebro.current else Decision.STOP))
        run.add(CONFIGS[0])
        run.end_search()
        assert cerebro.drive(run)[0].status == "finished"
        return psutil.Process().children(recursive=True)

    children = trained()
    gc.collect()
    assert psutil.wait_procs(children, timeout=3)[1] == []


def test_misspelled_keys_and_exits_are_told(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        with pytest.warns(UserWarning, match="Linear has not read momentumm of its config"):
            cerebro.fit(Linear, [{"lr": 0.1, "momentumm": 3}])
        (result,) = cerebro.fit(Exiting, [{"lr": 0.1}])
    assert result.status == "failed"
    assert "SystemExit: 3" in str(result.error)


def test_config_keys_of_ours_win_over_the_defaults(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        one, three = cerebro.fit(
            Linear, [{"lr": 0.1, "epochs": np.int64(1), "batch_size": np.int32(51)}, {"lr": 0.1, "epochs": 3}]
        )
    assert len(one.visits) == 4
    assert len(three.visits) == 12


def test_best_falls_back_without_validation(options: dict[str, Any]) -> None:
    with Cerebro(**options | {"validation": None}) as cerebro:
        (result,) = cerebro.fit(Linear, [{"lr": 0.3}], metric="train_loss")
    assert result.metrics["train_loss"] == min(report["train_loss"] for report in result.history)


def test_keep_none_writes_nothing(options: dict[str, Any]) -> None:
    with Cerebro(**options, keep="none") as cerebro:
        results = cerebro.fit(Linear, CONFIGS, metric="val_loss")
    assert all(result.checkpoint is None for result in results)
    assert {path.name for path in results.run_dir.rglob("*") if path.is_file()} == {"journal.sqlite", "lock"}


def test_the_trace_has_every_unit(options: dict[str, Any]) -> None:
    with Cerebro(**options, trace=True) as cerebro:
        results = cerebro.fit(Linear, CONFIGS)
    events = json.loads((results.run_dir / "trace.json").read_text())["traceEvents"]
    units = [(e["args"]["trial"], e["args"]["epoch"], e["args"]["shard"]) for e in events if e.get("cat") == "unit"]
    assert sorted(units) == sorted((r.trial_id, epoch, shard) for r in results for epoch, shard, _ in r.visits)
    by_worker: dict[int, float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        assert event["ts"] >= by_worker.get(event["tid"], 0) - 1  # microseconds: nothing on a worker overlaps
        by_worker[event["tid"]] = event["ts"] + event["dur"]


def test_closing_ends_the_calls_that_wait_in_other_threads(options: dict[str, Any]) -> None:
    reported = threading.Event()

    def note(trial_id: str, report: Any) -> Decision:
        reported.set()
        return Decision.CONTINUE

    with (
        Cerebro(**options | {"backend": "local", "epochs": 10_000}) as cerebro,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(cerebro.train_one, Linear, {"lr": 0.1}, caller=Caller(note))
        assert reported.wait(30)
        cerebro.close()
        with pytest.raises(TrialFailedError, match="trial-0000 was cut short"):
            waiting.result(30)
