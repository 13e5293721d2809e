"""What all processes below one have used: CPU seconds, and the peak of their memory together (PSS)."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Usage:
    """Of a process and all its descendants, from here on; it is looked at by calls of `look`.

    The CPU time of a process that ends counts as of the last look at it: what Ray's daemon reaps, it leaves no sum of.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = _cpu_times(pid)
        self._last = dict(self._before)
        self.peak_mb = 0.0

    def look(self, memory: bool) -> None:
        """Note how much CPU time they have had, and how much memory they have, which takes some milliseconds."""
        self._last |= _cpu_times(self._pid)
        if memory:
            self.peak_mb = max(self.peak_mb, sum(map(_pss_kb, _family(self._pid))) / 1024)

    @property
    def cpu_s(self) -> float:
        """CPU seconds up to the last look."""
        return sum(spent - self._before.get(pid, 0.0) for pid, spent in self._last.items())


def _family(root: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _cpu_times(root: int) -> dict[int, float]:
    """Seconds by process."""
    stats = {pid: _stat(pid) for pid in _family(root)}
    return {pid: (int(fields[11]) + int(fields[12])) / _TICKS for pid, fields in stats.items() if fields}


def _stat(pid: int) -> list[str]:
    """What /proc tells of a process after its name, which may hold anything; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss_kb(pid: int) -> int:
    """The memory of one process, with its share of what it has in common with others."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
