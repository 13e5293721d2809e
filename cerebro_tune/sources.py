"""Digests of what a user has written, by which a run that is taken up is known again."""

from __future__ import annotations

import inspect
import platform
import sys
from pathlib import Path
from typing import Any

import xxhash


def source_digest(written: Any) -> str:
    """A digest of the source of a function, or of a class and those that it is made of, as far as not installed."""
    hashed = xxhash.xxh3_64()
    for part in written.__mro__ if isinstance(written, type) else [written]:
        if not _is_installed(part):
            hashed.update(_source(part).encode())
    return hashed.hexdigest()


def _is_installed(kind: Any) -> bool:
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if kind.__module__ == "builtins":
        return True
    if file is None:  # a notebook, or a module of C
        return bool(kind.__module__ != "__main__")
    path = Path(file).parts
    return "site-packages" in path or path[-3:-1] == ("lib", platform.python_version()[:4]) or _in_ours(Path(file))


def _in_ours(file: Path) -> bool:
    return any(part.startswith("cerebro_tune") for part in file.parts[-4:-1])


def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        parts = vars(kind).values() if isinstance(kind, type) else [kind]
        return "\n".join(_code(part) for part in parts if inspect.isfunction(part))


def _code(function: Any) -> str:
    code = function.__code__
    return f"{code.co_code.hex()} {[c for c in code.co_consts if not inspect.iscode(c)]!r} {code.co_names}"
