"""Writing map-style Datasets: their rows become columns once, and what cannot be written for good is refused."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.errors import DataError, RowError

ROWS = 101


class Made(Dataset[Any]):
    """A Dataset of what a function makes of a row's number; counts how often each was read."""

    def __init__(self, make: Callable[[int], Any], rows: int = ROWS) -> None:
        self.make, self.rows = make, rows
        self.reads = np.zeros(rows, np.int64)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        self.reads[row] += 1
        return self.make(row)


class Sample(NamedTuple):
    image: torch.Tensor
    label: int


def image(row: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(row).random((3, 4, 5), dtype=np.float32))


def read_back(data: ShardedDataset, key: str) -> list[dict[str, Any]]:
    """All samples, in the order of the column `key`."""
    form = BatchForm(as_dict=True, collate_fn=lambda samples: samples)
    return sorted((sample for batch in data.batches_of(40, form) for sample in batch), key=lambda sample: sample[key])


def test_tensors_give_the_shards_that_a_table_of_them_gives(tmp_path: Path) -> None:
    x, y = torch.stack([image(row) for row in range(ROWS)]), torch.arange(ROWS) % 3
    table = pa.table({"0": pa.FixedShapeTensorArray.from_numpy_ndarray(x.numpy()), "1": y.numpy()})
    expected = ShardedDataset.write(table, tmp_path / "expected", 4, seed=1, stratify="1")
    for name, source in {
        "tensors": TensorDataset(x, y),
        "list": [(image(row), row % 3) for row in range(ROWS)],
    }.items():
        found = ShardedDataset.write(source, tmp_path / name, 4, seed=1, stratify="1")
        assert found.schema == expected.schema
        assert found.fingerprint == expected.fingerprint


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    def make(row: int) -> dict[str, Any]:
        return {
            "row": row, "half": row / 2, "even": row % 2 == 0, "text": f"é {row}", "raw": bytes([row, 0]),
            "scalar": torch.tensor(row, dtype=torch.int16), "numpy": np.float16(row), "big": np.full(2, row, ">i4"),
            "mask": np.arange(6).reshape(2, 3) < row, "bits": torch.arange(5) < row,
            "tokens": list(range(row % 4)), "flags": np.arange(row % 3) > 0, "none": torch.zeros(0), "x": image(row),
        }  # fmt: skip

    source = Made(make)
    data = ShardedDataset.write(source, tmp_path / "d", 3, stratify="even")
    types = {field.name: field.type for field in data.schema}
    assert types["row"] == pa.int64()
    assert types["numpy"] == pa.float16()
    assert types["big"] == pa.list_(pa.int32(), 2)
    assert types["bits"] == pa.list_(pa.bool_(), 5)
    assert types["tokens"] == pa.large_list(pa.int64())
    assert types["x"].shape == [3, 4, 5]
    samples = read_back(data, "row")
    assert len(samples) == ROWS
    for row, sample in enumerate(samples):
        for name, wanted in make(row).items():
            if isinstance(wanted, str | bytes):
                assert sample[name] == wanted
            else:
                assert np.array_equal(sample[name].numpy(), np.asarray(wanted))
    assert sample["scalar"].dtype == torch.int16


def test_each_row_is_decoded_once_beside_the_few_that_are_tried(tmp_path: Path) -> None:
    source = Made(lambda row: (image(row), row % 2))
    ShardedDataset.write(source, tmp_path / "d", 3, stratify="1")
    assert set(source.reads) == {1, 3}
    assert (source.reads == 3).sum() == 16


@pytest.mark.parametrize(
    ("sample", "columns"),
    [
        (lambda row: (image(row), row), ("0", "1")),
        (lambda row: Sample(image(row), row), ("image", "label")),
        (lambda row: {"x": image(row), "y": row}, ("x", "y")),
        (image, ("0",)),
        (lambda row: [row, row], ("0",)),
    ],
)
def test_columns_are_named_by_the_sample(
    tmp_path: Path, sample: Callable[[int], Any], columns: tuple[str, ...]
) -> None:
    assert ShardedDataset.write(Made(sample), tmp_path / "d", 2).columns == columns


def test_one_dimensional_rows_vary_wherever_they_do(tmp_path: Path) -> None:
    """The only other length is in a row that is not among those tried, after batches that are already handed on."""
    wide = 1 << 16
    always = ShardedDataset.write(Made(lambda _: np.zeros(wide)), tmp_path / "always", 2)
    assert always.schema.field("0").type == pa.list_(pa.float64(), wide)
    late = ShardedDataset.write(Made(lambda row: np.zeros(wide + (row == ROWS - 2))), tmp_path / "late", 2)
    assert late.schema.field("0").type == pa.large_list(pa.float64())


def test_subsets_and_columns(tmp_path: Path) -> None:
    source = Subset(Made(lambda row: {"row": row, "x": image(row)}), [5, 3, 8])
    data = ShardedDataset.write(source, tmp_path / "d", 1, columns=["row"])
    assert data.columns == ("row",)
    (rows,) = next(data.batches_of(3, BatchForm()))
    assert sorted(rows.tolist()) == [3, 5, 8]


def flipped(row: int) -> tuple[torch.Tensor, int]:
    return (image(row).flip(-1) if random.random() < 0.5 else image(row)), row


def cropped(row: int) -> dict[str, Any]:
    start = int(torch.randint(0, 3, ()))
    return {"label": row, "image": image(row)[:, : 4 - start]}


class ChangedInPlace(Made):
    def __init__(self) -> None:
        super().__init__(lambda row: self.images[row].mul_(0.5))
        self.images = torch.stack([image(row) for row in range(ROWS)])


@pytest.mark.parametrize(
    ("source", "column"), [(Made(flipped), "0"), (Made(cropped), "image"), (ChangedInPlace(), "0")]
)
def test_random_transforms_are_refused(tmp_path: Path, source: Made, column: str) -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(
        DataError, match=rf"row \d+ of .* differs in column '{column}' .*ShardedDataset\.index\(dataset"
    ):
        ShardedDataset.write(source, tmp_path / "d", 2)
    assert list(tmp_path.iterdir()) == []
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def raising(row: int) -> int:
    if row == 55:
        raise KeyError("no label")
    return row


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (raising, "row 55 of the Made cannot be read: KeyError: 'no label'"),
        (lambda row: np.zeros((2, 3 + (row == 55))), r"row 55 .* double \(2, 4\) in column '0', .* double \(2, 3\)"),
        (
            lambda row: 1 if row == 55 else 0.5,
            "row 55 of the Made has int64 in column '0', where other rows have double",
        ),
        (lambda row: "x" if row == 55 else b"x", "has large_string in column '0', where other rows have large_binary"),
        (lambda row: np.zeros(3) if row == 55 else 0.0, r"has double \(any length\) in column '0'"),
        (lambda row: {"x": 1} if row == 55 else {"x": 1, "y": 1}, "row 55 .* columns 'x', where row 0 has 'x', 'y'"),
        (lambda row: None, "row 0 of the Made has a NoneType in column '0', which cannot be stored"),
        (lambda row: (image(row), {"boxes": 1}), "row 0 .* has a dict in column '1'"),
        (lambda row: {1: row}, "row 0 of the Made is a dict with the key 1"),
        (lambda row: Image.new("L", (2, 2)), r"has a Image in column '0'.*ShardedDataset\.index"),
        (lambda row: image(row).bfloat16(), "has a Tensor of torch.bfloat16, shape .3, 4, 5., in column '0'"),
        (lambda row: [[1], [2, 3]], "has a list in column '0'"),
        (lambda row: [image(row), 7], "a tuple or a dict for several columns"),
        (lambda row: np.zeros((0, 4)), "nothing is in the shape"),
        (lambda row: 2**70, "its values are of type object"),
        (lambda row: np.datetime64("2020-01-01"), r"its values are of type datetime64\[D\]"),
    ],
)
def test_rows_that_cannot_be_columns_are_named(tmp_path: Path, sample: Callable[[int], Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        ShardedDataset.write(Made(sample), tmp_path / "d", 2)
    assert isinstance(caught.value, RowError) == ("cannot be read" in words)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_needs_a_length_and_enough_rows(tmp_path: Path) -> None:
    class Endless(Dataset[int]):
        def __getitem__(self, row: int) -> int:
            return row

    with pytest.raises(DataError, match=r"the Endless has no length .*define __len__"):
        ShardedDataset.write(Endless(), tmp_path / "d", 2)
    with pytest.raises(DataError, match="the Made has no rows"):
        ShardedDataset.write(Made(image, rows=0), tmp_path / "d", 2)
    source = Made(image, rows=30)
    with pytest.raises(DataError, match="num_shards is 31, but the Made has only 30 rows"):
        ShardedDataset.write(source, tmp_path / "d", 31)
    assert source.reads.sum() == 2 * 16  # told before all are decoded


def folder_of_images(folder: Path, content: np.ndarray[Any, Any]) -> Made:
    for row in range(20):
        Image.fromarray(content).save(folder / f"{row}.png")

    def make(row: int) -> np.ndarray[Any, Any]:
        with Image.open(folder / f"{row}.png") as file:
            return np.asarray(file)

    return Made(make, rows=20)


def test_rows_much_larger_than_their_files_are_warned_about(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path, np.zeros((256, 256, 3), np.uint8))
    words = r"reads about .* kB from files, and its rows will take 3.93 MB as shards, \d+ times .*ShardedDataset.index"
    with pytest.warns(UserWarning, match=words) as caught:
        ShardedDataset.write(source, tmp_path / "d", 2)
    assert caught[0].filename == __file__


def test_rows_about_as_large_as_their_files_are_not(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedDataset.write(folder_of_images(tmp_path, noise), tmp_path / "files", 2)
        ShardedDataset.write(TensorDataset(torch.zeros(50, 3, 64, 64)), tmp_path / "memory", 2)
