"""The journal of a run: every fact in the order in which it was taken in, in one SQLite file that has one writer.

A row is a kind and a JSON text, and carries a hash over its own text and the hash of the row before: SQLite by itself
reads most flipped bits silently as something else. The first row is the manifest, which says what the run is of.

Kills: every row is a transaction of its own in WAL mode, so that what was appended is there whatever is killed. Power:
`sync` waits until the disk has what was appended; a thread does so at least every 50 ms while rows come.

A journal that was cut, by a disk that lost its tail say, opens as the rows that are whole; one whose bytes were changed
does not open. Nothing in here is executed, and readers change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import xxhash

from cerebro_tune.errors import ConfigurationError, DamagedJournalError, RunBusyError

NAME, LOCK = "journal.sqlite", "lock"
FORMAT = 1
MANIFEST = "manifest"
_TABLE = "create table rows (number integer primary key, kind text not null, body text not null, hash text not null)"
_SYNC_EVERY_S = 0.05
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

    def __init__(self, folder: Path, keeper: Keeper = RUN, anew: bool = False) -> None:
        _check_local(folder, keeper)
        folder.mkdir(parents=True, exist_ok=True)
        self._keeper = keeper
        self._lock = _take_lock(folder / LOCK, keeper)
        self._syncing: Future[None] | None = None
        self._synced_at = monotonic()
        self._dirty = False
        path = folder / NAME
        try:
            for old in folder.glob(f"{NAME}*") if anew else ():
                old.unlink()
            self.rows = _whole_rows(path, keeper) if path.exists() else []
            """What was in it when it was opened."""
            if path.exists() and _is_cut(path):
                _write_anew(path, self.rows)
            self._database = _connect(path)
            self._database.execute(_TABLE.replace("table", "table if not exists"))
            self._wal = os.open(f"{path}-wal", os.O_RDWR | os.O_CREAT)
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cerebro-journal")
        self._number = len(self.rows)
        self._hash = _chain(self.rows)

    @property
    def count(self) -> int:
        """Rows in it."""
        return self._number

    def append(self, kind: str, **body: Any) -> None:
        """Append a row; when this returns it survives the death of any process. OSError when the disk is full."""
        text = json.dumps(body)
        hashed = _hashed(self._hash, kind, text)
        try:
            self._database.execute("insert into rows values (?, ?, ?, ?)", (self._number + 1, kind, text, hashed))
        except sqlite3.OperationalError as error:
            raise OSError(f"the {self._keeper.name}'s journal could not be written: {error}") from error
        self._number, self._hash, self._dirty = self._number + 1, hashed, True
        if monotonic() - self._synced_at > _SYNC_EVERY_S and (self._syncing is None or self._syncing.done()):
            self._syncing = self._thread.submit(self._sync)

    def sync(self) -> None:
        """Wait until what was appended survives a loss of power."""
        if self._dirty:
            self._thread.submit(self._sync).result()

    def close(self) -> None:
        """Let go of it, with everything in the one file. May be called twice."""
        if self._lock >= 0:
            self._thread.shutdown()
            with contextlib.suppress(sqlite3.OperationalError):  # of a full disk: the rows are in the file beside it
                self._database.execute("pragma wal_checkpoint(truncate)")
            self._database.close()
            os.close(self._wal)
            os.close(self._lock)
            self._lock = -1

    def _sync(self) -> None:
        self._dirty, self._synced_at = False, monotonic()
        os.fsync(self._wal)


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
    """SQLite's running check sums of a write-ahead file."""
    one, two = before
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFF_FFFF
        two = (two + second + one) & 0xFFFF_FFFF
    return one, two


def _write_anew(path: Path, rows: list[Row]) -> None:
    """Put the rows that are whole into a file of their own; the damaged one is kept beside it."""
    fresh = path.with_name(f"{path.name}.partial")
    fresh.unlink(missing_ok=True)
    hashed = ""
    with contextlib.closing(sqlite3.connect(fresh)) as database, database:
        database.execute(_TABLE)
        for row in rows:
            text = json.dumps(row.body)
            hashed = _hashed(hashed, row.kind, text)
            database.execute("insert into rows values (?, ?, ?, ?)", (row.number, row.kind, text, hashed))
    shutil.copyfile(path, path.with_name(f"{path.name}.cut"))
    for beside in ("-wal", "-shm"):
        path.with_name(path.name + beside).unlink(missing_ok=True)
    os.replace(fresh, path)


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
