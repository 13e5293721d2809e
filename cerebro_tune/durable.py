"""States on disk, of every few units, that a run whose coordinator has died goes on from: the latest of each trial."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from cerebro_tune.clock import Clock
from cerebro_tune.ledger import FullDisk
from cerebro_tune.store import StateStore
from cerebro_tune.wholefile import durable_folder

FOLDER = "states"


class DurableStates:
    """Writes committed states on a thread of its own, while the trials go on.

    `post` has a call made on the loop's thread; `saved` is called there, with trial, units and file, when the disk has
    a state; `failed` with what went wrong. The one before it goes by `when_safe`: when no loss of power can bring back
    a time in which it was the latest.
    """

    def __init__(
        self,
        run_dir: Path,
        every: int,
        store: StateStore,
        post: Callable[[Callable[[], object]], object],
        saved: Callable[[str, int, str], None],
        failed: Callable[[str], None],
        when_safe: Callable[[Callable[[], object]], object],
        clock: Clock,
        disk: FullDisk,
    ) -> None:
        self.folder = run_dir / FOLDER
        self._every, self._store, self._post, self._saved, self._failed = every, store, post, saved, failed
        self._files: dict[str, Path] = {}
        self._writing: set[str] = set()
        self._when_safe, self._disk = when_safe, disk
        self._thread = clock.beside("durable")

    @property
    def pending(self) -> bool:
        """Whether a state is being written."""
        return bool(self._writing)

    def due(self, units: int) -> bool:
        """Whether a state of so many units is one that is written."""
        return units % self._every == 0

    def begin(self, trial: str, units: int) -> None:
        """Write the trial's committed state, which stays as it is until that is done.

        One whose last state is still being written is left out, or for which there would be no room beside the others:
        a slow disk would hold more and more of them in memory.
        """
        if trial in self._writing or not self._store.has_room(trial):
            return
        held = f"{trial}@{units}"
        self._store.clone(held, trial)
        self._writing.add(trial)
        done = self._thread.submit(self._write, held, trial, units)
        done.add_done_callback(lambda done: self._post(partial(self._conclude, held, trial, units, done)))

    def write_now(self, trial: str, units: int) -> None:
        """Write it, and return when the disk has it."""
        self._take(trial, units, self._write(trial, trial, units))

    def found(self, trial: str, file: str) -> Path:
        """Take over the state that an earlier coordinator has written."""
        self._files[trial] = self.folder / file
        return self._files[trial]

    def forget(self, trial: str) -> None:
        """The trial has ended."""
        if path := self._files.pop(trial, None):
            self._remove(path)

    def clear_strays(self) -> None:
        """Remove files that no row of the journal knows: of writes that a death has cut short."""
        for path in self.folder.glob("*") if self.folder.exists() else ():
            if path not in self._files.values():
                path.unlink()

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown()
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, held: str, trial: str, units: int) -> Path:
        path = self.folder / f"{trial}-{units}.safetensors"

        def write() -> None:
            durable_folder(self.folder)
            self._store.save(held, path)

        self._disk.wait_out(write)
        return path

    def _conclude(self, held: str, trial: str, units: int, done: Future[Path]) -> None:
        self._writing.discard(trial)
        alive = self._store.holds(trial)
        self._store.release(held)
        if error := done.exception():
            self._failed(f"the state of {trial} could not be written to {self.folder}: {error}")
        elif alive:
            self._take(trial, units, done.result())
        else:
            done.result().unlink(missing_ok=True)

    def _take(self, trial: str, units: int, path: Path) -> None:
        before, self._files[trial] = self._files.get(trial), path
        self._saved(trial, units, path.name)
        if before is not None and before != path:
            self._remove(before)

    def _remove(self, path: Path) -> None:
        self._when_safe(partial(path.unlink, missing_ok=True))
