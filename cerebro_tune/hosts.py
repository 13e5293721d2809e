"""The hosts that are optional: the sentence that says how to get one, and whether one is built as it is used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from cerebro_tune.errors import MissingHostError


def require_host(*packages: str, extra: str) -> None:
    """Raise MissingHostError with the exact command when none of these packages is installed."""
    if not any(find_spec(package) for package in packages):
        raise MissingHostError(f'{" or ".join(packages)} is not installed: pip install "cerebro-tune[{extra}]"')


def lacking(host: str, used: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What of a host's insides is not there as it is used: by dotted path below the package, with parameters.

    An object begins at the first capital or leading underscore of its path, or is its last part.
    """
    return [where for where, parameters in used.items() if not _has(host, where, parameters)]


def _has(host: str, where: str, parameters: tuple[str, ...]) -> bool:
    try:
        found = _find(host, where)
    except (AttributeError, ModuleNotFoundError):
        return False
    return not parameters or set(parameters) <= inspect.signature(found).parameters.keys()


def _find(host: str, where: str) -> Any:
    parts = where.split(".")
    end = next((i for i, part in enumerate(parts) if part != part.lower() or part.startswith("_")), len(parts) - 1)
    return reduce(getattr, parts[end:], import_module(".".join([host, *parts[:end]])))
