"""A config as plain data is given back equal, or not at all."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

from cerebro_tune.configtext import config_of, plain_config

NAMED = namedtuple("Named", "lr")(0.1)


@pytest.mark.parametrize(
    "config", [{"betas": (0.9, 0.99)}, {"a": [(1,), {"b": ()}], "n": np.int64(3), "on": np.True_}, {"<tuple>": 1}]
)
def test_a_config_comes_back_from_json(config: dict[str, Any]) -> None:
    assert config_of(json.loads(json.dumps(plain_config(config)))) == config


@pytest.mark.parametrize("value", [np.float32(0.1), math.nan, object(), {"<tuple>": [1]}, {1: 2}, NAMED])
def test_a_config_that_json_would_change_is_none(value: Any) -> None:
    assert plain_config({"value": value}) is None
