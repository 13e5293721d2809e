"""A set of row numbers: shards of a map-style Dataset that stays what it is.

Nothing is copied. A shard is the list of its rows' numbers, taken from one seeded permutation; the rows themselves are
read by the user's Dataset, in every epoch. What the set was made from is written down in a manifest (length, seed, a
fingerprint of a few rows), and every process that makes the Dataset anew compares.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt

from cerebro_tune.data.base import Reader, RowSet
from cerebro_tune.data.fingerprint import digest_of
from cerebro_tune.data.form import BatchForm
from cerebro_tune.data.order import Rows, shard_bounds, stratified_order, write_order
from cerebro_tune.errors import DataError, NotPicklableError
from cerebro_tune.seeding import kept_streams, one_thread, seed_data, seed_row
from cerebro_tune.warn import warn_user
from cerebro_tune.wholefile import whole_file

_KIND = "cerebro_tune index"
_FORMAT = 1
_ROWS_COMPARED = 4
# Read twice before the rows of an index are trusted: a flip at even odds stays unseen in 1 of 65,536 Datasets.
_ROWS_TRIED = 16
_SECONDS_TO_TRY = 1.0  # beyond the rows compared, however long these take


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What an index was made from.

    order: sha256 of the row numbers in the order of the shards.
    samples: digests of a few rows by their numbers, read with the generators seeded; empty for a Dataset whose rows
        differ even so.
    """

    dataset: str
    rows: int
    num_shards: int
    seed: int
    order: str
    samples: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Identity of the rows and of the shard that each is in, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Keep it in a file."""
        with whole_file(path) as file:
            file.write((json.dumps({"kind": _KIND, "format": _FORMAT} | asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> IndexManifest:
        """The manifest in a file."""
        try:
            body = json.loads(path.read_text())
            if body.pop("kind") != _KIND or body.pop("format") != _FORMAT:
                raise ValueError("of another kind or format")
            return cls(**body)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no manifest of an index: {error}") from error

    def require(self, found: IndexManifest) -> None:
        """Raise DataError unless `found` describes the same rows in the same shards."""
        self.require_rows(found.dataset, found.rows)
        for name in ("num_shards", "seed", "order"):
            now, then = getattr(found, name), getattr(self, name)
            if now != then:
                raise DataError(
                    f"An index of {found.dataset} was made with {name} {then}, and now with {now}: "
                    "make it with the arguments it was made with (num_shards, seed, stratify), or start a new run."
                )
        self.require_samples(found.dataset, found.samples)

    def require_rows(self, dataset: str, rows: int) -> None:
        """Raise DataError when the Dataset has grown or shrunk."""
        if rows != self.rows:
            raise DataError(
                f"{dataset} has {rows} rows, and had {self.rows} when its index was made: "
                "bring back what is missing (or take away what was added), or make the index again."
            )

    def require_samples(self, dataset: str, samples: dict[str, str]) -> None:
        """Raise DataError when one of the rows compared is not what it was."""
        changed = [row for row, digest in self.samples.items() if samples.get(row) != digest]
        if changed and samples:
            raise DataError(
                f"Row {changed[0]} of {dataset} is not what it was when its index was made ({len(changed)} of "
                f"{len(self.samples)} rows compared differ): the Dataset must give the same rows in the same order in "
                "every process. Sort file names, seed random splits, or make the index again if the data has changed."
            )


class IndexedDataset(RowSet):
    """Rows of a map-style Dataset, sharded by number; make one with `ShardedDataset.index`.

    It pickles as what makes the Dataset, which each worker does once. Rows are compared where they are read: a process
    that only hands the Dataset on, to others that it forks, must not have opened what they would then share.
    """

    def __init__(self, make_dataset: Any, manifest: IndexManifest, order: Rows) -> None:
        self.num_rows, self.num_shards, self.seed = manifest.rows, manifest.num_shards, manifest.seed
        self.name = manifest.dataset
        self.manifest = manifest
        self._make, self._order = make_dataset, order
        self._bounds = shard_bounds(manifest.rows, manifest.num_shards)
        self._source: Any = None
        self._is_compared = False

    @property
    def fingerprint(self) -> str:
        """Identity of the rows, as far as they were compared, and of the shard that each is in, in hex."""
        return self.manifest.fingerprint

    @property
    def source(self) -> Any:
        """The Dataset in this process, of the length that it had; no row of it is read here."""
        if self._source is None:
            with kept_streams(), one_thread():
                source = made(self._make, self.seed)
            self.manifest.require_rows(self.name, _length(source))
            self._source = source
        return self._source

    @property
    def compared(self) -> Any:
        """The Dataset in this process, a few rows of which have been compared with what they were."""
        source = self.source
        if not self._is_compared:
            with kept_streams(), one_thread():
                self._compare(source)
            self._is_compared = True
        return source

    def _compare(self, source: Any) -> None:
        """Raise DataError when rows are not what they were; warn where they do not even repeat in this process."""
        numbers = [int(row) for row in self.manifest.samples]
        found = _sampled(source, self.seed, numbers)
        if found != self.manifest.samples:
            again = _sampled(source, self.seed, numbers)
            if found != again:
                _warn_of_own_generator(self.name, found, again)
                return
        self.manifest.require_samples(self.name, found)

    def rows(self, shard: int) -> int:  # noqa: D102
        return len(self.numbers(shard))

    def numbers(self, shard: int) -> Rows:
        """The numbers of the rows in this shard, in no particular order."""
        if not 0 <= shard < self.num_shards:
            raise DataError(f"there is no shard {shard}; {self.name} has shards 0 to {self.num_shards - 1}")
        return self._order[self._bounds[shard] : self._bounds[shard + 1]]

    def values(self, name: str) -> Any:  # noqa: D102
        return values_of(self.source, name)

    def check(self, shards: Iterable[int] | None = None) -> None:
        """Raise DataError when the Dataset has grown or shrunk; what reads it compares rows, see `compared`."""
        assert self.source is not None, "made"

    def reader(self, form: BatchForm, seed: int, on_row_error: str = "raise") -> Reader:  # noqa: D102
        from cerebro_tune.data.readers import RowReader

        assert self.source is not None, "made here, before processes are forked that share its memory"
        return RowReader(self, form, seed, on_row_error)

    def release(self) -> None:
        """Let go of a Dataset that can be made again."""
        if not _is_dataset(self._make):
            self._source = None

    def __repr__(self) -> str:
        return f"IndexedDataset({self.name}: {self.num_rows} rows in {self.num_shards} shards)"

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self._make, self.manifest, self._order)


def index_rows(make_dataset: Any, num_shards: int, seed: int, stratify: Any) -> IndexedDataset:
    """See `ShardedDataset.index`."""
    for name, value, least in (("num_shards", num_shards, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    with kept_streams(), one_thread():
        source = made(make_dataset, seed)
        rows, name = _length(source), f"the Dataset {type(source).__qualname__}"
        if not rows:
            raise DataError(f"{name} has no rows")
        if num_shards > rows:
            raise DataError(f"num_shards is {num_shards}, but {name} has only {rows} rows; use {rows} or fewer")
        samples = _fingerprint(_copy_of(source, name) if source is make_dataset else source, name, seed, rows)
        places = write_order(seed, rows)
        if stratify is not None:
            places = stratified_order(places, _classes(source, stratify, rows), num_shards)
    order = np.empty(rows, dtype=np.int64)
    order[places] = np.arange(rows, dtype=np.int64)
    identity = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    found = IndexedDataset(make_dataset, IndexManifest(name, rows, num_shards, seed, identity, samples), order)
    if _is_dataset(make_dataset):
        found._source = source
    return found


def made(make_dataset: Any, seed: int) -> Any:
    """The Dataset; DataError when it is none whose rows have numbers."""
    seed_data(seed)
    source = make_dataset if _is_dataset(make_dataset) or not callable(make_dataset) else make_dataset()
    what = f"a {type(source).__qualname__}"
    splits = [key for key in source if isinstance(key, str)] if isinstance(source, Mapping) else []
    if splits:  # a DatasetDict of Hugging Face
        raise DataError(
            f"{what} holds {', '.join(map(repr, splits))}, not rows: give one of its splits, ds[{splits[0]!r}]"
        )
    if any(base.__name__ == "IterableDataset" for base in type(source).__mro__):
        raise DataError(
            f"{what} is an IterableDataset: its rows have no numbers, so they cannot be shuffled or sharded. Write "
            "what it yields once, ShardedDataset.write(pyarrow.RecordBatchReader.from_batches(schema, batches), path, "
            "num_shards=8), or give it __getitem__ and __len__"
        )
    if not _is_dataset(source):
        raise DataError(
            f"{what} is no map-style Dataset: it needs __getitem__(row) and __len__, as a torch.utils.data.Dataset "
            "has, or pass a function without arguments that makes one"
        )
    return source


def values_of(source: Any, name: str) -> Any:
    """One value per row of a Dataset: its column of this name, or its attribute (`targets`)."""
    if name in (getattr(source, "column_names", None) or ()):
        # A transform of Hugging Face's gets columns too, and need not give this one.
        plain = source.with_format(None) if hasattr(source, "with_format") else source
        return plain[name][:]
    if hasattr(source, name):
        return getattr(source, name)
    if hasattr(source, "indices") and hasattr(source, "dataset"):  # a Subset of torch's
        return np.asarray(values_of(source.dataset, name))[np.asarray(source.indices)]
    if hasattr(source, "datasets") and hasattr(source, "cumulative_sizes"):  # a ConcatDataset of torch's
        return np.concatenate([np.asarray(values_of(part, name)) for part in source.datasets])
    raise DataError(
        f"{type(source).__qualname__} has neither an attribute nor a column {name!r}; "
        "pass the values themselves, an array with one for each row"
    )


def _is_dataset(given: Any) -> bool:
    return hasattr(type(given), "__getitem__") and not isinstance(given, str | bytes)


def _copy_of(source: Any, name: str) -> Any:
    """The Dataset as workers get it: one that opens files when it is first read could not travel after that."""
    try:
        return cloudpickle.loads(cloudpickle.dumps(source))
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"{name} cannot be sent to the workers: {type(error).__name__}: {error}. Pass a function without "
            "arguments that makes it there, or open files, locks and connections when the first row is read."
        ) from error


def _length(source: Any) -> int:
    try:
        return len(source)
    except (TypeError, NotImplementedError) as error:
        raise DataError(
            f"a {type(source).__qualname__} has no length ({error}): define __len__(self), the number of its rows"
        ) from error


def _fingerprint(source: Any, name: str, seed: int, rows: int) -> dict[str, str]:
    """Digests of a few rows; none, with a warning, when seeding does not make these or others repeat."""
    numbers = _spread(rows, _ROWS_COMPARED)
    first = _sampled(source, seed, numbers, may_raise=len(numbers) - 1)
    found, again = first, _sampled(source, seed, numbers)
    ends = time.monotonic() + _SECONDS_TO_TRY
    for row in _spread(rows, _ROWS_TRIED):
        if found != again or time.monotonic() > ends:
            break
        found, again = _sampled(source, seed, [row]), _sampled(source, seed, [row])
    if found == again:
        return first
    _warn_of_own_generator(name, found, again)
    return {}


def _spread(rows: int, count: int) -> Sequence[int]:
    return sorted({int(row) for row in np.linspace(0, rows - 1, count)})


def _warn_of_own_generator(name: str, first: dict[str, str], second: dict[str, str]) -> None:
    row = next(row for row in first if first[row] != second[row])
    warn_user(
        f"Row {row} of {name} differs when it is read twice with the generators of Python, NumPy and torch seeded "
        "alike: it draws from a generator of its own or changes itself, so that runs will not repeat and their data "
        "cannot be compared. Draw from the global generators (random, numpy.random, torch) in __getitem__."
    )


def _sampled(source: Any, seed: int, rows: Iterable[int], may_raise: int | None = None) -> dict[str, str]:
    """A digest per row. A row that raises has its error's name for one, unless more than `may_raise` do."""
    found, raised = {}, 0
    for row in rows:
        seed_row(seed, 0, row)
        try:
            sample = source[row]
        except Exception as error:
            raised += 1
            if may_raise is not None and raised > may_raise:
                raise DataError(
                    f"Row {row} of {type(source).__qualname__} raised {type(error).__name__}: {error}; "
                    "so did every other row that was tried"
                ) from error
            found[str(row)] = f"raises {type(error).__name__}"
        else:
            found[str(row)] = digest_of(sample)
    return found


def _classes(source: Any, stratify: Any, rows: int) -> npt.NDArray[np.int32]:
    """A number per row that is the same for rows of one class."""
    given = values_of(source, stratify) if isinstance(stratify, str) else stratify
    labels = np.asarray(given)
    if labels.shape != (rows,):
        raise DataError(f"stratify has shape {labels.shape}; it must hold one class for each of the {rows} rows")
    if labels.dtype.kind in "fc":
        raise DataError(f"stratify has type {labels.dtype}; it must hold classes: integers, booleans or strings")
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)
