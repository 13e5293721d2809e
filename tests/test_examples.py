"""The examples run as a reader would run them, say nothing but what they mean to, and beat the figure they state."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["image_folder", "text"])
def test_an_example_beats_what_it_states(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "[worker-" not in done.stdout, f"a worker had something to say:\n{done.stdout}"
    table = re.findall(r"^(trial-\d+) +(\d\.\d+)  \{", done.stdout, re.M)
    assert len(table) == 4
    best = re.search(r"^(trial-\d+) has (\d\.\d+) on (\d+) held-out", done.stdout, re.M)
    assert best is not None, done.stdout
    assert best[1] == table[0][0], "what was loaded is the best of the table"
    assert abs(float(best[2]) - float(table[0][1])) < 0.05, "the checkpoint is the model that was measured"
