"""A hop in steady state: from the predecessor's last optimizer step to the successor's first forward elsewhere.

Two worker processes train one model in turns; a coordinator commits each unit and sends the next one to the other
worker, or to the same one. In between lie: writing the state (what is not in place already), its digest, the commit,
two messages, the copy, and adopting the tensors. The bar is 0.5 ms + 1.6 x one memcpy of as many bytes, measured
between the hops, and 0.5 ms + 1.3 x for the same worker.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from _report import Report
from _sizes import sized
from cerebro_tune import state
from cerebro_tune.adopt import adopt_optimizer
from cerebro_tune.buffers import BufferCache, BufferRef, copy
from cerebro_tune.store import StateStore

SIZES = sized({1: 40, 10: 30}, {1: 300, 10: 150, 100: 40, 400: 14})  # MB of state: hops measured
# what is measured -> (worker processes that take turns, bar in memcpys beyond 0.5 ms)
WAYS = {"hop": (2, 1.6), "the same worker": (1, 1.3)}
WARMUP = 6  # hops until every buffer is mapped everywhere
LAYERS = 4


class Worker:
    """What a worker process does: it keeps one model, whose tensors live wherever its current unit's buffer is."""

    def __init__(self, megabytes: int, grow: Callable[[int], BufferRef]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        width = math.isqrt(megabytes * 1_000_000 // 12 // LAYERS)  # 4 bytes for each parameter and its two moments
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batch = torch.randn(8, width)
        self.buffers = BufferCache()
        self.grow = grow

    def unit(self, committed: BufferRef | None, used: int, working: BufferRef | None) -> tuple[Any, ...]:
        if committed is not None and working is not None:
            target = self.buffers.open(working)
            copy(self.buffers.open(committed), target, used)
            self.adopt(state.read(target))
        forward_at, stepped_at = self.train()
        layout = state.plan(self.tree(), None if working is None else self.buffers.open(working))
        if working is None:
            working = self.grow(layout.nbytes)
        target = self.buffers.open(working)
        used = state.write(layout, target)
        return forward_at, stepped_at, used, state.digest(target, used)

    def train(self) -> tuple[float, float]:
        forward_at = monotonic()
        for _ in range(2):
            loss = self.model(self.batch).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return forward_at, monotonic()

    def tree(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def adopt(self, tree: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data = tree["model"][name]
        adopt_optimizer(self.optimizer, tree["optimizer"])

    def memcpy(self, source: BufferRef, target: BufferRef, used: int) -> float:
        views = self.buffers.open(source), self.buffers.open(target)
        began = monotonic()
        copy(*views, used)
        return monotonic() - began

    def digest(self, ref: BufferRef, used: int) -> float:
        view = self.buffers.open(ref)
        began = monotonic()
        state.digest(view, used)
        return monotonic() - began

    def torch_unit(self, path: str, load: bool) -> tuple[float, float]:
        if load:
            tree = torch.load(path, weights_only=True)
            self.model.load_state_dict(tree["model"])
            self.optimizer.load_state_dict(tree["optimizer"])
        forward_at, stepped_at = self.train()
        torch.save(self.tree(), path)
        return forward_at, stepped_at


def serve(pipe: Connection, megabytes: int) -> None:
    def grow(nbytes: int) -> BufferRef:
        pipe.send(("grow", nbytes))
        answer: BufferRef = pipe.recv()
        return answer

    worker = Worker(megabytes, grow)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, *arguments = order
        pipe.send(("done", getattr(worker, name)(*arguments)))


class Bench:
    """The coordinator of one state size."""

    def __init__(self, megabytes: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # its processes need not import torch one by one
        context.set_forkserver_preload(["torch", "cerebro_tune"])
        self.store = StateStore(megabytes * 10_000_000, folder / "spill")
        self.pipes, self.processes = [], []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, megabytes))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def call(self, worker: int, name: str, *arguments: Any) -> Any:
        pipe = self.pipes[worker]
        pipe.send((name, *arguments))
        while (answer := pipe.recv())[0] == "grow":
            pipe.send(self.store.grow("trial", answer[1]))
        return answer[1]

    def hops(self, count: int, workers: int) -> tuple[list[float], list[float], list[float]]:
        """Seconds of each hop among so many workers, and of a memcpy and a digest of as much that came before it."""
        hops, copies, digests, stepped_before = [], [], [], 0.0
        for index in range(WARMUP + count):
            worker = index % workers
            if index >= WARMUP:
                _, used, _ = self.store.buffers("trial")
                source, target = self.store.grow("scratch-a", used), self.store.grow("scratch-b", used)
                copies.append(self.call(worker, "memcpy", source, target, used))
                digests.append(self.call(worker, "digest", target, used))
                stepped_before = self.one((worker + 1) % workers)[1]
            forward_at, stepped_at = self.one(worker)
            hops.append(forward_at - stepped_before)
            stepped_before = stepped_at
        return hops[WARMUP:], copies, digests

    def one(self, worker: int) -> tuple[float, float]:
        forward_at, stepped_at, used, digest = self.call(worker, "unit", *self.store.buffers("trial"))
        self.store.commit("trial", used, digest)
        return forward_at, stepped_at

    def torch_hops(self, count: int, folder: Path) -> list[float]:
        hops, stepped_before = [], 0.0
        for index in range(count + 1):
            forward_at, stepped_at = self.call(index % 2, "torch_unit", str(folder / "state.pt"), index > 0)
            hops.append(forward_at - stepped_before)
            stepped_before = stepped_at
        return hops[1:]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()
        self.store.close()


def main() -> int:
    report = Report("Hops between two processes, medians")
    for megabytes, count in SIZES.items():
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            bench = Bench(megabytes, Path(folder))
            measured = {way: bench.hops(count, workers) for way, (workers, _) in WAYS.items()}
            through_torch = bench.torch_hops(4, Path(folder))
            bench.close()
        for way, (_, bar) in WAYS.items():
            hop, memcpy, _ = (statistics.median(times) * 1e3 for times in measured[way])
            report.add(f"{megabytes} MB: {way}", hop, 0.5 + bar * memcpy, unit="ms", row=8)
            report.add(f"{megabytes} MB: {way}, in memcpys beyond 0.5 ms", (hop - 0.5) / memcpy, bar, row=8)
        for number, name in ((1, "one memcpy"), (2, "one digest")):
            seconds = [one for times in measured.values() for one in times[number]]
            report.add(f"{megabytes} MB: {name}", statistics.median(seconds) * 1e3, unit="ms", row=8)
        report.add(f"{megabytes} MB: torch.save and load", statistics.median(through_torch) * 1e3, unit="ms", row=8)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
