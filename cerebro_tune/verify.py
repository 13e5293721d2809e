"""Does a hop lose anything of what is trained? Two units with a hop between them, beside the same two without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

from cerebro_tune import state
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import ConfigurationError, StateError
from cerebro_tune.feed import Feed
from cerebro_tune.given import take
from cerebro_tune.seeding import kept_streams, seed_build, seed_unit
from cerebro_tune.trainable import Batches, Config, Plan, Recipe, Trainable, UnitWork, as_recipe

_UNLIKE = (
    " does not train twice alike: after the first unit of two equal builds {path} is {one} and {other}. Draw random "
    "numbers from the global generators only, which are seeded for every unit, and use deterministic algorithms."
)
_LOST = (
    " loses state at a hop: {path} is {one} with a hop and {other} without. Keep what training changes in parameters, "
    "buffers, or attributes of numbers, text, tensors and containers of these; or save and load it in the hooks for "
    "that."
)


def verify_hop(
    trainable: Any,
    config: Config | None = None,
    *,
    train: Any = None,
    datamodule: Any = None,
    batches: Sequence[Any] | None = None,
    batch_size: int | None = None,
    loader: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train two units in this process, once in one place and once with a hop between them; both must be equal.

    Args:
        trainable: What `Cerebro.fit` takes.
        config: The config of the trial.
        train: A training set, as `Cerebro` takes it; its first two shards are trained on.
        datamodule: Instead of it: a LightningDataModule.
        batches: Instead of both: two batches or more, of which each unit gets half.
        batch_size: As `Cerebro` takes it.
        loader: As `Cerebro` takes it.
        device: Where to train.
        seed: The seed of the run.

    Raises:
        StateError: With the key path of the first leaf that differs, and its values.
        UnsupportedLeafError: With the key path of what cannot be carried.
    """
    recipe = as_recipe(trainable)
    config = dict(config or {})
    recipe.check_config(config)
    source = partial(_data, recipe, train, datamodule, batches, batch_size, loader or {}, device, seed)
    # Each from a source of its own, since a DataModule may have state.
    with (
        kept_streams(),
        source() as data,
        source() as again,
        closing(_Course(recipe, config, *data, seed)) as there,
        closing(_Course(recipe, config, *again, seed)) as here,
    ):
        there.train()
        here.train()
        before = there.tree()
        _compare(before, here.tree(), recipe.name + _UNLIKE)
        there.hop()
        _compare(there.tree(), before, recipe.name + _LOST)
        there.train()
        here.train()
        _compare(there.tree(), here.tree(), recipe.name + _LOST)


class _Course:
    """One trial, unit after unit, in one seat until it hops to another."""

    def __init__(self, recipe: Recipe, config: Config, plan: Plan, units: Callable[[int], Batches], seed: int) -> None:
        self._recipe, self._plan, self._units, self._seed = recipe, plan, units, seed
        self._config = recipe.model_config(config)
        self._buffers: list[Mapped] = []
        self._seats: list[Trainable] = []
        self._done = 0

    def train(self) -> None:
        """Train the next unit; before the first, build."""
        if not self._seats:
            self._sit()
        seed_unit(self._seed, 0, 0, self._done)
        work = UnitWork(0, self._done, self._done, False, self._units(self._done), None, nullcontext)
        self._seats[-1].run_unit(work)
        self._done += 1

    def tree(self) -> Any:
        """The state now, as another worker would read it."""
        return state.read(self._written())

    def hop(self) -> None:
        """Go on in another seat."""
        buffer = self._written()
        self._sit()
        self._seats[-1].load_state_dict(state.read(buffer))

    def close(self) -> None:
        for seat in self._seats:
            seat.close()
        for buffer in self._buffers:
            buffer.close()

    def _sit(self) -> None:
        seed_build(self._seed, 0)
        seat = self._recipe.create()
        self._seats.append(seat)
        seat.start(self._config, self._plan)

    def _written(self) -> Mapped:
        layout = state.plan(self._seats[-1].state_dict())
        self._buffers.append(Mapped.private(layout.nbytes))
        state.write(layout, self._buffers[-1])
        return self._buffers[-1]


@contextmanager
def _data(
    recipe: Recipe, train: Any, datamodule: Any, batches: Sequence[Any] | None, batch_size: int | None,
    loader: Mapping[str, Any], device: str, seed: int,
) -> Iterator[tuple[Plan, Callable[[int], Batches]]]:  # fmt: skip
    """The plan of a trial that is not over after two units, and the batches of each unit."""
    if batches is not None:
        if train is not None or datamodule is not None or len(batches) < 2:
            raise ConfigurationError(
                f"batches has {len(batches)}; verify_hop needs two or more, and then neither train nor datamodule."
            )
        half = len(batches) // 2
        units = [_Listed(batches[:half]), _Listed(batches[half:])]
        counts = tuple(len(unit) for unit in units)
        yield _plan(recipe, batch_size or units[0].sizes[0], (1, 1), counts, device, None), units.__getitem__
        return
    given = take(train, None, datamodule, 4, 1, seed, loader)
    size = batch_size or recipe.batch_size or given.batch_size
    feed = Feed(given.for_run(recipe.loader), seed, device)
    try:
        shards = range(feed.data.train.num_shards)
        rows, counts = tuple(map(feed.data.train.rows, shards)), feed.batch_counts(size)
        module = None if feed.data.module is None else feed.data.module.module
        last = shards[-1]
        yield (
            _plan(recipe, size, rows, counts, device, module),
            lambda unit: feed.train(0, min(unit, last), size, partial(seed_unit, seed, 0, 0, unit)),
        )
    finally:
        feed.release()


def _plan(
    recipe: Recipe, batch_size: int, rows: tuple[int, ...], counts: tuple[int, ...], device: str, module: Any
) -> Plan:
    # One shard more than there is, so that the two units end in mid-epoch.
    rows, counts = (*rows, rows[0]), (*counts, counts[0])
    return Plan(2, batch_size, rows, device, recipe.accumulate, shard_batches=counts, datamodule=module)


class _Listed(list[Any]):
    """Batches that are at hand."""

    @property
    def sizes(self) -> list[int]:
        from cerebro_tune.torch_trainable import rows_of

        return [rows_of(batch) for batch in self]


def _compare(one: Any, other: Any, message: str) -> None:
    """Raise StateError for the first leaf that differs."""
    if found := _first_difference(one, other, ""):
        path, left, right = found
        raise StateError(message.format(path=path.removeprefix("."), one=_shown(left), other=_shown(right)))


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _first_difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any] | None:
    # Of what is there on one side only, the first leaf.
    one, other = ({} if a is _NOTHING and isinstance(b, Mapping) and b else a for a, b in ((one, other), (other, one)))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {**other, **one}
        pairs = [
            (f"{path}.{key}" if key != "" else path, one.get(key, _NOTHING), other.get(key, _NOTHING)) for key in keys
        ]
    elif type(one) is type(other) and isinstance(one, list | tuple) and len(one) == len(other):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if _equal(one, other) else (path, one, other)
    return next((found for key, a, b in pairs if (found := _first_difference(a, b, key))), None)


def _equal(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        nan = one.isnan()
        return torch.equal(nan, other.isnan()) and torch.equal(one[~nan], other[~nan])
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
