from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cerebro_tune import buffers, state, statefile
from cerebro_tune.budget import memory_limit, state_budget
from cerebro_tune.buffers import Buffer, BufferCache, BufferRef, Mapped
from cerebro_tune.errors import ConfigurationError, DamagedStateError, StateError, StateMemoryError
from cerebro_tune.store import SMALLEST, StateStore, rounded

SIZE = 100_000  # bytes of tensors of a small state: two of the smallest steps of capacity
CAPACITY = rounded(SIZE + 1000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    store = StateStore(20 * CAPACITY, tmp_path / "spill")
    yield store
    store.close()
    assert store.bytes_in_use == 0
    assert not (tmp_path / "spill").exists()


def tight(tmp_path: Path, states: int, **kwargs: Any) -> StateStore:
    return StateStore(states * CAPACITY, tmp_path / "spill", **kwargs)


def unit(store: StateStore, trial: str, value: float, nbytes: int = SIZE) -> str:
    """What a worker does, in this process; returns the digest."""
    cache = BufferCache()
    committed, used, working = store.buffers(trial)
    if committed is not None and working is not None:
        target = cache.open(working)
        buffers.copy(cache.open(committed), target, used)
        tree = state.read(target)
        tree["w"] += value
        layout = state.plan(tree, target)
    else:
        layout = state.plan({"w": torch.full((nbytes // 4,), float(value))})
    if working is None or working.nbytes < layout.nbytes:
        working = store.grow(trial, layout.nbytes)
    target = cache.open(working)
    used = state.write(layout, target)
    digest = state.digest(target, used)
    store.commit(trial, used, digest)
    cache.close()
    return digest


def value(store: StateStore, trial: str) -> float:
    tensor = state.read(store.mapped(trial))["w"]
    assert (tensor == tensor[0]).all()
    return float(tensor[0])


def is_whole(store: StateStore, trial: str) -> bool:
    mapped = store.mapped(trial)
    end, table, text = state.parts(mapped.memory)
    return state.digest(mapped, end + len(table) + len(text)) == store.digest_of(trial)


def test_units_follow_one_another(store: StateStore) -> None:
    assert store.buffers("a") == (None, 0, None)
    for step in range(4):
        unit(store, "a", 1.0)
        assert value(store, "a") == step + 1
        assert is_whole(store, "a")


def test_a_unit_never_works_in_the_committed_buffer(store: StateStore) -> None:
    unit(store, "a", 1)
    for _ in range(3):
        committed, _, working = store.buffers("a")
        assert committed is not None
        assert working is not None
        assert committed.key != working.key
        unit(store, "a", 1)


def test_only_running_units_hold_a_second_buffer(store: StateStore) -> None:
    for _ in range(3):
        for trial in "abcdef":
            unit(store, trial, 1)
    assert store.bytes_in_use == 7 * CAPACITY


def test_an_unwritten_working_buffer_is_kept_for_the_unit_that_runs_again(store: StateStore) -> None:
    unit(store, "a", 1)
    first = store.buffers("a")
    assert store.buffers("a") == first
    store.abandon("a")
    assert unit(store, "a", 1) == store.digest_of("a")
    assert value(store, "a") == 2


def test_a_state_that_outgrows_its_buffer_is_not_lost_on_the_way(store: StateStore) -> None:
    unit(store, "a", 3)
    cache = BufferCache()
    committed, used, working = store.buffers("a")
    assert committed is not None
    assert working is not None
    target = cache.open(working)
    buffers.copy(cache.open(committed), target, used)
    tree = state.read(target)
    tree["w"] += 1
    tree["more"] = torch.ones(SIZE)
    layout = state.plan(tree, target)
    larger = store.grow("a", layout.nbytes)
    assert larger.key != working.key
    unit(store, "b", 9)  # another trial must not get the buffer that is still read
    used = state.write(layout, cache.open(larger))
    store.commit("a", used, state.digest(cache.open(larger), used))
    cache.close()
    del tree, layout, target
    assert value(store, "a") == 4
    assert is_whole(store, "a")


def test_clones_share_a_buffer_until_they_move_on(store: StateStore) -> None:
    unit(store, "a", 5)
    before = store.bytes_in_use
    store.clone("b", "a")
    store.clone("c", "b")
    assert store.bytes_in_use == before
    assert store.digest_of("c") == store.digest_of("a")
    unit(store, "b", 1)
    unit(store, "a", 10)
    assert [value(store, trial) for trial in "abc"] == [15, 6, 5]
    store.drop("a")
    unit(store, "c", 2)
    assert [value(store, trial) for trial in "bc"] == [6, 7]


def test_a_clone_replaces_what_the_trial_had(store: StateStore) -> None:
    unit(store, "a", 1)
    unit(store, "b", 2)
    store.clone("b", "a")
    assert value(store, "b") == 1
    store.clone("a", "a")
    assert value(store, "a") == 1
    with pytest.raises(StateError, match="'new', which has no committed state"):
        store.clone("a", "new")


def test_paused_states_go_to_disk_coldest_first_and_return(tmp_path: Path) -> None:
    store = tight(tmp_path, 4)
    digests = {}
    for trial in "abcdefgh":
        digests[trial] = unit(store, trial, ord(trial))
        store.cool(trial)
    on_disk = sorted(path.name for path in (tmp_path / "spill").iterdir())
    assert len(on_disk) == 4
    assert store.bytes_in_use == 4 * CAPACITY
    assert [trial for trial in "abcdefgh" if store.buffered(trial)] == list("efgh")
    for trial in "abcdefgh":
        assert value(store, trial) == ord(trial)
        assert unit(store, trial, 0.0) == digests[trial] == store.digest_of(trial)
        store.cool(trial)
    store.close()
    assert not (tmp_path / "spill").exists()


def test_live_states_never_go_to_disk(tmp_path: Path) -> None:
    store = tight(tmp_path, 3)
    for trial in "abc":
        unit(store, trial, 1)
    with pytest.raises(StateMemoryError, match=r"393 kB of state_memory=393 kB hold .* 3 live .*live_trials"):
        store.grow("d", SIZE)
    store.cool("b")
    unit(store, "d", 1)
    assert [trial for trial in "abcd" if store.buffered(trial)] == ["a", "c", "d"]
    store.close()


def test_a_shared_state_stays_in_memory_while_one_of_its_trials_is_live(tmp_path: Path) -> None:
    store = tight(tmp_path, 2)
    unit(store, "a", 1)
    store.clone("b", "a")
    store.cool("a")
    unit(store, "c", 1)
    with pytest.raises(StateMemoryError):
        unit(store, "d", 1)
    store.cool("b")
    unit(store, "d", 1)
    assert not store.buffered("a")
    assert value(store, "b") == 1
    store.close()


def test_a_state_larger_than_the_budget_is_refused_before_anything_gives_way(tmp_path: Path) -> None:
    store = tight(tmp_path, 2)
    unit(store, "a", 1)
    store.cool("a")
    with pytest.raises(StateMemoryError, match=r"one state needs .* more than state_memory=262 kB"):
        store.grow("b", 10 * CAPACITY)
    assert store.buffered("a")
    store.close()


def test_a_damaged_spilled_state_is_noticed(tmp_path: Path) -> None:
    store = tight(tmp_path, 2)
    for trial in "abc":
        unit(store, trial, 1)
        store.cool(trial)
    (file,) = (tmp_path / "spill").iterdir()
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedStateError):
        store.buffers("a")
    in_use = store.bytes_in_use
    with pytest.raises(DamagedStateError):
        store.mapped("a")
    assert store.bytes_in_use == in_use
    store.close()


def test_a_full_spill_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("in the way")
    store = tight(tmp_path, 2)
    unit(store, "a", 1)
    store.cool("a")
    unit(store, "b", 1)
    with pytest.raises(StateMemoryError, match=r"could not be written to .*spill.* raise state_memory"):
        unit(store, "c", 1)
    assert value(store, "a") == 1, "what could not be spilled is still there"
    store.close()


def test_states_of_a_killed_run_are_cleared_and_other_files_are_not(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    (spill / "state-7.safetensors").write_text("old")
    (spill / "notes.txt").write_text("mine")
    tight(tmp_path, 2).close()
    assert os.listdir(spill) == ["notes.txt"]


def test_pooled_buffers_keep_their_keys_and_freed_ones_are_told(store: StateStore) -> None:
    for trial in "abc":
        unit(store, trial, 1)
    keys = set()
    for trial in "abc":
        committed, _, _ = store.buffers(trial)
        assert committed is not None
        keys.add(committed.key)
    assert store.drop("a") == ()
    reused = store.grow("new", SIZE)
    assert reused.key in {*keys, 3}
    unit(store, "new", 1)
    store.close()
    assert set(store.freed()) >= keys
    assert store.freed() == ()


def test_the_pool_never_holds_more_than_what_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cerebro_tune.store._POOL_FLOOR", 0)
    store = tight(tmp_path, 40)
    for number in range(12):
        unit(store, str(number), 1)
    for number in range(12):
        store.drop(str(number))
        live = (11 - number) * CAPACITY
        assert store.bytes_in_use <= 2 * live
    store.close()


def test_a_freed_buffer_gives_its_pages_back_while_a_worker_still_maps_it(tmp_path: Path) -> None:
    buffer = Buffer(0, 50_000_000, None)
    mapped = Mapped.open(buffer.ref)
    before = psutil.Process().memory_full_info().pss
    buffer.free()
    assert before - psutil.Process().memory_full_info().pss > 45_000_000
    assert not any(mapped.memory[:100])


def test_a_state_is_saved_and_restored(store: StateStore, tmp_path: Path) -> None:
    digest = unit(store, "a", 7)
    assert store.save("a", tmp_path / "a.safetensors") == digest
    assert store.restore("b", tmp_path / "a.safetensors") == digest == store.digest_of("b")
    unit(store, "b", 1)
    assert (value(store, "a"), value(store, "b")) == (7, 8)
    assert float(statefile.load(tmp_path / "a.safetensors")["w"][0]) == 7


def test_what_was_never_committed_is_an_error(store: StateStore) -> None:
    for call in (store.mapped, store.digest_of):
        with pytest.raises(StateError, match="'a' has no committed state"):
            call("a")
    with pytest.raises(StateError, match="cannot commit 10 bytes for trial 'a': its working buffer is none"):
        store.commit("a", 10, "")


def test_capacities_are_alike_for_like_states() -> None:
    assert rounded(1) == SMALLEST
    for nbytes in (SMALLEST, 10**6, 10**9 + 7, 2**30, 2**30 + 1):
        assert nbytes <= rounded(nbytes) <= nbytes * 1.13 + SMALLEST
        assert rounded(rounded(nbytes)) == rounded(nbytes)


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of orders: every trial has the value it should have, whole, and the budget holds."""

    trials = st.sampled_from("abcde")

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, float] = {}

    @initialize()
    def start(self) -> None:
        self.folder = Path(os.environ["TEST_SPILL"]) / str(id(self))
        self.store = StateStore(4 * CAPACITY, self.folder)

    @rule(trial=trials, value=st.integers(0, 9))
    def run(self, trial: str, value: int) -> None:
        """One trial runs at a time, the others are paused: what is over the budget must go to disk."""
        unit(self.store, trial, value)
        self.store.cool(trial)
        self.expected[trial] = self.expected.get(trial, 0) + value

    @precondition(lambda self: self.expected)
    @rule(trial=trials, data=st.data())
    def clone(self, trial: str, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.expected)))
        self.store.clone(trial, source)
        self.store.cool(trial)
        self.expected[trial] = self.expected[source]

    @rule(trial=trials)
    def lose(self, trial: str) -> None:
        _, _, working = self.store.buffers(trial)
        if working is not None:
            Mapped.open(working).memory[:] = b"\xff" * working.nbytes
        self.store.abandon(trial)
        self.store.cool(trial)

    @rule(trial=trials)
    def drop(self, trial: str) -> None:
        self.store.drop(trial)
        self.expected.pop(trial, None)

    @invariant()
    def every_state_is_whole(self) -> None:
        if hasattr(self, "store"):
            for trial, expected in self.expected.items():
                assert value(self.store, trial) == expected
                assert is_whole(self.store, trial)
            assert self.store.bytes_in_use <= self.store.budget_bytes

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            assert self.store.bytes_in_use == 0
            assert not self.folder.exists()


def test_any_sequence_of_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SPILL", str(tmp_path))
    run_state_machine_as_test(StoreMachine, settings=settings(stateful_step_count=25))


WORKER = textwrap.dedent(
    """
    import sys, torch
    from cerebro_tune import state
    from cerebro_tune.buffers import BufferCache, BufferRef, copy
    committed, used, working = eval(sys.stdin.readline())
    cache = BufferCache()
    target = cache.open(working)
    copy(cache.open(committed), target, used)
    tree = state.read(target)
    print("training", flush=True)
    while True:
        tree["w"] += 1
        state.write(tree, target)
    """
)


def test_a_worker_killed_in_the_middle_of_a_unit_leaves_the_committed_state_whole(store: StateStore) -> None:
    digest = unit(store, "a", 1)
    order = store.buffers("a")
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{order!r}\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "training\n"
        worker.send_signal(signal.SIGKILL)
    assert worker.returncode == -signal.SIGKILL
    assert store.digest_of("a") == digest
    assert is_whole(store, "a")
    assert value(store, "a") == 1
    assert unit(store, "a", 1) != digest
    assert value(store, "a") == 2


def test_buffers_vanish_with_a_killed_coordinator(tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from cerebro_tune.store import StateStore
        store = StateStore(10**8, Path({str(tmp_path / "spill")!r}))
        print(store.grow("a", 10**7).path, flush=True)
        sys.stdin.read()
        """
    )
    coordinator = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with coordinator:
        assert coordinator.stdout is not None
        ref = BufferRef(0, coordinator.stdout.readline().strip(), rounded(10**7))
        mapped = Mapped.open(ref)
        coordinator.kill()
    mapped.memory[:4] = b"here"  # what a worker has mapped stays until it lets go
    with pytest.raises(StateError, match="the coordinator freed it or has ended"):
        Mapped.open(ref)


@pytest.mark.parametrize("folder", [False, True])
def test_shared_memory_that_is_full_is_one_clear_error(tmp_path: Path, folder: bool) -> None:
    """For real: this process may make no file above a limit, which is how posix_fallocate sees a full file system."""
    where = f"Path({str(tmp_path)!r})" if folder else "None"
    code = textwrap.dedent(
        f"""
        import os, resource
        from pathlib import Path
        from cerebro_tune.buffers import Buffer
        from cerebro_tune.errors import StateMemoryError
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        before = os.listdir("/proc/self/fd")
        try:
            Buffer(0, 10**7, {where})
        except StateMemoryError as error:
            print(error)
        assert os.listdir("/proc/self/fd") == before
        """
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert re.match(r"no room for a state buffer of 10 MB: .*live_trials.*state_memory", output)
    assert os.listdir(tmp_path) == []


def test_a_full_file_system_is_one_clear_error(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(StateMemoryError, match="no room for a state buffer of 4 MB: No space left on device"):
            Buffer(0, 4_000_000, tmp_path)
        assert os.listdir(tmp_path) == []
        store = StateStore(10**9, tmp_path / "spill", allocate=lambda key, nbytes: Buffer(key, nbytes, tmp_path))
        for trial in "abcdefghij":  # far below the budget: what is full is the file system, and the cold give way
            unit(store, trial, 1)
            store.cool(trial)
        assert value(store, "j") == 1
    except StateMemoryError as error:
        assert "could not be written" in str(error)  # noqa: PT017  (the spilled states fill it too)
    finally:
        store.close()
        subprocess.run(["umount", tmp_path], check=True)


def test_more_memory_than_there_is_is_refused_without_trying() -> None:
    with pytest.raises(StateMemoryError, match="of memory are available"):
        Buffer(0, 1 << 50, None)


def test_without_anonymous_memory_buffers_are_files_that_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerebro_tune.store.has_anonymous_memory", lambda: False)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = tight(tmp_path, 9)
    for trial in "aabbc":
        unit(store, trial, 1)
    assert [value(store, trial) for trial in "abc"] == [2, 2, 1]
    (folder,) = tmp_path.glob("cerebro-tune-*")
    assert folder.stat().st_mode & 0o77 == 0
    assert len(list(folder.iterdir())) == 3
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_descriptors_raises_the_soft_limit_first(store: StateStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    try:
        for trial in "abcdefgh":
            unit(store, trial, 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_maps_a_buffer_once_and_forgets_it_when_told(store: StateStore) -> None:
    cache = BufferCache()
    ref = store.grow("a", SIZE)
    mapped = cache.open(ref)
    assert cache.open(ref) is mapped
    cache.forget([ref.key, 99])
    assert cache.open(ref) is not mapped
    with pytest.raises(StateError, match="closed"):
        _ = mapped.memory
    cache.close()


def test_copying_more_than_fits_is_refused() -> None:
    with pytest.raises(StateError, match="cannot copy 100 bytes"):
        buffers.copy(Mapped.private(4096), Mapped.private(64), 100)


def test_budgets() -> None:
    limit = memory_limit()
    assert state_budget("50%") == limit // 2
    assert state_budget("64MB") == 64_000_000
    assert state_budget("64 MiB") == 64 << 20
    assert state_budget("0.5gb") == 500_000_000
    assert state_budget(12345) == 12345


def test_a_budget_that_makes_no_sense_is_refused() -> None:
    for wrong in ("a lot", "", "%", "-1GB", "0%", "101%", "1e9", 0, -5, True, None, 1.5, "999TB"):
        with pytest.raises(ConfigurationError, match=r"state_memory=.*\"50%\""):
            state_budget(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/jobs/1", {"jobs/1/memory.max": "max", "jobs/memory.max": "3000000"}, 3_000_000),
        ("0::/", {"memory.max": "2000000"}, 2_000_000),
        ("0::/../elsewhere", {"memory.max": "2000000"}, 2_000_000),
        ("5:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "1000000"}, 1_000_000),
        ("5:cpu:/a", {}, None),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, lines: str, files: dict[str, str], limit: int | None) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines + "\n")
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    found = memory_limit(tmp_path / "proc", tmp_path / "cgroup")
    assert found == (limit or psutil.virtual_memory().total)
