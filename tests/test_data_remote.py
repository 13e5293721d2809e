"""Sets at URIs: written whole or not at all, fetched when used, and never taken for whole when they are not."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.data.remote import RemoteSet
from cerebro_tune.errors import DamagedShardError, DataError

ROWS = 1003


def numbers(rows: int = ROWS) -> pa.Table:
    x = np.random.default_rng(0).random((rows, 50), dtype=np.float32)
    return pa.table({"row": np.arange(rows), "x": pa.FixedSizeListArray.from_arrays(x.ravel(), 50)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def everything(data: ShardedDataset) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*data.batches_of(64, BatchForm()), strict=True)]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder of a set that tests reach by URI; its name needs quoting in one."""
    return ShardedDataset.write(numbers(), tmp_path / "over there" / "set", 4).path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cerebro_tune"


def test_a_set_at_a_uri_is_the_set_in_a_folder(tmp_path: Path, cache: Path) -> None:
    local = ShardedDataset.write(numbers(), tmp_path / "local", 4, seed=3)
    target = tmp_path / "far" / "away set"
    far = ShardedDataset.write(numbers(), target.as_uri(), 4, seed=3)
    assert names(target) == names(local.path)
    assert all((target / name).read_bytes() == (local.path / name).read_bytes() for name in names(target))
    assert (far.fingerprint, far.num_rows, far.columns) == (local.fingerprint, local.num_rows, local.columns)
    assert all(torch.equal(a, b) for a, b in zip(everything(far), everything(local), strict=True))
    assert names(cache / far.fingerprint) == names(local.path)[1:]
    assert "/far/away%20set'" in repr(far)
    assert repr(far).startswith("ShardedDataset('file:///")


def test_shards_are_fetched_when_first_used_and_only_once(there: Path, tmp_path: Path) -> None:
    data = ShardedDataset.open(there.as_uri(), cache_dir=tmp_path / "kept")
    folder = tmp_path / "kept" / data.fingerprint
    assert data.path == folder
    assert not folder.exists()
    data.shard(2)
    assert names(folder) == ["shard-00002.arrow"]
    fetched = data.file(2).stat()
    view = ShardedDataset.open(there.as_uri(), cache_dir=tmp_path / "kept").select(["row"])
    view.shard(2)
    assert data.file(2).stat().st_ino == fetched.st_ino
    view.check()
    assert len(names(folder)) == 4
    (there / "shard-00000.arrow").unlink()  # no longer needed
    assert len(everything(ShardedDataset.open(there.as_uri() + "/", cache_dir=tmp_path / "kept"))[0]) == ROWS


def test_it_pickles_as_uri_and_cache(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ShardedDataset.open(there.as_uri(), cache_dir="kept").select(["x"])
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(data))
    assert (again.columns, again.fingerprint, again.path) == (data.columns, data.fingerprint, data.path)
    assert again.path == tmp_path / "kept" / ShardedDataset.open(there).fingerprint
    assert torch.equal(everything(again)[0], everything(ShardedDataset.open(there))[1])


def test_a_damaged_file_in_the_cache_is_fetched_again(there: Path) -> None:
    uri = there.as_uri()
    first = ShardedDataset.open(uri)
    before = first.shard(1).gather(np.arange(9), BatchForm())
    for damage in (b"", b"x" * first.file(1).stat().st_size):
        (there.parent / "damage").write_bytes(damage)
        os.replace(there.parent / "damage", first.file(1))  # in place it would change under the mapping of `first`
        found = ShardedDataset.open(uri).shard(1).gather(np.arange(9), BatchForm())
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert names(first.path) == ["shard-00001.arrow"]


def test_a_shard_that_is_damaged_over_there_is_refused(there: Path) -> None:
    data = ShardedDataset.open(there.as_uri())
    content = (there / "shard-00001.arrow").read_bytes()
    (there / "shard-00001.arrow").write_bytes(content[:-1])
    with pytest.raises(DamagedShardError, match=r"shard file:///.*/shard-00001\.arrow has \d+ bytes, \d+ were written"):
        data.shard(1)
    (there / "shard-00001.arrow").write_bytes(content[:-1] + b"\x01")
    with pytest.raises(DamagedShardError, match="has the checksum"):
        data.check()
    (there / "shard-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"has a shard shard-00001\.arrow that cannot be fetched into"):
        data.shard(1)
    assert names(data.path) == ["shard-00000.arrow"]


FETCHING = """
import resource, signal, sys
from cerebro_tune.data import ShardedDataset

data = ShardedDataset.open(sys.argv[1])
if sys.argv[2] == "cut":  # what is written beyond this ends the process
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
print("ready", flush=True)
sys.stdin.readline()
data.check()
"""


def fetching(there: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHING, there.as_uri(), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_killed_in_mid_download_leaves_no_shard(there: Path, cache: Path) -> None:
    process = fetching(there, "cut")
    process.communicate("go\n")
    assert process.returncode == -signal.SIGXFSZ
    data = ShardedDataset.open(there.as_uri())
    (left,) = names(cache / data.fingerprint)
    assert left.startswith(".shard-00000.arrow.")
    assert (data.path / left).stat().st_size == 20_000
    assert len(everything(data)[0]) == ROWS


def test_several_processes_fetch_at_once(there: Path) -> None:
    processes = [fetching(there, "whole") for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    data = ShardedDataset.open(there.as_uri())
    assert names(data.path) == [f"shard-0000{shard}.arrow" for shard in range(4)]
    data.check()


def test_an_existing_set_is_never_touched(there: Path, tmp_path: Path) -> None:
    before = {name: (there / name).read_bytes() for name in names(there)}
    with pytest.raises(DataError, match="over%20there/set exists already: choose another place"):
        ShardedDataset.write(numbers(7), there.as_uri(), 2)
    with pytest.raises(DataError, match="exists already"):
        ShardedDataset.write(numbers(7), (there / "manifest.json").as_uri(), 2)
    assert {name: (there / name).read_bytes() for name in names(there)} == before
    (tmp_path / "empty").mkdir()
    assert ShardedDataset.write(numbers(7), (tmp_path / "empty").as_uri(), 2).num_rows == 7


def test_a_set_that_appears_meanwhile_is_not_touched_either(tmp_path: Path) -> None:
    target = tmp_path / "set"

    def batches() -> Iterator[pa.RecordBatch]:
        yield from numbers().to_batches()
        ShardedDataset.write(numbers(7), target, 2)

    reader = pa.RecordBatchReader.from_batches(numbers().schema, batches())
    with pytest.raises(DataError, match="exists already"):
        ShardedDataset.write(reader, target.as_uri(), 4)
    assert ShardedDataset.open(target).num_rows == 7


def test_a_source_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(DataError, match="has no rows"):
        ShardedDataset.write(numbers(0), (tmp_path / "a" / "set").as_uri(), 4)
    assert names(tmp_path) == []


def test_an_upload_that_fails_takes_back_what_it_sent(there: Path, tmp_path: Path) -> None:
    """The third shard is a folder, which cannot be read as a file, when two are there already."""
    (there / "shard-00002.arrow").unlink()
    (there / "shard-00002.arrow").mkdir()
    for target in (tmp_path / "far" / "away", tmp_path):
        before = names(tmp_path)
        with pytest.raises(DataError, match=r"could not be written, and nothing is left there: .*Is a directory"):
            RemoteSet.at(target.as_uri()).upload(there)
        assert names(tmp_path) == before


FULL = """
import resource, signal, sys
from pathlib import Path
from cerebro_tune.data.remote import RemoteSet

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
RemoteSet.at(sys.argv[2]).upload(Path(sys.argv[1]))
"""


def test_an_upload_that_breaks_within_a_file_leaves_nothing(there: Path, tmp_path: Path) -> None:
    uri = (tmp_path / "far" / "away").as_uri()
    done = subprocess.run([sys.executable, "-c", FULL, there, uri], check=False, capture_output=True, text=True)
    assert "could not be written, and nothing is left there: [Errno 27]" in done.stderr
    assert not (tmp_path / "far").exists()


def test_the_manifest_is_what_makes_a_set(there: Path, tmp_path: Path) -> None:
    uri = there.as_uri()
    content = (there / "manifest.json").read_text()
    (there / "manifest.json").write_text(content.replace("shard-00001.arrow", "../secret"))
    with pytest.raises(DataError, match=r"file:///.*/manifest\.json is damaged"):
        ShardedDataset.open(uri)
    (there / "manifest.json").unlink()
    for missing in (uri, (tmp_path / "nowhere").as_uri()):
        with pytest.raises(DataError, match=r"file:///.* is not a sharded data set: it has no manifest\.json"):
            ShardedDataset.open(missing)


@pytest.mark.parametrize("call", ["open", "write"])
def test_errors_tell_no_secrets(call: str, tmp_path: Path) -> None:
    uri = "nosuch://key:secret@bucket/set?token=secret"
    with pytest.raises(DataError, match="nosuch://bucket/set cannot be opened: Unrecognized filesystem") as caught:
        ShardedDataset.open(uri) if call == "open" else ShardedDataset.write(numbers(7), uri, 2)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=r"nosuch://bucket/t\.csv cannot be read") as caught:
        ShardedDataset.write("nosuch://key:secret@bucket/t.csv?token=secret", tmp_path / "d", 2)
    assert "secret" not in str(caught.value)
