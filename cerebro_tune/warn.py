"""Warnings that point at the user's own line, however deep in this package they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_user(message: str) -> None:
    """Warn at the innermost line that is neither this package's nor one of its integrations'."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("cerebro_tune")
