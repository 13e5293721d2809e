from __future__ import annotations

import collections
import datetime
import enum
import gc
import pathlib
import subprocess
import sys
import types
import weakref
import zoneinfo
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebro_tune import state
from cerebro_tune.buffers import Mapped
from cerebro_tune.errors import StateError, StateMemoryError, UnsupportedLeafError
from trees import leaves, round_trip, same

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: float


@st.composite
def storages(draw: st.DrawFn) -> list[torch.Tensor]:
    """Views of one storage: any dtypes, shapes, strides and offsets that fit, overlapping or not."""
    raw = draw(st.binary(min_size=64, max_size=192).map(lambda b: b[: len(b) // 16 * 16]))
    storage = torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone()
    views = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        if dtype is torch.bool:
            storage.bitwise_and_(1)  # other bytes are no bools
        typed = storage.view(dtype)
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stride = [draw(st.integers(0, 4)) for _ in shape]
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
        if reach >= typed.numel():
            shape, stride, reach = [], [], 0
        offset = draw(st.integers(0, typed.numel() - 1 - reach))
        view = typed.as_strided(shape, stride, offset)
        trainable = dtype.is_floating_point or dtype.is_complex
        views.append(view.requires_grad_(draw(st.booleans())) if trainable else view)
    return views


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.binary() | st.datetimes()
    | st.text(st.characters(), max_size=5) | st.sampled_from([Colour.BLUE, Access.READ | Access.WRITE, Level.LOW])
    | st.timedeltas() | st.dates() | st.times() | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int8, st.integers(-128, 127)) | st.builds(pathlib.PurePosixPath, st.sampled_from(["a/b", "/"]))
    | st.builds(lambda n: np.arange(n, dtype=np.int16).reshape(-1, 1), st.integers(0, 5))
)  # fmt: skip
keys = (
    st.text(st.characters(), max_size=4) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers())
    | st.sampled_from(["~tensor", "~dict", "~", Colour.RED])
)  # fmt: skip


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.dictionaries(keys, children, max_size=3)
    return (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | pairs
        | pairs.map(collections.OrderedDict)
        | pairs.map(lambda d: collections.defaultdict(list, d))
        | st.dictionaries(keys, st.integers(), max_size=3).map(collections.Counter)
        | st.builds(collections.deque, st.lists(children, max_size=3), st.none() | st.integers(0, 4))
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
        | st.builds(Point, st.integers(), children)
        | st.builds(lambda v: types.SimpleNamespace(a=v), children)
    )


trees = st.recursive(scalars | storages(), containers, max_leaves=12)


@given(trees, st.binary(max_size=3))
def test_any_tree_comes_back_to_the_last_bit(tree: Any, junk: bytes) -> None:
    assert same(round_trip(tree, junk), tree)


@given(trees)
def test_equal_trees_have_equal_bytes_whatever_the_buffer_held(tree: Any) -> None:
    nbytes = state.plan(tree).nbytes
    digests = set()
    for junk in (0, 255):
        buffer = Mapped.private(nbytes)
        buffer.memory[:] = bytes([junk]) * nbytes
        digests.add(state.digest(buffer, state.write(tree, buffer)))
    buffer = Mapped.private(nbytes)
    state.write(round_trip(tree), buffer)  # and so has what was read
    digests.add(state.digest(buffer, nbytes))
    assert len(digests) == 1


@given(st.lists(storages(), min_size=1, max_size=3))
def test_views_of_one_storage_stay_views_of_one_storage(groups: list[list[torch.Tensor]]) -> None:
    for before, after in zip(groups, round_trip(groups), strict=True):
        pairs = [(t, u) for t, u in zip(before, after, strict=True) if t.numel()]
        assert len({u.untyped_storage().data_ptr() for _, u in pairs}) <= 1
        assert len({t.data_ptr() - u.data_ptr() for t, u in pairs}) <= 1


@given(trees, trees)
@settings(max_examples=50)
def test_a_changed_layout_does_not_corrupt_leaves_that_live_in_the_buffer(first: Any, second: Any) -> None:
    buffer = Mapped.private(1 << 16)
    state.write([1, first, torch.arange(7)], buffer)
    tree = state.read(buffer)
    grown = [torch.ones(33), second, tree[2], tree[1]]
    wanted = [torch.ones(33), second, torch.arange(7), first]
    state.write(grown, buffer)
    assert same(state.read(buffer), wanted)
    state.write(state.read(buffer)[::-1], buffer)
    assert same(state.read(buffer), wanted[::-1])


EASILY_LOST = [
    2**5000,
    -(2**63) - 1,
    float("-inf"),
    -0.0,
    "\ud800\udc00",  # two lone surrogates, which plain JSON would join
    {"\ud800": 1},
    datetime.datetime(2026, 3, 29, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1, seconds=5), "odd")),
    datetime.time(1, 2, 3, 4, tzinfo=datetime.UTC),
    Namespace(a=1, b=[2]),
    bytearray(b"ab"),
    range(5, -3, -2),
    pathlib.Path("x/y"),
    torch.float8_e4m3fn,
    torch.device("cuda:1"),
    torch.Size([2, 3]),
    np.datetime64("2026-01-01", "ns"),
    np.str_("text"),
    np.str_(""),
    np.bool_(True),
    np.array([1 + 2j, np.nan]),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.float16),
    np.array(3.0),
    np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", ">f8")]),
    np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", ">f8")])[0],
    np.array(["2026-01-01"], "M8[D]"),
    np.arange(10)[::3],
    {1: "int", "1": "text", None: 0, (1, (2,)): 3, 1.5: 4},
    {"~tensor": [1, 2]},
    [{"~dict": []}, {"": 1}],
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.tensor(3.0).expand(2, 3),
    torch.empty(2, 0, 3),
    torch.nn.utils.rnn.pack_sequence([torch.ones(2)]),
]


def test_values_that_are_easily_lost() -> None:
    for value in EASILY_LOST:
        back = round_trip({"value": value}, b"\xff")["value"]
        assert same(back, value), value


def test_the_order_of_an_array_is_kept() -> None:
    back = round_trip([np.asfortranarray(np.ones((2, 3))), np.ones((2, 3)), np.arange(9).reshape(3, 3)[:, ::2]])
    assert [array.flags.f_contiguous for array in back] == [True, False, False]


def test_enum_members_come_back_as_themselves() -> None:
    back = round_trip([Colour.RED, Access.READ | Access.WRITE, Level.LOW, Access(0)])
    assert back[0] is Colour.RED
    assert back[1:] == [Access.READ | Access.WRITE, Level.LOW, Access(0)]
    assert type(back[2]) is Level


def test_conjugated_and_negated_views_keep_their_values() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    tree = [z.conj(), z.conj().imag, z]
    back = round_trip(tree)
    assert all(torch.equal(a, b) for a, b in zip(back, tree, strict=True))
    assert not back[0].is_conj()


def test_a_parameter_comes_back_as_a_tensor_that_requires_grad() -> None:
    back = round_trip(torch.nn.Parameter(torch.ones(2)))
    assert type(back) is torch.Tensor
    assert back.requires_grad
    assert back.is_leaf


def test_a_slice_of_a_large_storage_takes_only_its_own_bytes() -> None:
    large = torch.zeros(1_000_000)
    assert state.plan([large[10:20]]).nbytes < 1000


def test_a_storage_is_stored_once_however_many_leaves_view_it() -> None:
    weight = torch.zeros(100_000)
    assert state.plan([weight, weight.view(100, 1000).T, weight[5:]]).nbytes < 410_000


def test_tensors_are_views_of_the_buffer_and_keep_it_mapped() -> None:
    buffer = Mapped.private(1 << 12)
    state.write({"w": torch.zeros(4)}, buffer)
    tensor = state.read(buffer)["w"]
    tensor += 1
    assert same(state.read(buffer)["w"], torch.ones(4))
    buffer.close()
    del buffer
    gc.collect()
    assert tensor.sum() == 4  # a crash, were the memory gone


def test_the_buffer_is_unmapped_with_its_last_tensor() -> None:
    buffer = Mapped.private(1 << 12)
    state.write({"w": torch.zeros(4)}, buffer)
    tensor = state.read(buffer)["w"]
    alive = weakref.ref(buffer.memory.obj)
    buffer.close()
    assert alive() is not None
    del tensor
    assert alive() is None, "nothing may need the garbage collector to let a mapping go"


def test_planning_keeps_no_tensor_alive() -> None:
    gc.disable()
    try:
        tensor = torch.zeros(3)
        state.plan({"a": [tensor, {1: tensor}]})
        gone = weakref.ref(tensor)
        del tensor
        assert gone() is None
    finally:
        gc.enable()


def test_a_step_in_place_then_writes_no_tensor_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        scheduler.step()

    def tree() -> dict[str, Any]:
        return {"text": scheduler.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}

    step()
    buffer = Mapped.private(1 << 16)
    state.write(tree(), buffer)
    for before_text in range(3):
        read = state.read(buffer)
        for name, parameter in model.named_parameters():
            parameter.data = read["model"][name]
        for name, values in model.named_buffers():
            values.set_(read["model"][name])
        optimizer.load_state_dict(read["optimizer"])
        step()
        layout = state.plan(tree(), buffer)
        assert layout.buffer is buffer, "all tensors are where they belong"
        assert all(buffer.address <= t.data_ptr() < buffer.address + buffer.nbytes for t in leaves(tree()))
        with monkeypatch.context() as patch:
            patch.setattr("cerebro_tune.state.move", lambda *_: pytest.fail("tensors were moved"))
            state.write(layout, buffer)
        assert same(state.read(buffer), tree()), before_text


def test_text_that_grows_moves_no_tensor() -> None:
    buffer = Mapped.private(1 << 12)
    state.write({"log": "", "w": torch.zeros(40)}, buffer)
    tree = state.read(buffer)
    address = tree["w"].data_ptr()
    tree["log"] = "long" * 100
    state.write(tree, buffer)
    assert state.read(buffer)["w"].data_ptr() == address


def test_what_is_left_out_in_place_leaves_no_trace_in_the_bytes() -> None:
    buffer = Mapped.private(1 << 12)
    whole = torch.arange(1, 17, dtype=torch.int32)
    state.write([whole, whole[1::2], torch.arange(1, 17)], buffer)
    tree = state.read(buffer)
    less = [tree[1], tree[2][:3]]
    used = state.write(less, buffer)
    fresh = Mapped.private(1 << 12)
    assert state.write([torch.arange(1, 17, dtype=torch.int32)[1::2], torch.arange(1, 4)], fresh) == used
    assert state.digest(buffer, used) == state.digest(fresh, used)


def test_a_layout_planned_for_one_buffer_can_be_written_to_a_larger_one() -> None:
    small, large = Mapped.private(1 << 12), Mapped.private(1 << 13)
    state.write({"w": torch.arange(9)}, small)
    layout = state.plan({**state.read(small), "more": "x" * 3900}, small)
    with pytest.raises(StateMemoryError, match=r"needs 4.* grow it"):
        state.write(layout, small)
    state.write(layout, large)
    assert same(state.read(large)["w"], torch.arange(9))


def test_what_is_known_of_a_buffer_is_not_trusted_when_its_content_has_changed() -> None:
    a, b = Mapped.private(1 << 12), Mapped.private(1 << 12)
    state.write([torch.zeros(3), torch.ones(5)], a)
    state.read(a)
    state.write([torch.full((8,), 7)], b)
    a.memory[:] = b.memory  # as when the pooled buffer served another trial
    assert same(state.read(a), [torch.full((8,), 7)])


class Odd:
    """Something of the user's."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Odd, r"is a .*Odd, which cannot be carried"),
        (lambda: print, "builtin_function_or_method"),
        (lambda: Odd, "builtins.type"),
        (lambda: iter([]), "list_iterator"),
        (lambda: torch.ones(2).to_sparse(), "to_dense"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
        (lambda: torch.nn.Linear(1, 1), "Linear"),
        (torch.Generator, "Generator"),
        (lambda: collections.defaultdict(lambda: 0), "factory"),
        (lambda: np.array([None]), "dtype"),
        (lambda: enum.Enum("Made", "A")["A"], "define it at the top level"),
        (lambda: collections.namedtuple("Hidden", "a")(1), "define it at the top level"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_leaf_that_cannot_be_carried_is_named_by_its_path(make: Callable[[], Any], why: str) -> None:
    tree = {"model": {}, "optimizer": {"state": {0: {"exp_avg": torch.ones(1), "hook": [1, (make(),)]}}}}
    with pytest.raises(UnsupportedLeafError, match=why) as caught:
        state.plan(tree)
    assert "state['optimizer']['state'][0]['hook'][1][0] is " in str(caught.value)


def test_a_tree_that_holds_itself_is_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(UnsupportedLeafError, match="holds itself"):
        state.plan(tree)


def test_a_tensor_subclass_is_refused_because_its_type_would_be_lost() -> None:
    class Tagged(torch.Tensor):
        pass

    with pytest.raises(UnsupportedLeafError, match=r"state\['t'\] is a .*Tagged"):
        state.plan({"t": torch.ones(2).as_subclass(Tagged)})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no state in this buffer"), (b"cerebro\0\x09", "layout version 9"), (b"x" * 64, "no state in this buffer")],
)
def test_a_buffer_without_a_state_is_refused(content: bytes, message: str) -> None:
    buffer = Mapped.private(4096)
    buffer.memory[: len(content)] = content
    with pytest.raises(StateError, match=message):
        state.read(buffer)


def test_reading_never_calls_what_a_state_names() -> None:
    buffer = Mapped.private(4096)
    state.write([Colour.RED], buffer)
    end, table, text = state.parts(buffer.memory)
    for module, name in (("os", "system"), ("subprocess", "Popen"), ("collections", "OrderedDict"), ("no.such", "X")):
        forged = text.replace(__name__, module).replace("Colour", name)
        assert forged != text
        state.seal(buffer.memory, end, table, forged.encode())
        with pytest.raises(StateError, match="a state needs"):
            state.read(buffer)


def test_the_store_and_the_codec_do_not_import_torch() -> None:
    code = "import sys, cerebro_tune.store, cerebro_tune.statefile; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.usefixtures("gpu")
def test_device_tensors_come_back_to_a_device_with_their_aliases() -> None:
    weight = torch.arange(12.0, device="cuda").view(3, 4)
    tree = [weight, weight.T, torch.ones(2), torch.empty(0, device="cuda"), weight.to(torch.bfloat16)[1:]]
    on_host = round_trip(tree)
    assert all(t.is_cpu for t in on_host)
    buffer = Mapped.private(1 << 14)
    state.write(tree, buffer)
    back = state.read(buffer, device="cuda")
    assert [t.device.type for t in back] == ["cuda", "cuda", "cpu", "cuda", "cuda"]
    assert back[0].data_ptr() == back[1].data_ptr()
    assert same([t.cpu() for t in back], [t.cpu() for t in tree])
    back[0] += 1
    used = state.write(back, buffer)
    assert same(state.read(buffer)[1], (weight + 1).T.cpu())
    assert used == state.plan(back).nbytes
