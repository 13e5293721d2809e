"""Sharded sets on another file system: written there whole, and fetched from there shard by shard.

    temporary folder -> shard-00000.arrow, ... -> manifest.json          (writing: the manifest is what makes it a set)
    manifest.json -> shard-00003.arrow -> checked -> renamed into the cache        (reading: when a shard is first used)

Any URI that `pyarrow.fs` knows will do; `file://` is treated like the others.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from cerebro_tune.data.manifest import FILE_NAME, Manifest, ShardEntry, no_manifest, parse_manifest
from cerebro_tune.data.shard import check_shard
from cerebro_tune.errors import DamagedShardError, DataError

_BLOCK_BYTES = 4 << 20


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether this names something by URI and not by a path of this machine."""
    return "://" in os.fspath(path)


def shown(uri: str) -> str:
    """The URI without the key, the secret and the options that it may hold: for messages."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True, slots=True)
class RemoteSet:
    """The folder that a URI names, with a set in it or free for one."""

    uri: str
    cache_dir: Path
    system: fs.FileSystem
    folder: str

    @classmethod
    def at(cls, uri: str, cache_dir: str | os.PathLike[str] | None = None) -> RemoteSet:
        """The folder at `uri`; nothing is read yet. DataError for a URI that pyarrow.fs does not know."""
        try:
            system, folder = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError) as error:
            raise failed(uri, "cannot be opened", error) from error
        return cls(uri, Path(os.path.abspath(cache_dir or _user_cache())), system, folder.rstrip("/"))

    def manifest(self) -> Manifest:
        """The manifest of the set; DataError when there is none that can be trusted."""
        try:
            with self.system.open_input_stream(self._place(FILE_NAME), compression=None) as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise no_manifest(shown(self.uri)) from None
        except (pa.ArrowException, OSError) as error:
            raise failed(self.uri, "cannot be read", error) from error
        return parse_manifest(content, self._shown(FILE_NAME))

    def fetch(self, entry: ShardEntry, schema: pa.Schema, file: Path) -> None:
        """See that this shard lies in `file`, whole and unharmed; several processes may do so at once.

        A file that is there and damaged is fetched anew. DamagedShardError when what is fetched is damaged too.
        """
        with suppress(DamagedShardError):  # not fetched yet, or damaged since
            check_shard(file, entry, schema)
            return
        work = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with (
                self.system.open_input_stream(self._place(entry.file), compression=None) as source,
                work.open("xb") as target,
            ):
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
            check_shard(work, entry, schema, self._shown(entry.file))
            work.replace(file)  # who has the old one mapped keeps it
        except (pa.ArrowException, OSError) as error:
            raise failed(
                self.uri, f"has a shard {entry.file} that cannot be fetched into {file.parent}", error
            ) from error
        finally:
            work.unlink(missing_ok=True)

    def require_free(self) -> None:
        """Raise DataError when there is something already."""
        try:
            found = self.system.get_file_info(self.folder)
            taken = found.is_file or (
                found.type == fs.FileType.Directory and self.system.get_file_info(fs.FileSelector(self.folder))
            )
        except (pa.ArrowException, OSError) as error:
            raise failed(self.uri, "cannot be written", error) from error
        if taken:
            raise DataError(
                f"{shown(self.uri)} exists already: choose another place, delete it, or read it with "
                "ShardedDataset.open"
            )

    def upload(self, written: Path) -> None:
        """Copy the set in the folder `written` to here, the manifest last; a failure takes back what was sent."""
        shards = sorted(path.name for path in written.iterdir() if path.name != FILE_NAME)
        sent: list[str] = []
        made: list[Path] = []
        try:
            if isinstance(self.system, fs.LocalFileSystem):  # others have no folders, or make them as files need them
                made = [path for path in (Path(self.folder), *Path(self.folder).parents) if not path.exists()]
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            for name in [*shards, FILE_NAME]:
                sent.append(name)
                with (
                    (written / name).open("rb") as source,
                    self.system.open_output_stream(self._place(name), compression=None) as target,
                ):
                    shutil.copyfileobj(source, target, _BLOCK_BYTES)
        except BaseException as error:
            left = self._take_back(sent, made)
            if not isinstance(error, pa.ArrowException | OSError):
                raise
            what = "could not be written, and nothing is left there"
            if left:
                what = f"could not be written, and {', '.join(left)} could not be removed from there"
            raise failed(self.uri, what, error) from error

    def _take_back(self, sent: Sequence[str], made: Sequence[Path]) -> list[str]:
        """Delete these files, the last first, and the folders made for them; the names of those that remain."""
        left = []
        for name in reversed(sent):
            try:
                self.system.delete_file(self._place(name))
            except FileNotFoundError:
                continue
            except (pa.ArrowException, OSError):
                left.append(name)
        with suppress(OSError):  # someone else has put something there meanwhile
            for folder in made:
                folder.rmdir()
        return left

    def _place(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _shown(self, name: str) -> str:
        return f"{shown(self.uri).rstrip('/')}/{name}"


@contextmanager
def uploaded(uri: str) -> Iterator[Path]:
    """A local folder to write a set into; it is uploaded when the block ends, and gone whatever happens."""
    target = RemoteSet.at(uri)
    target.require_free()  # before hours of work
    with tempfile.TemporaryDirectory(prefix="cerebro_tune-") as temporary:
        folder = Path(temporary, "set")
        yield folder
        target.require_free()  # someone else may have been faster
        target.upload(folder)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cerebro_tune")


def failed(uri: str, what: str, error: BaseException) -> DataError:
    """The error that `uri` cannot be used: what happened to it, and why; without secrets."""
    return DataError(f"{shown(uri)} {what}: {str(error).replace(uri, shown(uri))}")
