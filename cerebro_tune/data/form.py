"""The form in which batches reach the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cerebro_tune.data.schema import require_columns, tensor_type
from cerebro_tune.errors import DataError

Batch = Any
"""A tuple of tensors in column order, a dict of them by name, or what the user's collate function returned."""


@dataclass(frozen=True, slots=True)
class BatchForm:
    """Which columns a batch holds and how they are put together.

    columns: names in the order wanted; None for those of the data set.
    as_dict: a dict by column name instead of a tuple.
    collate_fn: as torch's DataLoader has it: called with a list of samples, each a tuple (or dict) of one row's values:
        a tensor for a column of fixed shape or of lists of numbers, a str, bytes or plain Python object for others.
        Without one, whole columns are gathered at once, which is many times faster.
    transform: called with the finished batch, returns the one to use.
    """

    columns: tuple[str, ...] | None = None
    as_dict: bool = False
    transform: Callable[[Batch], Batch] | None = None
    collate_fn: Callable[[list[Any]], Batch] | None = None

    def names(self, available: Sequence[str]) -> tuple[str, ...]:
        """The columns of a batch, out of the `available` ones."""
        return tuple(available) if self.columns is None else self.columns

    def validate(self, schema: pa.Schema) -> None:
        """Raise DataError when batches of this form cannot be made of rows of this schema."""
        names = self.names(schema.names)
        require_columns(names, schema.names)
        if not names:
            raise DataError(f"columns is empty; choose among {', '.join(map(repr, schema.names))}")
        if self.collate_fn is not None:
            return
        for name in names:
            if tensor_type(kind := schema.field(name).type) is None:
                raise DataError(
                    f"column {name!r} has type {kind}, whose rows may differ in shape and cannot be stacked. If they "
                    "are lists of one length, write the column as a fixed-size list: cast it to "
                    "pa.list_(pa.float32(), length). Otherwise pass a collate_fn, which gets a list of samples as in "
                    "torch's DataLoader, or choose other columns"
                )

    def assemble(self, names: tuple[str, ...], values: Sequence[Any]) -> Batch:
        """A batch of these columns' values: for each one tensor of all rows, or a list with a value per row."""
        batch: Batch
        if self.collate_fn is not None:
            rows = zip(*(list(column) for column in values), strict=True)
            batch = self.collate_fn(
                [dict(zip(names, row, strict=True)) for row in rows] if self.as_dict else list(rows)
            )
        elif self.as_dict:
            batch = dict(zip(names, values, strict=True))
        else:
            batch = tuple(values)
        return batch if self.transform is None else self.transform(batch)
