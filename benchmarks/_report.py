"""A plain table of what a benchmark measured and what it must reach."""

from __future__ import annotations

from collections.abc import Sequence


class Report:
    """Collects rows; `finish` prints them and says with the exit code whether every bar was met."""

    def __init__(self, title: str = "") -> None:
        self._title = title
        self._rows: list[tuple[str, str, str, str]] = []

    def add(
        self,
        measure: str,
        figure: float,
        bar: float | None = None,
        unit: str = "x",
        at_most: bool = True,
        row: int | None = None,
        runs: Sequence[float] | None = None,
    ) -> None:
        """One row; `bar` None for a figure that is stated and not judged, `at_most` False for a floor.

        `row` is its number in the table of bars, `runs` are the single figures behind a median or mean.
        """
        limit, verdict = "", ""
        if bar is not None:
            limit = f"{'<=' if at_most else '>='} {_number(bar)} {unit}"
            verdict = "OK" if (figure <= bar if at_most else figure >= bar) else "MISS"
        number = "" if row is None else f"{row}. "
        spread = "" if runs is None else f", {len(runs)} runs: {_number(min(runs))} to {_number(max(runs))}"
        self._rows.append((f"{number}{measure}{spread}", f"{_number(figure)} {unit}", limit, verdict))

    def finish(self) -> int:
        """Print the table; the exit code is 1 when a bar was missed."""
        rows = [("measure", "figure", "bar", ""), *self._rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        if self._title:
            print(self._title)
        for measure, figure, bar, verdict in rows:
            line = f"{measure:<{widths[0]}}  {figure:>{widths[1]}}  {bar:>{widths[2]}}  {verdict}"
            print(line.rstrip())
        return int(any(row[3] == "MISS" for row in self._rows))


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
