"""The Ray that workers run on: being connected to it, and places in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any, ClassVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cerebro_tune.errors import ConfigurationError, WorkerError

Resources = Mapping[str, float]

_PATIENCE_S = 60.0
"""How long to wait for places that the cluster has, and others hold."""


def checked(resources: Resources | None) -> dict[str, float]:
    """What a worker needs, in Ray's words; one CPU where nothing is said of it."""
    asked = {"CPU": 1.0} | dict(resources or {})
    for name, amount in asked.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount >= 0:
            raise ConfigurationError(
                f"resources_per_worker has {name!r}: {amount!r}; it must be a number of at least 0, as in "
                '{"CPU": 2, "GPU": 0.5}.'
            )
    found = {name: float(amount) for name, amount in asked.items() if amount}
    if not found:
        raise ConfigurationError(
            "resources_per_worker asks for nothing, so that any number of workers would fit anywhere; give each a CPU "
            "or a share of one."
        )
    return found


def as_options(needed: Resources) -> dict[str, Any]:
    """The same as options of an actor."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    others = {name: amount for name, amount in needed.items() if name not in names}
    known = {option: needed[name] for name, option in names.items() if name in needed}
    return {"num_cpus": 0, **known, "resources": others}


def room(needed: Resources) -> int:
    """How many workers the nodes of the cluster would hold, were they empty."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0.0) / amount) for name, amount in needed.items()) for node in nodes)


class Cluster:
    """The Ray that this process is connected to; connecting, where it was not, is undone when the last has left."""

    _members: ClassVar[int] = 0
    _connected_here: ClassVar[bool] = False

    def __init__(self, needed: Resources) -> None:
        self._needed = dict(needed)
        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING)
            Cluster._connected_here = True
        Cluster._members += 1

    def places(self, count: int) -> list[PlacementGroup]:
        """Places for so many workers, spread over the nodes; an error that tells what there is if there are fewer."""
        if (most := room(self._needed)) < count:
            raise ConfigurationError(
                f"{count} workers of {self._needed} each were asked for, and the cluster has room for {most}: "
                f"{_shown(ray.cluster_resources())} on {sum(node['Alive'] for node in ray.nodes())} node(s). Lower "
                "workers or resources_per_worker, or add nodes first (an autoscaler does when it is asked by "
                "ray.autoscaler.sdk.request_resources)."
            )
        places = [self.place() for _ in range(count)]
        deadline = monotonic() + _PATIENCE_S
        if not all(place.wait(max(0.0, deadline - monotonic())) for place in places):
            for place in places:
                self.give_back(place)
            raise WorkerError(
                f"{count} workers of {self._needed} each were asked for, and could not be had within "
                f"{_PATIENCE_S:.0f} s: of {_shown(ray.cluster_resources())} others hold all but "
                f"{_shown(ray.available_resources())}."
            )
        return places

    def place(self) -> PlacementGroup:
        """A place for one worker, on the node that has most room, now or when one has any.

        Each worker has a group of its own: that of a node that has died is tried again, without a pause, until there is
        room, which keeps a core busy; one that is given back and asked for anew is tried now and then.
        """
        place: PlacementGroup = placement_group([self._needed], strategy="SPREAD")
        return place

    def give_back(self, place: PlacementGroup) -> None:
        """Free a place, and end what is in it."""
        if ray.is_initialized():
            remove_placement_group(place)

    def leave(self) -> None:
        """Disconnect, if an object of this kind connected, and none is left; to be called once."""
        Cluster._members -= 1
        if Cluster._connected_here and not Cluster._members:
            Cluster._connected_here = False
            ray.shutdown()


def node_of(place: PlacementGroup) -> str:
    """The id of the node that a place is on; "" while it is on none."""
    found: dict[str, Any] = placement_group_table(place)
    return str(found["bundles_to_node_id"].get(0) or "")


def _shown(resources: Resources) -> str:
    """The amounts that can be asked for; Ray's list also has each node's address."""
    amounts = {name: amount for name, amount in sorted(resources.items()) if not name.startswith("node:")}
    for name in ("memory", "object_store_memory"):
        amounts.pop(name, None)
    return ", ".join(f"{name} {amount:g}" for name, amount in amounts.items() if "_group_" not in name) or "nothing"
