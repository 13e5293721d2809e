"""What a search has told its scheduler and searcher, and where its trials stand: for a driver that dies.

Ray writes its experiment's state every few seconds, and none of a scheduler's. Beside it, in the experiment's folder,
lies a journal with a row for every call into the scheduler, with its answer, and with what says where the states of
trials lie. The row is there before the answer is carried out, so that what a scheduler has been told of a trial and the
state that it goes on from always agree. A trial is noted as the text that Ray makes of it.

Kills: rows and states survive them as soon as they are written. Power: whenever Ray writes its own state, the disk is
first made to hold the record and every state that it names, `secure`; these states are kept until the next time. Rows
that came since may survive without their states, which their digests tell: then all goes back to where it was secured.

Ray copies its files to the experiment's folder one by one and over those of before, so that a death can leave them cut
or of two times. What it wrote lies in the record too, as one file that is there whole.
"""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from cerebro_tune.buffers import Mapped
from cerebro_tune.clock import CLOCK
from cerebro_tune.errors import ConfigurationError, DamagedStateError
from cerebro_tune.journal import MANIFEST, Journal, Keeper, Row, check_free
from cerebro_tune.ledger import FullDisk, Ledger
from cerebro_tune.recovery import understood
from cerebro_tune.statefile import load_into, sync
from cerebro_tune.warn import warn_user
from cerebro_tune.wholefile import whole_file
from cerebro_tune_ray.rows import BACK, SECURED, STOOD, Call, Past, Standing, file_name

T = TypeVar("T")

FOLDER = "cerebro"
FORMAT = 1
_RAYS = "ray.zip"
_ANEW = (
    "begin a new experiment under another name; stock Ray goes on from this one's checkpoints (ray.tune.Tuner.restore)"
)
EXPERIMENT = Keeper(
    "experiment",
    elsewhere="give another name",
    anew=_ANEW,
    local="give a storage_path on a disk of this machine",
)


class Record:
    """The journal and the folder of states of one experiment; `about` is what must be equal when it is restored.

    With `anew` the record of an experiment of that name, which is over, is removed. RunBusyError while another driver
    has the experiment in its hands, DamagedJournalError where the record is not as it was written, ConfigurationError
    where it is of something else, of another format, or on a network file system.
    """

    def __init__(self, experiment: Path, about: Mapping[str, Any], anew: bool = False) -> None:
        self.folder = experiment / FOLDER
        self._over = False
        journal = Journal(self.folder, keeper=EXPERIMENT, anew=anew)
        if anew:
            (self.folder / _RAYS).unlink(missing_ok=True)
        self._disk = FullDisk(CLOCK, _say, lambda: self._over)
        self._ledger = Ledger(journal, self._disk)
        self._past = Past()
        try:
            if journal.rows:
                with understood(journal.rows[0]):
                    self._check(journal.rows[0], about)
            else:
                made_by = {package: version(package) for package in ("cerebro-tune", "ray")}
                self._ledger.note(MANIFEST, format=FORMAT, about=dict(about), environment=made_by)
            for row in journal.rows[1:]:
                self._past.read(row)
        except BaseException:
            journal.close()
            raise
        self._clear_strays()
        self._due: list[Standing] = []
        self._gone: list[str] = []
        """States to let go of with the next note."""
        self._insecure = not journal.rows
        """Whether something was noted since all was secured."""
        self._names = count(self._past.last + 1)

    def _check(self, first: Row, wanted: Mapping[str, Any]) -> None:
        manifest = first.body if first.kind == MANIFEST else {}
        if manifest.get("format") != FORMAT:
            raise ConfigurationError(
                f"The record in {self.folder} has format {manifest.get('format')!r}, and this version of "
                f"cerebro_tune_ray writes and reads {FORMAT}: go on with the one that began it "
                f"({manifest.get('environment')})."
            )
        found = manifest["about"]
        # An executor that has no data yet, which a function's first fit brings, says nothing of shards.
        if changed := sorted(key for key in found.keys() & wanted.keys() if found[key] != wanted[key]):
            told = ", ".join(f"{key} was {found[key]!r} and is {wanted[key]!r}" for key in changed)
            raise ConfigurationError(
                f"The experiment in {self.folder.parent} cannot go on with this executor: {told}. Give it the executor "
                "that it was begun with, or begin a new experiment."
            )

    @property
    def count(self) -> int:
        """Calls noted."""
        return self._past.count

    def calls(self) -> list[Call]:
        """All calls that were noted before this was opened, in order."""
        return self._past.calls

    def standings(self) -> dict[str, Standing]:
        """The states that there are, by file, in the order in which they were noted."""
        return dict(self._past.standings)

    def new_file(self, trial: str) -> Path:
        """Where the next state of a trial goes."""
        return self.folder / file_name(trial, next(self._names))

    def patiently(self, write: Callable[[], T]) -> T:
        """Write a state; while the disk is full stand still."""
        return self._disk.wait_out(write)

    def stand(self, standing: Standing) -> None:
        """Note where a trial is, together with the next call."""
        self._due.append(standing)

    def forget(self, file: str) -> None:
        """Let go of a state that nobody may go back to, with the next note."""
        if file not in self._gone:
            self._gone.append(file)

    def note(self, kind: str, trial: str, **told: Any) -> None:
        """Note a call, and with it where trials are."""
        self._write(kind, trial=trial, told=json.loads(json.dumps(told, default=_plain)))
        self._past.count += 1

    def settle(self) -> None:
        """Note where trials are now, with no call."""
        if self._due:
            self._write(STOOD)

    def _write(self, kind: str, **call: Any) -> None:
        known = {*self._past.standings, *(each.file for each in self._due)}
        gone = [file for file in self._gone if file in known]
        self._ledger.note(kind, **call, stood=[vars(each) for each in self._due], gone=gone)
        self._past.take(self._due, gone)
        self._due.clear()
        self._gone.clear()
        self._insecure = True
        self._remove(file for file in gone if file not in self._past.secured)

    def secure(self) -> None:
        """Return when the disk has all that was noted, and the states: what comes after may go back to here."""
        if self._due or self._gone:
            self._write(STOOD)
        if not self._insecure:
            return
        before = self._past.secured.keys()
        sync([self.folder / file for file in self._past.standings.keys() - before])
        self._ledger.note(SECURED)
        self._ledger.sync()
        self._past.secure()
        self._insecure = False
        self._remove(before - self._past.secured.keys())

    def keep(self, files: Iterable[Path]) -> None:
        """Keep what Ray has written of the experiment's state, all of one time."""
        written = list(files)

        def write() -> None:
            with whole_file(self.folder / _RAYS, durable=True) as file, zipfile.ZipFile(file, "w") as archive:
                for each in written:
                    archive.write(each, each.name)

        self.patiently(write)

    def give_back(self) -> None:
        """Put what was kept of Ray's where it looks for it; DamagedStateError where that is not as it was written."""
        kept = self.folder / _RAYS
        if not kept.exists():  # no state was ever secured, or a version wrote the record that kept none
            return
        try:
            with zipfile.ZipFile(kept) as archive:
                files = {Path(name).name: archive.read(name) for name in archive.namelist()}
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # by what was hit
            raise DamagedStateError(
                f"The experiment in {self.folder.parent} cannot go on: {kept} is not as it was written ({error}). "
                f"Restore its folder from a copy, or {_ANEW}."
            ) from error
        for name, content in files.items():
            with whole_file(self.folder.parent / name) as file:
                file.write(content)

    def mend(self) -> None:
        """Go back to where all was secured last if a state is lost; DamagedStateError if one is that was there then."""
        wrong = self._damage()
        if not wrong:
            self._insecure = True  # what the driver that died has noted may not be on disk yet
            return
        self._past.go_back()
        if still := self._damage():
            raise DamagedStateError(
                f"The experiment in {self.folder.parent} cannot go on: {still}. Restore its folder from a copy, or "
                f"{_ANEW}."
            )
        self._ledger.note(BACK)
        self._insecure = True
        self._clear_strays()
        warn_user(
            f"The experiment in {self.folder.parent} goes back to where it was when Ray wrote its state last, and what "
            f"came after is done again: {wrong}."
        )

    def _damage(self) -> str:
        """What is wrong with the first state that is not as it was noted, if there is one."""
        for file, standing in self._past.standings.items():
            try:
                _, _, digest = load_into(self.folder / file, Mapped.private)
            except (OSError, DamagedStateError) as error:
                return f"a state of trial {standing.trial} is lost ({error})"
            if digest != standing.digest:
                return f"a state of trial {standing.trial} is lost ({file} is another one)"
        return ""

    def close(self, over: bool, kept: Collection[str] = ()) -> None:
        """Let go of it; of an experiment that is over the only states still needed are those of trials `kept`.

        May be called twice.
        """
        if self._over:
            return
        self._over = True
        for file, standing in self._past.standings.items() if over else ():
            if standing.trial not in kept:
                self.forget(file)
        with suppress(OSError):  # of a full disk: it is as if this process had died before
            self.secure()
        self._ledger.close()

    def _clear_strays(self) -> None:
        """Remove states that nothing goes back to: of writes that a death has cut short, or that were let go of."""
        known = self._past.standings.keys() | self._past.secured.keys()
        states = {path.name for path in self.folder.glob("*.safetensors*")} - known
        self._remove([*states, *(path.name for path in self.folder.glob(f"{_RAYS}.*"))])

    def _remove(self, files: Iterable[str]) -> None:
        for file in files:
            (self.folder / file).unlink(missing_ok=True)


def check_idle(experiment: Path) -> None:
    """RunBusyError while another driver has the experiment in its hands."""
    check_free(experiment / FOLDER, EXPERIMENT)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """A value that JSON has not: numbers, arrays and tensors as Python's numbers and lists, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
