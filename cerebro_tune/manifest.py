"""What a run is of, as the first row of its journal: what must be so again when it is taken up, and what should be."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cerebro_tune.configtext import config_text
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.journal import FORMAT, MANIFEST, Journal, Row
from cerebro_tune.recovery import MOVED
from cerebro_tune.settings import RunSettings
from cerebro_tune.trainable import Recipe
from cerebro_tune.warn import warn_user

_PACKAGES = ("cerebro-tune", "torch", "numpy", "pyarrow", "pytorch-lightning", "lightning")


def environment(threads: int) -> dict[str, Any]:
    """What training repeats under, bit for bit: versions, threads of each worker, and the CPU's instruction set."""
    found = {"python": platform.python_version(), "threads": threads, "instructions": instruction_set()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def instruction_set() -> str:
    """What torch computes with on this CPU, and the CPU's model, by which BLAS libraries choose."""
    torch = sys.modules.get("torch")
    capability = torch.backends.cpu.get_cpu_capability() if torch is not None else "unknown"
    return f"{capability} on {_cpu_model()}"


def _cpu_model() -> str:
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        facts = dict(line.split("\t", 1) for line in cpus.read_text().split("\n\n")[0].splitlines() if "\t" in line)
        named = [facts.get(name, "").lstrip("\t: ") for name in ("vendor_id", "cpu family", "model", "model name")]
        return " ".join(part for part in named if part) or platform.machine()
    return platform.processor() or platform.machine()


def about_run(
    settings: RunSettings, recipe: Recipe, data: Mapping[str, str], loader: Mapping[str, Any], number: int | None
) -> dict[str, Any]:
    """What a run is of: all that must be so again when it is taken up.

    `data` are the fingerprints of its sets, `loader` says how the executor makes batches, `number` is that of its
    configs where it is known before.
    """
    return {
        "trainable": recipe.name,
        "source": recipe.identity,
        "metric": settings.metric,
        "mode": settings.mode,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seed": settings.spec.seed,
        "shards": settings.shards,
        **data,
        "validation_rows": settings.spec.validation_rows,
        "report_every": settings.spec.report_every,
        "keep": settings.keep,
        "policy": settings.policy if isinstance(settings.policy, str) else type(settings.policy).__qualname__,
        "loader": config_text({**loader, **recipe.loader}),
        "max_failures": settings.max_failures,
        "configs": number,
    }


def open_run(
    journal: Journal, about: dict[str, Any], now: dict[str, Any], settings: RunSettings, but: Collection[str]
) -> RunSettings:
    """Write the manifest of a new run, or compare that of one that is taken up; returns the settings that hold.

    ConfigurationError, with a list, where it is another run; another environment `now` is warned of, and noted.
    """
    if not journal.rows:
        about = about | {"live_trials": settings.live_trials}
        journal.append(MANIFEST, format=FORMAT, about=about, environment=now)
        return settings
    manifest = manifest_of(journal.rows, settings.run_dir)
    check_same(manifest["about"], about, settings.run_dir, but)
    threads = manifest["environment"]["threads"]
    if moved := changes(manifest["environment"], now | {"threads": threads}):
        warn_user(
            f"The run in {settings.run_dir} goes on, and its results are not comparable bit for bit with those of an "
            f"undisturbed one: {'; '.join(moved)}."
        )
        journal.append(MOVED, changes=moved)
    return as_before(settings, manifest)


def as_before(settings: RunSettings, manifest: Mapping[str, Any]) -> RunSettings:
    """The settings with what a run keeps from its beginning, whatever workers there are now."""
    threads = manifest["environment"]["threads"]
    live = manifest["about"]["live_trials"]
    return replace(settings, live_trials=live, spec=replace(settings.spec, threads=threads))


def manifest_of(rows: Sequence[Row], run_dir: Path) -> dict[str, Any]:
    """The manifest of a journal; ConfigurationError where it is of another format than this version reads."""
    found = rows[0].body if rows and rows[0].kind == MANIFEST else {}
    if found.get("format") != FORMAT:
        raise ConfigurationError(
            f"The journal in {run_dir} has format {found.get('format')!r}, and this version of cerebro_tune writes and "
            f"reads {FORMAT}: go on with the one that began it ({found.get('environment')})."
        )
    return found


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path, but: Collection[str] = ()) -> None:
    """Refuse to go on with another run; how many trials are live is what it was, and `but` may differ."""
    left_out = {"live_trials", *but}
    if different := changes(*({k: v for k, v in each.items() if k not in left_out} for each in (before, now))):
        raise refusal(run_dir, different)


def refusal(run_dir: Path, different: list[str]) -> ConfigurationError:
    """The error for a run that cannot be taken up."""
    listed = "\n".join(f"  {each}" for each in different)
    return ConfigurationError(
        f"The run in {run_dir} was of something else:\n{listed}\nGive what it was begun with, or begin a new run "
        "beside it: resume='never', or another run_dir."
    )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
