"""Compares the ratios of two results: `python benchmarks/compare.py OLD NEW [--margin 1.5]`.

Only ratios are compared, which are measured within one run: seconds differ from machine to machine, and from day to day
on the same one. The exit code is 1 when a ratio is worse than it was by more than the margin.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Change:
    """A ratio then and now."""

    measure: str
    old: float
    new: float
    worse: float
    """By what factor; below 1 it is better."""


def changes(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> Iterator[Change]:
    """The ratios that both have, by their names."""
    before = {row["measure"]: row for row in old if _is_ratio(row)}
    for row in new:
        if _is_ratio(row) and row["measure"] in before:
            was, now = before[row["measure"]]["figure"], row["figure"]
            yield Change(row["measure"], was, now, now / was if row["at_most"] else was / now)


def _is_ratio(row: dict[str, Any]) -> bool:
    return row.get("unit") == "x" and row["figure"] > 0


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a run of the benchmarks."""
    return [row for script in results["scripts"] for row in script["rows"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=1.5, help="how much worse is let pass (%(default)s)")
    given = parser.parse_args()
    old, new = (rows_of(json.loads(path.read_text())) for path in (given.old, given.new))
    found = sorted(changes(old, new), key=lambda change: -change.worse)
    for change in found:
        verdict = "WORSE" if change.worse > given.margin else ""
        print(f"{change.measure:<90}{change.old:>9.4g}{change.new:>9.4g}  x {change.worse:<6.3g}{verdict}".rstrip())
    for measure in sorted({row["measure"] for row in old} ^ {row["measure"] for row in new}):
        print(f"{measure:<90}{'only in one of them'}")
    return int(any(change.worse > given.margin for change in found))


if __name__ == "__main__":
    sys.exit(main())
