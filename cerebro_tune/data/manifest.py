"""The manifest of a sharded set: what was written, and how to tell that it is still that.

It is JSON for people to read. Each shard has two digests: sha256 is its identity (equal sets have equal ones), xxh3 is
what a reader checks, since it runs at memory speed. The manifest carries an xxh3 of itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from cerebro_tune.data.schema import tensor_type
from cerebro_tune.errors import DataError

FILE_NAME = "manifest.json"
_KIND = "cerebro_tune sharded data set"
_FORMAT = 1


def shard_file(index: int) -> str:
    """Name of a shard's file within the set's folder."""
    return f"shard-{index:05d}.arrow"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard's file as it was written."""

    file: str
    rows: int
    bytes: int
    sha256: str
    xxh3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about a sharded set without opening a shard."""

    schema: pa.Schema
    seed: int
    stratify: str | None
    shards: tuple[ShardEntry, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole set."""
        return sum(entry.rows for entry in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the rows, their types and the shard that each is in, in hex."""
        digest = hashlib.sha256(self.schema.serialize().to_pybytes())
        for entry in self.shards:
            digest.update(bytes.fromhex(entry.sha256))
        return digest.hexdigest()

    def to_json(self) -> str:
        """The text of the file."""
        body: dict[str, Any] = {
            "kind": _KIND,
            "format": _FORMAT,
            "rows": self.rows,
            "seed": self.seed,
            "stratify": self.stratify,
            "columns": [_describe(field) for field in self.schema],
            "arrow_schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "shards": [asdict(entry) for entry in self.shards],
        }
        return json.dumps(body | {"xxh3": _checksum(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the set in `folder`; DataError when there is none that can be trusted."""
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise no_manifest(str(folder)) from None
    return parse_manifest(content, str(path))


def no_manifest(folder: str) -> DataError:
    """The error of a folder that is no sharded set."""
    return DataError(
        f"{folder} is not a sharded data set: it has no {FILE_NAME}. "
        "Write one with ShardedDataset.write(source, path, num_shards=...)"
    )


def parse_manifest(content: bytes, name: str) -> Manifest:
    """The manifest that a file holds; DataError, with the file's `name`, when it cannot be trusted."""
    try:
        body = json.loads(content)
    except ValueError as error:
        raise _damaged(name, str(error)) from error
    if not isinstance(body, dict) or body.get("kind") != _KIND:
        raise _damaged(name, "it does not describe a sharded data set")
    if body.get("format") != _FORMAT and body.get("xxh3") == _checksum({k: v for k, v in body.items() if k != "xxh3"}):
        raise DataError(
            f"{name} has format {body.get('format')!r}; this version of cerebro_tune reads format {_FORMAT}. "
            "Upgrade cerebro_tune, or write the set again"
        )
    return _parse(name, body)


def _parse(name: str, body: dict[str, Any]) -> Manifest:
    found = body.pop("xxh3", None)
    if found != (expected := _checksum(body)):
        raise _damaged(name, f"its checksum is {found}, its content has {expected}")
    try:
        shards = tuple(ShardEntry(**entry) for entry in body["shards"])
        if [entry.file for entry in shards] != [shard_file(index) for index in range(len(shards))]:
            raise ValueError("its files have other names than shards have")  # they might lead out of the folder
        return Manifest(
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(body["arrow_schema"]))),
            seed=body["seed"],
            stratify=body["stratify"],
            shards=shards,
        )
    except (KeyError, TypeError, ValueError) as error:  # a well-formed checksum over a manifest that we never wrote
        raise _damaged(name, repr(error)) from error


def _damaged(name: str, why: str) -> DataError:
    return DataError(
        f"{name} is damaged: {why}. Write the set again from its source, or restore the folder from a copy"
    )


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


def _describe(field: pa.Field[Any]) -> dict[str, Any]:
    form = tensor_type(field.type)
    described: dict[str, Any] = {"name": field.name, "type": str(field.type)}
    if form is not None:
        described |= {"value": str(form.value), "shape": [form.shape[axis] for axis in form.axes]}
    return described
