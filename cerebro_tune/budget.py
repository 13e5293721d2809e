"""How much memory the states of all trials may take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from cerebro_tune.buffers import readable
from cerebro_tune.errors import ConfigurationError

_UNITS = {"": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for kind, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_VALID = 'a share such as "50%", a size such as "4GB" or "512MiB", or a number of bytes'


def state_budget(state_memory: str | int) -> int:
    """`state_memory` in bytes; a share is one of what this process may use at all."""
    limit = memory_limit()
    nbytes = _parsed(state_memory, limit)
    if not 0 < nbytes <= limit:
        raise ConfigurationError(
            f"state_memory={state_memory!r} are {nbytes} bytes; it must be more than 0 and at most the "
            f"{readable(limit)} that this process may use: {_VALID}"
        )
    return nbytes


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: the machine's memory, or less where a cgroup (a container, a job) says so."""
    return min([int(psutil.virtual_memory().total), *_cgroup_limits(proc, cgroups)])


def _parsed(state_memory: str | int, limit: int) -> int:
    if isinstance(state_memory, int) and not isinstance(state_memory, bool):
        return state_memory
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*", state_memory) if isinstance(state_memory, str) else None
    )
    if match and match[2] == "%":
        return int(float(match[1]) / 100 * limit)
    if match and match[2].lower() in {*_UNITS, "b"}:
        return int(float(match[1]) * _UNITS.get(match[2].lower(), 1))
    raise ConfigurationError(f"state_memory={state_memory!r} is not understood: give {_VALID}")


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The limits of this process's cgroup and of all above it; version 2 and, for older systems, version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # A container often sees its own group as the root of the file system, under another path than it is told.
        for folder in {root, group, *group.parents} - set(root.parents):
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # no such file, or "max"
                continue
