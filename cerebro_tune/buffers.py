"""Memory that several processes share without a name: one buffer holds one trial's state.

The coordinator allocates a buffer, all of it at once, because a write to a page that a full file system cannot provide
kills the process (SIGBUS) instead of raising. Workers open it by the path in its `BufferRef`: on Linux an anonymous
memory file of the coordinator, seen through /proc, which vanishes with the last process that has it; elsewhere a file
in a private temporary folder, which the coordinator removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cerebro_tune.errors import StateError, StateMemoryError

T = TypeVar("T")

_NO_ROOM = {errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT}
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class BufferRef:
    """How another process finds a buffer; keys are never used twice."""

    key: int
    path: str
    nbytes: int


class Mapped:
    """A buffer as memory of this process.

    Tensors and arrays may view the memory, and then keep it mapped by themselves. `close` therefore only gives up this
    object's hold: unmapping under a tensor would crash the process, since torch releases the buffer protocol's lock at
    once and `mmap.close` would succeed.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._memory: memoryview | None = memoryview(mapping)
        self.known: object = None  # what `regions.py` keeps of the tensors here
        self.nbytes = len(mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._pinned = False

    @classmethod
    def open(cls, ref: BufferRef, populate: bool = True) -> Mapped:
        """Map another process's buffer; `populate` takes all page faults now instead of at first touch."""
        try:
            fd = with_descriptors(lambda: os.open(ref.path, os.O_RDWR))
        except FileNotFoundError:
            raise StateError(
                f"state buffer {ref.key} is gone ({ref.path} does not exist): the coordinator freed it or has ended"
            ) from None
        try:
            size = os.fstat(fd).st_size
            if size != ref.nbytes:
                raise StateError(f"state buffer {ref.key} has {size} bytes, not {ref.nbytes}: it was freed meanwhile")
            return cls(with_descriptors(lambda: _map(fd, ref.nbytes, populate)))
        finally:
            os.close(fd)

    @classmethod
    def private(cls, nbytes: int) -> Mapped:
        """Memory of this process alone."""
        return cls(mmap.mmap(-1, nbytes))

    @property
    def memory(self) -> memoryview:
        """The bytes, writable."""
        if self._memory is None:
            raise StateError("this mapped buffer was closed")
        return self._memory

    def pin(self) -> None:
        """Lock the pages for CUDA, which copies at the speed of the bus then; where it refuses, copies stay slow."""
        self._pinned = int(_cuda().cudaHostRegister(self.address, self.nbytes, 0)) == 0

    def close(self) -> None:
        """Give up this hold; the memory is unmapped when the last tensor that views it goes."""
        if self._pinned:
            _cuda().cudaHostUnregister(self.address)
            self._pinned = False
        self._memory = self.known = None


def _cuda() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _map(fd: int, nbytes: int, populate: bool) -> mmap.mmap:
    if not hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(fd, nbytes)
    mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
    mapping.madvise(mmap.MADV_DONTFORK)  # a loader process would keep the memory of buffers that are long freed
    return mapping


def copy(source: Mapped, target: Mapped, used: int) -> None:
    """Copy the first `used` bytes: one memcpy, other threads run meanwhile."""
    if used > min(source.nbytes, target.nbytes):
        raise StateError(f"cannot copy {used} bytes from a buffer of {source.nbytes} into one of {target.nbytes}")
    # Holding the views holds the mappings: an address alone would not.
    views = source.memory, target.memory
    ctypes.memmove(target.address, source.address, used)
    del views


class BufferCache:
    """A worker's mapped buffers: each is mapped once and kept, so that a hop in steady state takes no page faults.

    `pinned` is for a worker that computes on a CUDA device.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._mapped: dict[int, Mapped] = {}

    def open(self, ref: BufferRef) -> Mapped:
        """The buffer as memory of this process."""
        mapped = self._mapped.get(ref.key)
        if mapped is None:
            mapped = self._mapped[ref.key] = Mapped.open(ref)
            if self._pinned:
                mapped.pin()
        return mapped

    def forget(self, keys: Iterable[int]) -> None:
        """Give up buffers that the coordinator has freed; unknown keys are fine."""
        for key in keys:
            if mapped := self._mapped.pop(key, None):
                mapped.close()

    def close(self) -> None:
        """Give up all buffers."""
        self.forget(list(self._mapped))


class Buffer:
    """A buffer that this process, the coordinator, owns."""

    def __init__(self, key: int, nbytes: int, folder: Path | None) -> None:
        """Allocate it: anonymous memory, or a file in `folder` when one is given. StateMemoryError when it is full."""
        self._fd: int | None = None
        if folder is None:
            self._fd = with_descriptors(lambda: os.memfd_create(f"cerebro-tune-{key}", os.MFD_CLOEXEC))
            path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            path = str(folder / f"state-{key}")
        self.ref = BufferRef(key, path, nbytes)
        try:
            self._reserve()
        except BaseException:
            self.free()
            raise

    @property
    def nbytes(self) -> int:
        """Its capacity."""
        return self.ref.nbytes

    def _reserve(self) -> None:
        fd = self._fd if self._fd is not None else os.open(self.ref.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(fd, self.nbytes)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise StateMemoryError(
                f"no room for a state buffer of {readable(self.nbytes)}: {error.strerror}. "
                f"Lower live_trials, or set state_memory below what is free so that paused states go to disk earlier"
            ) from error
        finally:
            if self._fd is None:
                os.close(fd)

    def free(self) -> None:
        """Give the memory back at once, also where a worker still has it mapped (it would read zeros)."""
        if self._fd is not None:
            # Without this the pages would stay until the last worker hears that the buffer is gone.
            with contextlib.suppress(OSError, ValueError):
                _map(self._fd, self.nbytes, populate=False).madvise(mmap.MADV_REMOVE)
            os.close(self._fd)
            self._fd = None
        elif not self.ref.path.startswith("/proc/"):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows keeps a file that is mapped
                os.unlink(self.ref.path)


def has_anonymous_memory() -> bool:
    """Whether buffers can be memory files without a name, opened by others through /proc."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def _reserve(fd: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        import psutil

        # A memory file has no size limit of its own: asking for more than there is wakes the kernel's OOM killer.
        if nbytes > psutil.virtual_memory().available:
            raise OSError(errno.ENOSPC, f"only {readable(psutil.virtual_memory().available)} of memory are available")
        os.posix_fallocate(fd, 0, nbytes)
        return
    for start in range(0, nbytes, len(_ZEROS)):
        os.write(fd, _ZEROS[: nbytes - start])


def with_descriptors(call: Callable[[], T]) -> T:
    """Call; when this process is out of file descriptors, raise its soft limit to the hard one and call again."""
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise StateMemoryError(
            f"out of file descriptors ({soft} allowed, {hard} at most): each live or paused trial needs two. "
            f"Lower live_trials or raise the limit with `ulimit -n`"
        ) from error


def readable(nbytes: float) -> str:
    """Bytes as people write them: 1.5 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, int(math.log10(max(1.0, nbytes))) // 3))
    return f"{nbytes / 1000**power:.3g} {units[power]}"
