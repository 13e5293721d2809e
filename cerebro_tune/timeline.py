"""Where the time of a run went: the shares of its closing line, and a Chrome trace of every unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cerebro_tune.units import WorkerId
from cerebro_tune.wholefile import whole_file
from cerebro_tune.workers.messages import Finished


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of workers x wall clock, from the first unit's start to the last one's end; they add up to 1."""

    compute: float = 0.0
    validate: float = 0.0
    hop: float = 0.0
    idle: float = 0.0

    def __str__(self) -> str:
        return (
            f"compute {self.compute:.0%} · validate {self.validate:.0%} · hop {self.hop:.0%} · idle {self.idle:.0%}"
        ).replace("%", " %")

    @property
    def hint(self) -> str | None:
        """What to do about a run that spends its time elsewhere than in training."""
        if self.idle > 0.25:
            return "workers idled: raise live_trials, add trials, or use fewer workers"
        if self.hop > 0.15:
            return "hops are dear beside these units: use fewer shards, or placement='shared'"
        if self.validate > 0.35:
            return "validation takes long: lower validation_rows, or report_every='epoch'"
        return None


class Timeline:
    """Adds up what units took; with `trace=True` also keeps when."""

    def __init__(self, workers: Sequence[WorkerId], trace: bool) -> None:
        self._workers, self._trace = tuple(workers), trace
        self._began: float | None = None
        self._ended = 0.0
        self._compute = self._validate = self._hop = 0.0
        self.units = 0
        self._events: list[Finished] = []

    def add(self, finished: Finished) -> None:
        """Count one unit."""
        spans = finished.spans
        self._began = spans.began if self._began is None else min(self._began, spans.began)
        self._ended = max(self._ended, spans.ended)
        self._compute += spans.compute_s + spans.build_s
        self._validate += spans.validation_s
        self._hop += spans.hop_s
        self.units += 1
        if self._trace:
            self._events.append(finished)

    @property
    def mean_unit_s(self) -> float:
        """Seconds that a unit has taken on the mean, all told; 0 before the first."""
        return (self._compute + self._validate + self._hop) / self.units if self.units else 0.0

    @property
    def shares(self) -> TimeShares:
        """The shares so far; all zero before the first unit has ended."""
        if self._began is None:
            return TimeShares()
        total = max((self._ended - self._began) * len(self._workers), 1e-9)
        compute, validate, hop = self._compute / total, self._validate / total, self._hop / total
        return TimeShares(compute, validate, hop, max(0.0, 1.0 - compute - validate - hop))

    def write(self, path: Path) -> None:
        """Write the trace in the Chrome trace event format: open it in a trace viewer; times in microseconds."""
        zero = self._began or 0.0
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": worker.number, "args": {"name": str(worker)}}
            for worker in self._workers
        ]
        free_since = dict.fromkeys(self._workers, zero)
        for finished in sorted(self._events, key=lambda event: event.spans.began):
            spans, unit = finished.spans, finished.unit
            detail = {"trial": unit.trial, "epoch": unit.epoch, "shard": unit.shard}
            trained = spans.trained - spans.validation_s
            for name, began, ended in (
                ("idle", free_since[finished.worker], spans.began),
                ("build", spans.began, spans.began + spans.build_s),
                ("hop", spans.began + spans.build_s, spans.loaded),
                (unit.trial, spans.loaded, trained),
                ("validate", trained, spans.trained),
                ("commit", spans.trained, spans.ended),
            ):
                if ended > began:
                    events.append(
                        {
                            "name": name,
                            "cat": "unit" if name == unit.trial else name,
                            "ph": "X",
                            "pid": 0,
                            "tid": finished.worker.number,
                            "ts": (began - zero) * 1e6,
                            "dur": (ended - began) * 1e6,
                            "args": {} if name == "idle" else detail,
                        }
                    )
            free_since[finished.worker] = spans.ended
        with whole_file(path) as file:
            file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
