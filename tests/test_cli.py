"""The command `cerebro-tune`, on the folder of a real run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cerebro_tune.cli import main
from cerebro_tune.journal import NAME
from resumed_runs import die_at, fit, in_child


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, train: Any, validation: Any) -> Path:
    """A run that has ended."""
    base = tmp_path_factory.mktemp("cli")
    for data in (train, validation):
        (base / ("train" if data is train else "validation")).symlink_to(data.path)
    return fit(base / "runs").run_dir


def test_show_lists_the_trials(folder: Path) -> None:
    told = run("show", folder)
    assert told.exit_code == 0
    assert "Mixed, 2 epochs of 4 shards, seed 0" in told.output
    lines = [line.split()[:5] for line in told.output.splitlines()[1:]]
    assert lines == [
        ["trial-0000", "finished", "8", "of", "8"], ["trial-0001", "stopped", "5", "of", "8"],
        ["trial-0002", "failed", *lines[2][2:]], ["trial-0003", "finished", "4", "of", "4"],
    ]  # fmt: skip
    plain = json.loads(run("show", folder, "--json").output)
    assert plain["about"]["trainable"] == "Mixed"
    assert plain["environment"]["threads"] >= 1
    assert [trial["status"] for trial in plain["trials"]] == ["finished", "stopped", "failed", "finished"]
    assert plain["trials"][0]["metrics"]["val_loss"] > 0


def test_story_tells_what_happened(folder: Path) -> None:
    told = run("story", folder, "trial-0002")
    assert told.exit_code == 0
    assert "running -> failed" in told.output
    assert "this unit was told to raise" in told.output
    plain = json.loads(run("story", folder, "trial-0000", "--json").output)
    assert sorted(visit[:2] for visit in plain["visits"]) == [[e, s] for e in range(2) for s in range(4)]


def test_export_copies_the_best_checkpoint(folder: Path, tmp_path: Path) -> None:
    told = run("export", folder, "trial-0000", tmp_path / "mine.safetensors")
    assert told.exit_code == 0
    assert (tmp_path / "mine.safetensors").read_bytes() == (folder / "trial-0000" / "best.safetensors").read_bytes()
    plain = json.loads(run("export", folder, "trial-0001", tmp_path / "other.safetensors", "--json").output)
    assert Path(plain["from"]).parent == folder / "trial-0001"


def test_verify_finds_damage(folder: Path, tmp_path: Path) -> None:
    told = run("verify", folder)
    assert (told.exit_code, told.output.count("as they were written")) == (0, 2)
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "trial-0000" / "best.safetensors").write_bytes(b"another")
    told = run("verify", copied)
    assert (told.exit_code, "trial-0000: its best checkpoint is not the one" in told.output) == (1, True)
    for name in ("train", "validation"):
        (tmp_path / name).symlink_to((folder.parent.parent / name).resolve())
    assert in_child(lambda: (die_at(60, False), fit(tmp_path / "runs"))) == -9
    dead = tmp_path / "runs" / "run-0000"
    whole = json.loads(run("verify", dead, "--json").output)
    assert (whole["rows"], whole["wrong"]) == (60, [])
    assert whole["decisions"] > 5
    (state, *_) = sorted((dead / "states").iterdir())
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    told = run("verify", dead)
    assert told.exit_code == 1
    assert f"{state} is damaged" in told.output
    beside = dead / f"{NAME}-wal"
    rows = bytearray(beside.read_bytes())
    rows[len(rows) // 2] ^= 1
    beside.write_bytes(rows)
    told = run("show", dead)
    assert (told.exit_code, "is damaged" in told.output) == (1, True)


def test_replay_makes_decisions_again_and_trains_a_trial_again(folder: Path) -> None:
    assert "decisions, made again, are what they were" in run("replay", folder).output
    assert json.loads(run("replay", folder, "--json").output)["decisions"] > 10
    sets = folder.parent.parent
    words = ["--train", sets / "train", "--validation", sets / "validation", "--trainable", "resumed_runs:Mixed"]
    told = run("replay", folder, "--trial", "trial-0001", *words)
    assert (told.exit_code, told.output) == (0, "trial-0001: 5 units trained again, of which 0 gave another state.\n")
    assert run("replay", folder, "--trial", "trial-0001").exit_code == 2
    assert "cannot be imported" in run("replay", folder, "--trial", "trial-0001", *words[:-1], "nothing:Net").output


def test_doctor_tells_of_the_machine() -> None:
    told = json.loads(run("doctor", "--json").output)
    assert told["torch"]
    assert told["threads"] >= 1
    assert told["missing"] == []
    assert "instructions" in run("doctor").output


def test_wrong_usage_has_its_own_exit_code(folder: Path, tmp_path: Path) -> None:
    assert run("show", tmp_path / "nowhere").exit_code == 2
    assert run("show", tmp_path).exit_code == 2
    told = run("story", folder, "trial-9")
    assert told.exit_code == 2
    assert "there are: trial-0000, trial-0001" in told.output


def test_the_command_is_installed(folder: Path) -> None:
    command = Path(sys.executable).with_name("cerebro-tune")
    told = subprocess.run([command, "show", folder], capture_output=True, text=True, check=True)
    assert "trial-0003" in told.stdout
