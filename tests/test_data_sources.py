"""Whatever a table is read from, equal rows give equal shards."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.errors import DataError

ROWS = 211


def make_table() -> pa.Table:
    """Of types that CSV can hold too."""
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "row": np.arange(ROWS),
            "weight": rng.random(ROWS),
            "flag": rng.random(ROWS) > 0.5,
            "text": [f"text {row} é" for row in range(ROWS)],
        }
    )


def reader_of(table: pa.Table, size: int) -> pa.RecordBatchReader:
    return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=size))


def parquet(table: pa.Table, folder: Path) -> Path:
    pq.write_table(table, folder / "t.parquet", row_group_size=17)
    return folder / "t.parquet"


def parquet_parts(table: pa.Table, folder: Path) -> list[str]:
    # In the order of the list and not of the names.
    pq.write_table(table.slice(0, 100), folder / "z.pq")
    pq.write_table(table.slice(100), folder / "a.pq")
    return [str(folder / "z.pq"), str(folder / "a.pq")]


def folder_of_parquet(table: pa.Table, folder: Path) -> Path:
    (folder / "set" / "inner").mkdir(parents=True)
    pq.write_table(table.slice(0, 100), folder / "set" / "a.parquet")
    pq.write_table(table.slice(100), folder / "set" / "inner" / "b.parquet")
    (folder / "set" / "_SUCCESS").touch()
    (folder / "set" / "notes.txt").write_text("not a table")
    return folder / "set"


def glob_of_csv(table: pa.Table, folder: Path) -> str:
    csv.write_csv(table.slice(0, 100), folder / "part-0.csv")
    csv.write_csv(table.slice(100), folder / "part-1.csv")
    (folder / "other.csv").write_text("a\n1\n")
    return str(folder / "part-*.csv")


def csv_gz(table: pa.Table, folder: Path) -> Path:
    csv.write_csv(table, folder / "t.csv")
    (folder / "t.csv.gz").write_bytes(gzip.compress((folder / "t.csv").read_bytes()))
    return folder / "t.csv.gz"


def tsv(table: pa.Table, folder: Path) -> Path:
    csv.write_csv(table, folder / "t.tsv", csv.WriteOptions(delimiter="\t"))
    return folder / "t.tsv"


def arrow_file(table: pa.Table, folder: Path) -> Path:
    feather.write_feather(table, str(folder / "t.arrow"), compression="lz4", chunksize=50)
    return folder / "t.arrow"


def arrow_streams(table: pa.Table, folder: Path) -> list[Path]:
    paths = [folder / "a.arrow", folder / "b.arrow"]
    for path, part in zip(paths, [table.slice(0, 100), table.slice(100)], strict=True):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, part.schema) as out:
            out.write_table(part)
    return paths


def uri(table: pa.Table, folder: Path) -> str:
    return parquet(table, folder).as_uri()


def uri_of_folder(table: pa.Table, folder: Path) -> str:
    return folder_of_parquet(table, folder).as_uri()


def uri_with_glob(table: pa.Table, folder: Path) -> str:
    return parquet(table, folder).parent.as_uri() + "/t.*et"


def uri_with_options(table: pa.Table, folder: Path) -> str:
    return uri_with_glob(table, folder) + "?use_mmap=true"


def dictionary_encoded(table: pa.Table, _: Path) -> pa.Table:
    # A dictionary of its own in each batch.
    parts = [table.slice(start, 30) for start in range(0, ROWS, 30)]
    encoded = [part.set_column(3, "text", part["text"].combine_chunks().dictionary_encode()) for part in parts]
    return pa.concat_tables(encoded)


def other_types(table: pa.Table, _: Path) -> pa.Table:
    schema = table.schema.set(3, pa.field("text", pa.string_view()))
    return table.cast(schema).replace_schema_metadata({"pandas": "{}"})


def hugging_face(table: pa.Table, _: Path) -> Any:
    return datasets.Dataset.from_dict(table.to_pydict())


def hugging_face_on_disk(table: pa.Table, folder: Path) -> Any:
    parts = [datasets.Dataset.from_file(str(path)) for path in arrow_streams(table, folder)]
    return datasets.concatenate_datasets(parts).with_format("torch")


def hugging_face_reordered(table: pa.Table, _: Path) -> Any:
    # Rows lie in another order, which an indices mapping puts right.
    order = np.random.default_rng(0).permutation(ROWS)
    mapped = hugging_face(table.take(order), _).select(np.argsort(order))
    assert mapped._indices is not None
    return mapped


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


KINDS: list[Callable[[pa.Table, Path], Any]] = [
    lambda table, _: table.to_batches()[0],
    lambda table, _: reader_of(table, 1),
    lambda table, _: reader_of(table, 37),
    lambda table, _: SimpleNamespace(__arrow_c_stream__=table.__arrow_c_stream__),
    lambda table, _: table.to_pandas(),
    parquet,
    parquet_parts,
    folder_of_parquet,
    glob_of_csv,
    csv_gz,
    tsv,
    arrow_file,
    arrow_streams,
    uri,
    uri_of_folder,
    uri_with_glob,
    uri_with_options,
    dictionary_encoded,
    other_types,
    hugging_face,
    hugging_face_on_disk,
    hugging_face_reordered,
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("stratify", [None, "flag"])
def test_equal_rows_give_equal_shards(
    tmp_path: Path, make: Callable[[pa.Table, Path], Any], stratify: str | None
) -> None:
    expected = ShardedDataset.write(make_table(), tmp_path / "expected", 4, stratify=stratify)
    source = tmp_path / "source"
    source.mkdir()
    found = ShardedDataset.write(make(make_table(), source), tmp_path / "found", 4, stratify=stratify)
    assert found.schema == expected.schema
    assert found.fingerprint == expected.fingerprint
    for shard in range(4):
        assert found.file(shard).read_bytes() == expected.file(shard).read_bytes()


@settings(deadline=None, max_examples=settings().max_examples // 4)  # each writes three sets
@given(cuts=st.lists(st.integers(0, ROWS), max_size=8), seed=st.integers(0, 3), chunk=st.integers(1, 20_000))
def test_batching_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("batching")
    table = tensors_table()
    edges = [0, *sorted(cuts), ROWS]  # empty batches included
    batches = [table.slice(a, b - a).combine_chunks() for a, b in pairwise(edges)]
    pieces = [batch for part in batches for batch in (part.to_batches() or [table.to_batches()[0].slice(0, 0)])]
    expected = ShardedDataset.write(table, folder / "expected", 5, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cerebro_tune.data.write._CHUNK_BYTES", chunk)
        reader = pa.RecordBatchReader.from_batches(table.schema, pieces)
        assert ShardedDataset.write(reader, folder / "reader", 5, seed).fingerprint == expected.fingerprint
        assert (
            ShardedDataset.write(pa.concat_tables(batches), folder / "t", 5, seed).fingerprint == expected.fingerprint
        )


def tensors_table() -> pa.Table:
    """Of types that CSV cannot hold."""
    rng = np.random.default_rng(1)
    return pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(rng.random((ROWS, 2, 3), dtype=np.float32)),
            "pair": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(2 * ROWS) > 0.5), 2),
            "tokens": [rng.integers(0, 9, row % 4).tolist() for row in range(ROWS)],
            "bits": rng.random(ROWS) > 0.5,
        }
    )


def test_tensor_columns_survive_parquet(tmp_path: Path) -> None:
    table = tensors_table()
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    found = ShardedDataset.write(tmp_path / "t.parquet", tmp_path / "found", 3)
    assert found.fingerprint == ShardedDataset.write(table, tmp_path / "expected", 3).fingerprint
    assert found.schema.field("image").type.shape == [2, 3]


def test_foreign_tensor_types_keep_their_shape(tmp_path: Path) -> None:
    class Array2D(pa.ExtensionType):
        """As Hugging Face has it: nested lists, and a shape beside them."""

        shape = (2, 3)

        def __init__(self) -> None:
            super().__init__(pa.list_(pa.list_(pa.float32())), "test.array2d")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

    values = np.random.default_rng(0).random((20, 2, 3), dtype=np.float32)
    array = pa.ExtensionArray.from_storage(Array2D(), pa.array(values.tolist(), pa.list_(pa.list_(pa.float32()))))
    found = ShardedDataset.write(pa.table({"x": array}), tmp_path / "d", 1)
    (images,) = found.shard(0).gather(np.arange(20), BatchForm())
    assert sorted(images.numpy().tolist()) == sorted(values.tolist())


def test_hugging_face_columns_reach_the_collate_function(tmp_path: Path) -> None:
    tokens = [list(range(row % 5)) for row in range(ROWS)]
    images = np.random.default_rng(0).random((ROWS, 2, 3), dtype=np.float32)
    columns = {
        "row": list(range(ROWS)), "text": [f"{row} é" for row in range(ROWS)], "tokens": tokens,
        "raw": [bytes([row, 0]) for row in range(ROWS)], "image": images, "label": [row % 2 for row in range(ROWS)],
    }  # fmt: skip
    features = datasets.Features(
        row=datasets.Value("int64"), text=datasets.Value("string"), tokens=datasets.List(datasets.Value("int32")),
        raw=datasets.Value("binary"), image=datasets.Array2D((2, 3), "float32"),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )  # fmt: skip
    source = datasets.Dataset.from_dict(columns, features).shuffle(seed=3).select(range(10, ROWS))
    data = ShardedDataset.write(source, tmp_path / "d", 3, stratify="label")
    form = BatchForm(collate_fn=lambda samples: samples)
    samples = [sample for batch in data.batches_of(32, form) for sample in batch]
    assert sorted(int(sample[0]) for sample in samples) == sorted(source["row"])
    for row, text, found, raw, image, label in samples:
        number = int(row)
        assert (text, raw, int(label)) == (columns["text"][number], columns["raw"][number], number % 2)
        assert found.dtype == torch.int32
        assert found.tolist() == tokens[number]
        assert np.array_equal(image.numpy(), images[number])


def test_hugging_face_rows_are_never_decoded(tmp_path: Path) -> None:
    """These bytes are no image; looking at them as one would raise."""
    source = datasets.Dataset.from_dict({"image": [b"no image"] * 3}).cast_column("image", datasets.Image())
    data = ShardedDataset.write(source, tmp_path / "d", 1)
    (batch,) = data.batches_of(3, BatchForm(collate_fn=lambda samples: samples))
    assert batch == [({"bytes": b"no image", "path": None},)] * 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.parquet", "no such file"),
        ("file:///missing/dir/*.csv", "cannot be read"),
        ("nosuchscheme://x/y.csv", "cannot be read"),
        (["a.csv", "b.xlsx"], "readable are .parquet"),
        (["a.csv", "c.parquet"], "several formats"),
        ("broken.parquet", "cannot be read as parquet"),
        ("late.csv", "set them, open the file with pyarrow.csv.open_csv"),
        ({"x": [1]}, "dict cannot be read as a table"),
        ([], "the list has no rows"),
        (iter([1, 2]), "list_iterator is read from front to back.*RecordBatchReader.from_batches"),
        (Stream(), "Stream is read from front to back and may have no end"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("x\n1\n")
    Path("b.xlsx").touch()
    Path("broken.parquet").write_bytes(b"PAR1 is not enough")
    Path("late.csv").write_text("x\n" + "1\n" * 700_000 + "one\n")
    pq.write_table(pa.table({"x": [1]}), "c.parquet")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=words):
        ShardedDataset.write(source, "target", 1)
    assert sorted(tmp_path.iterdir()) == before


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.binary(), 1, pa.array([b"\xff\xfe"]).buffers()).view(pa.string())
    with pytest.raises(DataError, match="Invalid UTF8"):
        ShardedDataset.write(pa.table({"x": text}), tmp_path / "d", 1)


def test_a_column_that_one_file_lacks_is_named(tmp_path: Path) -> None:
    for name, columns in {"a.arrow": {"x": [1], "y": [1]}, "b.arrow": {"x": [2]}}.items():
        table = pa.table(columns)
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    with pytest.raises(DataError, match="column 'y' is missing from row 1 on"):
        ShardedDataset.write(tmp_path, tmp_path / "target", 1)
    assert not (tmp_path / "target").exists()
