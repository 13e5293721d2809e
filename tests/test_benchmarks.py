"""What the benchmarks found last: rendered as it is, and still so within wide margins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
import compare  # noqa: E402
import render  # noqa: E402
from _report import ROWS_FILE, Report  # noqa: E402

MARGIN = 2.0
"""How much worse a ratio may be on a machine that others use as well."""
ATTEMPTS = 3
"""What is worse in each of them is so for another reason than that others had the machine just then."""


@pytest.fixture(scope="module")
def last() -> dict[str, Any]:
    return render.load(render.last())


def test_the_page_and_the_readme_are_what_the_last_results_give(last: dict[str, Any]) -> None:
    assert render.PAGE.read_text() == render.page(last), "run benchmarks/render.py"
    readme = render.README.read_text()
    assert readme == render.with_section(readme, render.section(last)), "run benchmarks/render.py"


def test_the_plots_are_there_and_small(last: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PLOTS", tmp_path)
    render.draw(last)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    committed = sorted((ROOT / "benchmarks" / "plots").glob("*.svg"))
    assert drawn == [path.name for path in committed]
    assert all(path.stat().st_size < 100_000 for path in committed)


def test_results_name_no_machine(last: dict[str, Any]) -> None:
    told = json.dumps(last)
    assert str(Path.home()) not in told
    assert os.uname().nodename not in told


@pytest.mark.parametrize("script", ["loader", "scheduling"])
def test_a_reduced_run_has_the_ratios_that_the_last_one_had(script: str, last: dict[str, Any], tmp_path: Path) -> None:
    worse: dict[str, list[compare.Change]] = {}
    for _ in range(ATTEMPTS):
        found = compare.changes(compare.rows_of(last), reduced(script, tmp_path / "rows.json"))
        changed = {change.measure: change for change in found}
        assert len(changed) >= 5, "the names of the measures are those of the last results"
        late = {name for name, change in changed.items() if change.worse > MARGIN}
        worse = {name: [*worse.get(name, []), changed[name]] for name in (late & worse.keys() if worse else late)}
        if not worse:
            return
    pytest.fail(f"Worse by more than {MARGIN} x, {ATTEMPTS} times out of {ATTEMPTS}: {worse}")


def reduced(script: str, rows: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark that does little."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py")]
    environment = os.environ | {"SMALL": "1", "OMP_NUM_THREADS": "1", ROWS_FILE: str(rows)}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=75, check=False)
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def test_a_report_says_what_missed_and_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ROWS_FILE, str(tmp_path / "rows.json"))
    report = Report()
    report.add("slow", 2.0, 1.0, row=1, runs=[1.0, 2.0, 3.0])
    report.add("fast enough", 2.0, 1.0, at_most=False)
    report.not_run("unknown", "there is no data")
    assert report.finish() == 1
    slow, fast, unknown = json.loads((tmp_path / "rows.json").read_text())
    assert (slow["met"], fast["met"], unknown["not_run"]) == (False, True, "there is no data")
    assert (slow["row"], slow["min"], slow["max"], slow["runs"]) == (1, 1.0, 3.0, 3)
    assert "MISS" in capsys.readouterr().out


def test_a_part_takes_the_place_of_what_the_last_results_have_of_it(
    last: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run_script", lambda name: {"name": name, "seconds": 1.0})  # which takes minutes
    names = [script["name"] for script in last["scripts"]]
    results = {**last, "scripts": list(last["scripts"])}
    bench.measure(["hops", "unheard"], tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [script["name"] for script in written["scripts"]] == [*names, "unheard"]
    kept = [script for script in last["scripts"] if script["name"] != "hops"]
    assert [script for script in written["scripts"] if script["seconds"] != 1.0] == kept
    assert written["seconds"] == round(2.0 + sum(script["seconds"] for script in kept))


def test_a_part_from_elsewhere_is_put_aside(last: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    here = last["machine"]
    monkeypatch.setattr(bench, "SIZE", last["size"])
    for machine, file in ((here, last["file"]), (here | {"cpu": "another"}, bench.PART)):
        monkeypatch.setattr(bench, "machine", lambda machine=machine: machine)
        assert bench.begun(["hops"])[0].name == file


def test_what_a_gpu_does_goes_into_a_table_of_its_own(last: dict[str, Any]) -> None:
    path, results = bench.begun([bench.GPU])
    assert path == render.GPU_RESULTS
    assert "gpu" in results["machine"]
    rows = compare.rows_of(render.load(path))
    assert all(f"| {row['measure']} |" in render.page(last) for row in rows)
    assert not {row["measure"] for row in rows} & {row["measure"] for row in compare.rows_of(last)}


def test_only_ratios_are_compared_and_worse_means_worse() -> None:
    def row(measure: str, figure: float, unit: str = "x", at_most: bool = True) -> dict[str, Any]:
        return {"measure": measure, "figure": figure, "unit": unit, "at_most": at_most}

    old = [row("time", 1.0), row("speed", 1.0, at_most=False), row("seconds", 1.0, "s"), row("gone", 1.0)]
    new = [row("time", 3.0), row("speed", 0.5, at_most=False), row("seconds", 9.0, "s"), row("new", 1.0)]
    assert [(c.measure, c.worse) for c in compare.changes(old, new)] == [("time", 3.0), ("speed", 2.0)]
