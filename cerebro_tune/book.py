"""What a run writes down of each trial: its reports, its visits, its best."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cerebro_tune.errors import ConfigurationError, UnknownMetricError
from cerebro_tune.instructions import ReportUnit
from cerebro_tune.results import TrialResult
from cerebro_tune.settings import RunSettings, whole_number
from cerebro_tune.trainable import Recipe
from cerebro_tune.units import Decision, Status, Trial, Unit
from cerebro_tune.workers.base import ship
from cerebro_tune.workers.messages import Export, Finished, improves


@dataclass(frozen=True)
class Brought:
    """The recipe of a trial that is not the run's, and as it travels."""

    recipe: Recipe
    shipped: bytes


@dataclass
class TrialPage:
    """One trial's entry."""

    trial: Trial
    config: Mapping[str, Any]
    """As the user gave it."""
    shipped: bytes
    """What of it the model takes, cloudpickled."""
    batch_size: int
    suffix: str
    """Of its checkpoints."""
    brought: Brought | None = None
    """Until the trial has ended: it may hold the weights of an instance."""
    source: str | None = None
    """The trial that a clone goes on from."""
    inherited: int = 0
    """Units that a clone's source had done."""
    born_under: bytes | None = None
    """The shipped config that a clone's source was trained under, where it differs from `shipped`."""
    visits: list[tuple[int, int, str]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    latest: Finished | None = None
    """The last unit committed, of which the report may still be due."""
    best: dict[str, Any] | None = None
    checkpoint: Path | None = None
    last_checkpoint: Path | None = None
    digests: dict[str, str] = field(default_factory=dict)
    """Of the checkpoint files, `best` and `last`."""
    error: str | None = None
    raised: tuple[str, ...] = ()
    """The classes of the exception that failed it."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("compute", "validate", "hop"), 0.0))
    """What its units took."""
    wish: Decision | None = None
    """What was asked out of turn while a report waits for its answer."""

    @property
    def units(self) -> int:
        """Units in the committed state: its own, and those its source had done."""
        return self.inherited + len(self.visits)

    @property
    def trained_under(self) -> bytes | None:
        """The shipped config that the committed state was trained under, while it differs from `shipped`."""
        return None if self.visits else self.born_under

    @property
    def last(self) -> dict[str, Any]:
        """The last report; empty before the first."""
        return self.history[-1] if self.history else {}

    def committed(self, finished: Finished) -> None:
        """Note a unit whose state is committed."""
        self.latest = finished
        self.visits.append((finished.unit.epoch, finished.unit.shard, str(finished.worker)))
        spans = finished.spans
        self.seconds["compute"] += spans.compute_s + spans.build_s
        self.seconds["validate"] += spans.validation_s
        self.seconds["hop"] += spans.hop_s

    def report(self, due: ReportUnit, shards: int) -> dict[str, Any]:
        """Write down the report that is due, and return it."""
        assert self.latest is not None, "a report without a unit"
        finished, spans = self.latest, self.latest.spans
        report = dict(finished.metrics) | {
            "training_iteration": len(self.history) + 1,
            "epoch": due.units_done / shards,
            "units": due.units_done,
            "unit_time_s": spans.compute_s,
            "hop_time_s": spans.hop_s,
            "validation_time_s": spans.validation_s,
            "shard": due.unit.shard,
            "worker": str(finished.worker),
        }
        self.history.append(report)
        return report


class TrialBook:
    """The pages of all trials, and the rule of what counts as best.

    Reports on the whole validation set compete (those at an epoch's end); without a validation set all of them do.
    """

    def __init__(self, settings: RunSettings, recipe: Recipe) -> None:
        self.metric, self.mode, self.keep = settings.metric, settings.mode, settings.keep
        self._settings, self._recipe = settings, recipe
        self._pages: dict[str, TrialPage] = {}
        self._warned = False

    def __getitem__(self, trial: str) -> TrialPage:
        return self._pages[trial]

    def __iter__(self) -> Iterator[TrialPage]:
        return iter(self._pages.values())

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def ids(self) -> Collection[str]:
        """Ids of the trials, in order."""
        return self._pages.keys()

    def recipe_of(self, page: TrialPage) -> Recipe:
        """The trial's own recipe, or the run's."""
        return self._recipe if page.brought is None else page.brought.recipe

    def bring(self, recipe: Recipe) -> Brought | None:
        """A recipe for one trial; None where it is the run's, so that workers have it."""
        shipped = ship(recipe, recipe.name)
        if shipped == self._settings.spec.recipe:
            return None
        if ship(dict(recipe.loader), "loader") != ship(dict(self._recipe.loader), "loader"):
            raise ConfigurationError(
                f"{recipe.name} has loader={dict(recipe.loader)!r}, and the run, which began with {self._recipe.name}, "
                f"{dict(self._recipe.loader)!r}: the trials of a run read the same batches. Use an executor for each."
            )
        return Brought(recipe, shipped)

    def new_page(
        self, config: Mapping[str, Any] | None, brought: Brought | None, index: int | None = None
    ) -> TrialPage:
        """The page of one more trial, not yet in the book; ConfigurationError for a config that cannot be trained."""
        chosen = dict(config or {})
        settings, recipe = self._settings, self._recipe if brought is None else brought.recipe
        defaults = {"epochs": recipe.epochs or settings.epochs, "batch_size": recipe.batch_size or settings.batch_size}
        ours = {key: default if recipe.takes(key) else chosen.get(key, default) for key, default in defaults.items()}
        ours = {key: whole_number(f"{key} in a config", value, 1) for key, value in ours.items()}
        model_config = recipe.model_config(chosen)
        recipe.check_config(model_config)
        trial = Trial(f"trial-{len(self):04d}", len(self) if index is None else index, ours["epochs"])
        shipped = ship(model_config, f"The config {chosen}")
        return TrialPage(trial, chosen, shipped, ours["batch_size"], recipe.suffix, brought)

    def closed_page(self, trial: Trial, config: Mapping[str, Any], batch_size: int) -> TrialPage:
        """The page of a trial that has ended in another process."""
        return TrialPage(trial, dict(config), b"", batch_size, self._recipe.suffix)

    def inherit(self, page: TrialPage, source: TrialPage) -> None:
        """Note that a trial goes on from the committed state of another."""
        page.source, page.inherited = source.trial.id, source.units
        before = source.trained_under or source.shipped
        page.born_under = before if before != page.shipped else None

    def add(self, page: TrialPage) -> None:
        """Put a page into the book."""
        self._pages[page.trial.id] = page

    def competes(self, epoch_done: bool) -> bool:
        """Whether a report made here may be a trial's best."""
        spec = self._settings.spec
        return epoch_done or (spec.validation_rows is None and spec.report_every == "unit")

    def path(self, page: TrialPage, name: str) -> Path:
        """Where a checkpoint of the trial lies: name is `best` or `last`."""
        return self._settings.run_dir / page.trial.id / f"{name}{page.suffix}"

    def _staged(self, page: TrialPage, units: int) -> Path:
        """Where a worker writes what may become the best: it is not until the unit is committed and reported."""
        return self.path(page, f"best.{units}")

    def clear_staged(self, early: Collection[str]) -> None:
        """Remove what was written by units that were not committed, or in a time that a loss of power has undone.

        What waits to be put in its place stays, and so does the next one of trials whose next unit has ended `early`.
        """
        for page in self:
            waits = {page.units + 1} if page.trial.id in early else set()
            if page.latest is not None and page.latest.best_written:
                waits.add(page.units)
            folder = self.path(page, "best").parent
            staged = {path for path in folder.glob("best.[0-9]*") if _number_of(path) not in waits}
            for path in staged | {*folder.glob("*.partial")}:
                path.unlink()

    def export(self, unit: Unit, epoch_done: bool, last: bool, durable: bool) -> Export | None:
        """What the worker is to write after this unit, if anything; `durable` says that it outlives a loss of power."""
        page = self._pages[unit.trial]
        best = self._staged(page, page.units + 1) if self.keep == "best" and self.competes(epoch_done) else None
        final = self.path(page, "last") if self.keep != "none" and last else None
        if best is None and final is None:
            return None
        so_far = page.best[self.metric] if page.best is not None and self.metric is not None else None
        return Export(best, self.metric, self.mode, so_far, final, durable)

    def check_metric(self, page: TrialPage, due: ReportUnit) -> str | None:
        """Raise UnknownMetricError if a report at an epoch's end lacks the metric; before that, warn of it once.

        Some metrics are logged only at an epoch's end, but most that are missing are misspelled.
        """
        if self.metric is None or self.metric in page.last:
            return None
        has = ", ".join(sorted(page.latest.metrics)) if page.latest else "nothing"
        if due.epoch_done:
            raise UnknownMetricError(
                f"No report has a metric {self.metric!r}; this one, of {page.trial.id}, has {has}."
            )
        if self._warned:
            return None
        self._warned = True
        return (
            f"The first report has no metric {self.metric!r}, but {has}. "
            "If it is not in those at the end of the first epoch either, the run stops there."
        )

    def note(
        self,
        page: TrialPage,
        report: dict[str, Any],
        due: ReportUnit,
        when_safe: Callable[[Callable[[], object]], object],
    ) -> None:
        """Rank a new report, and note the checkpoints that its unit wrote.

        A better one takes the place of the best before it by `when_safe`, when its unit cannot be lost any more.
        """
        assert page.latest is not None, "a report without a unit"
        if self.competes(due.epoch_done):
            so_far = page.best[self.metric] if page.best is not None and self.metric is not None else None
            if improves(self.metric, self.mode, report, so_far):
                page.best = report
        name = "best" if page.latest.best_written else "last"
        if page.latest.best_written:
            page.checkpoint = self.path(page, "best")
            when_safe(partial(_put_in_place, self._staged(page, page.units), page.checkpoint))
        if due.last and self.keep != "none":
            page.last_checkpoint = self.path(page, name)
        if page.latest.exported:
            page.digests[name] = page.latest.exported

    def result(self, page: TrialPage, status: Status, cut_short: bool) -> TrialResult:
        """The trial's result as things stand; of a run that was cut short, what had not ended counts as stopped."""
        ended = status.ended or status is Status.PAUSED
        assert ended or cut_short, f"{page.trial.id} is {status.value}: no result yet"
        return TrialResult(
            trial_id=page.trial.id,
            config=page.config,
            status=status.value if ended else Status.STOPPED.value,
            metrics=page.best if page.best is not None else page.last,
            last_metrics=page.last,
            history=tuple(page.history),
            visits=tuple(page.visits),
            checkpoint=page.checkpoint if page.checkpoint is not None else page.last_checkpoint,
            last_checkpoint=page.last_checkpoint,
            error=page.error,
            raised=page.raised,
            seconds=dict(page.seconds),
        )


def _put_in_place(staged: Path, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # noted once more after a coordinator's death: it is in place
        os.replace(staged, path)


def _number_of(staged: Path) -> int:
    """The units of the trial that the name of a staged checkpoint has; 0 where it has none."""
    number = staged.name.split(".")[1]
    return int(number) if number.isdecimal() else 0
