"""The journal: what was appended is there, in order and unchanged, or it does not open."""

from __future__ import annotations

import errno
import random
import shutil
import sqlite3
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import resumed_runs
import soak
from cerebro_tune.clock import CLOCK
from cerebro_tune.errors import ConfigurationError, DamagedJournalError, RunBusyError
from cerebro_tune.eventcodec import to_event, to_plain
from cerebro_tune.events import (
    RunResumed,
    SearchEnded,
    TrialAdded,
    TrialCloned,
    TrialDecided,
    TrialRestored,
    UnitFailed,
    UnitFinished,
    WorkerJoined,
    WorkerLost,
    WorkerStayedAway,
)
from cerebro_tune.journal import FORMAT, MANIFEST, NAME, Journal, read_journal
from cerebro_tune.ledger import FullDisk, Ledger
from cerebro_tune.reading import RunReading
from cerebro_tune.units import Decision, Trial, Unit, WorkerId

GOLDEN = Path(__file__).parent / "golden" / "format-1"
"""The journal of a run that died once and was taken up, as the first version that kept one wrote it."""
DAMAGES = 500
"""Files that are cut or have a bit flipped, in all."""


def filled(folder: Path, rows: int = 120) -> Journal:
    journal = Journal(folder)
    for number in range(rows):
        journal.append("thing", number=number, text="x" * (number % 300), value=float("nan"), half=0.5)
    return journal


def copied(folder: Path, to: Path) -> Path:
    """The folder as another process would find it now."""
    shutil.copytree(folder, to)
    for beside in to.glob("*-shm"):
        beside.unlink()
    return to


def texts(rows: Any) -> list[str]:
    return [f"{row.number} {row.kind} {row.body}" for row in rows]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """A journal as a killed process leaves it: much of it in the file beside it."""
    journal = filled(tmp_path / "run")
    yield copied(tmp_path / "run", tmp_path / "killed")
    journal.close()


def test_what_was_appended_is_there_without_an_end(killed: Path) -> None:
    rows = read_journal(killed)
    assert [row.body["number"] for row in rows] == list(range(120))
    journal = Journal(killed)
    assert texts(journal.rows) == texts(rows)
    journal.append("more", of="it")
    journal.close()
    journal.close()
    assert texts(read_journal(killed)) == [*texts(rows), "121 more {'of': 'it'}"]
    assert {path.name for path in killed.iterdir()} == {NAME, "lock"}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_flipped_bits_are_refused_and_cut_files_open_as_what_is_whole(tmp_path: Path, closed: bool) -> None:
    journal = filled(tmp_path / "run")
    if closed:
        journal.close()
    whole = texts(read_journal(tmp_path / "run"))
    chance = random.Random(closed)
    refused = unharmed = shorter = 0
    source = copied(tmp_path / "run", tmp_path / "source")
    files = [path.name for path in source.iterdir() if path.name.startswith(NAME)]
    longer = soak.Loop()
    for number in takewhile(lambda number: number < DAMAGES // 2 or longer, count()):
        name = chance.choice(files)
        folder = copied(source, tmp_path / "damaged")
        content = bytearray((folder / name).read_bytes())
        if cut := number % 2 == 0:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(content)
        try:
            found = texts(read_journal(folder))
        except DamagedJournalError:
            refused += 1
            assert not cut, "a cut file opens"
        else:
            assert found == whole[: len(found)]
            unharmed += found == whole
            shorter += found != whole
            taken = Journal(folder)
            assert texts(taken.rows) == found
            taken.append("after", all="that")
            taken.close()
            assert texts(read_journal(folder)) == [*found, f"{len(found) + 1} after {{'all': 'that'}}"]
            # A flip in the last bytes written looks as a write that a loss of power has torn.
            assert cut or found == whole or (name.endswith("-wal") and len(found) >= len(whole) - 1)
        shutil.rmtree(folder)
    state = "that was closed" if closed else "of a killed process"
    told = f"{refused} refused, {shorter} opened as what was whole, {unharmed} hit nothing that is read"
    soak.tell(f"{number + 1} times a journal {state} was cut or had a bit flipped: {told}")
    assert refused > 20
    assert shorter > 20
    journal.close()


def test_rows_that_were_exchanged_or_left_out_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path / "run").close()
    for number, damage in enumerate(
        ["delete from rows where number = 7", "update rows set body = '{}' where number = 120",
         "update rows set number = -number where number > 118"]
    ):  # fmt: skip
        folder = copied(tmp_path / "run", tmp_path / str(number))
        with sqlite3.connect(folder / NAME) as database:
            database.execute(damage)
        database.close()
        with pytest.raises(DamagedJournalError, match="is not the one that was written"):
            read_journal(folder)


def test_one_writer_and_any_readers(tmp_path: Path) -> None:
    journal = filled(tmp_path / "run", 3)
    with pytest.raises(RunBusyError, match=r"in the hands of process \d+ on"):
        Journal(tmp_path / "run")
    assert len(read_journal(tmp_path / "run")) == 3
    journal.append("more")
    assert len(read_journal(tmp_path / "run")) == 4
    journal.close()
    Journal(tmp_path / "run").close()


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"has no {NAME}"):
        read_journal(tmp_path)


def test_a_network_file_system_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    with pytest.raises(ConfigurationError, match=r"network file system \(nfs4\).*cerebro-tune export"):
        Journal(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_this_format_opens_for_ever() -> None:
    reading = RunReading(GOLDEN)
    assert [(trial.status, trial.units, trial.total) for trial in reading.trials.values()] == [
        ("finished", 8, 8), ("stopped", 5, 8), ("failed", 6, 8), ("finished", 4, 4),
    ]  # fmt: skip
    assert (reading.rows, reading.decisions) == (93, 25)
    assert reading.manifest["about"]["trainable"] == "Mixed"
    assert sorted(path.name for path in GOLDEN.iterdir()) == [NAME]


def test_a_newer_format_is_refused(tmp_path: Path, train: Any, validation: Any) -> None:
    for data in (train, validation):
        (tmp_path / ("train" if data is train else "validation")).symlink_to(data.path)
    journal = Journal(tmp_path / "runs" / "run-0000")
    journal.append(MANIFEST, format=FORMAT + 1, about={}, environment={"cerebro-tune": "9.0"})
    journal.close()
    told = f"has format {FORMAT + 1}, and this version of cerebro_tune writes and reads {FORMAT}.*'cerebro-tune': '9.0'"
    with pytest.raises(ConfigurationError, match=told):
        RunReading(tmp_path / "runs" / "run-0000")
    with pytest.raises(ConfigurationError, match=told):
        resumed_runs.fit(tmp_path / "runs")


MALICE = [
    ("Saved", {"trial": "trial-0000", "units": 3, "file": file})
    for file in ("../../victim", "/etc/passwd", "trial-0000-4.safetensors", "", ".", "..", "a/b", "trial-0000-3.ckpt")
]
MALICE += [
    ("Released", {"trial": "trial-0000", "last": last}) for last in ("../../victim", "/etc/passwd", "", "last/..")
]
MALICE += [
    (
        kind,
        {
            "event": {"trial": {"id": name, "index": 1, "epochs": 1}, **more},
            "config": {},
            "text": "{}",
            "batch_size": 1,
        },
    )
    for name in ("../../victim", "/tmp", "trial-0000", "trial-0002", "")
    for kind, more in (("TrialAdded", {}), ("TrialCloned", {"source": "trial-0000"}))
]
MALICE += [
    ("TrialDecided", {"event": {"trial": "nobody", "decision": "stop"}}),
    ("TrialDecided", {"event": {"trial": "trial-0000", "decision": "__import__"}}),
    ("UnitFinished", {"event": {"job": 1e9, "unit": {"trial": "trial-0000", "epoch": 0, "shard": 0}, "elapsed_s": 1}}),
    ("UnitFinished", {"event": None}),
    ("UnitFailed", {}),
    ("WorkerLost", {"event": {"worker": {"number": []}}}),
    ("Dispatched", {"starts": [[1, 0, [["trial-0000", 0, 0]]]]}),
    ("Dispatched", {}),
    ("builtins.eval", {"event": {}}),
]
"""Rows with a hash that fits, which no run writes."""


@pytest.mark.parametrize(("kind", "body"), MALICE)
def test_rows_that_no_run_writes_are_refused(tmp_path: Path, train: Any, validation: Any, kind: str, body: Any) -> None:
    for data in (train, validation):
        (tmp_path / ("train" if data is train else "validation")).symlink_to(data.path)
    assert resumed_runs.in_child(lambda: (resumed_runs.die_at(9, False), resumed_runs.fit(tmp_path / "runs"))) == -9
    victim = tmp_path / "runs" / "victim"
    victim.write_text("is still here")
    journal = Journal(tmp_path / "runs" / "run-0000")
    journal.append(kind, **body)
    journal.close()
    with pytest.raises(DamagedJournalError, match=r"Row 10|row 10"):
        resumed_runs.fit(tmp_path / "runs")
    with pytest.raises(DamagedJournalError, match=r"Row 10"):
        RunReading(tmp_path / "runs" / "run-0000")
    assert victim.read_text() == "is still here"


TRIALS = st.builds(Trial, st.text(max_size=8), st.integers(0, 99), st.integers(1, 99))
UNITS = st.builds(Unit, st.text(max_size=8), st.integers(0, 9), st.integers(0, 9))
WORKERS = st.builds(WorkerId, st.integers(0, 99))
SHARDS = st.frozensets(st.integers(0, 9))


@given(
    st.one_of(
        st.builds(TrialAdded, TRIALS), st.builds(TrialCloned, TRIALS, st.text(max_size=8)),
        st.builds(TrialRestored, TRIALS, st.integers(0, 9), SHARDS), st.builds(WorkerJoined, WORKERS, SHARDS),
        st.builds(WorkerLost, WORKERS), st.builds(WorkerStayedAway, WORKERS), st.builds(RunResumed),
        st.builds(UnitFinished, st.integers(0, 9), UNITS, st.floats(0, 9)),
        st.builds(UnitFailed, st.integers(0, 9), UNITS, st.text(max_size=8)),
        st.builds(TrialDecided, st.text(max_size=8), st.sampled_from(Decision)), st.builds(SearchEnded),
    )
)  # fmt: skip
def test_events_come_back_as_they_were(event: Any) -> None:
    assert to_event(type(event).__name__, to_plain(event)) == event


def test_rows_for_soon_keep_their_order_and_none_follows_one_that_was_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ledger = Ledger(journal, FullDisk(CLOCK, lambda what: None, interrupted=lambda: True))
    ledger.note("first", soon=True)
    assert journal.count == 0
    ledger.note("second")
    ledger.note("third", soon=True)
    with (
        patch.object(Journal, "append", side_effect=OSError(errno.ENOSPC, "no room")),
        pytest.raises(OSError, match="no room"),
    ):
        ledger.note("fourth")
    ledger.note("last", soon=True)
    ledger.close()
    assert [row.kind for row in read_journal(tmp_path)] == ["first", "second", "last"]
