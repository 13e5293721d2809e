"""`Cerebro.fit` with real training: results, faults, order, and what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from cerebro_tune import Cerebro, Decision, Results, ShardedDataset, TrialResult
from cerebro_tune.errors import (
    ConfigurationError,
    DamagedShardError,
    NotPicklableError,
    NotTrainableError,
    StateMemoryError,
    UnknownMetricError,
)
from cerebro_tune.policy import AutoPolicy, Board, Choice, Ready, Regime
from cerebro_tune.run import Run
from cerebro_tune.settings import Report
from nets import AtEpochsEnd, Counting, Deep, Diverging, Exiting, Linear, Mortal, Raising, Remembering, Talking


class InOrder(AutoPolicy):
    """One trial, sent through these visits."""

    def __init__(self, visits: Any) -> None:
        super().__init__(logical=True)
        self.shards = [shard for _, shard, _ in visits]

    def choose(self, regime: Regime, board: Board, worker: int, held: int, ready: Ready) -> Choice | None:
        (entry,) = ready
        trial = entry[-1]
        return Choice((trial,), self.shards[len(self.shards) - trial.units_left])


CONFIGS = [{"lr": 0.001}, {"lr": 0.03}, {"lr": 0.3}]


@pytest.fixture
def options(train: ShardedDataset, validation: ShardedDataset, tmp_path: Path) -> dict[str, Any]:
    return {
        "train": train, "validation": validation, "epochs": 2, "batch_size": 16, "workers": 2, "backend": "inline",
        "run_dir": tmp_path / "runs", "progress": False,
    }  # fmt: skip


def weights(result: TrialResult) -> bytes:
    return Path(str(result.last_checkpoint)).read_bytes()


def outcome(results: Results) -> list[Any]:
    """What must be equal between equal runs: all but the times."""
    times = ("unit_time_s", "hop_time_s", "validation_time_s")
    history = [[{k: v for k, v in report.items() if k not in times} for report in result.history] for result in results]
    return [[(r.status, r.visits) for r in results], history, [weights(result) for result in results]]


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
    assert [path for path in results.run_dir.rglob("*") if path.is_file()] == []


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


# Commands, as the integrations give them.


class Script:
    """A tuner that does what a function says."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.ended = answer, []

    def on_report(self, trial_id: str, report: Report) -> Decision | None:
        return self.answer(trial_id, report)

    def on_end(self, result: TrialResult) -> None:
        self.ended.append((result.trial_id, result.status))


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


# What it refuses, before any training.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workers": 0}, "workers is 0; it must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"placement": "sharded"}, "placement is 'sharded'; valid: 'auto', 'shared', 'pinned'"),
        ({"policy": "greedy"}, "policy is 'greedy'; valid: 'auto', 'random', 'fixed'"),
        ({"report_every": "step"}, "report_every is 'step'"),
        ({"keep": "worst"}, "keep is 'worst'"),
        ({"loader": {"shuffle": True}}, "loader has shuffle; valid: columns, as_dict"),
        ({"workers": 5, "placement": "pinned"}, "4 shards cannot be pinned to 5 workers"),
        ({"validation_rows": "most"}, "validation_rows is 'most'"),
        ({"state_memory": "plenty"}, "plenty"),
        ({"train": 7}, "train is a int; valid: a ShardedDataset"),
        ({"devices": "gpu"}, 'devices has \'gpu\'; valid: "auto", "cpu"'),
        ({"seed": -1}, "seed is -1"),
        ({"loader": {"columns": "xy"}}, "columns is 'xy'; it must be a list of names"),
    ],
)
def test_bad_arguments(options: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        Cerebro(**options | changed)
    assert not Path(options["run_dir"]).exists()


def test_unknown_column_and_backend(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x"):
        Cerebro(**options, loader={"columns": ["pixels"]})
    with pytest.raises(ConfigurationError, match="no backend 'slurm'; valid: inline, local"):
        Cerebro(**options | {"backend": "slurm"}).fit(Linear, CONFIGS)


def test_bad_configs_and_trainables(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        with pytest.raises(ConfigurationError, match="configs is empty"):
            cerebro.fit(Linear, [])
        with pytest.raises(ConfigurationError, match="epochs in a config is 0"):
            cerebro.fit(Linear, [{"lr": 1, "epochs": 0}])
        with pytest.raises(NotTrainableError, match="Valid are a TorchTrainable subclass"):
            cerebro.fit(print, CONFIGS)
        with pytest.raises(NotTrainableError, match="Give the class, Linear"):
            cerebro.fit(Linear(), CONFIGS)
        with pytest.raises(NotTrainableError, match="import LightningTrainable"):
            cerebro.fit(lambda config: None, CONFIGS)
        for configs in ({"lr": 0.1}, ["lr"]):
            with pytest.raises(ConfigurationError, match="it must be a list of dicts"):
                cerebro.fit(Linear, configs)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="the name of one metric"):
            cerebro.fit(Linear, CONFIGS, metric=["val_loss"])  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="mode is 'least'"):
            cerebro.fit(Linear, CONFIGS, mode="least")
        with pytest.raises(NotPicklableError, match=r"The config .* cannot be sent to the workers"):
            cerebro.fit(Linear, [{"lr": 0.1, "lock": threading.Lock()}])
        assert list(Path(options["run_dir"]).iterdir()) == []  # nothing half-written
        assert cerebro.fit(Linear, CONFIGS[:1])[0].status == "finished"  # and it still works


def test_an_unknown_metric_lists_those_there_are(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro, pytest.raises(UnknownMetricError, match="train_loss, val_accuracy, val_loss"):
        cerebro.fit(Linear, CONFIGS, metric="accuracy")


def test_a_flipped_bit_in_a_shard_stops_the_run_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 800, pa.float32()), 8), "y": [0, 1] * 50})
    damaged = ShardedDataset.write(table, tmp_path / "damaged", num_shards=4)
    file = damaged.file(2)
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    with Cerebro(**options | {"train": damaged}) as cerebro, pytest.raises(DamagedShardError, match=file.name):
        cerebro.fit(Linear, CONFIGS)
    assert list(Path(options["run_dir"]).iterdir()) == []


def test_full_state_memory_says_what_to_do(options: dict[str, Any]) -> None:
    with Cerebro(**options, state_memory=100_000) as cerebro, pytest.raises(StateMemoryError, match="state_memory"):
        cerebro.fit(Linear, CONFIGS)


def test_one_run_at_a_time(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        run = cerebro.run(Linear, Script(lambda *_: Decision.CONTINUE))
        with pytest.raises(ConfigurationError, match="has a run in progress"):
            cerebro.fit(Linear, CONFIGS)
        run.end_search()
        assert len(cerebro.drive(run)) == 0
