"""How a module is made of a config: which keys its class takes, and whether as keywords or as one mapping."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_origin

from cerebro_tune.errors import ConfigurationError
from cerebro_tune.trainable import Config

_MAPPING_NAMES = frozenset({"config", "hparams", "conf", "cfg", "params"})
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters that `cls(...)` takes, by name."""
    return dict(inspect.signature(cls).parameters)


def mapping_parameter(cls: type, config: Config) -> str | None:
    """The parameter that takes the whole config, for a class that is called as `cls(config)`; None for `cls(**config)`.

    That is the only required one, if it is positional and named like a config, annotated as a mapping, or neither
    annotated nor matched by any key of the config.
    """
    parameters = parameters_of(cls)
    keys = config.keys() - {"batch_size", "epochs"}  # these say nothing about the class
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (*_KEYWORD, *_POSITIONAL)]
    if len(required) != 1 or required[0].kind not in _POSITIONAL or required[0].name in config:
        return None
    only = required[0]
    if only.annotation in (only.empty, Any, "Any"):
        return only.name if only.name in _MAPPING_NAMES or (keys and not keys & parameters.keys()) else None
    return only.name if _is_mapping(only.annotation) else None


def _is_mapping(annotation: Any) -> bool:
    if isinstance(annotation, str):  # of a module with `from __future__ import annotations`
        return annotation.split("[")[0].rpartition(".")[2] in ("dict", "Dict", "Mapping", "MutableMapping")
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Mapping)


def takes(cls: type, key: str) -> bool:
    """Whether the class names this key among its parameters."""
    parameter = parameters_of(cls).get(key)
    return parameter is not None and parameter.kind in _KEYWORD


def reads(cls: type, key: str, config: Config) -> bool:
    """Whether the key can make a difference when a module is built."""
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters_of(cls).values())
    return open_ended or takes(cls, key) or mapping_parameter(cls, config) is not None


def construct(cls: type, config: Config) -> Any:
    """Make a module of the config."""
    return cls(dict(config)) if mapping_parameter(cls, config) else cls(**config)


def check_config(cls: type, config: Config) -> None:
    """Raise ConfigurationError for a config that the class would refuse."""
    if mapping_parameter(cls, config):
        return
    parameters = parameters_of(cls)
    valid = [name for name, p in parameters.items() if p.kind in _KEYWORD]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unexpected = [] if open_ended else [key for key in config if key not in valid]
    missing = [name for name in valid if parameters[name].default is inspect.Parameter.empty and name not in config]
    if not unexpected and not missing:
        return
    problems = []
    if unexpected:
        problems.append(f"it does not take {', '.join(map(_quoted(valid), unexpected))}")
    if missing:
        problems.append(f"it needs {', '.join(missing)}")
    raise ConfigurationError(
        f"{cls.__name__} cannot be built from the config {dict(config)!r}: {' and '.join(problems)}. "
        f"Valid keys are {', '.join(valid) or 'none'}; batch_size and epochs are the executor's."
    )


def _quoted(valid: list[str]) -> Any:
    def quote(key: str) -> str:
        near = difflib.get_close_matches(key, valid, 1)
        return f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key)

    return quote
