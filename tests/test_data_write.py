"""Writing: a seeded shuffle in bounded memory that leaves a whole set or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.errors import DataError


def numbers(rows: int) -> pa.Table:
    return pa.table({"row": np.arange(rows), "kind": [f"kind {row % 3}" for row in range(rows)]})


def rows_of(data: ShardedDataset, shard: int) -> list[int]:
    (rows,) = data.shard(shard).gather(np.arange(data.rows(shard)), BatchForm(columns=("row",)))
    found: list[int] = rows.tolist()
    return found


@pytest.mark.parametrize("stratify", [None, "kind"])
def test_each_row_is_in_one_shard_of_equal_size(tmp_path: Path, stratify: str | None) -> None:
    data = ShardedDataset.write(numbers(1003), tmp_path / "d", 8, seed=3, stratify=stratify)
    shards = [rows_of(data, shard) for shard in range(8)]
    assert sorted(row for shard in shards for row in shard) == list(range(1003))
    assert {len(shard) for shard in shards} == {125, 126}
    assert [len(shard) for shard in shards] == [data.rows(shard) for shard in range(8)]
    for shard in shards:
        assert abs(np.corrcoef(np.arange(len(shard)), shard)[0, 1]) < 0.4  # no trace of the source's order


def test_stratification_spreads_each_class(tmp_path: Path) -> None:
    kinds = ["rare"] * 16 + ["common"] * 400 + ["odd"] * 7
    table = pa.table({"row": np.arange(423), "kind": kinds})
    data = ShardedDataset.write(table, tmp_path / "d", 8, stratify="kind", columns=["row"])
    assert data.columns == ("row",)
    for shard in range(8):
        rows = np.array(rows_of(data, shard))
        assert (rows < 16).sum() == 2
        assert ((rows >= 16) & (rows < 416)).sum() == 50


def test_the_seed_decides(tmp_path: Path) -> None:
    first = ShardedDataset.write(numbers(100), tmp_path / "a", 3, seed=1)
    again = ShardedDataset.write(numbers(100), tmp_path / "b", 3, seed=1)
    other = ShardedDataset.write(numbers(100), tmp_path / "c", 3, seed=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_the_manifest_tells_what_was_written(tmp_path: Path) -> None:
    data = ShardedDataset.write(numbers(10), tmp_path / "d", 3, seed=5, stratify="kind")
    told = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert (told["rows"], told["seed"], told["stratify"], told["format"]) == (10, 5, "kind", 1)
    assert [column["name"] for column in told["columns"]] == ["row", "kind"]
    assert told["columns"][0] == {"name": "row", "type": "int64", "value": "int64", "shape": []}
    assert [shard["rows"] for shard in told["shards"]] == [4, 3, 3]
    assert sorted(path.name for path in data.path.iterdir()) == [
        "manifest.json",
        *(f"shard-0000{shard}.arrow" for shard in range(3)),
    ]
    # The files are ordinary uncompressed Arrow.
    with pa.memory_map(str(data.file(0))) as file:
        assert pa.ipc.open_file(file).read_all().schema == data.schema


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    data = ShardedDataset.write(numbers(10), tmp_path / "d", 2, columns=["kind", "row"])
    assert data.columns == ("kind", "row")
    assert ShardedDataset.open(tmp_path / "d").schema.names == ["kind", "row"]


@pytest.mark.parametrize(
    ("table", "arguments", "words"),
    [
        (numbers(3), {"columns": ["row", "colour"]}, "no column 'colour'; the columns are 'row', 'kind'"),
        (numbers(3), {"columns": ["row", "row"]}, "'row' occurs twice"),
        (numbers(3), {"columns": []}, "at least one"),
        (numbers(3), {"stratify": "colour"}, "no column 'colour'"),
        (pa.table({"x": [0.5]}), {"stratify": "x"}, "it must hold classes"),
        (numbers(0), {}, "the table has no rows"),
        (numbers(3), {"num_shards": 4}, "num_shards is 4, but the table has only 3 rows; use 3 or fewer"),
        (numbers(3), {"num_shards": 0}, "num_shards is 0; it must be 1 or more"),
        (numbers(3), {"seed": -1}, "seed is -1"),
        (pa.table({"x": [1, 2, None]}), {}, "'x' has no value in row 2 of the source; fill or drop"),
        (pa.table({"x": [[1], [None]]}), {}, "'x' has a list with a missing value"),
        (pa.table({"x": pa.array([[1, 2], [3, None]], pa.list_(pa.int8(), 2))}), {}, "'x' has a list with a missing"),
        (pa.table({"x": pa.nulls(2)}), {}, "'x' has no value in row 0"),
        (pa.table([[1], [2]], names=["x", "x"]), {}, "'x' occurs twice"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, table: pa.Table, arguments: dict[str, Any], words: str
) -> None:
    for source in (table, pa.RecordBatchReader.from_batches(table.schema, table.to_batches())):
        with pytest.raises(DataError, match=words.replace("the table", "the (table|reader)")):
            ShardedDataset.write(
                source, tmp_path / "a" / "d", **{"num_shards": 2 if len(table) > 1 else 1, **arguments}
            )
        assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield from numbers(5).to_batches()
        raise OSError("the disk is on fire")

    reader = pa.RecordBatchReader.from_batches(numbers(5).schema, batches())
    with pytest.raises(OSError, match="on fire"):
        ShardedDataset.write(reader, tmp_path / "d", 2)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_set_is_never_touched(tmp_path: Path) -> None:
    data = ShardedDataset.write(numbers(5), tmp_path / "d", 2)
    with pytest.raises(DataError, match="exists already: choose another path"):
        ShardedDataset.write(numbers(9), tmp_path / "d", 2)
    data.check()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="exists already"):
        ShardedDataset.write(numbers(9), tmp_path / "file", 2)
    (tmp_path / "empty").mkdir()
    assert ShardedDataset.write(numbers(9), tmp_path / "empty", 2).num_rows == 9


KILLED = """
import os, signal, sys
import pyarrow as pa
from cerebro_tune.data import ShardedDataset

def batches():
    for row in range(100):
        if row == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield pa.record_batch({"x": [row]})

reader = pa.RecordBatchReader.from_batches(pa.schema({"x": pa.int64()}), batches())
ShardedDataset.write(reader, sys.argv[1], 2)
"""


def test_a_killed_write_is_not_opened_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    target = tmp_path / "d"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), "50"], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match=r"is not a sharded data set: it has no manifest\.json"):
        ShardedDataset.open(target)
    subprocess.run([sys.executable, "-c", KILLED, str(target), "-1"], check=True)
    assert ShardedDataset.open(target).num_rows == 100


BOUNDED = """
import resource, sys
import numpy as np, pyarrow as pa
from cerebro_tune.data import ShardedDataset

ROW_BYTES, BATCHES, ROWS, LIMIT = 4096, 80, 1000, 144 << 20

def batches():
    for number in range(BATCHES):
        values = np.full((ROWS, ROW_BYTES), number, np.uint8)
        yield pa.record_batch({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)})

def private_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))

schema = next(batches()).schema
limit = private_bytes() + LIMIT
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.ones(2 * LIMIT, np.uint8)
except MemoryError:
    print("the limit is in force")
data = ShardedDataset.write(pa.RecordBatchReader.from_batches(schema, batches()), sys.argv[1], 16)
print(data.num_rows * ROW_BYTES // LIMIT)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux only")
def test_a_source_larger_than_memory_is_written(tmp_path: Path) -> None:
    """330 MB of rows with less than half of that to allocate from; mapped files are not counted, and can be evicted."""
    settings = {
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "ARROW_IO_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",  # or glibc keeps what was freed, more or less of it by chance
    }
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path / "d")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the limit is in force", "2"]
    ShardedDataset.open(tmp_path / "d").check()
