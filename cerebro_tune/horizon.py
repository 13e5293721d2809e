"""Lengths that a tuner counts in reports, read as epochs: for those that were written with epochs in mind."""

from __future__ import annotations

from collections.abc import Mapping

from cerebro_tune.units import Units


def told_in_epochs(clock: str, lengths: Mapping[str, float], shards: int) -> str | None:
    """What lengths in units amount to, and what to write for epochs; None unless one of them is below an epoch.

    `clock` is the tuner's name for its count of reports, `lengths` has its arguments by name. Those that are whole
    epochs, or were written by `Cerebro.units`, are taken as meant, and not told.
    """
    odd = {name: length for name, length in lengths.items() if length % shards and not isinstance(length, Units)}
    if not any(0 < length < shards for length in odd.values()):
        return None
    amounts = " and ".join(f"{name}={length} is {length / shards:.3g}" for name, length in odd.items())
    rewritten = ", ".join(f"{name}=cerebro.units({length})" for name, length in odd.items())
    meant = ", ".join(f"{name}=cerebro.units({length / shards:.3g})" for name, length in odd.items())
    return (
        f"{clock} counts units, {shards} to an epoch. In epochs, {amounts}. If epochs were meant, write {rewritten}; "
        f'or give Cerebro report_every="epoch", and every report is an epoch. If units were meant, {meant} says so.'
    )
