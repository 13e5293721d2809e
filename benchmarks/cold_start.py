"""From the start of a user's script to its first batch: imports, two worker processes up, the first unit begun.

A fresh Python for each run; the files of the packages are in the system's cache, since the first run is not counted.
The script is `_cold.py`, with a plain PyTorch model or a LightningModule.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from _report import Report
from _sizes import sized
from cerebro_tune import ShardedDataset

RUNS = sized(1, 5, 9)
BAR_S = 4.5
KINDS = {"torch": "a TorchTrainable", "lightning": "a LightningModule"}


def main() -> int:
    report = Report("Cold start")
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(RUNS + 1):
        for kind, values in found.items():
            seconds = cold(kind)
            if number:
                values.append(seconds)
    for kind, name in KINDS.items():
        seconds = statistics.median(found[kind])
        report.add(f"from nothing to the first batch, {name}", seconds, BAR_S, "s", row=13, runs=found[kind])
    return report.finish()


def cold(kind: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = pa.FixedSizeListArray.from_arrays(np.zeros(64 * 8, "float32"), 8)
        ShardedDataset.write(pa.table({"x": x, "y": np.arange(64) % 2}), folder / "train", num_shards=4)
        began = time.monotonic()
        script = [sys.executable, str(Path(__file__).with_name("_cold.py")), str(folder), kind]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        return float((folder / "begun").read_text()) - began


if __name__ == "__main__":
    sys.exit(main())
