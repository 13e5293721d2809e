"""The examples run as a reader would run them, say nothing but what they mean to, and beat the figure they state."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)  # a minute or two, where nothing else runs
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path, host_logs: bool = False) -> str:
    """What an example prints; a host may log to stderr beside it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, cwd=folder, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert host_logs or done.stderr == ""
    assert "[worker-" not in done.stdout, f"a worker had something to say:\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("name", ["image_folder", "text"])
def test_an_example_beats_what_it_states(tmp_path: Path, name: str) -> None:
    said = run(name, tmp_path)
    table = re.findall(r"^(trial-\d+) +(\d\.\d+)  \{", said, re.M)
    assert len(table) == 4
    best = re.search(r"^(trial-\d+) has (\d\.\d+) on (\d+) held-out", said, re.M)
    assert best is not None, said
    assert best[1] == table[0][0], "what was loaded is the best of the table"
    assert abs(float(best[2]) - float(table[0][1])) < 0.05, "the checkpoint is the model that was measured"


def test_the_example_of_optuna_prunes_and_beats_what_it_states(tmp_path: Path) -> None:
    said = run("optuna_study", tmp_path)
    complete, pruned, units, whole = map(
        int, re.findall(r"^thirty-two: (\d+) complete, (\d+) pruned, (\d+) of (\d+) units", said, re.M)[0]
    )
    assert (complete + pruned, whole) == (32, 32 * 16)
    assert pruned >= 12
    assert units < 0.7 * whole
    trainers = re.search(r"^trainers: (\d+) complete, (\d+) pruned", said, re.M)
    assert trainers is not None, said
    assert int(trainers[1]) + int(trainers[2]) == 6
    best = re.findall(r"^best: trial \d+ with (\d\.\d+)", said, re.M)
    held_out = re.search(r"^The best one has (\d\.\d+) on 500 held-out images; the plots are in (.*)$", said, re.M)
    assert held_out is not None, said
    assert abs(float(best[0]) - float(held_out[1])) < 0.05, "the checkpoint is the model that was measured"
    assert len(list(Path(held_out[2]).glob("*.png"))) == 2


def test_the_example_of_ray_tune_stops_early_and_beats_what_it_states(tmp_path: Path) -> None:
    said = run("ray_tune", tmp_path, host_logs=True)
    searches = re.findall(r"^(\w+): (\d+) of (\d+) units, best (\d\.\d+)", said, re.M)
    assert [(name, int(whole)) for name, _, whole, _ in searches] == [("LitNet", 32 * 16), ("train", 8 * 16)]
    assert all(int(units) < 0.8 * int(whole) for _, units, whole, _ in searches)
    held_out = re.search(r"^The best one has (\d\.\d+) on 500 held-out images", said, re.M)
    assert held_out is not None, said
    assert abs(float(searches[0][3]) - float(held_out[1])) < 0.05, "the checkpoint is the model that was measured"
