"""How runs begin and end as processes: unguarded scripts, notebooks, Ctrl-C, and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cerebro_tune import ShardedDataset

SCRIPT = """
import sys
import torch
from cerebro_tune import Cerebro, TorchTrainable

class Net(TorchTrainable):
    def build(self, config, plan):
        model = torch.nn.Linear(8, 2)
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"])

    def training_step(self, model, batch):
        helper(batch)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def helper(batch):
    assert len(batch) == 2
"""

RUN = """
cerebro = Cerebro({train!r}, epochs=2, workers=2, run_dir={runs!r})
results = cerebro.fit(Net, [{{"lr": 0.1}}, {{"lr": 0.2}}], metric="train_loss")
print("statuses", [result.status for result in results])
"""

ENDLESS = """
import time
class Slow(Net):
    def training_step(self, model, batch):
        time.sleep(0.02)
        return super().training_step(model, batch)
cerebro = Cerebro({train!r}, epochs=1000, workers=2, run_dir={runs!r}, batch_size=8)
cerebro.start()
print("pids", *cerebro._workers.pids.values(), cerebro._workers._server._process.pid, flush=True)
results = cerebro.fit(Slow, [{{"lr": 0.1}}, {{"lr": 0.2}}, {{"lr": 0.3}}], metric="train_loss")
print("statuses", [result.status for result in results], [bool(result.last_checkpoint) for result in results])
"""


@pytest.fixture
def places(train: ShardedDataset, tmp_path: Path) -> dict[str, str]:
    return {"train": str(train.path), "runs": str(tmp_path / "runs")}


def script(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "search.py"
    file.write_text(text)
    return [sys.executable, "-W", "error", str(file)]


def test_an_unguarded_script_works_and_ends_by_itself(tmp_path: Path, places: dict[str, str]) -> None:
    done = subprocess.run(
        script(tmp_path, SCRIPT + RUN.format(**places)),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("statuses") == 1, "the script was run more than once"
    assert "statuses ['finished', 'finished']" in done.stdout
    assert "trial-0001  epoch 2  train_loss" in done.stdout
    assert "compute" in done.stdout


NOTEBOOK = """
import json, sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in json.loads(sys.argv[1])])
NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
print(json.dumps(notebook.cells[1].outputs))
"""


def test_a_notebook_works(tmp_path: Path, places: dict[str, str]) -> None:
    cells = json.dumps([SCRIPT, RUN.format(**places)])
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, cells], capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout)
    text = "".join(output.get("text", "") for output in outputs)
    assert "statuses ['finished', 'finished']" in text
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 1, "one table, updated in place"
    assert "trial-0001" in tables[0]
    assert "2 finished" in tables[0]


def endless(tmp_path: Path, places: dict[str, str]) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A search that would go on for hours, its units begun; with the processes of its workers and their server."""
    process = subprocess.Popen(
        script(tmp_path, SCRIPT + ENDLESS.format(**places)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    word, *pids = process.stdout.readline().split()
    assert word == "pids"
    assert "epoch 1" in process.stdout.readline()
    return process, [psutil.Process(int(pid)) for pid in pids]


def test_ctrl_c_ends_with_the_results_so_far(tmp_path: Path, places: dict[str, str]) -> None:
    process, children = endless(tmp_path, places)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "statuses ['stopped', 'stopped', 'stopped'] [True, True, True]" in out
    assert "Interrupted; the results so far. compute" in out
    assert "Traceback" not in err
    assert not any(child.is_running() for child in children)


@pytest.mark.parametrize("victim", ["coordinator", "everything at once"])
def test_two_seconds_after_a_kill_nothing_is_left(tmp_path: Path, places: dict[str, str], victim: str) -> None:
    process, children = endless(tmp_path, places)
    for pid in [process.pid] + ([child.pid for child in children] if victim != "coordinator" else []):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=2)
    assert alive == []
    assert [name for name in os.listdir("/dev/shm") if "cerebro" in name] == []


def test_a_killed_server_is_replaced_with_its_workers(tmp_path: Path, places: dict[str, str]) -> None:
    """The server's death leaves the workers be; the next worker to die is forked from a new server."""
    process, (first, _, server) = endless(tmp_path, places)
    assert process.stdout is not None
    server.kill()
    time.sleep(0.2)
    first.kill()
    for line in process.stdout:
        if "epoch 3" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "worker-0 is lost" in err


def test_importing_the_core_imports_neither_torch_nor_a_tuner() -> None:
    hosts = "torch", "ray", "optuna", "pytorch_lightning"
    program = f"import sys, cerebro_tune.executor; print([host for host in {hosts} if host in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
