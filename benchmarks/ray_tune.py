"""Ray Tune by hops beside stock Ray: the same trainable, search space and seeds, on 2 CPUs, taking turns.

A class trainable whose unit is a sleep, searched by three schedulers that compare trials after each epoch of
units. Wall clock is that of `tune.run`, per unit, for schedulers decide by what has come in, and so not the same on
both sides. What Ray and the executor take to start is not in it, and each side has had a turn before. Overhead is the
wall clock per unit beyond that of units which follow one another on both CPUs without a gap: what trials cost when they
start and end is in it, and a CPU that idles at the end.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in all processes that inherit it

import sys
from functools import partial
from typing import Any

import _ray_searches
from _report import Report
from _sizes import sized
from _turns import Contender, Opened, Turn, median, started

WORKERS = 2
LONG_MS = 500
STOCK, REUSED, OURS = "stock, one turn", "stock, reuse_actors", "ours"
SCHEDULERS = ("ASHA", "HyperBand", "PBT")
BESIDE_STOCK = sized(SCHEDULERS[:1], SCHEDULERS[:1], SCHEDULERS)
"""Those for which stock has a turn with an actor per trial, too, which takes ten times as long as ours."""
# (ms of a unit, trials, units of an epoch, epochs, turns); what no bar is beside has one
SEARCHES = sized(
    [(0, 4, 3, 3, 1), (50, 4, 3, 3, 1)],
    [(0, 8, 6, 3, 5), (50, 6, 3, 3, 5)],
    [(0, 8, 9, 3, 9), (50, 8, 9, 3, 9), (LONG_MS, 6, 3, 3, 5)],
)
OVERHEAD_MS = 2.5  # of empty units
BARS = {(50, STOCK): 0.2, (50, REUSED): 0.8, (LONG_MS, REUSED): 1.02}


def main() -> int:
    report = Report()
    print(f"{'search':<28}{'':<28}{'wall s':>8}{'units':>7}{'ms/unit':>9}{'over ms':>9}{'CPU s':>8}{'peak MB':>9}")
    searches(report)
    for scheduler in SCHEDULERS:
        if scheduler not in BESIDE_STOCK:
            name = f"{scheduler}, units of 50 ms: wall clock per unit beside {STOCK}"
            report.not_run(name, "FULL=1 measures it", row=7)
    if LONG_MS not in {unit_ms for unit_ms, *_ in SEARCHES}:
        report.not_run(f"*, units of {LONG_MS} ms: wall clock per unit beside stock", "FULL=1 measures it", row=7)
    print()
    return report.finish()


def searches(report: Report) -> None:
    opened: dict[str, Opened] = {
        STOCK: partial(_ray_searches.stock, False),
        REUSED: partial(_ray_searches.stock, True),
        OURS: _ray_searches.ours,
    }
    with started(opened, watched=True) as contenders:
        for contender in contenders.values():
            contender.turn("ASHA", 0.0, 2, 1, 1)
        for unit_ms, trials, epoch, epochs, turns in SEARCHES:
            for scheduler in SCHEDULERS:
                arguments = scheduler, unit_ms / 1e3, trials, epoch, epochs
                names = (STOCK, REUSED, OURS) if unit_ms and scheduler in BESIDE_STOCK else (REUSED, OURS)
                taking = {name: contenders[name] for name in names}
                found = take_turns(taking, arguments, turns, {STOCK} if unit_ms else {REUSED})
                name = f"{scheduler}, units of {unit_ms} ms"
                for contender, turn in found.items():
                    show(name, contender, turn, unit_ms)
                judge(report, name, unit_ms, found)


def judge(report: Report, name: str, unit_ms: int, found: dict[str, Turn]) -> None:
    if unit_ms == 0:
        report.add(f"{name}: overhead per unit", found[OURS].unit_ms, OVERHEAD_MS, "ms", row=7)
    for other in (name for name in found if name != OURS):
        ratio = found[OURS].unit_ms / found[other].unit_ms
        report.add(f"{name}: wall clock per unit beside {other}", ratio, BARS.get((unit_ms, other)), row=7)


def take_turns(
    contenders: dict[str, Contender], arguments: tuple[Any, ...], turns: int, once: set[str]
) -> dict[str, Turn]:
    """The median turn of each contender; some have one."""
    taken: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(turns):
        for name, contender in contenders.items():
            if number == 0 or name not in once:
                taken[name].append(contender.turn(*arguments))
    return {name: median(all_of_one) for name, all_of_one in taken.items()}


def show(name: str, contender: str, turn: Turn, unit_ms: float) -> None:
    over = turn.unit_ms - unit_ms / WORKERS
    print(
        f"{name:<28}{contender:<28}{turn.wall_s:>8.2f}{turn.units:>7}{turn.unit_ms:>9.1f}{over:>9.1f}{turn.cpu_s:>8.1f}"
        f"{turn.peak_mb:>9,.0f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
