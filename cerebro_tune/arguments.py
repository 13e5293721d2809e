"""What users pass to `Cerebro` and to `fit`, checked and resolved."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from cerebro_tune.errors import ConfigurationError
from cerebro_tune.journal import LOCK
from cerebro_tune.journal import NAME as JOURNAL
from cerebro_tune.settings import whole_number
from cerebro_tune.trainable import Config


def listed(configs: Iterable[Config]) -> list[Config]:
    """The configs, each of which must be a mapping."""
    given = [configs] if isinstance(configs, Mapping) else list(configs)
    for config in given:
        if not isinstance(config, Mapping) or isinstance(configs, Mapping):
            raise ConfigurationError(
                f"configs has {config!r}; it must be a list of dicts, one for each trial, such as [{{'lr': 0.1}}]."
            )
    return given


def check_rows(wanted: int | str) -> int | str:
    """What `validation_rows` may be."""
    if isinstance(wanted, str) and wanted not in ("auto", "all"):
        raise ConfigurationError(f'validation_rows is {wanted!r}; valid: "auto", "all" or a number of rows.')
    return wanted if isinstance(wanted, str) else at_least(1, validation_rows=wanted)


def edited_since(moment_s: float) -> bool:
    """Whether the source of a module of the user's has changed since: workers would go on with the old one."""
    ours = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parent)})
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    users = [file for file in files if not file.startswith(ours) and os.path.exists(file)]
    return any(os.path.getmtime(file) > moment_s for file in users)


def devices_of(workers: int | None, devices: str | Sequence[str], per_device: int) -> tuple[str, ...]:
    """The device of each worker."""
    if isinstance(devices, str):
        kinds = [devices]
        if devices in ("auto", "cuda"):
            import torch

            kinds = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            if not kinds and devices == "cuda":
                raise ConfigurationError('devices is "cuda", but torch sees no CUDA device; use "auto" or "cpu".')
    else:
        kinds = list(devices)
    for kind in kinds:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", kind):
            raise ConfigurationError(f'devices has {kind!r}; valid: "auto", "cpu", "mps", "cuda", "cuda:0", ...')
    if not kinds or kinds == ["cpu"]:
        return ("cpu",) * (len(cores()) if workers is None else at_least(1, workers=workers))
    seats = kinds * per_device
    if workers is None:
        return tuple(seats)
    return tuple(seats[number % len(seats)] for number in range(at_least(1, workers=workers)))


def cores() -> list[int]:
    """The cores this process may use; hyperthreads beyond the physical cores do not count."""
    allowed = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    usable = allowed or list(range(os.cpu_count() or 1))
    return usable[: psutil.cpu_count(logical=False) or len(usable)]


def new_folder(base: Path | None, name: str) -> Path:
    """A new folder for a run: under `base` numbered, otherwise `runs/<time>-<name>`."""
    stem = "run" if base is None else None
    parent = Path("runs") if base is None else base
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}" if stem else "run"
    number = 0
    while True:
        folder = parent / (stamp if stem and not number else f"{stamp}-{number:04d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder.absolute()


DATA_FILE = "data.json"
"""In a run's folder: what its index was made from, which must still be so when the run is taken up again."""
LEFT_BEHIND = {DATA_FILE, JOURNAL, LOCK}
"""What a run that has done nothing leaves there."""


def run_folder(base: Path | None, name: str, number: int, resume: str) -> Path:
    """The folder of the run that is number `number` of an executor's, which may be there from another time."""
    if base is None or resume == "never":
        if resume == "must":
            raise ConfigurationError("resume='must' needs the run_dir that the run was begun with.")
        return new_folder(base, name)
    folder = (base / f"run-{number:04d}").absolute()
    if resume == "must" and not (folder / JOURNAL).exists():
        raise ConfigurationError(f"resume='must', and there is no run in {folder}; resume='auto' begins one.")
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if left - LEFT_BEHIND and JOURNAL not in left:
        raise ConfigurationError(
            f"{folder} is of a run that cannot be taken up: give another run_dir, or resume='never' for one beside it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_untouched(folder: Path) -> None:
    """Remove the folder of a run that has done nothing, if there is nothing else in it."""
    if all(path.name in LEFT_BEHIND for path in folder.iterdir()):
        shutil.rmtree(folder)


def at_least(least: int, **named: Any) -> int:
    """The one value given by name, as a whole number of at least `least`."""
    ((name, value),) = named.items()
    return whole_number(name, value, least)


def one_of(valid: Sequence[str], **named: Any) -> str:
    """The one value given by name, which must be among the valid ones."""
    ((name, value),) = named.items()
    if value not in valid:
        raise ConfigurationError(f"{name} is {value!r}; valid: {', '.join(map(repr, valid))}.")
    return str(value)
