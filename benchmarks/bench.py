"""Runs the benchmarks one after another, writes what they found to `results/<date>.json`, and renders it.

    make bench                     # all of them
    python benchmarks/bench.py --only hops loader     # a part, in place of what the last results have of it
    python benchmarks/bench.py --only gpu             # by itself, where torch sees a CUDA device

On another machine, or with other versions or sizes than those of the last results, a part goes to results/part.json,
of which nothing is rendered: only what one machine has measured stands in one table. What a GPU does goes to
results/gpu.json, and into a table of its own.

The file is written anew after each benchmark. One that fails is told among the results, and the others go on; the exit
code is then 1. So it is when a bar was missed and `misses.md` gives no reason. FULL=1 takes more seeds and runs,
SMALL=1 finds out whether all of them work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

import render
from _report import ROWS_FILE
from _sizes import SIZE

HERE = Path(__file__).parent
SCRIPTS = (
    "efficiency",
    "against_ray",
    "memory",
    "subepoch",
    "overhead",
    "lightning_overhead",
    "ray_tune",
    "optuna_study",
    "hops",
    "scheduling",
    "streams",
    "asha24",
    "coordinator",
    "cold_start",
    "loader",
    "validating",
    "when_not",
)
GPU = "gpu"
PACKAGES = ("torch", "pytorch-lightning", "ray", "optuna", "numpy", "pyarrow")
PART = "part.json"
LIMIT_S = 1800  # for one script: what hangs must not keep the others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*SCRIPTS, GPU], help=", ".join([*SCRIPTS, GPU]))
    only = parser.parse_args().only
    if only and GPU in only and only != [GPU]:
        parser.error("gpu is measured by itself: --only gpu")
    if only == [GPU] and not _gpu_model():
        parser.error("torch sees no CUDA device")
    path, results = begun(only)
    measure(only or SCRIPTS, path, results)
    if path.name != PART:
        render.write(render.last() if path == render.GPU_RESULTS else path)
    judged = path.name != PART and SIZE != "small"  # the misses of a reduced run are of no meaning
    unexplained = [measure for measure, why in render.reasons(results).items() if not why] if judged else []
    failed = [script["name"] for script in results["scripts"] if script["error"]]
    print(f"\n{path.name}: {results['seconds']:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    for measure_ in unexplained:
        print(f"misses.md does not say why this misses its bar: {measure_}")
    for heading in render.idle(results) if judged and path != render.GPU_RESULTS else []:
        print(f"misses.md gives a reason where nothing is missed: {heading}")
    return int(bool(failed or unexplained))


def begun(only: Sequence[str] | None) -> tuple[Path, dict[str, Any]]:
    """Where the results go, and what they are so far: nothing yet, or those that a part of them is to be put into."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    fresh: dict[str, Any] = {"date": str(date.today()), "size": SIZE, "machine": machine(), "scripts": []}
    if only == [GPU]:
        fresh["machine"]["gpu"] = _gpu_model()
        return folder / PART if SIZE == "small" else render.GPU_RESULTS, fresh
    if not only:
        return folder / f"{date.today()}.json", fresh
    path = render.last()
    before: dict[str, Any] = json.loads(path.read_text())
    return (path, before) if _conditions(before) == _conditions(fresh) else (folder / PART, fresh)


def _conditions(results: dict[str, Any]) -> list[Any]:
    """What results must have in common to stand in one table."""
    return [results["size"], *(results["machine"][key] for key in ("cpu", "cores", "python", "packages"))]


def measure(names: Sequence[str], path: Path, results: dict[str, Any]) -> None:
    """Put what these scripts find into the results, in place of what was there, and write the file after each."""
    scripts = results["scripts"]
    for name in names:
        place = next((at for at, script in enumerate(scripts) if script["name"] == name), len(scripts))
        scripts[place : place + 1] = [run_script(name)]
        results["seconds"] = round(sum(script["seconds"] for script in scripts))
        path.write_text(json.dumps(results, indent=1) + "\n")


def run_script(name: str, **variables: str) -> dict[str, Any]:
    """Run one benchmark as a process of its own, with one thread in each of its workers."""
    print(f"\n== {name}", flush=True)
    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        environment = os.environ | {"OMP_NUM_THREADS": "1", ROWS_FILE: str(rows)} | variables
        command = [sys.executable, str(HERE / f"{name}.py")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, complaints = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            complaints = f"It was ended after {LIMIT_S} s."
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = json.loads(rows.read_text()) if rows.exists() else []
    if error := "" if found else _last_line(complaints) or f"exit code {process.returncode}":
        print(complaints, file=sys.stderr)
    took_s = round(perf_counter() - began, 1)
    return {"name": name, "date": str(date.today()), "seconds": took_s, "error": error or None, "rows": found}


def _last_line(text: str) -> str:
    """What a traceback ends with, without the folders of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"/\S*/", "", lines[-1])[:200] if lines else ""


def machine() -> dict[str, Any]:
    """What a reader needs to know of it; neither its name nor its paths."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
        "threads_per_worker": 1,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
    }


def _gpu_model() -> str:
    import torch  # for this alone

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
