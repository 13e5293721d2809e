"""`cerebro-tune`: look into the folder of a run. Exit codes: 0 all is well, 1 the run is not, 2 wrong usage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import psutil

from cerebro_tune.errors import CerebroError, ConfigurationError
from cerebro_tune.executor import Cerebro
from cerebro_tune.manifest import environment
from cerebro_tune.reading import RunReading

RUN = click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Commands(click.Group):
    """Errors of ours are told in a line, with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise click.UsageError(str(error)) from error  # exit code 2
        except CerebroError as error:
            raise click.ClickException(str(error)) from error  # exit code 1


@click.group(cls=_Commands)
@click.version_option(package_name="cerebro-tune")
def main() -> None:
    """Look into the folder of a run.

    Exit codes: 0 all is well, 1 something is wrong with the run, 2 the command was called wrongly.
    """


@main.command()
@RUN
@JSON
def show(run: Path, as_json: bool) -> None:
    """List a run's trials."""
    reading = RunReading(run)
    rows: list[dict[str, Any]] = [
        {
            "trial": trial.id, "status": trial.status, "units": trial.units, "of": trial.total, "config": trial.config,
            "metrics": trial.metrics,
        }
        for trial in reading.trials.values()
    ]  # fmt: skip
    if as_json:
        _print({"about": reading.manifest["about"], "environment": reading.manifest["environment"], "trials": rows})
        return
    about = reading.manifest["about"]
    click.echo(f"{about['trainable']}, {about['epochs']} epochs of {about['shards']} shards, seed {about['seed']}")
    for row in rows:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items() if isinstance(value, float))
        click.echo(f"{row['trial']}  {row['status']:<9} {row['units']:>4} of {row['of']:<4} {row['config']}  {shown}")


@main.command()
@RUN
@click.argument("trial")
@JSON
def story(run: Path, trial: str, as_json: bool) -> None:
    """Tell what happened to a trial."""
    reading = RunReading(run)
    lines = reading.story(trial)
    if as_json:
        _print({"trial": trial, "visits": reading.trial(trial).visits, "story": lines})
        return
    click.echo("\n".join(lines))
    if error := reading.trial(trial).error:
        click.echo(error)


@main.command()
@RUN
@JSON
def verify(run: Path, as_json: bool) -> None:
    """Check a run's journal, every decision in it, and the states and checkpoints on disk."""
    reading = RunReading(run)
    wrong = reading.verify()
    if as_json:
        _print({"rows": reading.rows, "decisions": reading.decisions, "wrong": wrong})
    else:
        click.echo(f"{reading.rows} rows and {reading.decisions} decisions are as they were written.")
        click.echo("\n".join(wrong) if wrong else "All states and checkpoints on disk are as they were written.")
    if wrong:
        sys.exit(1)


@main.command()
@RUN
@click.argument("trial")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@JSON
def export(run: Path, trial: str, file: Path, as_json: bool) -> None:
    """Copy a trial's checkpoint, its best where there is one, to FILE."""
    checkpoint = RunReading(run).export(trial, file)
    if as_json:
        _print({"from": str(checkpoint), "to": str(file)})
    else:
        click.echo(f"{checkpoint} copied to {file}")


@main.command()
@RUN
@click.option("--trial", help="The trial to train again.")
@click.option("--trainable", help="What it is of, as module:Class; the module is imported from the current folder.")
@click.option("--train", help="The training set.")
@click.option("--validation", help="The validation set, if the run had one.")
@JSON
def replay(
    run: Path, trial: str | None, trainable: str | None, train: str | None, validation: str | None, as_json: bool
) -> None:
    """Make all decisions of a run again; with --trial, train that one again and compare the state of every unit."""
    reading = RunReading(run)
    if trial is None:
        found: dict[str, Any] = {"decisions": reading.decisions}
        _print(found) if as_json else click.echo(f"{reading.decisions} decisions, made again, are what they were.")
        return
    reading.trial(trial)
    if trainable is None or train is None:
        raise ConfigurationError("--trial needs --trainable module:Class and --train PATH (and --validation PATH).")
    about = reading.manifest["about"]
    settings = {name: about[name] for name in ("epochs", "batch_size", "seed", "report_every", "policy", "keep")}
    rows = {} if about["validation_rows"] is None else {"validation_rows": about["validation_rows"]}
    with Cerebro(
        train, validation, backend="inline", workers=1, max_failures=about["max_failures"], progress=False, **settings,
        **rows,
    ) as cerebro:  # fmt: skip
        replayed = cerebro.replay(run, _import(trainable), trial)
    if as_json:
        _print({"trial": trial, "units": replayed.units, "differing": replayed.differing})
    else:
        click.echo(
            f"{trial}: {replayed.units} units trained again, of which {len(replayed.differing)} gave another state."
        )
        for epoch, shard in replayed.differing:
            click.echo(f"  epoch {epoch}, shard {shard}")
    if replayed.differing:
        sys.exit(1)


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"--trainable is {name!r}, which cannot be imported ({error}).") from error


@main.command()
@JSON
def doctor(as_json: bool) -> None:
    """Tell what this machine has, and what is missing."""
    import torch

    found: dict[str, Any] = environment(torch.get_num_threads())
    found["cores"] = psutil.cpu_count(logical=False)
    found["memory_bytes"] = psutil.virtual_memory().total
    found["shared_memory_bytes"] = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    found["disk_free_bytes"] = shutil.disk_usage(".").free
    found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    extras = {"ray": "ray", "optuna": "optuna", "lightning": "pytorch-lightning"}
    found["missing"] = [f'pip install "cerebro-tune[{extra}]"' for extra, name in extras.items() if not _has(name)]
    if as_json:
        _print(found)
        return
    for name, value in found.items():
        click.echo(f"{name:<20} {value if value not in ([], None) else 'none'}")


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
