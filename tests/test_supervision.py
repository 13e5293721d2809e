"""Workers that hang or are stopped are replaced, and their units run again elsewhere."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import nets
import soak
from cerebro_tune import Cerebro
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.workers.local import LocalWorkers
from runs import outcome

KILLS, STOPS = 100, 2
"""Of workers, in all."""


class Stuck(nets.Deep):
    """Hangs once, in the unit that its config names: asleep for ever, or stopped by a signal."""

    def run_unit(self, work: Any) -> dict[str, float]:
        mark = Path(self._config["marks"], "stuck")
        if self._config.get("how") and (work.epoch, work.shard) == (1, 2) and not mark.exists():
            mark.touch()
            if self._config["how"] == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while self._config["how"] == "asleep":
                time.sleep(3600)
        return super().run_unit(work)


@pytest.mark.parametrize(("how", "deadline_s"), [("asleep", 3.0), ("stopped", 3.0), ("stopped", None)])
def test_a_worker_that_hangs_is_replaced(
    options: dict[str, Any], tmp_path: Path, how: str, deadline_s: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for stuck in (how, None):
        config = {"lr": 0.1, "marks": str(tmp_path), "how": stuck}
        with Cerebro(**options | {"backend": "local", "policy": "fixed", "unit_deadline_s": deadline_s}) as cerebro:
            found.append(cerebro.fit(Stuck, [config, {"lr": 0.01, "marks": str(tmp_path)}], metric="val_loss"))
    assert (tmp_path / "stuck").exists()
    assert outcome(found[0]) == outcome(found[1])
    assert [result.status for result in found[0]] == ["finished"] * 2
    soak.tell(f"a worker {how}, with a deadline of {deadline_s} s: it was replaced, and not a bit was another")


def test_one_that_hangs_again_and_again_fails_its_trial_only(options: dict[str, Any], tmp_path: Path) -> None:
    class Always(nets.Deep):
        def run_unit(self, work: Any) -> dict[str, float]:
            while self._config["lr"] > 0.5:
                time.sleep(3600)
            return super().run_unit(work)

    changed = {"backend": "local", "unit_deadline_s": 2.5, "max_failures": 1}
    with Cerebro(**options | changed) as cerebro:
        good, bad = cerebro.fit(Always, [{"lr": 0.1}, {"lr": 1.0}])
    assert (good.status, bad.status) == ("finished", "failed")
    assert "a unit of its has not ended in" in str(bad.error)


class Brief(nets.Deep):
    """Takes long enough for a unit to be killed in it."""

    def run_unit(self, work: Any) -> dict[str, float]:
        time.sleep(0.02)
        return super().run_unit(work)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("number", "least", "pause_s", "told"),
    [(signal.SIGKILL, KILLS, 0.1, "killed"), (signal.SIGSTOP, STOPS, 3.0, "stopped by a signal")],
)
def test_workers_hit_at_random_moments_change_nothing(
    options: dict[str, Any], number: int, least: int, pause_s: float, told: str
) -> None:
    configs = [{"lr": 0.1}, {"lr": 0.03}, {"lr": 0.01}]
    options |= {"backend": "local", "policy": "fixed", "max_failures": 1000, "epochs": 3}
    with Cerebro(**options) as cerebro:
        undisturbed = outcome(cerebro.fit(Brief, configs, metric="val_loss"))
    chance, hits, runs, longer = random.Random(2), 0, 0, soak.Loop()
    while hits < least or longer:
        with Cerebro(**options) as cerebro:
            over, hit = threading.Event(), []
            arguments = cerebro, chance, over, hit, number, pause_s
            hitter = threading.Thread(target=_signal_now_and_then, args=arguments)
            hitter.start()
            try:
                found = cerebro.fit(Brief, configs, metric="val_loss")
            finally:
                over.set()
                hitter.join()
            assert outcome(found) == undisturbed
        hits, runs = hits + len(hit), runs + 1
    soak.tell(f"{hits} workers {told} in {runs} runs, none of which ended otherwise, bit for bit")


def _signal_now_and_then(
    cerebro: Cerebro, chance: random.Random, over: threading.Event, hit: list[int], number: int, pause_s: float
) -> None:
    """Send this signal to workers that run a unit."""
    while not over.wait(chance.uniform(pause_s / 10, pause_s)):
        workers, run = cerebro._workers, cerebro.current
        busy = [] if run is None else list(run._crew.running)
        pids = workers.pids if isinstance(workers, LocalWorkers) else {}
        if busy and (pid := pids.get(chance.choice(busy))) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                hit.append(pid)


def test_a_deadline_is_a_number_of_seconds(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="unit_deadline_s is 0"):
        Cerebro(**options | {"unit_deadline_s": 0})
