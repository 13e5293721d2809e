"""Rows of the record: what they come to, told one after the other, and that none is believed that no driver writes.

The first is the manifest: what must be equal when the experiment is restored. After it comes a row for each call, of
the call's kind. It carries the states that were noted with the call and the files let go of, so that all of this holds
or nothing of it. STOOD is the same without a call. SECURED says that all before it is on disk, states too, whatever
happens to the power; BACK, that what came after the last SECURED did not survive, and does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cerebro_tune.configtext import config_of
from cerebro_tune.journal import Row
from cerebro_tune.recovery import understood

STOOD, SECURED, BACK = "stood", "secured", "back"
CALLS: dict[str, set[str]] = {
    "add": {"text"},
    "start": {"text"},
    "result": {"result", "file", "decision"},
    "complete": {"result"},
    "remove": set(),
    "error": set(),
    "drop": set(),
}
"""Kinds of calls, with what each must tell."""

_TOLD = {"text": list, "result": dict, "file": str | NoneType, "decision": object, "generators": list}
_STANDING = {
    "trial": str, "file": str, "digest": str, "units": int, "visited": list, "iteration": int, "time_s": float | int,
    "index": int, "config": dict | NoneType, "fit": int,
}  # fmt: skip


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

    digest: of the state.
    config: what the state was trained under; None where it is not plain data.
    fit: which of a function's fits it is of, from 1.
    """

    trial: str
    file: str
    digest: str
    units: int
    visited: list[int]
    iteration: int
    time_s: float
    index: int
    config: dict[str, Any] | None
    fit: int = 0

    @property
    def trained_under(self) -> dict[str, Any] | None:
        """The config that the state was trained under; None where the rows cannot say."""
        return None if self.config is None else config_of(self.config)


def file_name(trial: str, number: int) -> str:
    """The name of a state's file; numbers are given once in an experiment, from 1."""
    return f"{trial}-{number}.safetensors"


class Past:
    """What the rows come to."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        """Those that were read; there may have been more since."""
        self.count = 0
        """Calls noted."""
        self.standings: dict[str, Standing] = {}
        """The states that there are, by file, in the order in which they were noted."""
        self.secured: dict[str, Standing] = {}
        """Those that there were when all was on disk last."""
        self._secured_count = 0
        self.last = 0
        """The number of the last state's file."""
        self._trials: set[str] = set()

    def read(self, row: Row) -> None:
        """Take a row in; DamagedJournalError for one that no driver writes."""
        with understood(row):
            if row.kind == SECURED:
                self.secure()
            elif row.kind == BACK:
                self.go_back()
            else:
                self._read(row.kind, **row.body)

    def _read(
        self, kind: str, stood: list[dict[str, Any]], gone: list[str], trial: str = "", told: Mapping[str, Any] = {}
    ) -> None:
        if kind != STOOD:
            self._check_call(kind, trial, told)
            self.count += 1
            self.calls.append(Call(self.count, kind, trial, told))
        self.take([self._standing(each) for each in stood], gone)

    def take(self, stood: Iterable[Standing], gone: Iterable[str]) -> None:
        """Take in where trials are, and the files that were let go of."""
        self.standings |= {each.file: each for each in stood}
        for file in gone:
            del self.standings[file]

    def secure(self) -> None:
        """All that came before is on disk."""
        self.secured, self._secured_count = dict(self.standings), self.count

    def go_back(self) -> None:
        """What came since does not hold."""
        self.standings, self.count = dict(self.secured), self._secured_count
        del self.calls[self.count :]

    def _check_call(self, kind: str, trial: str, told: Mapping[str, Any]) -> None:
        if kind == "add" and re.fullmatch(r"\w[\w.-]*", trial):  # files are named after it
            self._trials.add(trial)
        if trial not in self._trials:
            raise ValueError(f"there is no trial {trial!r}")
        if not CALLS[kind] <= told.keys():
            raise ValueError(f"it tells nothing of {sorted(CALLS[kind] - told.keys())}")
        _check_kinds(told, _TOLD)

    def _standing(self, plain: Mapping[str, Any]) -> Standing:
        _check_kinds(plain, _STANDING)
        found = Standing(**plain)
        number = int(found.file.removesuffix(".safetensors").rpartition("-")[2])
        if found.trial not in self._trials or number <= self.last or found.file != file_name(found.trial, number):
            raise ValueError(f"{found.file!r} is no file of a state of {found.trial!r}")
        if not all(type(each) is int and each >= 0 for each in (found.units, found.index, found.fit, *found.visited)):
            raise ValueError(f"{found} is no place of a trial")
        self.last = number
        return found


def _check_kinds(plain: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in plain.items():
        if not isinstance(value, kinds[name]):
            raise TypeError(f"{name} is {value!r}")
