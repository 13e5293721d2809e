"""Ray Tune on model hopping: `tune`, which is `ray.tune` with one more argument."""

from __future__ import annotations

from cerebro_tune.hosts import require_host

require_host("ray", extra="ray")

from cerebro_tune_ray import tune as tune
