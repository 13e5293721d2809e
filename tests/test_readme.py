"""Every block of the README runs, in one folder and in order, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_python_blocks_run(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text("\n".join(text for language, text in BLOCKS if language == "python"))
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=220,
        check=False,
        env=os.environ | {"RAY_ADDRESS": "local"},  # a Ray of its own, whatever else runs here
    )
    assert done.returncode == 0, done.stderr
    assert "compute" in done.stdout


def test_the_commands_exist() -> None:
    commands = [
        line.split("#")[0].split() for language, text in BLOCKS if language == "sh" for line in text.splitlines()
    ]
    assert ["make", "demo"] in commands
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {words[1] for words in commands if words[0] == "make"} <= set(targets)
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert extras is not None
    assert set(re.findall(r"^(\w+) =", extras[1], re.M)) == {"ray", "optuna", "lightning", "all"}
