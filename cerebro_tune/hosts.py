"""The hosts that are optional: the sentence that says how to get one."""

from __future__ import annotations

from importlib.util import find_spec

from cerebro_tune.errors import MissingHostError


def require_host(*packages: str, extra: str) -> None:
    """Raise MissingHostError with the exact command when none of these packages is installed."""
    if not any(find_spec(package) for package in packages):
        raise MissingHostError(f'{" or ".join(packages)} is not installed: pip install "cerebro-tune[{extra}]"')
