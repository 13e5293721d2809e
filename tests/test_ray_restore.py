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
    """Run a search in a process that is killed at its n-th result."""
    # Imported, not run as a script, so that its classes are those of this process too when the search is restored.
    script = "import ray_searches; ray_searches.main()"
    command = [sys.executable, "-c", script, name, str(folder), str(live), str(moment), how]
    session = {"RAY_SESSION": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(Path(__file__).parent)}
    environment = {**os.environ, **session}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr


def restore(folder: Path, cerebro: Cerebro) -> Any:
    return tune.Tuner.restore(str(folder / "ray" / "search"), nets.Deep, executor=cerebro).fit()


def told(log: Path) -> list[list[str]]:
    """The results in order; trials are numbered as they come, since their ids are drawn anew in every search."""
    rows = [line.split() for line in log.read_text().splitlines()]
    numbers: dict[str, int] = {}
    return [[str(numbers.setdefault(row[0], len(numbers))), *row[1:]] for row in rows]


@pytest.mark.parametrize(
    ("name", "moment", "how"),
    [("asha", 14, "before"), ("hyperband", 25, "after"), ("promotion", 19, "before"), ("pbt", 51, "after")],
)
def test_every_result_is_that_of_the_undisturbed_search(folder: Path, name: str, moment: int, how: str) -> None:
    whole = folder / "whole"
    whole.mkdir()
    for data in ("train", "validation"):
        shutil.copytree(folder / data, whole / data)
    with ray_searches.executor(whole, 1) as cerebro:
        expected = ray_searches.search(name, whole, cerebro, ray_searches.Watch(whole / "log"))
    kill(name, folder, 1, moment, how)
    assert moment <= len(told(folder / "log")) < len(told(whole / "log")) - 5
    with ray_searches.executor(folder, 1) as cerebro:
        grid = restore(folder, cerebro)
    assert told(folder / "log") == told(whole / "log")
    assert grid.num_errors == 0
    assert len(grid) == len(expected) == ray_searches.SAMPLES
    scores = [sorted(result.metrics["val_loss"] for result in each) for each in (grid, expected)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("name", "moments"), [("pbt", (20, 30)), ("promotion", (9, 17))])
def test_trials_side_by_side_go_on_from_their_last_unit_after_each_death(
    folder: Path, name: str, moments: tuple[int, int]
) -> None:
    kill(name, folder, 3, moments[0], "after")
    with ray_searches.executor(folder, 3) as cerebro:
        grid = restore(folder, cerebro)
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
            restore(folder, cerebro)
    shutil.rmtree(folder / "ray" / "search" / "cerebro")
    with ray_searches.executor(folder, 1) as cerebro, pytest.raises(ConfigurationError, match="has no record of its"):
        restore(folder, cerebro)
