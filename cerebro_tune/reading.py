"""A run's folder, read: its journal is told to a state machine, and nothing in the folder is executed or changed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from cerebro_tune.buffers import Mapped
from cerebro_tune.durable import FOLDER
from cerebro_tune.errors import CerebroError, ConfigurationError
from cerebro_tune.eventcodec import is_event, to_event
from cerebro_tune.events import TrialAdded, TrialCloned, UnitFailed, UnitFinished
from cerebro_tune.hopper import Hopper
from cerebro_tune.journal import Row, read_journal
from cerebro_tune.manifest import manifest_of
from cerebro_tune.recovery import DISPATCHED, RELEASED, SAVED, order_again, sound, understood
from cerebro_tune.statefile import load_into
from cerebro_tune.units import Shard
from cerebro_tune.wholefile import digest_of_file


@dataclass
class TrialReading:
    """What the journal has of one trial."""

    id: str
    config: str
    """As JSON text."""
    source: str | None = None
    """The trial that it goes on from."""
    inherited: int = 0
    """Units that that one had behind it then."""
    status: str = "queued"
    units: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last unit."""
    error: str | None = None
    state: str | None = None
    """The file of its last state on disk, while it has not ended."""
    visits: list[tuple[int, int, int]] = field(default_factory=list)
    """(epoch, shard, number of the worker), in order."""
    digests: list[str] = field(default_factory=list)
    """Of the state after each."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Digests of its checkpoint files, `best` and `last`, once it has ended."""


class RunReading:
    """A run as its journal has it; DamagedJournalError where that is not as it was written.

    Every decision of the policy is made again, and compared with what the journal has.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        rows = read_journal(self.folder)
        self.manifest = manifest_of(rows, self.folder)
        self.rows = len(rows)
        self.decisions = 0
        """Orders of the policy that were made again."""
        self.trials: dict[str, TrialReading] = {}
        about = self.manifest["about"]
        self._hopper = Hopper(
            [Shard(index, 1) for index in range(about["shards"])],
            policy=about["policy"],
            live_trials=about["live_trials"],
            report_every=about["report_every"],
            max_failures=about["max_failures"],
            seed=about["seed"],
        )
        for row in rows[1:]:
            with understood(row):
                self._take(sound(row, self.trials.keys()))
        for trial in self.trials.values():
            _, trial.units, trial.total = self._hopper.progress(trial.id)
            trial.status = self._hopper.status(trial.id).value

    def _take(self, row: Row) -> None:
        body = row.body
        if row.kind == DISPATCHED:
            self.decisions += order_again(row, self._hopper)
        elif row.kind == SAVED:
            self.trials[body["trial"]].state = body["file"]
        elif row.kind == RELEASED:
            self.trials[body["trial"]].checkpoints = body.get("digests", {})
        elif is_event(row.kind):
            event = to_event(row.kind, body["event"])
            self._hopper.apply(event)
            match event:
                case TrialAdded(trial):
                    self.trials[trial.id] = TrialReading(trial.id, body["text"])
                case TrialCloned(trial, source):
                    inherited = self._hopper.progress(trial.id)[1]
                    self.trials[trial.id] = TrialReading(trial.id, body["text"], source, inherited)
                case UnitFinished(_, unit, _):
                    reading, facts = self.trials[unit.trial], body["finished"]
                    reading.metrics = facts["metrics"]
                    reading.visits.append((unit.epoch, unit.shard, facts["worker"]))
                    reading.digests.append(facts["digest"])
                case UnitFailed(_, unit, _):
                    self.trials[unit.trial].error = body["error"]

    def trial(self, name: str) -> TrialReading:
        """The trial of this id; ConfigurationError names those that there are."""
        if name not in self.trials:
            known = ", ".join(self.trials) or "none"
            raise ConfigurationError(f"There is no trial {name!r} in {self.folder}; there are: {known}.")
        return self.trials[name]

    def story(self, name: str) -> list[str]:
        """What happened to a trial, a line for each move; the latest ones of a long life."""
        return [str(row) for row in self._hopper.story(self.trial(name).id)]

    def checkpoint(self, name: str) -> Path:
        """A trial's checkpoint: its best where there is one, else its last."""
        folder = self.folder / self.trial(name).id
        found = [path for kind in ("best", "last") for path in _named(folder, kind)]
        if not found:
            status = self.trial(name).status
            raise ConfigurationError(f"{name}, which is {status}, has no checkpoint in {self.folder}.")
        return found[0]

    def export(self, name: str, file: Path) -> Path:
        """Copy a trial's checkpoint to a file; returns which one."""
        checkpoint = self.checkpoint(name)
        shutil.copyfile(checkpoint, file)
        return checkpoint

    def verify(self) -> list[str]:
        """Check all states and checkpoints on disk against their digests; returns what is wrong."""
        wrong = []
        for trial in self.trials.values():
            for name, digest in trial.checkpoints.items():
                if [digest_of_file(path) for path in _named(self.folder / trial.id, name)] != [digest]:
                    wrong.append(f"{trial.id}: its {name} checkpoint is not the one that was written")
            ended = trial.status in ("finished", "stopped", "failed")
            if trial.state is None or ended:
                continue
            path = self.folder / FOLDER / trial.state
            try:
                load_into(path, Mapped.private)
            except (OSError, CerebroError) as error:
                wrong.append(f"{trial.id}: {error}")
        return wrong


def _named(folder: Path, name: str) -> list[Path]:
    """The checkpoint of this name, whatever its suffix; not one that waits to become it."""
    return [path for path in folder.glob(f"{name}.*") if path.stem == name and path.is_file()]
