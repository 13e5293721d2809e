"""A loss of power, or a kill, at any operation on a run's files: what the disk has then is enough to go on from.

What a disk has is modelled by what it was told: of a file the bytes at its last fsync, of a folder the names at its.
What came later is there, is not, or is in part. SQLite's own writes to its main file are taken as it promises them.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import soak
from cerebro_tune import Results
from cerebro_tune.journal import NAME, Journal
from cerebro_tune.reading import RunReading
from resumed_runs import fit
from runs import outcome

CONFIGS = [{"lr": 0.01}, {"lr": 0.1, "stop_at": 3}]
EVERYTHING, ONLY_WHAT_IS_SAFE, TORN = "everything", "only what is safe", "torn"
"""What is left: after a kill all that was written; after a loss of power the least, or something in between."""


@dataclass(frozen=True)
class Image:
    """Files by their place, and folders as None, as somebody finds them at some point."""

    point: str
    kind: str
    files: dict[Path, bytes | None]

    def lay_out(self, folder: Path) -> None:
        for place, content in sorted(self.files.items()):
            if content is None:
                (folder / place).mkdir(parents=True)
            else:
                (folder / place).write_bytes(content)


class Disk:
    """Watches the operations on a folder's files, and has an image of what is left at each of them."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.images: list[Image] = []
        self._root, self._chance, self._lock = root, chance, threading.RLock()
        self._bytes: dict[int, bytes] = {}
        """By inode: what was fsynced of a file."""
        self._names: dict[int, dict[str, int]] = {}
        """By inode: what was fsynced of a folder."""
        self._held: dict[int, int] = {}
        """Descriptors of all files that were seen, so that no inode is used twice."""
        root.mkdir()
        self._synced(root)
        self._synced(root.parent)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it is, every operation is a point at which the power may fail: just before it, and just after."""
        with (
            patch.object(
                os, "fsync", self._around(os.fsync, lambda fd: self._synced(Path(os.readlink(f"/proc/self/fd/{fd}"))))
            ),
            patch.object(os, "replace", self._around(os.replace)),
            patch.object(os, "unlink", self._around(os.unlink)),
            patch.object(Journal, "append", self._around(Journal.append)),
        ):
            yield
        for descriptor in self._held.values():
            os.close(descriptor)

    def _around(self, act: Callable[..., Any], after: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._take(f"before {act.__name__} {args[1:] if act.__name__ == 'append' else args}")
                found = act(*args, **kwargs)
                after(*args)
                self._take(f"after {act.__name__} {args[1:] if act.__name__ == 'append' else args}")
                return found

        return watched

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._names[path.stat().st_ino] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        elif path.exists():
            self._bytes[path.stat().st_ino] = path.read_bytes()

    def _take(self, point: str) -> None:
        for kind in (EVERYTHING, ONLY_WHAT_IS_SAFE, TORN):
            files: dict[Path, bytes | None] = {}
            self._walk(self._root, Path(), kind, files)
            if not self.images or all(files != image.files for image in self.images[-3:]):
                self.images.append(Image(point, kind, files))

    def _walk(self, folder: Path, place: Path, kind: str, files: dict[Path, bytes | None]) -> None:
        now = {path.name: path for path in folder.iterdir() if path.exists()}  # SQLite removes files of its own
        inodes = {path.stat().st_ino: path for path in now.values()}
        for path in now.values():
            self._hold(path)
        safe = self._names.get(folder.stat().st_ino, {})
        found: dict[str, int] = {name: path.stat().st_ino for name, path in now.items()}
        # File systems keep the order of what is done to the names of a folder, and do a renaming at once or not at all.
        if kind == ONLY_WHAT_IS_SAFE or (kind == TORN and self._chance.random() < 0.5):
            found = dict(safe)
        for name, inode in found.items():
            path = inodes.get(inode)
            if path is not None and path.is_dir():
                files[place / name] = None
                self._walk(path, place / name, kind, files)
            elif inode in self._names:  # a folder that was removed since, and may come back with what it had
                files[place / name] = None
                for inner, of in self._names[inode].items():
                    files[place / name / inner] = self._content(of, inner, kind)
            elif not name.endswith("-shm"):
                files[place / name] = self._content(inode, name, kind)

    def _hold(self, path: Path) -> None:
        if (inode := path.stat().st_ino) not in self._held and not path.is_dir():
            self._held[inode] = os.open(path, os.O_RDONLY)

    def _content(self, inode: int, name: str, kind: str) -> bytes:
        whole = _bytes_of(self._held[inode])
        if kind == EVERYTHING or (name.startswith(NAME) and not name.endswith("-wal")):
            return whole
        safe = self._bytes.get(inode, b"")
        if kind == ONLY_WHAT_IS_SAFE or whole == safe:
            return safe
        if not whole.startswith(safe):  # it was written over from the beginning
            return self._chance.choice([whole, safe])
        cut = self._chance.randint(len(safe), len(whole))
        return whole[:cut] + bytes(len(whole) - cut if self._chance.random() < 0.5 else 0)


def _bytes_of(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    return os.pread(descriptor, size, 0)


def run(folder: Path) -> Results:
    return fit(folder, CONFIGS, epochs=1, durable_every=2)


def watched(folder: Path, chance: random.Random, image: Image | None = None) -> tuple[Results, list[Image]]:
    """The run, or what is left of it by an image, and all images of it on the way."""
    disk = Disk(folder, chance)
    if image is not None:
        image.lay_out(folder)
        for path in [folder, *folder.rglob("*")]:
            disk._synced(path)
    with disk.watched():
        return run(folder), disk.images


def check(sets: Path, image: Image, undisturbed: Results, results: Results) -> None:
    told = f"{image.kind} of what was there {image.point}"
    assert outcome(results) == outcome(undisturbed), told
    assert RunReading(results.run_dir).verify() == [], told
    for ours, theirs in zip(results, undisturbed, strict=True):
        assert Path(str(ours.checkpoint)).read_bytes() == Path(str(theirs.checkpoint)).read_bytes(), told
    left = {str(path.relative_to(results.run_dir)) for path in results.run_dir.rglob("*")}
    expected = {str(path.relative_to(undisturbed.run_dir)) for path in undisturbed.run_dir.rglob("*")}
    assert left - {f"{NAME}.cut"} == expected, told


@pytest.mark.timeout(1200)
def test_power_fails_at_every_operation_on_files(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, longer, recovered = random.Random(8), soak.Loop(), 0
    undisturbed, images = watched(sets / "undisturbed", chance)
    assert len(images) > 100
    for number in count():
        if number >= len(images) and not longer:
            break
        folder, image = sets / "again", images[number] if number < len(images) else chance.choice(images)
        if number < len(images):
            folder.mkdir()
            image.lay_out(folder)
            check(sets, image, undisturbed, run(folder))
        else:  # and once more in the middle of the recovery
            _, further = watched(folder, chance, image)
            shutil.rmtree(folder)
            image = chance.choice(further)
            folder.mkdir()
            image.lay_out(folder)
            check(sets, image, undisturbed, run(folder))
        shutil.rmtree(folder)
        recovered += 1
        assert "is trained again from its beginning" not in capsys.readouterr().err
    soak.tell(
        f"{recovered} images of a disk, at every operation on files of a run and after it: all went on, bit for bit"
    )
