"""A trial's config as plain data: for the journal, which holds no pickle."""

from __future__ import annotations

import json
from typing import Any

from cerebro_tune.trainable import Config


def config_text(config: Config) -> str:
    """A config as text that is the same in every process; what is no plain data stands there by its type's name."""
    return json.dumps(dict(config), sort_keys=True, default=_named)


def plain_config(config: Config) -> dict[str, Any] | None:
    """The config, if JSON gives it back as it is."""
    try:
        back: dict[str, Any] = json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError):
        return None
    return back if back == dict(config) else None


def _named(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    kind = value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
