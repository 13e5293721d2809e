"""What a run shows while it goes: a live table on a terminal, HTML in a notebook, plain lines elsewhere, or nothing."""

from __future__ import annotations

import html
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from cerebro_tune.book import TrialBook
    from cerebro_tune.crew import Crew
    from cerebro_tune.hopper import Hopper
    from cerebro_tune.timeline import Timeline

_REDRAW_S = 0.25
"""A snapshot visits every trial: with thousands of them, one per unit would cost more than the unit."""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial, as shown."""

    trial_id: str
    status: str
    done: float
    """Share of its units that are committed, 0 to 1."""
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment: what the displays draw, and all they know."""

    trials: tuple[TrialRow, ...]
    workers: tuple[tuple[str, str], ...]
    """(worker, what it runs)."""
    metric: str | None
    mode: str
    idle: float
    """Share of worker time spent idle so far."""
    eta_s: float | None


def take_snapshot(book: TrialBook, hopper: Hopper, crew: Crew, timeline: Timeline) -> Snapshot:
    """The state of a run now."""
    rows, left = [], 0
    for page in book:
        _, done, total = hopper.progress(page.trial.id)
        status = hopper.status(page.trial.id)
        left += 0 if status.ended else total - done
        rows.append(TrialRow(page.trial.id, status.value, done / total, page.last))
    running = [(worker, crew.running.get(worker)) for worker in crew.ids]
    shown = tuple((str(worker), f"{unit.trial} shard {unit.shard}" if unit else "idle") for worker, unit in running)
    eta_s = timeline.mean_unit_s * left / len(crew.ids) if timeline.units else None
    return Snapshot(tuple(rows), shown, book.metric, book.mode, timeline.shares.idle, eta_s)


class Progress(ABC):
    """A display. Called on the thread that drives the run."""

    def start(self, snapshot: Callable[[], Snapshot]) -> None:
        """The run begins; `snapshot` gives its state at any later moment."""
        self.snapshot = snapshot

    @abstractmethod
    def update(self) -> None:
        """Something happened in the run."""

    @abstractmethod
    def say(self, text: str, stream: str = "stdout") -> None:
        """Print a line of the run or of user code without breaking the display."""

    def reported(self, trial_id: str, report: Mapping[str, Any]) -> None:  # noqa: B027  # a table shows it anyway
        """A trial reported at the end of an epoch."""

    @abstractmethod
    def stop(self) -> None:
        """The run is over: draw the last state and let go."""


class Silent(Progress):
    """Shows nothing of the run; what user code prints still comes through."""

    def update(self) -> None:  # noqa: D102
        return

    def say(self, text: str, stream: str = "stdout") -> None:  # noqa: D102
        with suppress(OSError):  # the log may be on the disk that is full
            print(text, file=sys.stderr if stream == "stderr" else sys.stdout, flush=True)

    def stop(self) -> None:  # noqa: D102
        return


class Lines(Silent):
    """A line for each epoch of each trial: for logs and pipes."""

    def reported(self, trial_id: str, report: Mapping[str, Any]) -> None:  # noqa: D102
        self.say(f"{trial_id}  epoch {report['epoch']:g}  {_metrics(report)}")


class Live(Progress):
    """A table that redraws itself on a terminal."""

    def start(self, snapshot: Callable[[], Snapshot]) -> None:  # noqa: D102
        from rich.live import Live as RichLive

        super().start(snapshot)
        self._latest, self._taken = snapshot(), monotonic()
        # Rich's own thread draws, from a snapshot taken on the run's thread: no lock, and units of minutes still tick.
        self._live = RichLive(get_renderable=lambda: render(self._latest), refresh_per_second=round(1 / _REDRAW_S))
        self._live.start()

    def update(self) -> None:  # noqa: D102
        if monotonic() - self._taken > _REDRAW_S:
            self._latest, self._taken = self.snapshot(), monotonic()

    def say(self, text: str, stream: str = "stdout") -> None:  # noqa: D102
        self._live.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:  # noqa: D102
        self._latest = self.snapshot()
        self._live.stop()


class Notebook(Progress):
    """An HTML table in the cell's output, redrawn a few times a second at most."""

    def start(self, snapshot: Callable[[], Snapshot]) -> None:  # noqa: D102
        from IPython.display import HTML, display

        super().start(snapshot)
        self._html: Any = HTML
        self._handle: Any = display(HTML(to_html(snapshot())), display_id=True)
        self._drawn = monotonic()

    def update(self) -> None:  # noqa: D102
        if monotonic() - self._drawn > _REDRAW_S:
            self._draw()

    def say(self, text: str, stream: str = "stdout") -> None:  # noqa: D102
        print(text, file=sys.stderr if stream == "stderr" else sys.stdout)

    def stop(self) -> None:  # noqa: D102
        self._draw()

    def _draw(self) -> None:
        self._handle.update(self._html(to_html(self.snapshot())))
        self._drawn = monotonic()


def make_progress(wanted: bool | None) -> Progress:
    """None: whatever suits where the output goes; True: the same, and lines rather than nothing; False: silence."""
    if wanted is False:
        return Silent()
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython().__class__.__name__ == "ZMQInteractiveShell":
        return Notebook()
    return Live() if sys.stdout.isatty() else Lines()


def render(snapshot: Snapshot) -> Table:
    """The rich table of a run."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(caption=_caption(snapshot), caption_justify="left", expand=False)
    for heading in ("trial", "status", "progress", "metrics"):
        table.add_column(heading, no_wrap=heading != "metrics")
    for row in shown(snapshot):
        table.add_row(row.trial_id, row.status, ProgressBar(1.0, row.done, width=20), _metrics(row.metrics))
    return table


def to_html(snapshot: Snapshot) -> str:
    """The HTML table of a run."""
    rows = "".join(
        f"<tr><td>{html.escape(row.trial_id)}</td><td>{row.status}</td>"
        f'<td><progress max="1" value="{row.done:.3f}"></progress></td>'
        f"<td>{html.escape(_metrics(row.metrics))}</td></tr>"
        for row in shown(snapshot)
    )
    head = "<tr><th>trial</th><th>status</th><th>progress</th><th>metrics</th></tr>"
    return f"<table>{head}{rows}</table><div>{html.escape(_caption(snapshot))}</div>"


_SHOWN = 20


def shown(snapshot: Snapshot) -> list[TrialRow]:
    """The trials worth a row: those at work, then the best of the others."""
    sign = -1.0 if snapshot.mode == "max" else 1.0

    def rank(row: TrialRow) -> tuple[bool, float]:
        value = row.metrics.get(snapshot.metric) if snapshot.metric else None
        return row.status not in ("running", "ready", "deciding"), sign * value if value is not None else float("inf")

    return sorted(snapshot.trials, key=rank)[:_SHOWN]


def _caption(snapshot: Snapshot) -> str:
    counts: dict[str, int] = {}
    for row in snapshot.trials:
        counts[row.status] = counts.get(row.status, 0) + 1
    parts = [", ".join(f"{count} {status}" for status, count in sorted(counts.items()))]
    parts += [f"{worker}: {what}" for worker, what in snapshot.workers[:8]]
    parts.append(f"idle {snapshot.idle:.0%}".replace("%", " %"))
    if snapshot.eta_s is not None:
        minutes, seconds = divmod(round(snapshot.eta_s), 60)
        parts.append(f"about {minutes}:{seconds:02d} left")
    return " · ".join(parts)


_BOOKKEEPING = {
    "epoch", "units", "training_iteration", "unit_time_s", "hop_time_s", "validation_time_s", "shard", "worker",
}  # fmt: skip


def _metrics(report: Mapping[str, Any]) -> str:
    values = {
        name: value for name, value in report.items() if name not in _BOOKKEEPING and isinstance(value, int | float)
    }
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
