"""What a search has told its scheduler and searcher, and where its trials stand: for a driver that dies.

Ray writes its experiment's state every few seconds, and none of a scheduler's. Beside it, in the experiment's folder,
lies a SQLite file with a row for every call into the scheduler, with its answer, and one for each trial that says where
its state lies. Both are there before the answer is carried out, in one transaction, so that what a scheduler has been
told of a trial and the state that it goes on from always agree. A trial is noted as the text that Ray makes of it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cerebro_tune.errors import ConfigurationError

FOLDER = "cerebro"
_FORMAT = 1
_TABLES = """
begin;
create table about (key text primary key, value text);
create table calls (number integer primary key, kind text, trial text, told text);
create table states (number integer primary key, file text unique, standing text);
commit;
"""


@dataclass(frozen=True)
class Call:
    """One call into the scheduler: add, result, complete, remove or error; or what it is not told: start or drop.

    told: the result and the file of the state that it is of, the answer (`decision`), Ray's text of a trial, and the
        state of the generators of random numbers before the call, where it drew from them.
    """

    number: int
    kind: str
    trial: str
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """Where a trial was: its state's file, and what goes with it.

    config: what the state was trained under; None where it is not plain data.
    fit: which of a function's fits it is of, from 1.
    """

    trial: str
    file: str
    units: int
    visited: list[int]
    iteration: int
    time_s: float
    index: int
    config: dict[str, Any] | None
    fit: int = 0


class Record:
    """The SQLite file and the folder of states of one experiment; `about` is what must be equal when it is restored."""

    def __init__(self, experiment: Path, about: Mapping[str, Any]) -> None:
        self.folder = experiment / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "record.sqlite"
        known = path.exists()
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("pragma journal_mode = wal")
        self._database.execute("pragma synchronous = normal")
        wanted = {"format": _FORMAT, **about}
        if not known:
            self._database.executescript(_TABLES)
            self._database.executemany(
                "insert into about values (?, ?)", [(k, json.dumps(v)) for k, v in wanted.items()]
            )
        self._check(wanted)
        self._due: list[Standing] = []
        self._gone: list[str] = []
        """States to let go of with the next note."""
        self._names = count(1 + max(map(_number_of, self.folder.glob("*.safetensors")), default=0))
        self.count = int(self._database.execute("select count(*) from calls").fetchone()[0])
        """Calls noted."""

    def _check(self, wanted: Mapping[str, Any]) -> None:
        found = {key: json.loads(value) for key, value in self._database.execute("select * from about")}
        # An executor that has no data yet, which a function's first fit brings, says nothing of shards.
        if changed := sorted(key for key in found.keys() & wanted.keys() if found[key] != wanted[key]):
            told = ", ".join(f"{key} was {found[key]!r} and is {wanted[key]!r}" for key in changed)
            raise ConfigurationError(
                f"The experiment in {self.folder.parent} cannot go on with this executor: {told}. Give it the executor "
                "that it was begun with, or begin a new experiment."
            )

    def new_file(self, trial: str) -> Path:
        """Where the next state of a trial goes."""
        return self.folder / f"{trial}-{next(self._names)}.safetensors"

    def stand(self, standing: Standing) -> None:
        """Note where a trial is, together with the next call."""
        self._due.append(standing)

    def note(self, kind: str, trial: str, **told: Any) -> None:
        """Note a call, and with it where trials are."""
        self.count += 1
        self._write((self.count, kind, trial, json.dumps(told, default=_plain)))

    def settle(self) -> None:
        """Note where trials are now, with no call."""
        if self._due:
            self._write()

    def _write(self, *calls: tuple[int, str, str, str]) -> None:
        rows = [(each.file, json.dumps(vars(each))) for each in self._due]
        gone, self._gone = self._gone, []
        with self._database:
            self._database.execute("begin")
            self._database.executemany("insert into calls values (?, ?, ?, ?)", calls)
            self._database.executemany("insert into states (file, standing) values (?, ?)", rows)
            self._database.executemany("delete from states where file = ?", [(file,) for file in gone])
        self._due.clear()
        for file in gone:
            (self.folder / file).unlink(missing_ok=True)

    def forget(self, file: str) -> None:
        """Let go of a state that nobody may go back to, with the next note: a transaction costs more than the rest."""
        self._gone.append(file)

    def calls(self) -> list[Call]:
        """All calls, in order."""
        rows = self._database.execute("select number, kind, trial, told from calls order by number")
        return [Call(number, kind, trial, json.loads(told)) for number, kind, trial, told in rows]

    def standings(self) -> dict[str, Standing]:
        """The states that there are, by file, in the order in which they were noted."""
        rows = self._database.execute("select file, standing from states order by number")
        return {file: Standing(**json.loads(standing)) for file, standing in rows}

    def close(self, over: bool, kept: Collection[str]) -> None:
        """Let go of the file; of an experiment that is over the only states still needed are those of trials `kept`."""
        self._gone += [file for file, standing in self.standings().items() if over and standing.trial not in kept]
        self._write()
        self._database.close()


def _number_of(file: Path) -> int:
    """The number in the name that `Record.new_file` has given."""
    return int(file.stem.rpartition("-")[2])


def _plain(value: Any) -> Any:
    """A value that JSON has not: numbers, arrays and tensors as Python's numbers and lists, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
