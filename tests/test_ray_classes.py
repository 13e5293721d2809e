"""Ray's class API by hops: trainables that people have run unchanged, and can read the shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray.tune
import torch
from torch import nn
from torch.nn import functional as F

from cerebro_tune import Cerebro, current_shard
from cerebro_tune_ray import tune

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return {"metric": "loss", "mode": "min", "verbose": 0, "storage_path": str(tmp_path / "ray")}


class Counter(ray.tune.Trainable):
    """Needs no data; tells what it was given and where its steps were run."""

    def setup(self, config: dict[str, Any], table: dict[str, int] | None = None) -> None:
        self.steps, self.table = 0, table
        self.marks = Path(config["marks"])

    def step(self) -> dict[str, Any]:
        self.steps += 1
        return {
            "loss": self.config["lr"] / self.steps, "pid_of_step": os.getpid(), "mine": {"deep": self.steps},
            "epoch": "my own", "given": (self.table or {}).get("answer", 0), "iteration_before": self.iteration,
            "trial_name_seen": self.trial_name,
        }  # fmt: skip

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "inner").mkdir()
        Path(checkpoint_dir, "inner", "steps.json").write_text(json.dumps(self.steps))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        self.steps = json.loads(Path(checkpoint_dir, "inner", "steps.json").read_text())

    def cleanup(self) -> None:
        (self.marks / f"{self.trial_id}-{os.getpid()}").touch()

    def _export_model(self, export_formats: list[str], export_dir: str) -> dict[str, str]:
        path = Path(export_dir, f"model-{self.steps}.txt")
        path.write_text(",".join(export_formats))
        return {export_formats[0]: str(path)}


def test_a_trainable_without_data_hops_between_processes(tmp_path: Path, asked: dict[str, Any]) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    places: dict[str, set[int]] = {}

    class Watch(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            places.setdefault(trial.trial_id, set()).add(result["pid_of_step"])
            assert result["mine"] == {"deep": result["training_iteration"]}
            assert result["iteration_before"] == result["training_iteration"] - 1
            assert result["epoch"] == "my own"
            assert result["trial_name_seen"] == str(trial)

    with Cerebro(workers=2, live_trials=3, run_dir=tmp_path / "runs", progress=False) as executor:
        analysis = tune.run(
            Counter, config={"lr": tune.uniform(0, 1), "marks": str(marks)}, num_samples=3,
            stop={"training_iteration": 12}, callbacks=[Watch()], executor=executor,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=5), **asked,
        )  # fmt: skip
    assert [trial.last_result["training_iteration"] for trial in analysis.trials] == [12] * 3
    assert os.getpid() not in set.union(*places.values())
    assert any(len(pids) > 1 for pids in places.values())  # three trials on two workers
    for trial in analysis.trials:
        saved = json.loads(Path(trial.checkpoint.path, "inner", "steps.json").read_text())
        assert saved == 12
        assert {mark.name.rpartition("-")[0] for mark in marks.iterdir()} == set(places)
    assert sum(len(pids) for pids in places.values()) == len(list(marks.iterdir()))


def test_parameters_resources_and_exports(tmp_path: Path, asked: dict[str, Any]) -> None:
    bound = tune.with_parameters(Counter, table={"answer": 42})
    greedy = tune.with_resources(bound, {"cpu": 7})
    with Cerebro(workers=1, backend="inline", run_dir=tmp_path / "runs", progress=False) as executor:
        config = {"lr": 0.5, "marks": str(tmp_path)}
        with pytest.warns(UserWarning, match="Counter asks for resources for each of its trials.*resources_per_worker"):
            analysis = tune.run(
                greedy,
                config=config,
                stop={"training_iteration": 3},
                export_formats=["text"],
                executor=executor,
                **asked,
            )
    (trial,) = analysis.trials
    assert trial.last_result["given"] == 42
    assert Path(trial.local_path, "model-3.txt").read_text() == "text"


class OnShards(ray.tune.Trainable):
    """A plain loop over the batches of the current shard."""

    def setup(self, config: dict[str, Any]) -> None:
        self.model = nn.Linear(8, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config["lr"], momentum=0.9)

    def step(self) -> dict[str, Any]:
        work = current_shard()
        for x, y in work.train:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        with work.validating(), torch.no_grad():
            outputs = [(F.cross_entropy(self.model(x), y, reduction="sum"), len(y)) for x, y in work.validation or ()]
        loss = float(sum(loss for loss, _ in outputs)) / sum(rows for _, rows in outputs)
        return {"loss": loss, "place": (work.epoch, work.shard), "done": work.epoch == 1 and work.last}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])


def test_a_step_reads_the_shard_that_is_its_turn(options: dict[str, Any], asked: dict[str, Any]) -> None:
    from nets import Linear  # trains the same model on the same batches

    with Cerebro(**options | {"backend": "local"}) as executor:
        analysis = tune.run(OnShards, config={"lr": 0.1}, executor=executor, **asked)
        expected = executor.fit(Linear, [{"lr": 0.1}], metric="val_loss")[0]
    (trial,) = analysis.trials
    assert trial.last_result["training_iteration"] == 8
    assert trial.last_result["loss"] == pytest.approx(expected.last_metrics["val_loss"], rel=1e-5)


class Forgetful(ray.tune.Trainable):
    """Cannot save itself."""

    def step(self) -> dict[str, Any]:
        return {"loss": 1.0}


def test_one_that_cannot_save_itself_is_told_what_to_define(tmp_path: Path, asked: dict[str, Any]) -> None:
    with Cerebro(workers=1, backend="inline", run_dir=tmp_path / "runs", progress=False) as executor:
        analysis = tune.run(Forgetful, executor=executor, raise_on_failed_trial=False, **asked)
    assert analysis.trials[0].status == "ERROR"
    assert "define save_checkpoint and load_checkpoint in Forgetful" in str(analysis.trials[0].get_error())
