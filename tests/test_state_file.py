from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cerebro_tune import state, statefile
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import DamagedStateError
from trees import same


def tree() -> dict[str, Any]:
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "model": {"head.weight": weight, "tied": weight, "mask": torch.tensor([True, False, True])},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 4, dtype=torch.bfloat16)}}},
        "slices": [weight[:, 1], torch.zeros(0, 2)],
        "array": np.arange(5, dtype=np.int64),
        "text": ["é", 2**70, None, {(1, 2): "x"}],
    }


def test_a_saved_state_is_loaded_exactly(tmp_path: Path) -> None:
    digest = statefile.save(tree(), tmp_path / "s.safetensors")
    back = statefile.load(tmp_path / "s.safetensors")
    assert same(back, tree())
    assert back["model"]["tied"].data_ptr() == back["model"]["head.weight"].data_ptr()
    buffer = Mapped.private(4096)
    assert digest == state.digest(buffer, state.write(tree(), buffer))
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    contents = {k: v for k, v in tree().items() if k != "slices"}
    statefile.save(contents, tmp_path / "s.safetensors")
    tensors = load_file(tmp_path / "s.safetensors")
    assert torch.equal(tensors["model.head.weight"], torch.arange(12.0).reshape(3, 4))
    assert tensors["optimizer.state.0.exp_avg"].dtype is torch.bfloat16
    assert tensors["optimizer.state.0.step"].shape == ()
    assert torch.equal(tensors["array"], torch.arange(5))
    assert "model.tied" not in tensors, "a storage is stored once"


def test_a_state_without_tensors_is_a_file_too(tmp_path: Path) -> None:
    statefile.save([1, "x"], tmp_path / "s")
    assert statefile.load(tmp_path / "s") == [1, "x"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statefile.save(tree(), path)
    raw = path.read_bytes()
    rng = random.Random(0)
    positions = {*range(64), *(rng.randrange(len(raw) * 8) for _ in range(600))}  # the length's bits, and any others
    for position in positions:
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedStateError, match=r"s\.safetensors is damaged: .* Delete it"):
            statefile.load(path)


def test_a_file_cut_short_or_added_to_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statefile.save(tree(), path)
    raw = path.read_bytes()
    for length in (0, 7, 8, 100, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedStateError):
            statefile.load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(DamagedStateError):
        statefile.load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statefile.save([1], path)
    # A limit on file sizes makes the disk "full" for this process alone.
    code = f"""
import resource, torch
from cerebro_tune import statefile
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    statefile.save(torch.zeros(100_000), {str(path)!r})
except OSError as error:
    print(error.errno)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) == 27  # EFBIG
    assert statefile.load(path) == [1]
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_dtypes_that_safetensors_does_not_know_are_kept_as_bytes(tmp_path: Path) -> None:
    values = [torch.tensor([1 + 2j]), np.arange(3, dtype=">i2"), np.asfortranarray(np.ones((2, 3)))]
    statefile.save(values, tmp_path / "s")
    assert same(statefile.load(tmp_path / "s"), values)
    assert {t.dtype for t in load_file(tmp_path / "s").values()} == {torch.uint8}
