"""A trial's config as plain data: for the journal, which holds no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from cerebro_tune.data.fingerprint import digest_of


def config_text(config: Mapping[str, Any]) -> str:
    """A config as text that is the same in every process; what is no plain data, or large, stands there by a digest."""
    return json.dumps(_told(config), sort_keys=True)


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): _told(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        return [_told(part) for part in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return f"<{value.__module__}.{value.__qualname__}>"
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    kind = type(value)
    if isinstance(value, set | frozenset):
        value = sorted(map(repr, value))
    elif isinstance(value, Enum | PurePath):
        value = str(value)
    return f"<{kind.__module__}.{kind.__qualname__} {digest_of(value)}>"


def plain_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config as JSON has it, from which `config_of` makes an equal one; None if that cannot be."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(_tagged(dict(config)), default=_number))
        return plain if config_of(plain) == dict(config) else None
    except (TypeError, ValueError):
        return None


def config_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The config of which `plain_config` has made this: tuples are tuples again, NumPy's integers are Python's."""
    return {key: _untagged(value) for key, value in plain.items()}


def _tagged(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tagged(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        items = [_tagged(part) for part in value]
        return {_TUPLE: items} if type(value) is tuple else items  # a named one is not given back
    return value


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(part) for part in value]
    if isinstance(value, dict) and value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list):
        return tuple(_untagged(part) for part in value[_TUPLE])
    return config_of(value) if isinstance(value, dict) else value


def _number(value: Any) -> Any:
    if isinstance(value, np.integer | np.bool_):  # a float32 is not what Python computes with
        return value.item()
    raise TypeError(f"JSON has no {type(value).__name__}")


_TUPLE = "<tuple>"
"""The key of a tuple's items, which JSON has as a list otherwise."""
_LONGEST = 100
"""Of what is told item by item."""
