"""`Tuner.restore` after a driver was killed: the search goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import nets
import ray_searches
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.errors import ConfigurationError
from cerebro_tune_ray import tune
from conftest import points

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    ShardedDataset.write(points(202), tmp_path / "train", num_shards=4)
    ShardedDataset.write(points(100, seed=1), tmp_path / "validation", num_shards=1)
    return tmp_path


def kill(name: str, folder: Path, live: int, moment: int, how: str) -> None:
    """Run a search, or take it up, in a process that is killed at the n-th result of all."""
    # Imported, not run as a script, so that its classes are those of this process too when the search is restored.
    script = "import ray_searches; ray_searches.main()"
    command = [sys.executable, "-c", script, name, str(folder), str(live)]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    session = {"RAY_SESSION": ray.get_runtime_context().gcs_address, "PYTHONPATH": paths}
    death = {"KILL_AT": str(moment)} | ({"KILL_AFTER": "1"} if how == "after" else {})
    environment = {**os.environ, **session, **death}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr


def told(log: Path) -> list[list[str]]:
    """The results in order; trials are numbered as they come, since their ids are drawn anew in every search."""
    rows = [line.split() for line in log.read_text().splitlines()]
    numbers: dict[str, int] = {}
    return [[str(numbers.setdefault(row[0], len(numbers))), *row[1:]] for row in rows]


@pytest.mark.parametrize(
    ("name", "moment", "how", "fresh"),
    [
        ("asha", 14, "before", False), ("hyperband", 25, "after", False), ("promotion", 19, "before", False),
        ("pbt", 51, "after", False), ("pbt", 61, "before", True), ("asha", 27, "after", True),
        ("function", 4, "before", False), ("function", 17, "after", True), ("function", 18, "before", False),
    ],
)  # fmt: skip
def test_every_result_is_that_of_the_undisturbed_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: int, how: str, fresh: bool
) -> None:
    if fresh:  # Ray's state of the experiment is that of its last step
        monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    whole = folder / "whole"
    whole.mkdir()
    for data in ("train", "validation"):
        shutil.copytree(folder / data, whole / data)
    with ray_searches.executor(whole, 1) as cerebro:
        expected = ray_searches.search(name, whole, cerebro)
    kill(name, folder, 1, moment, how)
    assert moment <= len(told(folder / "log")) < len(told(whole / "log")) - 5
    with ray_searches.executor(folder, 1) as cerebro:
        grid = ray_searches.restore(name, folder, cerebro)
    assert told(folder / "log") == told(whole / "log")
    assert grid.num_errors == 0
    assert len(grid) == len(expected) == ray_searches.SAMPLES
    scores = [sorted(result.metrics["val_loss"] for result in each) for each in (grid, expected)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("name", "moments"), [("pbt", (20, 30)), ("promotion", (9, 17)), ("function", (1, 30))])
def test_trials_side_by_side_go_on_from_their_last_unit_after_each_death(
    folder: Path, name: str, moments: tuple[int, int]
) -> None:
    kill(name, folder, 3, moments[0], "after")
    kill(name, folder, 3, moments[1], "before")
    with ray_searches.executor(folder, 3) as cerebro:
        grid = ray_searches.restore(name, folder, cerebro)
    assert grid.num_errors == 0
    rows = [row[:2] for row in told(folder / "log")]
    assert len({row[0] for row in rows}) == ray_searches.SAMPLES
    for trial in {row[0] for row in rows}:
        units = [int(unit) for number, unit in rows if number == trial]
        if name != "pbt":  # where a trial may go back to another's unit
            assert units == list(range(1, len(units) + 1))
    assert not list((folder / "ray" / "search" / "cerebro").glob("*.safetensors"))


def test_it_resumes_only_what_it_was(folder: Path) -> None:
    kill("asha", folder, 1, 6, "after")
    with ray_searches.executor(folder, 1) as cerebro:
        cerebro.seed = 9
        with pytest.raises(ConfigurationError, match="seed was 0 and is 9"):
            ray_searches.restore("asha", folder, cerebro)
    shutil.rmtree(folder / "ray" / "search" / "cerebro")
    with ray_searches.executor(folder, 1) as cerebro, pytest.raises(ConfigurationError, match="has no record of its"):
        ray_searches.restore("asha", folder, cerebro)


def tuner(folder: Path, cerebro: Cerebro, trainable: Any, config: dict[str, Any], **tuning: Any) -> Any:
    return tune.Tuner(
        trainable, param_space=config, tune_config=tune.TuneConfig(metric="val_loss", mode="min", **tuning),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), name="search", verbose=0), executor=cerebro,
    )  # fmt: skip


class Flaky(nets.Deep):
    """Raises in its second epoch, for as long as a file is there."""

    def run_unit(self, work: Any) -> dict[str, float]:
        with Path(self._config["mark"]).with_name("units").open("a") as file:
            file.write("one more\n")
        told = Path(self._config["mark"]).exists() and self._config["lr"] > 0.02
        if told and (work.epoch, work.position) == (1, 1):
            raise RuntimeError("told to raise")
        return super().run_unit(work)


@pytest.mark.parametrize(("how", "units"), [("resume_errored", 22), ("restart_errored", 32)])
def test_trials_that_failed_are_tried_again_when_that_is_asked_for(folder: Path, how: str, units: int) -> None:
    mark = folder / "mark"
    mark.touch()
    space = {"lr": tune.grid_search([0.01, 0.1, 0.2]), "mark": str(mark)}
    with ray_searches.executor(folder, 2) as cerebro:
        failed = tuner(folder, cerebro, Flaky, space).fit()
        assert failed.num_errors == 2
        mark.unlink()
        path = str(folder / "ray" / "search")
        (folder / "units").unlink()
        unasked = tune.Tuner.restore(path, Flaky, executor=cerebro).fit()
        assert unasked.num_errors == 2
        assert all(result.config == result.metrics["config"] for result in unasked)
        grid = tune.Tuner.restore(path, Flaky, executor=cerebro, **{how: True}).fit()
        assert [result.metrics["training_iteration"] for result in grid] == [16] * 3
        assert len((folder / "units").read_text().splitlines()) == units
        again = tune.Tuner.restore(path, Flaky, executor=cerebro).fit()
    for last in (grid, again):
        assert last.num_errors == 0
        assert sorted(result.config["lr"] for result in last) == [0.01, 0.1, 0.2]
        assert [result.error for result in last] == [None] * 3
    assert not list((folder / "ray" / "search" / "cerebro").glob("*.safetensors"))
