"""A trial's config as plain data: for the journal, which holds no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

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
    """The config, if JSON gives it back as it is."""
    try:
        back: dict[str, Any] = json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError):
        return None
    return back if back == dict(config) else None


_LONGEST = 100
"""Of what is told item by item."""
