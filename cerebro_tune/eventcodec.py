"""Events as rows of the journal: plain JSON, by the names of their classes and fields."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

from cerebro_tune import events
from cerebro_tune.events import Event

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(events.Event)}


def is_event(kind: str) -> bool:
    """Whether rows of this kind are events."""
    return kind in _KINDS


def to_plain(value: Any) -> Any:
    """An event, or a part of one, as JSON has it."""
    kind: type = type(value)
    if (names := _names(kind)) is not None:
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    return value


def to_event(kind: str, plain: dict[str, Any]) -> Event:
    """The event of a row; KeyError, TypeError or ValueError where the row is none."""
    event: Event = _back(_KINDS[kind], plain)
    return event


def _back(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        assert isinstance(kind, type), "a class"
        hints = _hints(kind)
        return kind(**{name: _back(hints[name], part) for name, part in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return frozenset(value) if kind == frozenset[int] else value


@cache
def _names(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass; None of another class."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
