"""Reading: batches are the rows that were written, and a damaged set is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebro_tune.data import BatchForm, ShardedDataset, TableShard, batch_sizes, shard_order
from cerebro_tune.data.manifest import Manifest
from cerebro_tune.errors import DamagedShardError, DataError

ROWS = 101
no_deadline = settings(deadline=None)


def columns() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kinds = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
    integers = {np.dtype(kind).name: rng.integers(0, 100, ROWS).astype(kind) for kind in kinds}
    floats = {np.dtype(kind).name: rng.random(ROWS).astype(kind) for kind in (np.float16, np.float32, np.float64)}
    return {
        "row": np.arange(ROWS),
        **integers,
        **floats,
        "bool": rng.random(ROWS) > 0.5,
        "image": rng.random((ROWS, 3, 2), dtype=np.float32),
        "mask": rng.random((ROWS, 5)) > 0.5,
        "nested": rng.integers(0, 9, (ROWS, 2, 3)),
    }


def to_arrow(values: np.ndarray[Any, Any]) -> pa.Array[Any]:
    array: pa.Array[Any] = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    arrays = {name: to_arrow(values) for name, values in columns().items()}
    arrays["image"] = pa.FixedShapeTensorArray.from_numpy_ndarray(columns()["image"])
    arrays["text"] = pa.array([f"row {row}" for row in range(ROWS)])
    arrays["raw"] = pa.array([bytes([row]) for row in range(ROWS)])
    arrays["tokens"] = pa.array([list(range(row % 5)) for row in range(ROWS)], pa.list_(pa.int32()))
    arrays["flags"] = pa.array([[True, False][: row % 3] for row in range(ROWS)])
    arrays["pairs"] = pa.array([{"a": row, "b": None} for row in range(ROWS)])
    return ShardedDataset.write(pa.table(arrays), tmp_path_factory.mktemp("data") / "d", 4)


STACKED = tuple(columns())
RAGGED = ("text", "raw", "tokens", "flags", "pairs")


@pytest.mark.parametrize("name", STACKED)
def test_tensors_have_the_values_types_and_shapes_that_were_written(data: ShardedDataset, name: str) -> None:
    expected = columns()[name]
    for shard in range(data.num_shards):
        order = shard_order(0, 0, shard, data.rows(shard))
        (rows,) = data.shard(shard).gather(order, BatchForm(columns=("row",)))
        (found,) = data.shard(shard).gather(order, BatchForm(columns=(name,)))
        assert found.dtype == torch.from_numpy(expected).dtype
        assert torch.equal(found, torch.from_numpy(expected[rows.numpy()]))


@pytest.mark.parametrize("form", [BatchForm(columns=STACKED), BatchForm(columns=STACKED[::-1], as_dict=True)])
def test_batches_are_the_rows_in_order(data: ShardedDataset, form: BatchForm) -> None:
    shard = data.shard(1)
    order, sizes = shard_order(1, 2, 1, shard.rows), batch_sizes(shard.rows, 7)
    batches = list(shard.batches(order, sizes, form))
    assert [len(batch["row"] if form.as_dict else batch[0]) for batch in batches] == sizes
    start = 0
    for batch, size in zip(batches, sizes, strict=True):
        expected = shard.gather(order[start : start + size], form)
        assert type(batch) is type(expected) is (dict if form.as_dict else tuple)
        assert list(batch) == list(form.columns or ()) if form.as_dict else len(batch) == len(STACKED)
        found, wanted = (list(one.values() if isinstance(one, dict) else one) for one in (batch, expected))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        start += size


def test_a_batch_may_be_changed_in_place(data: ShardedDataset) -> None:
    """Neither the file nor later batches change; read-only orders are taken without a warning."""
    digest = data.file(0).read_bytes()
    order = np.arange(data.rows(0))
    order.flags.writeable = False
    form = BatchForm(columns=("image", "bool", "tokens"), collate_fn=lambda samples: samples)
    before = [tuple(value.clone() for value in sample) for sample in data.shard(0).gather(order, form)]
    for sample in data.shard(0).gather(order, form):
        for value in sample:
            value.zero_()
    after = data.shard(0).gather(order, form)
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))
    assert data.file(0).read_bytes() == digest


def test_variable_length_columns_go_to_the_collate_function(data: ShardedDataset) -> None:
    form = BatchForm(columns=("row", *RAGGED), collate_fn=lambda samples: samples)
    form.validate(data.schema)
    for row, text, raw, tokens, flags, pairs in data.shard(2).gather(np.arange(data.rows(2)), form):
        number = int(row)
        assert (text, raw, pairs) == (f"row {number}", bytes([number]), {"a": number, "b": None})
        assert torch.equal(tokens, torch.arange(number % 5, dtype=torch.int32))
        assert torch.equal(flags, torch.tensor([True, False][: number % 3], dtype=torch.bool))
    named = BatchForm(columns=("row", "text"), as_dict=True, collate_fn=lambda samples: samples)
    assert set(data.shard(0).gather(np.arange(2), named)[0]) == {"row", "text"}


def test_torch_collates_samples_as_it_does_for_a_dataloader(data: ShardedDataset) -> None:
    collated = BatchForm(columns=("image", "int64"), collate_fn=torch.utils.data.default_collate)
    stacked = BatchForm(columns=("image", "int64"))
    rows = np.array([3, 0, 7])
    for found, expected in zip(data.shard(0).gather(rows, collated), data.shard(0).gather(rows, stacked), strict=True):
        assert torch.equal(found, expected)


def test_a_transform_sees_the_finished_batch(data: ShardedDataset) -> None:
    form = BatchForm(columns=("row",), transform=lambda batch: batch[0] * 2)
    found = next(data.shard(0).batches(np.arange(4), [2, 2], form))
    assert torch.equal(found, data.shard(0).gather(np.arange(2), BatchForm(columns=("row",)))[0] * 2)


def test_forms_that_cannot_work_are_refused_before_training(data: ShardedDataset) -> None:
    with pytest.raises(DataError, match=r"column 'text' has type large_string.*collate_fn"):
        BatchForm().validate(data.schema)
    with pytest.raises(DataError, match="no column 'imag'; the columns are 'row', 'int8'"):
        BatchForm(columns=("imag",)).validate(data.schema)
    with pytest.raises(DataError, match="no column 'imag'"):
        data.shard(0).gather(np.arange(2), BatchForm(columns=("imag",)))
    with pytest.raises(DataError, match="columns is empty"):
        BatchForm(columns=()).validate(data.schema)
    BatchForm(columns=STACKED).validate(data.schema)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1,), (5, 1)])
def test_permuted_tensors_are_read_in_their_logical_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    logical = np.random.default_rng(0).random((9, *shape))
    axes = tuple(reversed(range(len(shape))))
    stored = np.ascontiguousarray(logical.transpose(0, *(axis + 1 for axis in axes)))
    kind = pa.fixed_shape_tensor(pa.float64(), stored.shape[1:], permutation=axes)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), int(np.prod(shape)))
    table = pa.table({"row": np.arange(9), "x": pa.ExtensionArray.from_storage(kind, storage)})
    data = ShardedDataset.write(table, tmp_path / "d", 1)
    rows, found = data.shard(0).gather(np.arange(9), BatchForm())
    assert torch.equal(found, torch.from_numpy(logical[rows.numpy()]))


@no_deadline
@given(batch_size=st.integers(1, 60), rows=st.none() | st.lists(st.integers(0, ROWS - 1), max_size=40))
def test_validation_batches_cross_shards(data: ShardedDataset, batch_size: int, rows: list[int] | None) -> None:
    form = BatchForm(columns=("row", "image", "text"), collate_fn=lambda samples: samples)
    whole = [sample for shard in range(4) for sample in data.shard(shard).gather(np.arange(data.rows(shard)), form)]
    numbers = None if rows is None else np.array(rows, dtype=np.int64)
    batches = list(data.batches_of(batch_size, form, numbers))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    expected = whole if rows is None else [whole[row] for row in rows]
    found = [sample for batch in batches for sample in batch]
    assert [(int(row), text) for row, _, text in found] == [(int(row), text) for row, _, text in expected]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))


def test_a_subset_is_the_same_for_all_who_ask(data: ShardedDataset) -> None:
    rows = data.subset(10, seed=3)
    assert np.array_equal(rows, ShardedDataset.open(data.path).subset(10, seed=3))
    assert not np.array_equal(rows, data.subset(10, seed=4))
    stacked = torch.cat([batch[0] for batch in data.batches_of(4, BatchForm(columns=("row",)), rows)])
    assert torch.equal(stacked, torch.cat([b[0] for b in data.batches_of(ROWS, BatchForm(columns=("row",)))])[rows])


def test_a_view_has_the_columns_chosen(data: ShardedDataset) -> None:
    view = data.select(["image", "row"])
    assert view.columns == ("image", "row")
    assert view.schema.names == ["image", "row"]
    assert view.fingerprint != data.fingerprint
    assert len(view.shard(0).gather(np.arange(3), BatchForm())) == 2
    assert len(data.columns) > 2
    with pytest.raises(DataError, match="no column 'colour'"):
        data.select(["colour"])
    with pytest.raises(DataError, match="no columns selected"):
        data.select([])
    again = pickle.loads(pickle.dumps(view))
    assert (again.columns, again.fingerprint, again.path) == (view.columns, view.fingerprint, view.path)


def test_a_mapped_shard_holds_no_descriptor_and_is_mapped_once(data: ShardedDataset) -> None:
    fresh = ShardedDataset.open(data.path)
    before = len(os.listdir("/dev/fd"))
    shard = fresh.shard(0)
    assert len(os.listdir("/dev/fd")) == before
    assert fresh.shard(0) is shard
    fresh.release()
    assert fresh.shard(0) is not shard


@pytest.mark.parametrize("shard", [-1, 4])
def test_a_shard_that_is_not_there(data: ShardedDataset, shard: int) -> None:
    for ask in (data.shard, data.rows, data.file, lambda index: data.check([index])):
        with pytest.raises(DataError, match=f"no shard {shard}; .* has shards 0 to 3"):
            ask(shard)


@no_deadline
@given(draw=st.integers(0, 2**32), shard=st.integers(0, 3))
def test_one_flipped_bit_anywhere_is_found(
    data: ShardedDataset, tmp_path_factory: pytest.TempPathFactory, draw: int, shard: int
) -> None:
    copy = ShardedDataset.open(shutil.copytree(data.path, tmp_path_factory.mktemp("flip") / "d"))
    flip(copy.file(shard), draw)
    with pytest.raises(DamagedShardError, match=f"shard-0000{shard}.* has the checksum xxh3 .* was written"):
        copy.check()
    with pytest.raises(DamagedShardError, match="write the data set again"):
        copy.shard(shard)
    copy.check(index for index in range(4) if index != shard)


@no_deadline
@given(draw=st.integers(0, 2**32))
def test_a_flipped_bit_in_the_manifest_is_found(
    data: ShardedDataset, tmp_path_factory: pytest.TempPathFactory, draw: int
) -> None:
    copy = shutil.copytree(data.path, tmp_path_factory.mktemp("flip") / "d")
    flip(copy / "manifest.json", draw)
    try:
        opened = ShardedDataset.open(copy)
    except DataError as error:
        assert "is damaged" in str(error)  # noqa: PT017 -- a space that became another space is no damage
    else:
        assert opened.fingerprint == data.fingerprint
        opened.check()


def flip(path: Path, draw: int) -> None:
    content = bytearray(path.read_bytes())
    place = int(np.random.default_rng(draw).integers(len(content) * 8))  # evenly over the file, ends included
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), "cannot be read .No such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes were written|bytes, .* were written"),
    (lambda path: path.write_bytes(b""), "has 0 bytes"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), "were written"),
    (lambda path: shutil.copy(path.parent / "shard-00001.arrow", path), "was written|were written"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_missing_and_truncated_shards_are_named(
    data: ShardedDataset, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    copy = ShardedDataset.open(shutil.copytree(data.path, tmp_path / "d"))
    damage(copy.file(0))
    with pytest.raises(DamagedShardError, match=words):
        copy.check([0])


def test_a_shard_of_another_schema_is_refused_even_with_the_right_checksum(
    data: ShardedDataset, tmp_path: Path
) -> None:
    other = ShardedDataset.write(pa.table({"row": np.arange(ROWS)}), tmp_path / "d", 4)
    forged = ShardedDataset(other.path, Manifest(data.schema, 0, None, other._manifest.shards))
    with pytest.raises(DamagedShardError, match="holds 1 record batches of schema"):
        forged.check()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "cerebro_tune sharded data set"}', "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        ShardedDataset.open(tmp_path)


def test_another_format_version_asks_for_an_upgrade(
    data: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerebro_tune.data.manifest._FORMAT", 2)
    (tmp_path / "manifest.json").write_text(data._manifest.to_json())
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == 2
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"has format 2; this version of cerebro_tune reads format 1\. Upgrade"):
        ShardedDataset.open(tmp_path)


def test_a_shard_is_opened_by_its_class_alone(data: ShardedDataset) -> None:
    manifest = data._manifest
    shard = TableShard(data.file(0), manifest.shards[0], manifest.schema, ["row"])
    assert shard.rows == data.rows(0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are held")
def test_a_worker_holds_the_pages_of_the_shard_that_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerebro_tune.data.shard._LARGE_BYTES", 1 << 20)
    x = np.random.default_rng(0).random((4_000, 1_000), np.float32)
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(x.ravel(), 1_000)})
    data = ShardedDataset.write(table, tmp_path / "train", num_shards=4)
    first = [data.gather(data.numbers(index)[::7], BatchForm(), index) for index in range(4)]
    assert [held_mb(data.file(index)) for index in range(4)] == [0, 0, 0, pytest.approx(4, abs=1)]
    again = [data.gather(data.numbers(index)[::7], BatchForm(), index) for index in range(4)]
    assert all(torch.equal(one, other) for (one,), (other,) in zip(first, again, strict=True))


def held_mb(path: Path) -> float:
    """Of a mapped file, the pages that this process holds."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    held = [next(row for row in lines if row.startswith("Rss:")) for line in lines if line.endswith(str(path))]
    return sum(int(row.split()[1]) for row in held) / 1e3
