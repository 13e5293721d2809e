"""What every test may use, and what every test must leave behind: nothing."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, settings

import soak
from cerebro_tune import ShardedDataset

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("soak", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=2000)
settings.load_profile("default")


def pytest_configure() -> None:
    """Two cores, however many there are: how many threads a worker has, and so every bit, follows from it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


@pytest.hookimpl(tryfirst=True)  # before xdist looks for its marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray come last: once it runs, processes and sockets of its own come and go until the session ends.

    Where several processes share the tests, each file is one's, and what of it needs Ray may be another's.
    """
    items.sort(key=_needs_ray)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.stem + (" with Ray" if _needs_ray(item) else "")))


def _needs_ray(item: pytest.Item) -> bool:
    return "ray_session" in getattr(item, "fixturenames", ())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Where several processes share the tests, this one tells what the others have to."""
    soak.told += getattr(node, "workeroutput", {}).get("told", ())  # one that crashed has none


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand on what the tests of faults did."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["told"] = soak.told


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of faults did."""
    if soak.told:
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(soak.told))


def pytest_collection_finish() -> None:
    """What the imports made stays: `leaves_nothing` collects garbage after each test, and need not look through it.

    So does what the driver of a GPU opens, which the first backward pass makes torch use.
    """
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    gc.freeze()


@pytest.fixture(scope="session")
def gpu() -> None:
    """For tests that need one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One local Ray for all tests that ask for it; its workers can import the test modules.

    A cluster of one node, to which tests may add others. It is in a folder of its own, so that it is nobody else's
    "running cluster", and quick to see that a node is dead.
    """
    import ray
    from ray.cluster_utils import Cluster

    impatient = {
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 4, "include_dashboard": False, "_system_config": impatient}
    with TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(
            address=cluster.address, logging_level="ERROR", log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        )  # fmt: skip
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def _held(beside_ray: bool) -> dict[str, set[str]]:
    """Processes, threads, descriptors of pipes, sockets and memory files, and mappings of state buffers.

    Beside a running Ray without sockets: it opens and closes its own at any time.
    """
    kinds = ("pipe:", "/memfd:") if beside_ray else ("pipe:", "socket:", "/memfd:", "anon_inode:")
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith(kinds):
            descriptors.add(f"{number} -> {target}")
    mappings = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line}
    threads = {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio")}
    return {"processes": _processes(), "threads": threads, "descriptors": descriptors, "mappings": mappings}


def _processes() -> set[str]:
    """All children; of those of a Ray node, which keeps spare ones, only workers of ours and their actors."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            told = " ".join(child.cmdline())
            of_ray = "raylet" in {parent.name() for parent in child.parents()}
            if not of_ray or "ray::Post" in told or "cerebro_tune.workers" in told:
                found.add(f"{child.pid} {child.name()}")
    return found


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a process, thread, descriptor or shared memory is left that was not there before."""
    beside_ray = "ray_session" in request.fixturenames
    before = _held(beside_ray)
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while beside_ray and not _processes() <= before["processes"] and time.monotonic() < deadline:
        time.sleep(0.05)  # Ray ends actors in its own time
    left = {kind: sorted(things - before[kind]) for kind, things in _held(beside_ray).items()}
    assert not any(left.values()), (
        f"the test left behind: { {kind: things for kind, things in left.items() if things} }"
    )


def points(rows: int, seed: int = 0) -> pa.Table:
    """A classification task that a linear model learns: `x` of 8 floats, `y` of 2 classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 8)).astype("float32")
    y = (x @ np.arange(1, 9) > 0).astype("int64")
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(x.ravel(), 8), "y": y})


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """Four shards of 51, 51, 50 and 50 rows: no batch size in use divides them."""
    return ShardedDataset.write(points(202), tmp_path_factory.mktemp("data") / "train", num_shards=4)


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """100 rows of the same task."""
    return ShardedDataset.write(points(100, seed=1), tmp_path_factory.mktemp("data") / "validation", num_shards=1)


@pytest.fixture
def options(train: ShardedDataset, validation: ShardedDataset, tmp_path: Path) -> dict[str, Any]:
    """Arguments of an executor with two inline workers."""
    return {
        "train": train, "validation": validation, "epochs": 2, "batch_size": 16, "workers": 2, "backend": "inline",
        "run_dir": tmp_path / "runs", "progress": False, "resume": "never",
    }  # fmt: skip


@pytest.fixture
def quiet_optuna() -> Iterator[None]:
    """Optuna tells of every trial; these tests look into the study."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sets in it, in which runs of `resumed_runs` have theirs."""
    folder = tmp_path_factory.mktemp("sets")
    ShardedDataset.write(points(202), folder / "train", num_shards=4)
    ShardedDataset.write(points(100, seed=1), folder / "validation", num_shards=1)
    return folder
