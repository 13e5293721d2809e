"""Ray Tune on model hopping. The executor for it is not in this release; importing checks that the host is there."""

from __future__ import annotations

from cerebro_tune.hosts import require_host

require_host("ray", extra="ray")
