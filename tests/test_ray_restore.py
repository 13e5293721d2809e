"""`Tuner.restore` after a driver was killed: the search goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

import nets
import ray_searches
from cerebro_tune import Cerebro, ShardedDataset
from cerebro_tune.errors import ConfigurationError, DamagedJournalError, DamagedStateError, RunBusyError
from cerebro_tune.journal import LOCK, NAME, Journal, read_journal
from cerebro_tune.statefile import save
from cerebro_tune_ray import tune
from cerebro_tune_ray.record import Record
from cerebro_tune_ray.restoring import reports_since
from cerebro_tune_ray.rows import Call, Standing
from conftest import points

pytestmark = pytest.mark.usefixtures("ray_session")


def write_data(folder: Path) -> None:
    ShardedDataset.write(points(202), folder / "train", num_shards=4)
    ShardedDataset.write(points(100, seed=1), folder / "validation", num_shards=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    write_data(tmp_path)
    return tmp_path


Whole = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The undisturbed search of a name: its log and its grid. It is the same for all tests."""

    @cache
    def search(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(f"whole-{name}")
        write_data(folder)
        with ray_searches.executor(folder, 1) as cerebro:
            return folder / "log", ray_searches.search(name, folder, cerebro)

    return search


def driver(name: str, folder: Path, live: int, **environment: str) -> subprocess.Popen[str]:
    """A process that runs a search, or takes it up."""
    # Imported, not run as a script, so that its classes are those of this process too when the search is restored.
    script = "import ray_searches; ray_searches.main()"
    command = [sys.executable, "-c", script, name, str(folder), str(live)]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    session = {"RAY_SESSION": ray.get_runtime_context().gcs_address, "PYTHONPATH": paths}
    environment = {**os.environ, **session, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it told of errors."""
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, errors


def kill(name: str, folder: Path, live: int, moment: int, how: str) -> None:
    """Run a search, or take it up, in a process that is killed at the n-th result of all."""
    death = {"KILL_AT": str(moment)} | ({"KILL_AFTER": "1"} if how == "after" else {})
    code, errors = end_of(driver(name, folder, live, **death))
    assert code == -signal.SIGKILL, errors


def take_up(name: str, folder: Path) -> Any:
    with ray_searches.executor(folder, 1) as cerebro:
        return ray_searches.restore(name, folder, cerebro)


def scores(grid: Any) -> list[float]:
    return sorted(result.metrics["val_loss"] for result in grid)


def told(log: Path) -> list[list[str]]:
    """The results in order; trials are numbered as they come, since their ids are drawn anew in every search."""
    rows = [line.split() for line in log.read_text().splitlines()]
    numbers: dict[str, int] = {}
    return [[str(numbers.setdefault(row[0], len(numbers))), *row[1:]] for row in rows]


@pytest.mark.parametrize(
    ("name", "moment", "how", "fresh"),
    [
        ("asha", 14, "before", False), ("hyperband", 25, "after", False), ("promotion", 19, "before", False),
        ("pbt", 51, "after", False), ("pbt", 61, "before", True), ("asha", 27, "after", True),
        ("function", 4, "before", False), ("function", 17, "after", True), ("function", 18, "before", False),
        ("function-pbt", 31, "after", False), ("function-pbt", 35, "before", True),
    ],
)  # fmt: skip
def test_every_result_is_that_of_the_undisturbed_search(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, name: str, moment: int, how: str, fresh: bool
) -> None:
    if fresh:  # Ray's state of the experiment is that of its last step
        monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    log, expected = whole(name)
    kill(name, folder, 1, moment, how)
    assert moment <= len(told(folder / "log")) < len(told(log)) - 5
    grid = take_up(name, folder)
    assert told(folder / "log") == told(log)
    assert grid.num_errors == 0
    assert len(grid) == len(expected) == ray_searches.SAMPLES
    assert scores(grid) == scores(expected)


@pytest.mark.parametrize(("name", "moments"), [("pbt", (20, 30)), ("promotion", (9, 17)), ("function", (1, 30))])
def test_trials_side_by_side_go_on_from_their_last_unit_after_each_death(
    folder: Path, name: str, moments: tuple[int, int]
) -> None:
    kill(name, folder, 3, moments[0], "after")
    kill(name, folder, 3, moments[1], "before")
    with ray_searches.executor(folder, 3) as cerebro:
        grid = ray_searches.restore(name, folder, cerebro)
    assert grid.num_errors == 0
    rows = [row[:2] for row in told(folder / "log")]
    assert len({row[0] for row in rows}) == ray_searches.SAMPLES
    for trial in {row[0] for row in rows}:
        units = [int(unit) for number, unit in rows if number == trial]
        if name != "pbt":  # where a trial may go back to another's unit
            assert units == list(range(1, len(units) + 1))
    assert not list((folder / "ray" / "search" / "cerebro").glob("*.safetensors"))


@pytest.mark.parametrize(("name", "row"), [("asha", 22), ("hyperband", 48), ("pbt", 44)])
def test_a_row_has_all_that_a_death_right_after_it_needs(folder: Path, whole: Whole, name: str, row: int) -> None:
    """The rows are the start of a trial, the end of a bracket, and an exploit."""
    log, expected = whole(name)
    code, errors = end_of(driver(name, folder, 1, DIE_AT_ROW=str(row)))
    assert code == -signal.SIGKILL, errors
    assert scores(take_up(name, folder)) == scores(expected)
    # The report that the last row is of was not heard by callbacks, and is not made again.
    unheard = [each for each in told(log) if each not in told(folder / "log")]
    assert len(unheard) == (name == "hyperband")


def heard(log: Path) -> list[tuple[str, ...]]:
    """The results without those that are there again; trials are told apart by their learning rates."""
    return list(dict.fromkeys(tuple(row[1:]) for row in told(log)))


def test_what_fails_after_a_restore_goes_on_from_its_last_unit(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from where it stood when the driver died."""
    log, _ = whole("promotion")
    kill("breaking", folder, 1, 19, "before")
    begun = told(folder / "log")
    (waiting,) = {row[2] for row in begun if row[1] == "8"}  # at its second rung, to be promoted later
    named = folder / "breaks"
    named.write_text(waiting)
    monkeypatch.setenv("BREAKS", str(named))
    grid = take_up("breaking", folder)
    assert not named.exists(), "it was promoted, and has raised"
    assert grid.num_errors == 0
    undisturbed = {tuple(row[1:3]): row[3] for row in told(log)}
    again = {tuple(row[1:3]): row[3] for row in told(folder / "log")}
    both = undisturbed.keys() & again.keys()
    assert len(both) > len(begun)
    assert {key: again[key] for key in both} == {key: undisturbed[key] for key in both}


def record_of(folder: Path) -> Path:
    return folder / "ray" / "search" / "cerebro"


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (f"{NAME}-shm", LOCK)
    }


def test_a_damaged_record_is_refused_and_one_that_was_cut_is_not(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "1000")  # the first, when the search begins, is the only one
    log, expected = whole("asha")
    kill("asha", folder, 1, 30, "before")
    written = record_of(folder) / f"{NAME}-wal"
    content = written.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    written.write_bytes(damaged)
    before = contents(folder / "ray")
    with pytest.raises(DamagedJournalError, match=r"copy, or begin a new experiment under another name; stock Ray"):
        take_up("asha", folder)
    assert contents(folder / "ray") == before
    written.write_bytes(content[:-20_000])
    with pytest.warns(UserWarning, match="goes back to where it was when Ray wrote its state last"):
        grid = take_up("asha", folder)
    assert heard(folder / "log") == heard(log)
    assert len(told(folder / "log")) > len(told(log))
    assert scores(grid) == scores(expected)


@pytest.mark.parametrize("how", ["lost", "damaged", "exchanged"])
def test_a_state_that_is_not_what_was_noted_is_never_trained_on(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")  # all is secured after each report
    log, expected = whole("asha")
    kill("asha", folder, 1, 26, "before")
    rows = read_journal(record_of(folder))
    assert rows[-1].kind == "result"
    (noted,) = rows[-1].body["stood"]
    path = record_of(folder) / noted["file"]
    others = [each for each in record_of(folder).glob("*.safetensors") if each != path]
    kept = {each: each.read_bytes() for each in [path, *others]}
    for each in kept:
        each.unlink()
    before = (folder / "log").read_text()
    with pytest.raises(DamagedStateError, match=r"a state of trial \w+ is lost .*Restore its folder from a copy"):
        take_up("asha", folder)
    assert (folder / "log").read_text() == before
    for each in others:
        each.write_bytes(kept[each])
    if how == "damaged":
        path.write_bytes(kept[path][:-3])
    elif how == "exchanged":
        path.write_bytes(kept[others[0]])
    with pytest.warns(UserWarning, match="what came after is done again: a state of trial"):
        grid = take_up("asha", folder)
    assert heard(folder / "log") == heard(log)
    assert scores(grid) == scores(expected)


def test_what_ray_has_written_may_be_cut_by_a_death(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")  # it is writing all the time
    log, expected = whole("asha")
    kill("asha", folder, 1, 26, "before")
    written = [path for path in record_of(folder).parent.glob("*-*.*") if path.suffix in (".json", ".pkl")]
    assert {path.name.split("-")[0] for path in written} >= {"experiment_state", "searcher"}
    for path in written:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    kept = record_of(folder) / "ray.zip"
    content = kept.read_bytes()
    kept.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(DamagedStateError, match=r"ray\.zip is not as it was written .*Restore its folder from a copy"):
        take_up("asha", folder)
    kept.write_bytes(content)
    grid = take_up("asha", folder)
    assert told(folder / "log") == told(log)
    assert scores(grid) == scores(expected)


def test_what_was_kept_of_ray_is_given_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    experiment = tmp_path / "search"
    record = Record(experiment, {})
    contents_of = {"experiment_state-1.json": b'{"trials": 6}' * 9, "searcher-state-1.pkl": bytes(range(256))}
    for name, content in contents_of.items():
        (tmp_path / name).write_bytes(content)
    record.keep([tmp_path / name for name in contents_of])
    kept = record.folder / "ray.zip"
    whole, refused = kept.read_bytes(), 0
    for place in range(len(whole)):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            record.give_back()
        except DamagedStateError:
            refused += 1
            continue
        for name, content in contents_of.items():
            assert (experiment / name).read_bytes() == content
        assert {path.name for path in experiment.iterdir()} == {*contents_of, "cerebro"}
    assert refused > len(whole) // 2
    record.close(over=False)


@pytest.mark.parametrize(
    ("noted_at", "files", "since"),
    [(2, "-ab", 1), (2, "-aab", 2), (1, "-aab", 3), (1, "-", 0), (3, "--a", 0), (2, "--a", 1), (None, "-ab", 3)],
)
def test_reports_are_counted_from_the_state_that_a_trial_goes_back_to(
    noted_at: int | None, files: str, since: int
) -> None:
    """A state has been noted with the report of its iteration, or when the trial was started, before the next one."""
    rows = [{"result": {"training_iteration": at}, "file": file} for at, file in enumerate(files, 1)]
    calls = [Call(number, "result", "t", row) for number, row in enumerate(rows)]
    noted = None if noted_at is None else Standing("t", "a", "", 1, [], noted_at, 0.0, 0, None)
    assert reports_since(noted, SimpleNamespace(trial_id="t"), calls) == since  # type: ignore[arg-type]


def test_an_experiment_has_one_driver(folder: Path, whole: Whole) -> None:
    _, expected = whole("asha")
    first = driver("asha", folder, 1, KILL_AT="9", SIGNAL="SIGSTOP")
    try:
        os.waitpid(first.pid, os.WUNTRACED)
        before = contents(folder / "ray")
        for attempt in (take_up, lambda name, folder: ray_searches.search(name, folder, Cerebro(backend="inline"))):
            with pytest.raises(RunBusyError, match=f"in the hands of process {first.pid} on .*give another name"):
                attempt("asha", folder)
        with pytest.raises(RunBusyError), ray_searches.executor(folder, 1) as cerebro:
            tune.run(nets.Deep, storage_path=str(folder / "ray"), name="search", executor=cerebro, verbose=0)
        assert contents(folder / "ray") == before
    finally:
        first.kill()
        first.communicate()
    assert scores(take_up("asha", folder)) == scores(expected)


def test_a_search_stands_while_the_disk_is_full(folder: Path, whole: Whole) -> None:
    log, _ = whole("asha")
    code, errors = end_of(driver("asha", folder, 1, FULL_AT="150000"))
    assert code == 0, errors
    assert "the run stands still: the experiment's journal could not be written" in errors
    assert told(folder / "log") == told(log)


def begun(experiment: Path) -> None:
    """The record of a search whose driver has died after four rows: a manifest, two trials, and a report."""
    record = Record(experiment, {"seed": 0})
    record.note("add", "a1", text=["{}", "{}"])
    record.note("add", "b2", text=["{}", "{}"])
    path = record.new_file("a1")
    digest = save({"weight": 1.0}, path)
    record.stand(Standing("a1", path.name, digest, 1, [0], 1, 0.5, 0, {"lr": 0.1}))
    record.note("result", "a1", result={"val_loss": 1.0}, file=path.name, decision="CONTINUE")
    record.close(over=False)


STANDING = {
    "trial": "a1", "file": "a1-2.safetensors", "digest": "", "units": 2, "visited": [0], "iteration": 2, "time_s": 1,
    "index": 0, "config": None, "fit": 0,
}  # fmt: skip
RESULT = {"result": {}, "file": None, "decision": "CONTINUE"}
MALICE: list[tuple[str, dict[str, Any]]] = [
    ("stood", {"stood": [STANDING | {"file": file}], "gone": []})
    for file in (
        "../../victim", "/etc/passwd", "../a1-2.safetensors", "b2-2.safetensors", "a1-1.safetensors", "", ".",
        "a1-+2.safetensors", "a1-2.safetensors/", "a1-2.ckpt", None, ["a1-2.safetensors"],
    )
]  # fmt: skip
MALICE += [
    ("stood", {"stood": [STANDING | changed], "gone": []})
    for changed in (
        {"trial": "nobody", "file": "nobody-2.safetensors"}, {"trial": "..", "file": "..-2.safetensors"},
        {"units": -1}, {"units": 1.5}, {"visited": ["0"]}, {"config": "{}"}, {"mode": "min"}, {"index": True},
    )
]  # fmt: skip
MALICE += [
    ("stood", {"stood": [], "gone": [file]})
    for file in ("../../../victim", "/etc/passwd", "a1-2.safetensors", "journal.sqlite", "lock", "")
]
MALICE += [
    ("add", {"trial": trial, "told": {"text": ["{}", "{}"]}, "stood": [], "gone": []})
    for trial in ("../../victim", "/tmp", "a/b", "", "..", None)
]
MALICE += [
    ("result", {"trial": "nobody", "told": RESULT, "stood": [], "gone": []}),
    ("result", {"trial": "a1", "told": {}, "stood": [], "gone": []}),
    ("result", {"trial": "a1", "told": RESULT | {"file": 1}, "stood": [], "gone": []}),
    ("result", {"trial": "a1", "told": RESULT | {"call": "eval"}, "stood": [], "gone": []}),
    ("result", {"trial": "a1", "told": RESULT}),
    ("start", {"trial": "a1", "told": {"text": "{}"}, "stood": [], "gone": []}),
    ("builtins.eval", {"trial": "a1", "told": {}, "stood": [], "gone": []}),
    ("stood", {}),
    ("manifest", {"format": 1, "about": {}}),
]
"""Rows with a hash that fits, which no driver writes."""


@pytest.mark.parametrize(("kind", "body"), MALICE)
def test_rows_that_no_driver_writes_are_refused(tmp_path: Path, kind: str, body: dict[str, Any]) -> None:
    experiment = tmp_path / "ray" / "search"
    begun(experiment)
    victim = tmp_path / "victim"
    victim.write_text("is still here")
    journal = Journal(experiment / "cerebro")
    number = journal.count + 1
    journal.append(kind, **body)
    journal.close()
    before = contents(tmp_path)
    with pytest.raises(DamagedJournalError, match=f"Row {number} of the journal, {kind}"):
        Record(experiment, {"seed": 0})
    assert contents(tmp_path) == before


def test_a_record_of_a_newer_format_or_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "newer" / "cerebro")
    journal.append("manifest", format=2, about={}, environment={"cerebro-tune": "9.0"})
    journal.close()
    with pytest.raises(ConfigurationError, match=r"has format 2, and .* writes and reads 1: .*'cerebro-tune': '9.0'"):
        Record(tmp_path / "newer", {})
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    with pytest.raises(ConfigurationError, match=r"network file system \(nfs4\).*give a storage_path on a disk of"):
        Record(tmp_path / "remote", {})
    assert not (tmp_path / "remote").exists()


def test_it_resumes_only_what_it_was(folder: Path) -> None:
    kill("asha", folder, 1, 6, "after")
    with ray_searches.executor(folder, 1) as cerebro:
        cerebro.seed = 9
        with pytest.raises(ConfigurationError, match="seed was 0 and is 9"):
            ray_searches.restore("asha", folder, cerebro)
    shutil.rmtree(folder / "ray" / "search" / "cerebro")
    with ray_searches.executor(folder, 1) as cerebro, pytest.raises(ConfigurationError, match="has no record of its"):
        ray_searches.restore("asha", folder, cerebro)


def tuner(folder: Path, cerebro: Cerebro, trainable: Any, config: dict[str, Any], **tuning: Any) -> Any:
    return tune.Tuner(
        trainable, param_space=config, tune_config=tune.TuneConfig(metric="val_loss", mode="min", **tuning),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), name="search", verbose=0), executor=cerebro,
    )  # fmt: skip


class Flaky(nets.Deep):
    """Raises in its second epoch, for as long as a file is there."""

    def run_unit(self, work: Any) -> dict[str, float]:
        with Path(self._config["mark"]).with_name("units").open("a") as file:
            file.write("one more\n")
        told = Path(self._config["mark"]).exists() and self._config["lr"] > 0.02
        if told and (work.epoch, work.position) == (1, 1):
            raise RuntimeError("told to raise")
        return super().run_unit(work)


@pytest.mark.parametrize(("how", "units"), [("resume_errored", 22), ("restart_errored", 32)])
def test_trials_that_failed_are_tried_again_when_that_is_asked_for(folder: Path, how: str, units: int) -> None:
    mark = folder / "mark"
    mark.touch()
    space = {"lr": tune.grid_search([0.01, 0.1, 0.2]), "mark": str(mark)}
    with ray_searches.executor(folder, 2) as cerebro:
        failed = tuner(folder, cerebro, Flaky, space).fit()
        assert failed.num_errors == 2
        mark.unlink()
        path = str(folder / "ray" / "search")
        (folder / "units").unlink()
        unasked = tune.Tuner.restore(path, Flaky, executor=cerebro).fit()
        assert unasked.num_errors == 2
        assert all(result.config == result.metrics["config"] for result in unasked)
        grid = tune.Tuner.restore(path, Flaky, executor=cerebro, **{how: True}).fit()
        assert [result.metrics["training_iteration"] for result in grid] == [16] * 3
        assert len((folder / "units").read_text().splitlines()) == units
        again = tune.Tuner.restore(path, Flaky, executor=cerebro).fit()
    for last in (grid, again):
        assert last.num_errors == 0
        assert sorted(result.config["lr"] for result in last) == [0.01, 0.1, 0.2]
        assert [result.error for result in last] == [None] * 3
    assert not list((folder / "ray" / "search" / "cerebro").glob("*.safetensors"))
