"""What is built and installed: the wheel's names, the optional hosts, and the displays."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cerebro_tune import ShardedDataset

ROOT = Path(__file__).parent.parent


def test_the_wheel_has_the_four_packages_and_their_types(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"cerebro_tune", "cerebro_tune_ray", "cerebro_tune_optuna", "cerebro_tune_lightning"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [("ray", "ray", "tune"), ("ray", "ray", "RayWorkers"), ("optuna", "optuna", "optimize")],
)
def test_a_missing_host_is_named_with_the_command(package: str, extra: str, name: str) -> None:
    program = f"import importlib.util as u; u.find_spec = lambda name: None; from cerebro_tune_{package} import {name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        f'MissingHostError: {package} is not installed: pip install "cerebro-tune[{extra}]"'
    )


def test_a_terminal_gets_a_live_table(train: ShardedDataset, tmp_path: Path) -> None:
    """Under a real pseudo-terminal: the table, what user code prints above it, and the closing line below."""
    program = f"""
import nets, os
from cerebro_tune import Cerebro
os.environ["COLUMNS"] = "120"
with Cerebro({str(train.path)!r}, workers=2, run_dir={str(tmp_path)!r}) as cerebro:
    cerebro.fit(nets.Talking, [{{"lr": 0.1}}, {{"lr": 0.2}}], metric="train_loss")
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=theirs, stdin=theirs, cwd=ROOT / "tests",
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    text = shown.decode()
    for expected in (
        "trial-0000",
        "progress",
        "2 finished",
        "worker-1: idle",
        "[trial-0001] hello from a unit",
        "compute",
    ):
        assert expected in text, text
