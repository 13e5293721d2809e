"""A plain table of what a benchmark measured and what it must reach, and its rows as JSON for who collects them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS_FILE = "BENCH_ROWS"
"""The environment variable that names the file for the rows."""


class Report:
    """Collects rows; `finish` prints them and says with the exit code whether every bar was met."""

    def __init__(self, title: str = "") -> None:
        self._title = title
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        measure: str,
        figure: float,
        bar: float | None = None,
        unit: str = "x",
        at_most: bool = True,
        *,
        row: int | str | None = None,
        runs: Sequence[float] = (),
        interval: tuple[float, float] | None = None,
    ) -> None:
        """One row; `bar` None for a figure that is stated and not judged, `at_most` False where more is better.

        `row` says what it belongs to: the number of a bar in `render.TITLES`. `runs` are the figures of single runs,
        `interval` that of 95 %.
        """
        spread: dict[str, Any] = {"min": min(runs), "max": max(runs), "runs": len(runs)} if runs else {}
        if interval is not None:
            spread["interval"] = list(interval)
        met = None if bar is None else bool(figure <= bar if at_most else figure >= bar)
        self._rows.append(
            {"row": row, "measure": measure, "figure": float(figure), "unit": unit, "bar": bar, "at_most": at_most}
            | {"met": met}
            | spread
        )

    def not_run(self, measure: str, why: str, *, row: int | str | None = None) -> None:
        """A row that could not be measured here, and what it lacks."""
        self._rows.append({"row": row, "measure": measure, "not_run": why})

    def finish(self) -> int:
        """Print the table, and write the rows where they are asked for; the exit code is 1 when a bar was missed."""
        lines = [("measure", "figure", "bar", ""), *map(line_of, self._rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        if self._title:
            print(self._title)
        for measure, figure, bar, verdict in lines:
            print(f"{measure:<{widths[0]}}  {figure:>{widths[1]}}  {bar:>{widths[2]}}  {verdict}".rstrip())
        if path := os.environ.get(ROWS_FILE):
            Path(path).write_text(json.dumps(self._rows))
        return int(any(row.get("met") is False for row in self._rows))


def line_of(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """A row as text: measure, figure, bar, verdict."""
    if "not_run" in row:
        return row["measure"], "not run", "", row["not_run"]
    unit, limit = row["unit"], row["bar"]
    bar = "" if limit is None else f"{'<=' if row['at_most'] else '>='} {number(limit)} {unit}".rstrip()
    verdict = {None: "", True: "OK", False: "MISS"}[row["met"]]
    return row["measure"], f"{number(row['figure'])} {unit}".rstrip(), bar, verdict


def number(value: float) -> str:
    """Three digits are more than most of them deserve."""
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
