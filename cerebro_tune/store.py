"""Where the states of all trials live: in shared memory, within a budget, and the coldest paused ones on disk.

A trial's committed state is an image that nobody writes. A unit runs in a working buffer, which starts as a copy of it
and becomes the committed image when the unit is committed; a worker that dies in the middle has therefore destroyed
nothing. The image before it goes back to a pool, unless a clone still needs it: fresh memory costs a page fault per
4 kB, more than the copy itself, while a pooled buffer stays mapped in every worker that ever used it.

Only running units hold working buffers, so that memory goes to live and paused trials + running units + pool. The pool
never holds more than what is in use (or 256 MB), and gives way first when the budget is short; then the trials that
were cooled longest ago go to disk. Workers need to hear of freed buffers only to give up their mapping: their pages
are given back at once.

The store moves bytes and never imports torch. One thread uses it.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cerebro_tune.budget import state_budget
from cerebro_tune.buffers import Buffer, BufferCache, BufferRef, Mapped, copy, has_anonymous_memory, readable
from cerebro_tune.errors import StateError, StateMemoryError, StateTooLargeError
from cerebro_tune.statefile import load_into, save
from cerebro_tune.wholefile import give_up, once_there_is_room

__all__ = ["BufferCache", "BufferRef", "StateStore", "copy", "state_budget"]

SMALLEST = 1 << 16  # bytes: below that, a buffer's overhead is more than its memory
_POOL_FLOOR = 256 << 20


@dataclass(eq=False, slots=True)
class _Image:
    """A committed state: in a buffer or in a file, of one trial or of several clones."""

    used: int
    digest: str
    buffer: Buffer | None
    file: Path | None = None
    trials: set[str] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Slot:
    """What one trial holds."""

    committed: _Image | None = None
    working: Buffer | None = None
    outgrown: list[Buffer] = field(default_factory=list)  # too small for the running unit, which may still read them


class StateStore:
    """The states of all trials of one run.

    `budget_bytes` bounds the shared memory; `spill_dir` takes states beyond it, and belongs to the store alone.
    """

    def __init__(
        self, budget_bytes: int, spill_dir: Path, allocate: Callable[[int, int], Buffer] | None = None
    ) -> None:
        self.budget_bytes = budget_bytes
        self.bytes_in_use = 0  # of all buffers, those in the pool included
        self._spill_dir = spill_dir
        self._slots: dict[str, _Slot] = {}
        self._cool: dict[str, None] = {}  # coldest first
        self._pool: list[Buffer] = []  # least recently used first
        self._pooled_bytes = 0
        self._freed: list[int] = []
        self._keys, self._files = itertools.count(), itertools.count()
        self._folder: Path | None = None
        self._allocate = allocate or self._new_buffer
        self.stand_still: Callable[[OSError], object] = give_up
        """What is called, again and again, while the disk is full; it may raise to give up."""
        self._clear_spilled()  # of a run that was killed

    # What a unit needs

    def buffers(self, trial: str) -> tuple[BufferRef | None, int, BufferRef | None]:
        """The committed buffer, the bytes used in it, and a working buffer; None, 0, None before the first commit.

        Brings a spilled state back, and warms the trial.
        """
        slot = self._slot(trial)
        self.warm(trial)
        if (image := slot.committed) is None:
            return None, 0, slot.working.ref if slot.working else None
        committed = self._resident(image)
        if slot.working is None:
            slot.working = self._take(committed.nbytes)
        return committed.ref, image.used, slot.working.ref

    def grow(self, trial: str, nbytes: int) -> BufferRef:
        """A working buffer of at least `nbytes`, for the unit that runs now.

        The one it had stays as it is until the commit, because the worker copies from it.
        """
        slot = self._slot(trial)
        self.warm(trial)
        if slot.working is None or slot.working.nbytes < nbytes:
            larger = self._take(nbytes)
            if slot.working is not None:
                slot.outgrown.append(slot.working)
            slot.working = larger
        return slot.working.ref

    def commit(self, trial: str, used: int, digest: str) -> None:
        """The working buffer becomes the committed state."""
        slot = self._slot(trial)
        if slot.working is None or used > slot.working.nbytes:
            has = f"one of {slot.working.nbytes} bytes" if slot.working else "none"
            raise StateError(f"cannot commit {used} bytes for trial {trial!r}: its working buffer is {has}")
        working, slot.working = slot.working, None
        self._replace(trial, slot, _Image(used, digest, working))
        self._give_back(slot)

    def abandon(self, trial: str) -> None:
        """Give up the working buffer: the unit that ran in it is lost, and its worker is gone."""
        self._give_back(self._slot(trial))

    # What a tuner decides

    def clone(self, trial: str, source: str) -> None:
        """`trial` goes on from the committed state of `source`; both hold the same image until they move on."""
        image = self._slot(source).committed
        if image is None:
            raise StateError(f"trial {trial!r} cannot be cloned from {source!r}, which has no committed state yet")
        slot = self._slot(trial)
        self._give_back(slot)
        if slot.committed is not image:
            self._replace(trial, slot, image)

    def cool(self, trial: str) -> None:
        """The trial is paused: its state may go to disk, and its working buffer is free."""
        self._give_back(self._slot(trial))
        self._cool.setdefault(trial)

    def warm(self, trial: str) -> None:
        """The trial will run: its state stays in memory."""
        self._cool.pop(trial, None)

    def drop(self, trial: str) -> tuple[int, ...]:
        """Forget a trial, and return `freed()`."""
        self.warm(trial)
        self.release(trial)
        return self.freed()

    def release(self, trial: str) -> None:
        """Forget a trial that no worker knows of; what is freed is among the next `freed()`."""
        if slot := self._slots.pop(trial, None):
            self._give_back(slot)
            self._replace(trial, slot, None)

    def freed(self) -> tuple[int, ...]:
        """Keys of the buffers freed since the last call; workers may forget them."""
        keys, self._freed = tuple(self._freed), []
        return keys

    # What leaves and enters the store

    def mapped(self, trial: str) -> Mapped:
        """The committed state as memory of this process, for reading; a spilled one is read from its file."""
        image = self._committed(trial)
        if image.file is not None:
            return load_into(image.file, Mapped.private)[0]
        assert image.buffer is not None, "an image is in a buffer or in a file"
        return Mapped.open(image.buffer.ref, populate=False)

    def holds(self, trial: str) -> bool:
        """Whether there is a committed state of the trial."""
        return trial in self._slots and self._slots[trial].committed is not None

    def has_room(self, trial: str) -> bool:
        """Whether one more state like the trial's would be within the budget."""
        buffer = self._committed(trial).buffer
        used = self.bytes_in_use - self._pooled_bytes
        return buffer is None or used + 2 * buffer.nbytes <= self.budget_bytes

    def digest_of(self, trial: str) -> str:
        """The digest of the committed state."""
        return self._committed(trial).digest

    def buffered(self, trial: str) -> bool:
        """Whether the committed state is in shared memory, not on disk."""
        return self._committed(trial).buffer is not None

    def save(self, trial: str, path: Path, durable: bool = True) -> str:
        """Write the committed state to disk; returns its digest. If `durable`, it survives a power failure too."""
        return save(self.mapped(trial), path, durable)

    def restore(self, trial: str, path: Path) -> str:
        """A saved state becomes the trial's committed one; returns its digest."""
        image = self._load(path)
        slot = self._slot(trial)
        self._give_back(slot)
        self._replace(trial, slot, image)
        return image.digest

    def close(self) -> None:
        """Free everything: memory, files and folders."""
        for trial in list(self._slots):
            self.drop(trial)
        while self._pool:
            self._free(self._pool[0])
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._clear_spilled()

    # Images

    def _slot(self, trial: str) -> _Slot:
        return self._slots.setdefault(trial, _Slot())

    def _committed(self, trial: str) -> _Image:
        slot = self._slots.get(trial)
        if slot is None or slot.committed is None:
            raise StateError(f"trial {trial!r} has no committed state")
        return slot.committed

    def _replace(self, trial: str, slot: _Slot, image: _Image | None) -> None:
        before, slot.committed = slot.committed, image
        if image is not None:
            image.trials.add(trial)
        if before is not None:
            before.trials.discard(trial)
            if not before.trials:
                self._discard(before)

    def _discard(self, image: _Image) -> None:
        if image.buffer is not None:
            self._to_pool(image.buffer)
        if image.file is not None:
            image.file.unlink(missing_ok=True)

    def _resident(self, image: _Image) -> Buffer:
        """The image's buffer, brought back from disk where it was spilled."""
        if image.buffer is None:
            assert image.file is not None, "an image is in a buffer or in a file"
            loaded = self._load(image.file)
            image.file.unlink(missing_ok=True)
            image.buffer, image.file = loaded.buffer, None
        assert image.buffer is not None, "just loaded"
        return image.buffer

    def _load(self, path: Path) -> _Image:
        taken: list[Buffer] = []

        def buffer_of(nbytes: int) -> Mapped:
            taken.append(self._take(nbytes))
            return Mapped.open(taken[0].ref, populate=False)

        try:
            _, used, digest = load_into(path, buffer_of)
        except BaseException:
            for buffer in taken:
                self._to_pool(buffer)
            raise
        return _Image(used, digest, taken[0])

    def _spill(self) -> bool:
        """Send the coldest state that only paused trials hold to disk; False when there is none."""
        for trial in self._cool:
            image = self._slot(trial).committed
            if image is not None and image.buffer is not None and image.trials <= self._cool.keys():
                break
        else:
            return False
        file = self._spill_dir / f"state-{next(self._files)}.safetensors"
        try:
            self._spill_dir.mkdir(parents=True, exist_ok=True)
            mapped = Mapped.open(image.buffer.ref, populate=False)
            once_there_is_room(lambda: save(mapped, file, durable=False), self.stand_still)
        except OSError as error:
            raise StateMemoryError(
                f"the states need more than state_memory={readable(self.budget_bytes)}, and a paused one could not be "
                f"written to {file}: {error.strerror}. Free space there, set another run_dir, or raise state_memory"
            ) from error
        self._to_pool(image.buffer)
        image.buffer, image.file = None, file
        return True

    def _clear_spilled(self) -> None:
        for file in [*self._spill_dir.glob("state-*.safetensors"), *self._spill_dir.glob("state-*.partial")]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not empty: then it is somebody else's
            self._spill_dir.rmdir()

    # Buffers

    def _take(self, nbytes: int) -> Buffer:
        """A buffer from the pool or a new one; what is cold gives way."""
        capacity = rounded(nbytes)
        if capacity > self.budget_bytes:
            raise StateTooLargeError(
                f"one state needs {readable(capacity)}, more than state_memory={readable(self.budget_bytes)} for all "
                f"of them: set state_memory higher, to several times that"
            )
        while True:
            if (buffer := self._from_pool(nbytes, capacity)) is not None:
                return buffer
            if self.bytes_in_use + capacity <= self.budget_bytes:
                try:
                    buffer = self._allocate(next(self._keys), capacity)
                except StateMemoryError:
                    if not self._shed():
                        raise
                    continue
                self.bytes_in_use += capacity
                return buffer
            if not self._shed():
                raise self._over_budget(capacity)

    def _over_budget(self, capacity: int) -> StateMemoryError:
        live = sum(1 for slot in self._slots.values() if slot.working or (slot.committed and slot.committed.buffer))
        return StateMemoryError(
            f"no memory for one more state of {readable(capacity)}: {readable(self.bytes_in_use)} of "
            f"state_memory={readable(self.budget_bytes)} hold the states of {live} live "
            f"trials, which cannot go to disk. Set state_memory higher, or live_trials or workers lower"
        )

    def _from_pool(self, nbytes: int, capacity: int) -> Buffer | None:
        for index in reversed(range(len(self._pool))):  # the one used last is the warmest
            buffer = self._pool[index]
            if nbytes <= buffer.nbytes <= capacity + capacity // 4:
                del self._pool[index]
                self._pooled_bytes -= buffer.nbytes
                return buffer
        return None

    def _to_pool(self, buffer: Buffer) -> None:
        self._pool.append(buffer)
        self._pooled_bytes += buffer.nbytes
        while self._pooled_bytes > max(self.bytes_in_use - self._pooled_bytes, _POOL_FLOOR):
            self._free(self._pool[0])

    def _give_back(self, slot: _Slot) -> None:
        buffers = [*slot.outgrown, slot.working] if slot.working else slot.outgrown
        slot.working, slot.outgrown = None, []
        for buffer in buffers:
            self._to_pool(buffer)

    def _shed(self) -> bool:
        """Make room: free a pooled buffer, or spill a paused state into the pool; False when nothing can go."""
        if self._pool:
            self._free(self._pool[0])
            return True
        return self._spill()

    def _free(self, buffer: Buffer) -> None:
        self._pool.remove(buffer)
        self._pooled_bytes -= buffer.nbytes
        self.bytes_in_use -= buffer.nbytes
        self._freed.append(buffer.ref.key)
        buffer.free()

    def _new_buffer(self, key: int, nbytes: int) -> Buffer:
        if self._folder is None and not has_anonymous_memory():
            self._folder = Path(tempfile.mkdtemp(prefix="cerebro-tune-"))
        return Buffer(key, nbytes, self._folder)


def rounded(nbytes: int) -> int:
    """A capacity of at least `nbytes`, from eight sizes per power of two, so that buffers of like states are alike."""
    step = max(SMALLEST, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
