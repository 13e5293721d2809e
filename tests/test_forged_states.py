"""State files that somebody has made to do harm: every one is refused, and nothing in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import soak
from cerebro_tune import statefile
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import StateError


class Harm:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("harmed"),)


def torch_saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def raw(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def forged(
    tree: Any = None, tensors: Any = (), arrays: Any = (), body: bytes = b"", text: str | None = None, **more: Any
) -> bytes:
    """A file whose sums are right, of a state that no writer makes."""
    table = more.pop("table", None) or json.dumps(
        {"tensors": list(tensors), "arrays": list(arrays)}, separators=(",", ":")
    )
    text = json.dumps(tree, separators=(",", ":")) if text is None else text
    digest = xxhash.xxh3_64_hexdigest(_buffer(body, table, text))
    check = xxhash.xxh3_64_hexdigest("\n".join((table, text, digest)).encode())
    described = {"__metadata__": {"check": check, "xxh3": digest, "table": table, "tree": text} | more}
    try:
        entries = statefile._entries(table, text)
    except Exception:  # noqa: BLE001  # then no reader comes that far
        entries = []
    end = 0
    for entry in entries:
        described[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return raw(encoded, body=body)


def _buffer(body: bytes, table: str, text: str) -> bytes:
    """The bytes that such a state would have in memory, if `body` is its one region."""
    end = 64 + -(-len(body) // 64) * 64
    memory = bytearray(end) + table.encode() + text.encode()
    memory[64 : 64 + len(body)] = body
    statefile.seal(memoryview(memory), end, table.encode(), text.encode())
    return bytes(memory)


LEAF, ARRAY = {"~tensor": 0}, {"~array": 0}
BODY = bytes(range(64))
CALL = "__import__('pathlib').Path('harmed').touch()"
FORGERIES: dict[str, bytes] = {
    "a pickle": pickle.dumps(Harm()),
    "a pickle in a torch file": torch_saved(Harm()),
    "a pickle behind a header": raw(b"{}      ", body=pickle.dumps(Harm())),
    "a pickle as the tree": forged(text=json.dumps({"~pickle": pickle.dumps(Harm()).hex()})),
    "a header of 8 EiB": raw(b"{}", 1 << 63),
    "a header beyond the file": raw(b"{}", 3),
    "no header": raw(b"", 0),
    "half a length": b"\x01\x02",
    "a header that is no JSON": raw(b"\xff\xfe\xfd....."),
    "a header that is a list": raw(b"[]      "),
    "a header without metadata": raw(b"{}      "),
    "metadata of lists": raw(b'{"__metadata__":{"check":[],"xxh3":[],"table":[],"tree":[]}}'),
    "a nested header": raw(b"[" * 100_000),
    "a nested tree": forged(text="[" * 100_000),
    "a nested table": forged(table="[" * 100_000),
    "another sum": forged(LEAF, [[64, 64, "uint8", [64]]], body=BODY, check="0" * 16),
    "an offset before the file": forged(LEAF, [[-64, 64, "uint8", [64]]], body=BODY),
    "an offset of 64 EiB": forged(LEAF, [[1 << 62, 64, "uint8", [64]]], body=BODY),
    "an offset over the header": forged(LEAF, [[0, 64, "uint8", [64]]], body=BODY),
    "a region of -1 bytes": forged(LEAF, [[64, -1, "uint8", [64]]], body=BODY),
    "a region of 1 EiB": forged(LEAF, [[64, 1 << 60, "uint8", [1 << 60]]], body=BODY),
    "a shape beyond its region": forged(LEAF, [[64, 64, "uint8", [1 << 40]]], body=BODY),
    "a negative shape": forged(LEAF, [[64, 64, "uint8", [-64, -1]]], body=BODY),
    "strides beyond the region": forged(LEAF, [[64, 64, "uint8", [2, 2], [1 << 40, 1], 0, False, None]], body=BODY),
    "negative strides": forged(LEAF, [[64, 64, "uint8", [2, 2], [-1024, 1], 0, False, None]], body=BODY),
    "a first element beyond the region": forged(LEAF, [[64, 64, "uint8", [1], [1], 1 << 40, False, None]], body=BODY),
    "a first element before the region": forged(LEAF, [[64, 64, "uint8", [1], [1], -4096, False, None]], body=BODY),
    "a dtype that is a function": forged(LEAF, [[64, 64, "set_default_dtype", [64]]], body=BODY),
    "a dtype that is none": forged(LEAF, [[64, 64, "../../uint8", [64]]], body=BODY),
    "an array of objects": forged(ARRAY, arrays=[[64, 64, "'|O'", [8], "C"]], body=BODY),
    "an array whose dtype is a call": forged(ARRAY, arrays=[[64, 64, CALL, [8], "C"]], body=BODY),
    "an array beyond its region": forged(ARRAY, arrays=[[64, 64, "'|u1'", [1 << 40], "C"]], body=BODY),
    "a tensor that is not there": forged({"~tensor": 7}),
    "a tensor from the end": forged([LEAF, {"~tensor": -1000}], [[64, 64, "uint8", [64]]], body=BODY),
    "a tensor of another kind": forged({"~tensor": "__class__"}),
    "an unknown tag": forged({"~eval": "1"}),
    "a function as an enum": forged({"~enum": ["os", "system", "touch harmed"]}),
    "a function as a flag": forged({"~flag": ["os", "system", "touch harmed"]}),
    "a class as a named tuple": forged({"~named": ["subprocess", "Popen", ["touch", "harmed"]]}),
    "an enum of a module that lies about": forged({"~enum": ["lying_about", "Kind", "A"]}),
    "a named tuple of a module that lies about": forged({"~named": ["lying_about", "Pair", [1, 2]]}),
    "a factory that is a call": forged({"~defaultdict": ["eval", []]}),
    "a scalar of a call": forged({"~scalar": [CALL, "00"]}),
    "a scalar of objects": forged({"~scalar": ["'|O'", "00" * 8]}),
    "a time zone that is a path": forged({"~datetime": ["2026-01-01T00:00:00", 0, "../../../etc/passwd"]}),
    "a device that is none": forged({"~device": "touch harmed"}),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_state_is_refused_and_nothing_of_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("lying_about.py").write_text("import pathlib; pathlib.Path('harmed').touch()\n")
    Path("forged.safetensors").write_bytes(FORGERIES[what])
    with pytest.raises(StateError):
        statefile.load("forged.safetensors")
    assert sorted(os.listdir()) == ["forged.safetensors", "lying_about.py"]
    assert "lying_about" not in sys.modules


def test_a_file_made_the_same_way_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(forged({"a": LEAF}, [[64, 64, "uint8", [8, 8]]], body=BODY))
    assert statefile.load(path)["a"].shape == (8, 8)
    assert statefile.load_into(path, Mapped.private)[1] > 128
    soak.tell(f"{len(FORGERIES)} forged states refused")
