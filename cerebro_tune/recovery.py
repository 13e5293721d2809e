"""A run that goes on where its coordinator died: its journal, told once more to the same state machine and book.

Afterwards both are as they were, to the last row. The states of trials are on disk as of every few units: what was
trained since is trained again, in the order of the visits and without a report, and must give the same digests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cerebro_tune.book import TrialBook, TrialPage
from cerebro_tune.configtext import config_of, config_text
from cerebro_tune.errors import ConfigurationError, DamagedJournalError, IllegalEventError, InvariantError
from cerebro_tune.eventcodec import is_event, to_event
from cerebro_tune.events import TrialAdded, TrialCloned, TrialDecided, UnitFailed, UnitFinished, WorkerLost
from cerebro_tune.hopper import Hopper
from cerebro_tune.instructions import DropState, ReportUnit, StartJob
from cerebro_tune.journal import MANIFEST, Row
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision, Status, Unit, WorkerId
from cerebro_tune.workers.messages import Finished, Spans

DISPATCHED, SAVED, RELEASED, WISHED, MOVED = "Dispatched", "Saved", "Released", "Wished", "Moved"
"""Kinds of rows that are no events: orders given, a state on disk, a trial let go of, a wish, another environment."""


Given = Sequence[Config] | Mapping[str, tuple[Config, Recipe | None]]
"""Configs in the order of the trials, or (config, recipe) by the id of a trial."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A state on disk: so many units of a trial."""

    units: int
    file: str


@dataclass
class Past:
    """What the journal knows beyond machine and book."""

    saved: dict[str, Saved] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    """Of each trial's own units, in order."""
    early: dict[str, Finished] = field(default_factory=dict)
    """Units that ended before their turn came to be committed."""
    released: set[str] = field(default_factory=set)
    ended: dict[str, Status] = field(default_factory=dict)
    search_ended: bool = False
    trials: int = 0

    @property
    def unended(self) -> bool:
        """Whether something is left to do."""
        return self.trials > len(self.released)


@dataclass(frozen=True)
class Replayed:
    """A trial that was trained again: so many units, and those of them, (epoch, shard), whose state was another."""

    trial: str
    units: int
    differing: tuple[tuple[int, int], ...]


def finished_facts(finished: Finished) -> dict[str, Any]:
    """What the journal keeps of a unit, beside its event."""
    spans = finished.spans
    return {
        "metrics": dict(finished.metrics),
        "used": finished.used,
        "digest": finished.digest,
        "spans": [spans.began, spans.loaded, spans.trained, spans.ended, spans.validation_s, spans.build_s],
        "worker": finished.worker.number,
        "best_written": finished.best_written,
        "exported": finished.exported,
        "should_stop": finished.should_stop,
    }


def starts_plain(starts: Iterable[StartJob]) -> list[Any]:
    """Orders to start, as the journal keeps them."""
    return [[s.job, s.worker.number, [[u.trial, u.epoch, u.shard] for u in s.units]] for s in starts]


def sound(row: Row, trials: Collection[str]) -> Row:
    """The row, if its kind is known and its names, of which paths are made, are a run's; `trials` are there already."""
    body, kind = row.body, row.kind
    if kind in ("TrialAdded", "TrialCloned", "TrialRestored"):
        good = body["event"]["trial"]["id"] == f"trial-{len(trials):04d}"
    elif kind == SAVED:
        good = body["trial"] in trials and body["file"] == f"{body['trial']}-{int(body['units'])}.safetensors"
    elif kind == RELEASED:
        digests = body.get("digests", {})
        good = body["trial"] in trials and body["last"] in (None, "best", "last") and digests.keys() <= {"best", "last"}
    else:
        good = is_event(kind) or kind in (MANIFEST, DISPATCHED, WISHED, MOVED)
    if not good:
        raise DamagedJournalError(f"Row {row.number} of the journal, {kind}, is not as a run writes it: {body}.")
    return row


@contextmanager
def understood(row: Row) -> Iterator[None]:
    """A row that cannot be what a run writes is damage, whatever it makes of the code that reads it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IllegalEventError, InvariantError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise DamagedJournalError(
            f"Row {row.number} of the journal, {row.kind}, is none of a run: {error!r}"
        ) from error


def order_again(row: Row, hopper: Hopper) -> int:
    """Have the machine give the orders of a row once more; returns how many, DamagedJournalError if they differ."""
    starts = starts_plain(hopper.dispatch())
    if starts != row.body["starts"]:
        raise DamagedJournalError(
            f"Row {row.number} of the journal has the orders {row.body['starts']}, and they would be {starts} now: "
            "the run was made by another version. Go on with that, or begin a new run (resume='never')."
        )
    return len(starts)


def retell(rows: Sequence[Row], hopper: Hopper, book: TrialBook, shards: int, given: Given) -> Past:
    """Bring a new machine and a new book to where the journal ends.

    `given` is what the trials are now: of those that were added first, in order, or of those that go on, by their ids.
    Of others the journal has the configs. ConfigurationError where a config is another; DamagedJournalError where the
    machine decides otherwise than it did.
    """
    teller = _Teller(hopper, book, shards, given)
    for row in rows:
        with understood(row):
            teller.take(sound(row, book.ids))
    return teller.past


class _Teller:
    def __init__(self, hopper: Hopper, book: TrialBook, shards: int, given: Given) -> None:
        self._hopper, self._book, self._shards, self._given = hopper, book, shards, given
        self._added = 0
        self.past = Past()

    def take(self, row: Row) -> None:
        body = row.body
        if is_event(row.kind):
            self._event(row)
        elif row.kind == DISPATCHED:
            order_again(row, self._hopper)
        elif row.kind == SAVED:
            self.past.saved[body["trial"]] = Saved(body["units"], body["file"])
        elif row.kind == RELEASED:
            self.past.released.add(body["trial"])
            page = self._book[body["trial"]]
            page.last_checkpoint = None if body["last"] is None else self._book.path(page, body["last"])
            page.digests.update(body.get("digests", {}))
        elif row.kind == WISHED:
            self._book[body["trial"]].wish = Decision(body["decision"])

    def _event(self, row: Row) -> None:
        event = to_event(row.kind, row.body["event"])
        match event:
            case TrialAdded() | TrialCloned():
                self._page(event, row.body)
            case UnitFinished(_, unit, _):
                self.past.early[unit.trial] = _finished(event, row.body)
            case UnitFailed(_, unit, _):
                page = self._book[unit.trial]
                page.error, page.raised = row.body["error"], tuple(row.body["raised"])
            case TrialDecided(trial):
                self._book[trial].wish = None
        orders = self._hopper.apply(event)
        for trial, finished in list(self.past.early.items()):
            if self._hopper.progress(trial)[1] > self._book[trial].units:
                del self.past.early[trial]
                self._book[trial].committed(finished)
                self.past.digests[trial].append(finished.digest)
        for order in orders:
            match order:
                case ReportUnit(_, unit):
                    page = self._book[unit.trial]
                    self._book.note(page, page.report(order, self._shards), order, lambda call: call())
                case DropState(trial, status):
                    self.past.ended[trial] = status
                    if isinstance(event, WorkerLost):
                        self._book[trial].error = row.body.get("error")
        self.past.search_ended |= row.kind == "SearchEnded"

    def _page(self, event: TrialAdded | TrialCloned, body: dict[str, Any]) -> None:
        by_id = isinstance(self._given, Mapping)
        if by_id and event.trial.id not in self._given:  # it has ended, and nobody asks what it was made of
            self._add(event, self._book.closed_page(event.trial, config_of(body["config"] or {}), body["batch_size"]))
            return
        config, recipe = self._given_to(event, body)
        brought = None if recipe is None else self._book.bring(recipe)
        page = self._book.new_page(config, brought, event.trial.index)
        if page.trial != event.trial or page.batch_size != body["batch_size"]:
            raise ConfigurationError(
                f"{event.trial.id} was {event.trial} with batch_size={body['batch_size']}, and would be {page.trial} "
                f"with batch_size={page.batch_size}."
            )
        self._add(event, page)

    def _add(self, event: TrialAdded | TrialCloned, page: TrialPage) -> None:
        if isinstance(event, TrialCloned):
            self._book.inherit(page, self._book[event.source])
        self._book.add(page)
        self.past.digests[event.trial.id] = []
        self.past.trials += 1

    def _given_to(self, event: TrialAdded | TrialCloned, body: dict[str, Any]) -> tuple[Config, Recipe | None]:
        """What the trial is now, checked against what it was; a recipe where it is not the run's."""
        recipe = None
        if isinstance(self._given, Mapping):
            name, (config, recipe) = f"the config of {event.trial.id}", self._given[event.trial.id]
        elif isinstance(event, TrialAdded) and self._added < len(self._given):
            name, config = f"configs[{self._added}]", self._given[self._added]
            self._added += 1
        elif body["config"] is None:
            raise ConfigurationError(f"{event.trial.id} had the config {body['text']}, which is no plain data")
        else:
            return config_of(body["config"]), None
        if config_text(config) != body["text"]:
            raise ConfigurationError(f"{name} was {body['text']} and is {config_text(config)}")
        return config, recipe


def _finished(event: UnitFinished, body: dict[str, Any]) -> Finished:
    facts = body["finished"]
    return Finished(
        WorkerId(facts["worker"]), event.job, event.unit, facts["metrics"], facts["used"], facts["digest"],
        Spans(*facts["spans"]), facts["best_written"], facts.get("exported", ""), None, facts["should_stop"],
    )  # fmt: skip


@dataclass
class Arrears:
    """What of one trial is to be trained again: these units, of which the first is number `done` of the trial."""

    page: TrialPage
    done: int
    units: list[Unit]
    digests: list[str]
    early: bool
    """Whether the last of them waits to be committed."""

    @classmethod
    def of(cls, page: TrialPage, from_units: int, past: Past) -> Arrears:
        """From a state of so many units to the last one that ended."""
        trial = page.trial.id
        own = from_units - page.inherited
        units = [Unit(trial, epoch, shard) for epoch, shard, _ in page.visits[own:]]
        digests = past.digests[trial][own:]
        if early := past.early.get(trial):
            units.append(early.unit)
            digests = [*digests, early.digest]
        return cls(page, from_units, units, digests, early is not None)
