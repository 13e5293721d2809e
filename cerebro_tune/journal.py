"""The journal of a run: every fact in the order in which it was taken in, in one SQLite file that has one writer.

A row is a kind and a JSON text, and carries a hash over its own text and the hash of the row before: SQLite by itself
reads most flipped bits silently as something else. The first row is the manifest, which says what the run is of.

Kills: every row is a transaction of its own in WAL mode, so that what was appended is there whatever is killed. Power:
`sync` waits until the disk has what was appended; a thread sees to it within 50 ms.

A journal that was cut, by a disk that lost its tail say, opens as the rows that are whole; one whose bytes were changed
does not open. Nothing in here is executed, and readers change nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import xxhash

from cerebro_tune.clock import CLOCK, Clock
from cerebro_tune.errors import ConfigurationError, DamagedJournalError, RunBusyError
from cerebro_tune.wholefile import durable_folder, sync_folder

NAME, LOCK = "journal.sqlite", "lock"
FORMAT = 1
MANIFEST = "manifest"
_TABLE = "create table rows (number integer primary key, kind text not null, body text not null, hash text not null)"
_SYNC_EVERY_S = 0.05
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
"""What SQLite says of a full disk, and of a limit on the sizes of files."""
_REMOTE = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs", "glusterfs", "orangefs")
"""File systems, by the beginnings of their names, on which locks and mapped files cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `number` counts from 1."""

    number: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Keeper:
    """Whose journal it is, in the words of its errors, and what these advise."""

    name: str
    elsewhere: str
    """While another process has it in its hands."""
    anew: str
    """When it is damaged."""
    local: str
    """Where it would lie on a network file system."""


RUN = Keeper(
    "run",
    elsewhere="give another run_dir",
    anew="begin a new run (resume='never')",
    local="give a run_dir on a disk of this machine, and copy what you keep with `cerebro-tune export`",
)


class Journal:
    """A journal that is open for writing, in a folder of its own; it is made there if there is none.

    With `anew` what was there before is removed, unless another process has it open. RunBusyError while one has,
    ConfigurationError where it would lie on a network file system, DamagedJournalError for one whose bytes are not
    those that were written.
    """

    def __init__(self, folder: Path, clock: Clock = CLOCK, keeper: Keeper = RUN, anew: bool = False) -> None:
        _check_local(folder, keeper)
        durable_folder(folder)
        for around in folder.absolute().parents[1:3]:  # which are new where the run is the first
            sync_folder(around)
        self._keeper = keeper
        self._lock = _take_lock(folder / LOCK, keeper)
        path = folder / NAME
        try:
            for old in folder.glob(f"{NAME}*") if anew else ():
                old.unlink()
            _finish_mending(path)
            self.rows = _whole_rows(path, keeper) if path.exists() else []
            """What was in it when it was opened."""
            if path.exists() and _is_cut(path):
                _mend(path, self.rows)
            self._database = _connect(path)
            self._database.execute(_TABLE.replace("table", "table if not exists"))
            self._wal = os.open(f"{path}-wal", os.O_RDWR | os.O_CREAT)
            sync_folder(folder)
            os.fsync(self._wal)  # a process that was killed may not have come to it
        except BaseException:
            for opened in (getattr(self, "_wal", None), self._lock):
                if opened is not None:
                    os.close(opened)
            raise
        self._clock, self._thread = clock, clock.beside("journal")
        self._due, self._over = False, Event()
        self._broken: OSError | None = None
        """What the disk said when it lost rows."""
        self._number = self._synced = len(self.rows)
        self._hash = _chain(self.rows)

    @property
    def count(self) -> int:
        """Rows in it."""
        return self._number

    @property
    def synced(self) -> int:
        """Rows that survive a loss of power."""
        return self._synced

    def append(self, kind: str, **body: Any) -> None:
        """Append a row; when this returns it survives the death of any process. OSError when the disk is full."""
        self._check_whole()
        text = json.dumps(body)
        hashed = _hashed(self._hash, kind, text)
        try:
            self._database.execute("insert into rows values (?, ?, ?, ?)", (self._number + 1, kind, text, hashed))
        except sqlite3.OperationalError as error:
            why = f"the {self._keeper.name}'s journal could not be written: {error}"
            raise OSError(errno.ENOSPC if error.sqlite_errorcode in _NO_ROOM else errno.EIO, why) from error
        self._number, self._hash = self._number + 1, hashed
        if not self._due:
            self._due = True
            self._thread.submit(self._sync_soon)

    def sync(self) -> None:
        """Wait until what was appended survives a loss of power."""
        self._check_whole()
        if self._synced < self._number:
            self._sync()

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise OSError(
                self._broken.errno, f"the disk has lost rows of the {self._keeper.name}'s journal: {self._broken}"
            ) from self._broken

    def close(self) -> None:
        """Let go of it, with everything in the one file. May be called twice."""
        if self._lock >= 0:
            self._over.set()
            self._thread.shutdown()
            with contextlib.suppress(sqlite3.OperationalError):  # of a full disk: the rows are in the file beside it
                self._database.execute("pragma wal_checkpoint(truncate)")
            self._database.close()
            os.close(self._wal)
            os.close(self._lock)
            self._lock = -1

    def _sync_soon(self) -> None:
        self._clock.sleep(_SYNC_EVERY_S, unless=self._over)
        self._due = False  # before it looks how many rows there are: one that comes now has a call of its own
        self._sync()

    def _sync(self) -> None:
        number = self._number
        try:
            os.fsync(self._wal)
        except OSError as error:
            self._broken = error  # it is told once: the next call would succeed, and the rows not be on disk
            raise
        self._synced = max(number, self._synced)


def read_journal(folder: Path) -> list[Row]:
    """All rows of a run's journal, checked, also while another process writes it; DataError's kin as for `Journal`."""
    path = folder / NAME
    if not path.exists():
        raise ConfigurationError(f"{folder} has no {NAME}: it is not the folder of a run, or of one that kept none.")
    return _whole_rows(path, RUN)


def check_free(folder: Path, keeper: Keeper = RUN) -> None:
    """RunBusyError while another process has the journal in this folder open."""
    if (folder / LOCK).exists():
        os.close(_take_lock(folder / LOCK, keeper))


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("pragma journal_mode = wal")
    database.execute("pragma synchronous = normal")
    return database


def _whole_rows(path: Path, keeper: Keeper) -> list[Row]:
    _check_wal(path.with_name(f"{path.name}-wal"), keeper)
    cut = _is_cut(path)
    rows: list[Row] = []
    hashed = ""
    try:
        for number, kind, text, found in _raw_rows(path, keeper):
            hashed = _hashed(hashed, kind, text)
            if number != len(rows) + 1 or found != hashed:
                if cut:
                    break
                raise _damaged(path, f"row {number} is not the one that was written", keeper)
            rows.append(Row(number, kind, json.loads(text)))
    except (sqlite3.DatabaseError, ValueError, TypeError, OverflowError) as error:
        if not cut:
            raise _damaged(path, str(error), keeper) from error
    return rows


def _raw_rows(path: Path, keeper: Keeper) -> Iterator[tuple[int, str, str, str]]:
    beside = path.with_name(f"{path.name}-wal")
    # What has no file beside it is read as it lies: SQLite would leave new ones there.
    how = "mode=ro" if beside.exists() and beside.stat().st_size else "mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as database:
        if not _is_cut(path):
            (told,) = database.execute("pragma integrity_check").fetchone()
            if told != "ok":
                raise _damaged(path, told, keeper)
        if database.execute("select count(*) from sqlite_master").fetchone() == (0,):
            return  # cut before its table was in it
        yield from database.execute("select number, kind, body, hash from rows order by number")


def _is_cut(path: Path) -> bool:
    """Whether the file is shorter than its own header says; what is missing may still be in the file beside it."""
    with path.open("rb") as file:
        header = file.read(32)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 32:
        return True
    page = int.from_bytes(header[16:18], "big")
    return size < (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big")


def _check_wal(path: Path, keeper: Keeper) -> None:
    """Refuse a write-ahead file with a changed byte, which SQLite takes for the end of what was written.

    Its frames are checked by running sums; one that fails and has another of the same writing behind it was whole once.
    """
    content = path.read_bytes() if path.exists() else b""
    if len(content) < _WAL_HEADER.size:
        return
    magic, _, page, _, *salts, first, second = _WAL_HEADER.unpack_from(content)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _WAL_MAGIC or _sums(order, content[:24], (0, 0)) != (first, second):
        raise _damaged(path, "its header is not the one that was written", keeper)
    sums, size = (first, second), _FRAME_HEADER.size + page
    starts = range(_WAL_HEADER.size, len(content) - size + 1, size)
    wrong = None
    for start in starts:
        header = content[start : start + _FRAME_HEADER.size]
        _, _, *found, one, two = _FRAME_HEADER.unpack(header)
        if wrong is not None:
            if found == salts:
                raise _damaged(path, f"the frame at byte {wrong} is not the one that was written", keeper)
            continue
        sums = _sums(order, header[:8] + content[start + _FRAME_HEADER.size : start + size], sums)
        if found != salts or sums != (one, two):
            wrong = start


_WAL_HEADER, _FRAME_HEADER, _WAL_MAGIC = struct.Struct(">8I"), struct.Struct(">6I"), 0x377F0682


def _sums(order: str, content: bytes, before: tuple[int, int]) -> tuple[int, int]:
    """SQLite's running check sums of a write-ahead file: per pair of words, one += first + two; two += second + one.

    Every step is linear: what a word adds to the sums at the end is a Fibonacci number of times itself.
    """
    words = np.frombuffer(content, f"{order}u4").astype(np.uint64)  # which overflows as it should
    first, second = words[::2], words[1::2]
    numbers = _fibonacci(len(words) + 2)
    less, same, more = numbers[-4::-2], numbers[-3::-2], numbers[-2:1:-2]
    ahead = int(numbers[-1])
    one = int((first * same + second * less).sum()) + before[0] * int(same[0]) + before[1] * int(more[0])
    two = int((first * more + second * same).sum()) + before[0] * int(more[0]) + before[1] * ahead
    return one & 0xFFFF_FFFF, two & 0xFFFF_FFFF


@cache
def _fibonacci(count: int) -> npt.NDArray[np.uint64]:
    """The first Fibonacci numbers, modulo 2**32."""
    found = [0, 1]
    while len(found) < count:
        found.append((found[-1] + found[-2]) & 0xFFFF_FFFF)
    return np.array(found, dtype=np.uint64)


def _mend(path: Path, rows: list[Row]) -> None:
    """Put the rows that are whole into a file of their own; the damaged one is kept beside it.

    The name of the new one says that it is whole; from then on the old one's rows are not needed, in either file.
    """
    fresh, mended = (path.with_name(f"{path.name}.{name}") for name in ("partial", "mended"))
    fresh.unlink(missing_ok=True)
    hashed = ""
    with contextlib.closing(sqlite3.connect(fresh)) as database, database:
        database.execute(_TABLE)
        for row in rows:
            text = json.dumps(row.body)
            hashed = _hashed(hashed, row.kind, text)
            database.execute("insert into rows values (?, ?, ?, ?)", (row.number, row.kind, text, hashed))
    shutil.copyfile(path, path.with_name(f"{path.name}.cut"))
    os.replace(fresh, mended)
    sync_folder(path.parent)
    _finish_mending(path)


def _finish_mending(path: Path) -> None:
    """Put a mended journal in its place. What was beside the damaged one goes first: SQLite would read it into this."""
    mended = path.with_name(f"{path.name}.mended")
    if mended.exists():
        for beside in ("-wal", "-shm"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        sync_folder(path.parent)
        os.replace(mended, path)
        sync_folder(path.parent)


def _chain(rows: list[Row]) -> str:
    hashed = ""
    for row in rows:
        hashed = _hashed(hashed, row.kind, json.dumps(row.body))
    return hashed


def _hashed(before: str, kind: str, text: str) -> str:
    return xxhash.xxh3_128_hexdigest(f"{before}\n{kind}\n{text}".encode())


def _damaged(path: Path, why: str, keeper: Keeper) -> DamagedJournalError:
    return DamagedJournalError(
        f"The journal {path} is damaged: {why}. Nothing is taken up from it: restore the {keeper.name}'s folder from a "
        f"copy, or {keeper.anew}."
    )


def _take_lock(path: Path, keeper: Keeper) -> int:
    """Hold a lock for as long as this process lives, or until the descriptor is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise RunBusyError(
            f"The {keeper.name} in {path.parent} is in the hands of {holder}: wait for its end, or {keeper.elsewhere}."
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where only the inline backend runs: whoever shares a run there is not noticed
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remote_kind(folder: Path) -> str:
    """The name of the network file system that a folder is on; empty where it is on a disk of this machine."""
    found = [part for part in psutil.disk_partitions(all=True) if folder.absolute().is_relative_to(part.mountpoint)]
    kind = max(found, key=lambda part: len(part.mountpoint)).fstype if found else ""
    return kind if kind.startswith(_REMOTE) else ""


def _check_local(folder: Path, keeper: Keeper) -> None:
    if kind := remote_kind(folder):
        raise ConfigurationError(
            f"The {keeper.name}'s folder {folder} lies on a network file system ({kind}), whose locks and mapped files "
            f"cannot be trusted: {keeper.local}."
        )
