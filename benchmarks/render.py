"""Renders the last results: `benchmarks/README.md`, its plots, and the section "Performance" of the README.

    python benchmarks/render.py [results/<date>.json]

Nothing of it is written by hand but `misses.md`, which says of each bar that is missed what the limit is and why.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from _report import line_of, number
from compare import rows_of

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PAGE, MISSES, PLOTS = HERE / "README.md", HERE / "misses.md", HERE / "plots"
GPU_RESULTS = HERE / "results" / "gpu.json"
BEGIN, END = "<!-- benchmarks/render.py: begin -->\n", "<!-- benchmarks/render.py: end -->\n"

WHEN_NOT = "when not"
TITLES: dict[int | str | None, str] = {
    1: "Compute-bound efficiency: plain fits one after another / (workers x wall clock)",
    2: "The same search in stock Ray Tune: our wall clock / theirs",
    3: "Memory with a training set of 2 GB: ours / theirs",
    4: "ASHA from one shard on beside ASHA with whole epochs",
    5: "An empty unit",
    6: "A unit through Lightning, beyond its batches",
    7: "A unit under Ray Tune",
    8: "A hop",
    9: "Idle workers",
    10: "A stream of trials beside whole trials in parallel",
    11: "Promotion ASHA on recorded curves",
    12: "The coordinator alone",
    13: "Cold start",
    14: "The loader",
    15: "Validation",
    WHEN_NOT: "Where it loses: our wall clock / the alternative's",
    None: "More",
}
# What the README tells, under the names of the benchmarks, in which * stands for anything.
HEADLINES = {
    "efficiency, start-up excluded": "of two cores' time goes into training (8 CNNs, Fashion-MNIST)",
    "efficiency of two plain processes": "of it does where two plain processes share nothing but the machine",
    "wall clock beside stock Ray Tune, a DataLoader": "wall clock of that search beside stock Ray Tune, a DataLoader",
    "wall clock beside stock Ray Tune, a DataLoader, reuse_actors": "the same with `reuse_actors=True`",
    "wall clock beside stock Ray Tune, batches by index": "beside stock Ray Tune on batches by index, as ours has them",
    "wall clock beside stock Ray Tune, batches by index, reuse_actors": "the same with `reuse_actors=True`",
    "peak memory beside stock Ray Tune": "memory beside stock Ray Tune, each trial with its copy of 2 GB, 2 workers",
    "peak memory beside stock Ray Tune on mapped files": "where its trials share one copy in mapped files",
    "peak memory beside two Optuna processes, gc_after_trial": "memory beside two Optuna processes that collect it",
    "empty unit, 1 MB of state, 2 workers": "from one empty unit to the next on two workers, hop and journal included",
    "what hopping adds to a unit": "more for a unit through Lightning than in one long fit",
    "real, * seeds: time / whole epochs' whole time": "of the whole time of ASHA by epochs, until rungs from one shard "
    "on have found what it finds",
    "real, * seeds: time / whole epochs' time to it": "of the time in which ASHA by epochs had found that",
    "1000 live trials, 8 shared*at a time: 128": "scheduled for 128 simulated workers, journal on, no messages",
    "1000 live trials, 8 shared*at a time: 1": "where they are heard one by one",
    "from nothing to the first batch, a LightningModule": "from `python script.py` to the first batch on two workers",
    "8 shards: wall clock spent validating on subsets": "of the wall clock for validating in mid-epoch, 8 shards",
}


def load(path: Path) -> dict[str, Any]:
    """Results as they are on disk, and the name of their file."""
    return {"file": path.name, **json.loads(path.read_text())}


def last() -> Path:
    """The last results of all benchmarks."""
    return max((HERE / "results").glob("????-??-??.json"))


def reasons(results: dict[str, Any]) -> dict[str, str]:
    """Why a bar is missed, by measure: what `misses.md` says under the first heading that fits, or nothing."""
    known = re.findall(r"^## (.+?)\n+(.+?)\s*(?=^## |\Z)", MISSES.read_text(), re.M | re.S)
    missed = [row["measure"] for row in rows_of(results) if row.get("met") is False]
    fitting = {one: [text for heading, text in known if fnmatchcase(one, heading)] for one in missed}
    return {measure: " ".join(" ".join(texts[:1]).split()) for measure, texts in fitting.items()}


# The page of the benchmarks.


def page(results: dict[str, Any]) -> str:
    """`benchmarks/README.md`."""
    return "\n".join([*_head(results), *_tables(results), *_on_gpu(), *_scripts(results)]) + "\n"


def _head(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    yield f"# Benchmarks\n\nRendered by `render.py` from `results/{results['file']}`; `make bench` measures it again.\n"
    if warning := _caution(results):
        yield f"{warning}\n"
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['kernel']}; Python "
        f"{machine['python']}, {packages}; one thread per worker, {results['seconds'] / 60:.0f} minutes in all. "
        "Contenders take turns in one run, and a ratio is of what that run has measured. A figure is the median of "
        "runs or pairs, or for the rows 9 to 11 the mean over seeds; least and greatest stand beside it, or the "
        "interval of 95 %. A bar is what was aimed at before. Fashion-MNIST is that of the Debian package "
        "`dataset-fashion-mnist`.\n"
    )
    yield from (f"![{name}](plots/{name}.svg)\n" for name in _plotted(results))


def _caution(results: dict[str, Any]) -> str:
    if results["size"] == "small":
        return "**A reduced run (`SMALL=1`): its figures say that the benchmarks work, and nothing else.**"
    return ""


def _tables(results: dict[str, Any]) -> Iterator[str]:
    rows, why = rows_of(results), reasons(results)
    for key, title in TITLES.items():
        here = [row for row in rows if row["row"] == key]
        if not here:
            continue
        yield f"## {key}. {title}\n" if isinstance(key, int) else f"## {title}\n"
        yield from _table(here, why)


def _table(rows: list[dict[str, Any]], why: dict[str, str]) -> Iterator[str]:
    yield "| measure | figure | runs | bar | |\n|---|---:|---|---:|---|"
    for row in rows:
        measure, figure, bar, verdict = line_of(row)
        told = {"OK": "met", "MISS": "**missed**"}.get(verdict, verdict)
        yield f"| {measure} | {figure} | {_spread(row)} | {bar} | {told} |"
    yield ""
    if missed := [row["measure"] for row in rows if row["measure"] in why]:
        yield from (f"- *{measure}* misses its bar: {why[measure] or 'no reason is given.'}" for measure in missed)
        yield ""


def _on_gpu() -> Iterator[str]:
    """What the machine with the GPU has measured, if there was one."""
    if GPU_RESULTS.exists():
        results = load(GPU_RESULTS)
        yield "## On a GPU\n"
        yield (
            f"Measured on {results['date']} by `gpu.py`, on another machine with one {results['machine']['gpu']} "
            f"(`results/{GPU_RESULTS.name}`). Of the ratios more is better.\n"
        )
        yield from _table(rows_of(results), reasons(results))


def _spread(row: dict[str, Any]) -> str:
    told = [f"{number(row['min'])} to {number(row['max'])}, {row['runs']} runs"] if row.get("runs", 0) > 1 else []
    if "interval" in row:
        told.append("95 %: {} to {}".format(*map(number, row["interval"])))
    return "; ".join(told)


def _scripts(results: dict[str, Any]) -> Iterator[str]:
    yield "## The scripts\n"
    for script in results["scripts"]:
        outcome = f"**failed**: `{script['error']}`" if script["error"] else f"{script['seconds']:.0f} s"
        if script["date"] != results["date"]:
            outcome += f", measured again on {script['date']}"
        yield f"- `{script['name']}.py`: {outcome}"


# The section of the README.


def section(results: dict[str, Any]) -> str:
    """What stands between the two marks."""
    if _caution(results):
        return "`make bench` measures all of it beside what people use today; no figures of a whole run are here yet.\n"
    machine, rows = results["machine"], {row["measure"]: row for row in rows_of(results)}
    lines = [
        f"Measured by `make bench` on {machine['cores']} cores ({machine['cpu']}), contenders side by side "
        f"(`benchmarks/results/{results['file']}`). All of it, with the bars met and missed: `benchmarks/README.md`.\n",
        "| | |\n|---:|---|",
    ]
    lines += [f"| {_figure(_like(measure, rows))} | {phrase} |" for measure, phrase in HEADLINES.items()]
    lines.append(
        "\nWhere it does not help, our wall clock / that of what one would use instead, in searches of some seconds "
        "whose units take 0.1 s if nothing else is said:\n\n| | |\n|---:|---|"
    )
    lines += [f"| {_figure(row)} | {row['measure']} |" for row in rows.values() if row["row"] == WHEN_NOT]
    if GPU_RESULTS.exists():
        gpu = load(GPU_RESULTS)
        lines.append(f"\nOn a GPU ({gpu['machine']['gpu']}), where more of a ratio is better:\n\n| | |\n|---:|---|")
        lines += [f"| {_figure(row)} | {row['measure']} |" for row in rows_of(gpu)]
    return "\n".join(lines) + "\n"


def _like(pattern: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for measure, row in rows.items() if fnmatchcase(measure, pattern)), None)


def _figure(row: dict[str, Any] | None) -> str:
    return "not run" if row is None else line_of(row)[1]


def with_section(readme: str, text: str) -> str:
    """The README with this section in place of the one it has."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert all((begin, end)), "the README has both marks"
    return head + begin + text + end + tail


# The plots.


def _plotted(results: dict[str, Any]) -> dict[str, Callable[[Any], None]]:
    """What draws each plot, by its name; none of what was not measured."""
    ratios = {key: [r for r in rows_of(results) if r["row"] == key and r.get("unit") == "x"] for key in TITLES}
    plots: dict[str, Callable[[Any], None]] = {}
    if beside := [row for row in (*ratios[2], *ratios[3]) if "beside" in row["measure"]]:
        plots["beside"] = lambda axes: _bars(axes, beside, "ours / theirs: wall clock, memory", 1.0)
    if losses := ratios[WHEN_NOT]:
        plots["when_not"] = lambda axes: _bars(axes, losses, "wall clock, ours / the alternative's", 1.05)
    if hops := _hop_lines(results):
        plots["hops"] = lambda axes: _lines(axes, hops)
    return plots


def _bars(axes: Any, rows: list[dict[str, Any]], label: str, mark: float) -> None:
    rows = rows[::-1]  # the first at the top
    bars = axes.barh([row["measure"] for row in rows], [row["figure"] for row in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(mark, color="#cc3311", linewidth=1)
    axes.set_xlabel(label)
    axes.margins(x=0.12)


def _hop_lines(results: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(MB, ms) by what was measured: of rows named "<size> MB: <what>"."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows_of(results):
        if row["row"] == 8 and row.get("unit") == "ms" and (found := re.match(r"(\d+) MB: (.+)", row["measure"])):
            lines.setdefault(found[2], []).append((float(found[1]), row["figure"]))
    return lines


def _lines(axes: Any, lines: dict[str, list[tuple[float, float]]]) -> None:
    for name, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("MB of state")
    axes.set_ylabel("ms")
    axes.legend()


def draw(results: dict[str, Any]) -> None:
    """Write every plot."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "cerebro_tune", "font.size": 9}
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    for name, plot in _plotted(results).items():
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        plot(axes)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def write(path: Path) -> list[str]:
    """Render these results, and return the measures that miss their bar for no reason given."""
    results = load(path)
    PAGE.write_text(page(results))
    README.write_text(with_section(README.read_text(), section(results)))
    draw(results)
    return [measure for measure, why in reasons(results).items() if not why]


def idle(results: dict[str, Any]) -> list[str]:
    """Headings of `misses.md` that stand for nothing: no measure that they name has missed its bar."""
    missed = [row["measure"] for row in rows_of(results) if row.get("met") is False]
    headings = re.findall(r"^## (.+?)$", MISSES.read_text(), re.M)
    return [heading for heading in headings if not any(fnmatchcase(one, heading) for one in missed)]


if __name__ == "__main__":
    for missing in write(Path(sys.argv[1]) if sys.argv[1:] else last()):
        print(f"misses.md does not say why this misses its bar: {missing}")
    for heading in idle(load(last())):
        print(f"misses.md gives a reason where nothing is missed: {heading}")
