"""Shards that are row numbers of a user's Dataset, and what is refused before it is trained on."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import cloudpickle
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.data.fingerprint import digest_of
from cerebro_tune.data.index import IndexedDataset, IndexManifest, values_of
from cerebro_tune.errors import DataError, NotPicklableError
from map_datasets import (
    ROWS,
    Augmented,
    Bad,
    Folder,
    Numbered,
    OneFile,
    OwnGenerator,
    Plain,
    Stream,
    Unsized,
    point,
)
from nets import Linear


def shards_of(data: Any) -> list[list[int]]:
    return [data.numbers(shard).tolist() for shard in range(data.num_shards)]


@given(rows=st.integers(1, 300), shards=st.integers(1, 40), seed=st.integers(0, 9))
def test_shards_partition_the_rows(rows: int, shards: int, seed: int) -> None:
    shards = min(rows, shards)
    data = ShardedDataset.index(Numbered(rows), shards, seed)
    found = shards_of(data)
    assert sorted(chain(*found)) == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [data.rows(shard) for shard in range(shards)] == [len(numbers) for numbers in found]
    assert found == shards_of(ShardedDataset.index(Numbered(rows), shards, seed))
    assert data.fingerprint == ShardedDataset.index(lambda: Numbered(rows), shards, seed).fingerprint


def test_the_seed_makes_another_order() -> None:
    data = [ShardedDataset.index(Plain(), 4, seed) for seed in (0, 1)]
    assert shards_of(data[0]) != shards_of(data[1])
    assert data[0].fingerprint != data[1].fingerprint
    with pytest.raises(DataError, match=r"there is no shard 4; .*Plain has shards 0 to 3"):
        data[0].numbers(4)


class Columns(Plain):
    """Has columns by name, as a Hugging Face Dataset."""

    def __init__(self) -> None:
        super().__init__()
        self.column_names = ["label"]

    def __getitem__(self, row: Any) -> Any:
        return self.targets if row == "label" else super().__getitem__(row)


@pytest.mark.parametrize(
    ("source", "stratify", "labels"),
    [
        (Plain(), np.array(Plain().targets), Plain().targets),
        (Plain(), torch.tensor(Plain().targets), Plain().targets),
        (Plain(), ["ab"[label] for label in Plain().targets], Plain().targets),
        (Plain(), "targets", Plain().targets),
        (Columns, "label", Plain().targets),
        (Subset(Subset(Plain(), range(60)), range(10, 50)), "targets", Plain().targets[10:50]),
        (ConcatDataset([Plain(30), Subset(Plain(), range(9))]), "targets", Plain(30).targets + Plain(9).targets),
    ],
)
def test_strata_are_dealt_evenly(source: Any, stratify: Any, labels: Any) -> None:
    found = shards_of(ShardedDataset.index(source, 4, stratify=stratify))
    assert sorted(chain(*found)) == list(range(len(labels)))
    for label in set(labels):
        counts = [Counter(labels[row] for row in numbers)[label] for numbers in found]
        assert max(counts) - min(counts) <= 1


def test_strata_must_be_a_class_for_each_row() -> None:
    with pytest.raises(DataError, match=rf"stratify has shape \(3,\).* each of the {ROWS} rows"):
        ShardedDataset.index(Plain(), 4, stratify=[0, 1, 0])
    with pytest.raises(DataError, match="float64; it must hold classes"):
        ShardedDataset.index(Plain(), 4, stratify=np.arange(ROWS) / 2)
    for source in (Plain(), ConcatDataset([Plain(), Plain()])):
        with pytest.raises(DataError, match="Plain has neither an attribute nor a column 'colour'"):
            ShardedDataset.index(source, 4, stratify="colour")


def test_a_column_is_read_without_the_transform_that_drops_it() -> None:
    table = datasets.Dataset.from_dict(
        {"x": [[0.5, row] for row in range(12)], "features": [row % 2 for row in range(12)]}
    )
    table.set_transform(lambda batch: {"x": [torch.tensor(x) for x in batch["x"]]})
    assert list(values_of(table, "features")) == [row % 2 for row in range(12)], "the column, not the attribute"
    data = ShardedDataset.index(table, 2, stratify="features")
    assert [sum(number % 2 for number in numbers) for numbers in shards_of(data)] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Stream(), 2), r"Stream is an IterableDataset.*ShardedDataset\.write"),
        ((Stream, 2), "is an IterableDataset"),
        ((Unsized(), 2), r"Unsized has no length.*define __len__"),
        ((iter([1, 2]), 2), "is no map-style Dataset"),
        ((lambda: 7, 2), "int is no map-style Dataset"),
        (({"train": Plain(), "test": Plain(9)}, 2), r"a dict holds 'train', 'test', not rows.*ds\['train'\]"),
        (("data/train", 2), "is no map-style Dataset"),
        ((Plain(5), 6), "num_shards is 6, but .* has only 5 rows; use 5 or fewer"),
        ((Plain(0), 1), "has no rows"),
        ((Plain(), 0), "num_shards is 0"),
        ((Plain(), 2.0), "num_shards is 2.0"),
        ((Plain(), 2, -1), "seed is -1"),
        ((Bad(8, range(8)), 2), "Row 7 of Bad raised OSError: image 7 is truncated; so did every other"),
    ],
)
def test_refused(arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardedDataset.index(*arguments)


@pytest.mark.parametrize("given", [Plain(0), Stream(), Unsized()])
def test_cerebro_refuses_them_too(options: dict[str, Any], given: Any) -> None:
    for where in ("train", "validation"):
        with pytest.raises(DataError, match=r"has no rows|IterableDataset|no length"):
            Cerebro(**options | {where: given})


def test_a_dataset_that_cannot_travel_is_refused_with_what_to_do() -> None:
    source = Plain()
    source.handle = open(__file__, "rb")  # type: ignore[attr-defined]  # noqa: SIM115
    with source.handle, pytest.raises(NotPicklableError, match=r"Plain cannot be sent to the workers.*function"):  # type: ignore[attr-defined]
        ShardedDataset.index(source, 2)


def test_a_generator_of_its_own_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"Row 0 of the Dataset OwnGenerator differs.*global generators") as caught:
        data = ShardedDataset.index(OwnGenerator(), 4)
    assert caught[0].filename == __file__
    assert data.manifest.samples == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ShardedDataset.index(Augmented(), 4).manifest.samples) == 4


class Scarce(Plain):
    """Draws from a generator of its own, for one row in seven."""

    def __getitem__(self, row: int) -> Any:
        return os.urandom(8) if row % 7 == 3 else row


def test_rows_beside_those_compared_are_read_twice() -> None:
    with pytest.warns(UserWarning, match=r"Row \d+ of the Dataset Scarce differs when it is read twice"):
        assert ShardedDataset.index(Scarce(), 4).manifest.samples == {}


def test_rows_that_do_not_repeat_in_a_worker_are_warned_of_not_refused() -> None:
    data = ShardedDataset.index(Augmented(), 4)
    unlucky = IndexedDataset(OwnGenerator, replace(data.manifest, dataset="this one"), data._order)
    with pytest.warns(UserWarning, match="Row 0 of this one differs when it is read twice") as caught:
        assert unlucky.compared is unlucky.source
    assert len(caught) == 1
    assert unlucky.compared is unlucky.source, "said once"
    with pytest.raises(DataError, match=r"Row 0 of .* is not what it was"):
        _ = IndexedDataset(Plain, data.manifest, data._order).compared


class Made(Plain):
    """Gives what a function makes of a row."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__(8)
        self.make = make

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


def in_itself(row: int) -> Any:
    found: list[Any] = [row]
    found.extend([found, {"again": found}])
    return found


class Broken:
    """Its content cannot be had."""

    mode = size = ()

    def tobytes(self) -> bytes:
        raise OSError("gone")


WITH_BYTES: dict[str, Callable[[int], Any]] = {
    "conjugated": lambda row: torch.fft.fft(point(row)).conj(),
    "negated": lambda row: torch.fft.fft(point(row)).conj().imag,
    "csr": lambda row: point(row)[None].to_sparse_csr(),
    "coo": lambda row: torch.fft.fft(point(row)).to_sparse(),
    "float8": lambda row: point(row).to(torch.float8_e4m3fn),
    "bfloat16": lambda row: point(row).bfloat16(),
    "objects": lambda row: np.array([row, "a", None], dtype=object),
    "object": lambda row: np.array(row, dtype=object),
    "fields": lambda row: np.array([(row, "a")], dtype=[("n", object), ("w", object)]),
    "in itself": in_itself,
}
WITHOUT: dict[str, Callable[[int], Any]] = {
    "complex32": lambda row: torch.fft.fft(point(row)).to(torch.complex32),
    "quantized": lambda row: torch.quantize_per_tensor(point(row), 0.1, 0, torch.qint8),
    "nested": lambda row: torch.nested.nested_tensor([point(row), point(row)[:3]]),
    "jagged": lambda row: torch.nested.nested_tensor([point(row), point(row)[:3]], layout=torch.jagged),
    "meta": lambda row: point(row).to("meta"),
    "broken": lambda row: Broken(),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|ComplexHalf|quantized|deprecated)")
@pytest.mark.parametrize("name", [*WITH_BYTES, *WITHOUT])
def test_samples_of_any_kind_have_a_digest(name: str) -> None:
    make = (WITH_BYTES | WITHOUT)[name]
    samples = ShardedDataset.index(Made(make), 2).manifest.samples
    assert len(set(samples.values())) == (len(samples) if name in WITH_BYTES else 1)
    assert samples["0"] == digest_of(make(0))


def test_of_a_tensor_without_bytes_the_kind_and_shape_count() -> None:
    empty = [torch.empty(size, dtype=kind, device="meta") for size in (2, 3) for kind in (torch.int8, torch.int16)]
    assert len({digest_of(tensor) for tensor in empty}) == 4


def test_indexing_leaves_the_callers_streams_and_dataset_alone(tmp_path: Path) -> None:
    OneFile.write(tmp_path / "rows")
    source = OneFile(tmp_path / "rows")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data = ShardedDataset.index(source, 4)
    assert torch.equal(torch.rand(2), expected)
    assert source.file is None, "a row was read from the user's own object, which cannot travel any more"
    cloudpickle.dumps(data)


def test_a_manifest_comes_back_and_is_compared(tmp_path: Path) -> None:
    data = ShardedDataset.index(Plain(), 4, seed=1, stratify="targets")
    data.manifest.write(tmp_path / "index.json")
    kept = IndexManifest.read(tmp_path / "index.json")
    assert kept == data.manifest
    kept.require(ShardedDataset.index(Plain, 4, seed=1, stratify="targets").manifest)
    for found, message in [
        (ShardedDataset.index(Plain(69), 4, seed=1), "has 69 rows, and had 70"),
        (ShardedDataset.index(Plain(), 5, seed=1), "num_shards 4, and now with 5"),
        (ShardedDataset.index(Plain(), 4, seed=2), "seed 1, and now with 2"),
        (ShardedDataset.index(Plain(), 4, seed=1), "made with order .*stratify"),
        (ShardedDataset.index(Numbered(), 4, seed=1, stratify="targets"), "Row 0 of .* is not what it was"),
    ]:
        with pytest.raises(DataError, match=message):
            kept.require(found.manifest)
    for text in (
        "",
        "{}",
        '{"kind": "cerebro_tune index", "format": 2}',
        "[]",
        '{"kind": "cerebro_tune index", "format": 1}',
    ):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match="holds no manifest of an index"):
            IndexManifest.read(tmp_path / "index.json")
    with pytest.raises(DataError, match="holds no manifest"):
        IndexManifest.read(tmp_path / "nothing")
    assert replace(kept, seed=9).fingerprint != kept.fingerprint


def shrink(folder: Path) -> None:
    (folder / "05.txt").unlink()


def grow(folder: Path) -> None:
    (folder / "99.txt").write_text("99")


def change(folder: Path) -> None:
    (folder / "00.txt").write_text("another picture")


def shift(folder: Path) -> None:
    (folder / "00.txt").rename(folder / "zz.txt")


@pytest.mark.parametrize("backend", ["inline", "local"])
def test_a_dataset_that_changed_is_told_before_training(options: dict[str, Any], tmp_path: Path, backend: str) -> None:
    cases = [(shrink, "has 23 rows, and had 24"), (grow, "has 25 rows"), (change, "Row 0 "), (shift, "Row 0 ")]
    for spoil, message in cases if backend == "inline" else cases[2:3]:
        folder = tmp_path / spoil.__name__
        folder.mkdir()
        for row in range(24):
            (folder / f"{row:02}.txt").write_text(str(row))
        data = ShardedDataset.index(lambda folder=folder: Folder(folder), 4)
        processes = 0 if backend == "inline" else 2
        made = options | {"train": data, "validation": None, "backend": backend, "workers": 1}
        with Cerebro(**made, loader={"num_workers": processes}) as cerebro:
            spoil(folder)
            with pytest.raises(DataError, match=message):
                cerebro.fit(Linear, [{"lr": 0.1}])
        assert list(Path(options["run_dir"]).iterdir()) == []


SCRIPT = """
import os, torch
from cerebro_tune import Cerebro, ShardedDataset, TorchTrainable

class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows
    def __len__(self):
        return self.rows
    def __getitem__(self, row):
        return helper(row), row % 2

def helper(row):
    return torch.randn(8) + row % 2

def collate(samples):
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])

class Net(TorchTrainable):
    def build(self, config, plan):
        model = torch.nn.Linear(8, 2)
        return model, torch.optim.SGD(model.parameters(), lr=config["lr"])
    def training_step(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

for train in (Rows(40), ShardedDataset.index(lambda: Rows(40), 4)):
    cerebro = Cerebro(train, Rows(8), workers=1, loader={"num_workers": 1, "collate_fn": collate}, num_shards=4)
    results = cerebro.fit(Net, [{"lr": 0.1}], metric="val_loss")
    print("status", results[0].status, results[0].error)
    cerebro.close()
"""


def test_classes_of_an_unguarded_script(tmp_path: Path) -> None:
    (tmp_path / "search.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "error", "search.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("status finished None") == 2
