"""Memory of all processes together with a training set of 2 GB and two workers, at its peak.

The proportional set size, sampled about once a second while a search of 4 models x 1 epoch runs: of everything that
the search has started and of the process that runs it, Ray's own processes included. Stock Ray and two Optuna processes
train with each trial's own copy of the data, loaded from a NumPy file in the trial, as their examples do it; stock Ray
once more with every trial on the same mapped Arrow files, so that there is one copy, as there is in ours.

Optuna's processes hold the data of the trial before as well, until Python happens to collect the cycles of its Trainer,
unless `gc_after_trial=True` asks for that, which the examples do not: both are measured.

Each search has a contender of its own, with three turns, or one where stock does what is in none of the examples. There
is one at a time: what waits would share the pages of libraries and mapped files, and halve what they count for.
Ours are higher in the second and third turn than in the first, since more shards stay mapped; stock's are the same.
131,072 rows of 4,096 floats; the model is linear.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import _in_memory
from _in_memory import DATA_BYTES
from _report import Report
from _sizes import sized
from _turns import Contender, Opened

ROUNDS = sized(1, 3)
BAR = 0.6
# what of stock is beside what of ours -> bar
PAIRS: dict[str, tuple[str, str, float | None]] = {
    "stock Ray Tune": ("ray", "ours in ray", BAR),
    "two Optuna processes": ("optuna", "ours in optuna", BAR),
    "two Optuna processes, gc_after_trial": ("optuna, gc_after_trial", "ours in optuna", BAR),
    "stock Ray Tune on mapped files": ("ray, mapped", "ours in ray", None),
}
ONCE = {"ray, mapped", "optuna, gc_after_trial"}
"""What has one turn only."""


def main() -> int:
    report = Report(f"Peak memory of 4 trials on 2 workers, {DATA_BYTES / 1e9:.1f} GB of data")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if lacking := room(folder):
            for stock in PAIRS:
                report.not_run(f"peak memory beside {stock}", lacking, row=3)
            return report.finish()
        _in_memory.write_data(folder)
        peaks = measure(folder)
    for contender, values in peaks.items():
        report.add(f"peak memory, {contender}", statistics.median(values), unit="MB", row=3, runs=values)
    for stock, (theirs, mine, bar) in PAIRS.items():
        beside = peaks[theirs] * ROUNDS if theirs in ONCE else peaks[theirs]
        ratios = [a / b for a, b in zip(peaks[mine], beside, strict=True)]
        report.add(f"peak memory beside {stock}", statistics.median(ratios), bar, row=3, runs=ratios)
    return report.finish()


def room(folder: Path) -> str:
    """What is missing: the data lies on the disk twice, and while it is written once more."""
    needed = 3 * DATA_BYTES
    free = shutil.disk_usage(folder).free
    return "" if free > needed else f"{free / 1e9:.1f} GB are free for temporary files, of {needed / 1e9:.1f} needed"


def measure(folder: Path) -> dict[str, list[float]]:
    opened: dict[str, Opened] = {
        "ours in ray": partial(_in_memory.ours_in_ray, folder),
        "ray": partial(_in_memory.stock_ray, folder, "own copy"),
        "ray, mapped": partial(_in_memory.stock_ray, folder, "mapped"),
        "ours in optuna": partial(_in_memory.ours_in_optuna, folder),
        "optuna": partial(_in_memory.stock_optuna, folder, False),
        "optuna, gc_after_trial": partial(_in_memory.stock_optuna, folder, True),
    }
    peaks: dict[str, list[float]] = {}
    for name, each in opened.items():
        with Contender(each, watched=True) as contender:
            peaks[name] = [contender.turn().peak_mb for _ in range(1 if name in ONCE else ROUNDS)]
    return peaks


if __name__ == "__main__":
    sys.exit(main())
