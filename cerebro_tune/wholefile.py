"""Files that appear whole or not at all, and what it takes for them to outlive a loss of power or wait for room."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import xxhash

T = TypeVar("T")

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""What writing raises on a full disk, or beyond a limit that somebody has set."""
LOOK_AGAIN_S = 1.0
"""Between two looks whether a disk has room again, of which no file system tells."""
_NO_FOLDERS = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES})
"""What file systems raise on which folders cannot be synced, and those of others."""


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes its name at the end; nothing is left of it where that is not reached.

    `durable` waits until the disk has it, so that it survives a power failure.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def durable_folder(folder: Path) -> None:
    """Make a folder, and those around it, so that it survives a power failure; it may be there, and not for sure."""
    if not folder.exists():
        durable_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Wait until the disk has a file that was written before."""
    fd = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows syncs what may be written to
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make what was named anew in a folder survive a power failure; Windows does by itself, and cannot open folders."""
    if os.name == "posix":
        try:
            sync_file(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise


def digest_of_file(path: Path) -> str:
    """A hash of the file's bytes; empty where there is no such file."""
    hashed = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    except FileNotFoundError:
        return ""
    return hashed.hexdigest()


def give_up(error: OSError) -> None:
    """Not wait for room at all."""
    try:
        raise error
    finally:
        del error  # or it would hold this frame, which holds it, and with it what is mapped


def told(error: OSError) -> str:
    """What went wrong, and with which file, without a number that says nothing."""
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror or error)


def once_there_is_room(act: Callable[[], T], stand_still: Callable[[OSError], object]) -> T:
    """Do this, again and again while the disk is full; `stand_still` waits a little, or raises to give up."""
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            stand_still(error)
