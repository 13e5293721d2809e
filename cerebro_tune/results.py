"""What a run gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from cerebro_tune.errors import CerebroError
from cerebro_tune.timeline import TimeShares

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, repr=False)
class TrialResult:
    """How one trial went.

    `metrics` and `checkpoint` are those of the best report by the metric on the whole validation set; a trial that
    ended before it had one has its last report there. `history` has every report, `visits` the (epoch, shard, worker)
    of every unit in order.
    """

    trial_id: str
    config: Mapping[str, Any]
    status: str
    """finished, stopped, paused or failed."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    last_metrics: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    visits: Sequence[tuple[int, int, str]] = ()
    checkpoint: Path | None = None
    last_checkpoint: Path | None = None
    error: str | None = None
    """The traceback of a failed trial."""
    raised: Sequence[str] = ()
    """The classes of the exception in it, by their full names, the most specific first."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What its units took: compute, validate and hop; the rest of its life it waited."""

    def __repr__(self) -> str:
        values = {name: value for name, value in self.metrics.items() if isinstance(value, int | float)}
        shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        return f"TrialResult({self.trial_id}, {self.status}, {dict(self.config)}, {shown})"


class Results(Sequence[TrialResult]):
    """The trials of a run in the order in which they were added, and where their files are."""

    def __init__(
        self,
        trials: Sequence[TrialResult],
        metric: str | None,
        mode: str,
        run_dir: Path,
        shares: TimeShares,
        interrupted: bool = False,
    ) -> None:
        self._trials, self.interrupted = tuple(trials), interrupted
        self.metric, self.mode, self.run_dir, self.shares = metric, mode, run_dir, shares

    def __len__(self) -> int:
        return len(self._trials)

    @overload
    def __getitem__(self, index: int) -> TrialResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TrialResult]: ...
    def __getitem__(self, index: int | slice) -> TrialResult | Sequence[TrialResult]:
        return self._trials[index]

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for trial in self._trials:
            counts[trial.status] = counts.get(trial.status, 0) + 1
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"Results({told or 'no trials'}; {self.run_dir})"

    def closing_line(self, hint: bool) -> str:
        """Where the time went, and with a hint what to do about it."""
        begin = "Interrupted; the results so far. " if self.interrupted else ""
        return f"{begin}{self.shares}" + (f" ({self.shares.hint})" if hint and self.shares.hint else "")

    @property
    def ranked(self) -> list[TrialResult]:
        """The trials that have the metric, best first."""
        if self.metric is None:
            raise CerebroError("The run had no metric to rank by: pass metric= and mode= to fit.")
        having = [trial for trial in self._trials if _is_number(trial.metrics.get(self.metric))]
        return sorted(having, key=lambda trial: trial.metrics[self.metric or ""], reverse=self.mode == "max")

    @property
    def best(self) -> TrialResult:
        """The trial with the best metric."""
        ranked = self.ranked
        if ranked:
            return ranked[0]
        errors = [trial.error for trial in self._trials if trial.error]
        nowhere = not any(self.metric in trial.metrics for trial in self._trials)
        raise CerebroError(
            f"None of the {len(self)} trials has reported {self.metric!r}"
            + ("." if nowhere else " as anything but NaN.")
            + (f" The first error was:\n{errors[0]}" if errors else "")
        )

    def to_table(self) -> pa.Table:
        """An Arrow table with a row per trial: id, status, units, `config/...`, `metrics/...`, checkpoint, error."""
        import pyarrow as pa

        rows = []
        for trial in self._trials:
            row: dict[str, Any] = {"trial_id": trial.trial_id, "status": trial.status, "units": len(trial.visits)}
            row |= {f"config/{key}": _plain(value) for key, value in trial.config.items()}
            row |= {f"metrics/{key}": _plain(value) for key, value in trial.metrics.items()}
            row |= {"checkpoint": None if trial.checkpoint is None else str(trial.checkpoint), "error": trial.error}
            rows.append(row)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _plain(value: Any) -> Any:
    """A value that an Arrow column can hold: scalars as they are, anything else as its repr."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _column(values: list[Any]) -> list[Any]:
    """A column of one type: text where the trials' values are of several."""
    kinds = {type(value) for value in values if value is not None}
    return values if len(kinds) <= 1 or kinds <= {int, float} else [None if v is None else str(v) for v in values]
