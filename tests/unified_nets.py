"""The modules of `lightning_nets` for `lightning.pytorch`."""

from __future__ import annotations

from pathlib import Path

_source = Path(__file__).with_name("lightning_nets.py")
exec(compile(_source.read_text(), _source, "exec"))
