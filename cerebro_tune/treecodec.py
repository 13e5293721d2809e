"""A tree of Python values to JSON text and back, with every type kept.

Plain JSON loses int keys, tuples, Counter, inf and NumPy types, and a scheduler restored from it is silently wrong.
Here whatever JSON cannot say by itself becomes an object with one key that starts with a tilde, `{"~tuple": [1, 2]}`;
dicts whose keys could be taken for such a tag are written as pairs. What is not in the table below is refused with its
key path: nothing is dropped, and nothing is pickled. Containers are values: an object that is found twice comes back
as two equal objects (tensors keep their aliases, see `state.py`).

Classes of enums and named tuples are found again by module and name. Reading never calls them: it imports a module at
most, and takes a member that is already there. Files are checked before, see `statefile`.
"""

from __future__ import annotations

import ast
import base64
import collections
import datetime
import enum
import importlib
import json
import math
import pathlib
import reprlib
import sys
import types
import weakref
import zoneinfo
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from cerebro_tune.errors import StateError, UnsupportedLeafError

Handler = Callable[["Encoder", Any], Any]
Reader = Callable[[Any], Any]

_FACTORIES: dict[str, Any] = {f.__name__: f for f in (list, dict, set, int, float, str, bool, tuple)}
_PATHS = {cls.__name__: cls for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))}
_KNOWN = (
    "numbers, strings, bytes, tensors, NumPy arrays and scalars, dict, list, tuple, set, deque, Counter, OrderedDict, "
    "enums, named tuples, dates, paths"
)


class Refused(Exception):  # noqa: N818  (never leaves this module: it collects the key path on its way up)
    """A value that cannot be carried; `path` grows as the containers around it are left."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


class Encoder:
    """Turns a tree into what JSON can say; a subclass adds handlers for leaves that it stores elsewhere."""

    # Functions of (encoder, value), not bound methods: an encoder must hold no cycle, which would keep the tree's
    # tensors until the next garbage collection.
    handlers: Mapping[type, Handler]

    def encode(self, tree: Any) -> Any:
        """A tree for `dumps`; UnsupportedLeafError names the key path of a value that cannot be carried."""
        try:
            return self.value(tree)
        except Refused as refused:
            where = "state" + "".join(reversed(refused.path))
            raise UnsupportedLeafError(f"{where} {refused.reason}. Carried are: {_KNOWN}") from None
        except RecursionError:
            raise UnsupportedLeafError("the state is nested too deeply, or a container holds itself") from None

    def value(self, value: Any) -> Any:
        """One value as JSON can say it."""
        handler = self.handlers.get(type(value))
        return handler(self, value) if handler is not None else self._other(value)

    def sequence(self, values: Iterable[Any]) -> list[Any]:
        """Items in their order."""
        result: list[Any] = []
        handlers = self.handlers
        try:
            for value in values:
                handler = handlers.get(type(value))
                result.append(handler(self, value) if handler is not None else self._other(value))
        except Refused as refused:
            refused.path.append(f"[{len(result)}]")
            raise
        return result

    def mapping(self, values: dict[Any, Any]) -> dict[str, Any]:
        """A dict: as JSON has them where all keys are plain strings."""
        result: dict[str, Any] = {}
        handlers = self.handlers
        for key, value in values.items():
            if type(key) is not str or key[:1] == "~" or not key.isascii():
                return {"~dict": self.pairs(values)}
            handler = handlers.get(type(value))
            try:
                result[key] = handler(self, value) if handler is not None else self._other(value)
            except Refused as refused:
                refused.path.append(f"[{key!r}]")
                raise
        return result

    def pairs(self, values: Mapping[Any, Any]) -> list[Any]:
        """Keys of any kind with their values, in their order."""
        result = []
        for key, value in values.items():
            try:
                result.append([self.value(key), self.value(value)])
            except Refused as refused:
                refused.path.append(f"[{key!r}]")
                raise
        return result

    def members(self, values: Iterable[Any]) -> list[Any]:
        """Members of a set."""
        # Sorted, because the order of a set differs between processes and equal states must have equal bytes.
        return sorted(self.sequence(values), key=dumps)

    def _other(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, enum.Enum):
            return _enum(value)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {"~named": [*_located(kind), self.sequence(value)]}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            return {"~scalar": [dtype_text(value.dtype), value.tobytes().hex()]}
        return refuse(value)


def refuse(value: Any, why: str = "cannot be carried between workers") -> NoReturn:
    """Raise for a leaf of an unknown kind."""
    kind = type(value)
    raise Refused(f"is a {kind.__module__}.{kind.__qualname__}, which {why}: {reprlib.repr(value)}")


def decode(text: str, leaves: Mapping[str, Reader]) -> Any:
    """The tree of a JSON text; `leaves` has the readers of the caller's own tags (with their tilde)."""
    readers = {**_READERS, **leaves}

    def read_object(value: dict[str, Any]) -> Any:
        if len(value) == 1:
            ((tag, payload),) = value.items()
            if tag[:1] == "~":
                if (reader := readers.get(tag)) is None:
                    raise StateError(f"unknown tag {tag!r} in a state: it was written by a newer version")
                return reader(payload)
        return value

    try:
        return json.loads(text, object_hook=read_object)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"there is no state in this text: {error!r}") from error


def named_leaves(text: str, tags: Iterable[str]) -> Iterable[tuple[str, str, Any]]:
    """(dotted key path, tag, payload) of every leaf with one of the tags, without reading the tree."""
    return _walk(json.loads(text), "", frozenset(tags))


def _walk(value: Any, path: str, tags: frozenset[str]) -> Iterable[tuple[str, str, Any]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}.{index}", tags)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in tags:
                yield path.lstrip("."), key, item
            elif key in {"~dict", "~ordered", "~counter"}:
                for name, entry in item:
                    yield from _walk(entry, f"{path}.{name}", tags)
            else:
                yield from _walk(item, path if key[:1] == "~" else f"{path}.{key}", tags)


def dtype_text(dtype: Any) -> str:
    """A NumPy dtype as text, as in the header of a .npy file."""
    import numpy.lib.format

    if dtype.hasobject or dtype.metadata:
        raise Refused(f"is of the NumPy dtype {dtype!r}, whose values cannot be carried")
    return repr(numpy.lib.format.dtype_to_descr(dtype))


def dtype_of(text: str) -> Any:
    """The NumPy dtype of its text."""
    import numpy.lib.format

    dtype = numpy.lib.format.descr_to_dtype(ast.literal_eval(text))
    if dtype.hasobject:  # its elements would be addresses
        raise StateError(f"a state has values of the NumPy dtype {text}, which none can have")
    return dtype


dumps = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":")).encode


def _same(encoder: Encoder, value: Any) -> Any:
    return value


def _text(encoder: Encoder, value: str) -> Any:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates: JSON would join two of them into one character
        return {"~text": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _integer(encoder: Encoder, value: int) -> Any:
    # Python refuses to read decimal integers of more than 4,300 digits; hexadecimal ones have no limit.
    return value if -(1 << 63) <= value < 1 << 63 else {"~int": hex(value)}


def _number(encoder: Encoder, value: float) -> Any:
    return value if math.isfinite(value) else {"~float": repr(value)}


def _bytes(encoder: Encoder, value: bytes | bytearray) -> dict[str, str]:
    return {f"~{type(value).__name__}": base64.b64encode(value).decode()}


def _path(encoder: Encoder, value: pathlib.PurePath) -> dict[str, Any]:
    return {"~path": [type(value).__name__, _text(encoder, str(value))]}


def _defaultdict(encoder: Encoder, value: collections.defaultdict[Any, Any]) -> dict[str, Any]:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(name or "") is not factory:
        raise Refused(f"is a defaultdict whose factory {factory!r} is none of {', '.join(_FACTORIES)}")
    return {"~defaultdict": [name, encoder.pairs(value)]}


def _enum(value: enum.Enum) -> dict[str, Any]:
    place = _located(type(value))
    if type(value).__members__.get(value.name or "") is value:
        return {"~enum": [*place, value.name]}
    if isinstance(value, enum.Flag):  # a union of members has no name of its own
        return {"~flag": [*place, value.value]}
    return refuse(value)


def _zone(zone: datetime.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is datetime.timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        return [offset // datetime.timedelta(microseconds=1), None if name == str(datetime.timezone(offset)) else name]
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        return zone.key
    return refuse(zone)


def _moment(encoder: Encoder, value: datetime.datetime | datetime.time) -> dict[str, Any]:
    tag = f"~{type(value).__name__}"
    return {tag: [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo)]}


_HANDLERS: dict[type, Handler] = {
    type(None): _same,
    bool: _same,
    str: _text,
    int: _integer,
    float: _number,
    complex: lambda encoder, value: {"~complex": [_number(encoder, value.real), _number(encoder, value.imag)]},
    bytes: _bytes,
    bytearray: _bytes,
    range: lambda encoder, value: {"~range": encoder.sequence((value.start, value.stop, value.step))},
    list: Encoder.sequence,
    tuple: lambda encoder, value: {"~tuple": encoder.sequence(value)},
    dict: Encoder.mapping,
    collections.OrderedDict: lambda encoder, value: {"~ordered": encoder.pairs(value)},
    collections.Counter: lambda encoder, value: {"~counter": encoder.pairs(value)},
    collections.defaultdict: _defaultdict,
    collections.deque: lambda encoder, value: {"~deque": [value.maxlen, encoder.sequence(value)]},
    set: lambda encoder, value: {"~set": encoder.members(value)},
    frozenset: lambda encoder, value: {"~frozenset": encoder.members(value)},
    types.SimpleNamespace: lambda encoder, value: {"~simplenamespace": encoder.pairs(vars(value))},
    Namespace: lambda encoder, value: {"~namespace": encoder.pairs(vars(value))},
    datetime.date: lambda encoder, value: {"~date": value.isoformat()},
    datetime.datetime: _moment,
    datetime.time: _moment,
    datetime.timedelta: lambda encoder, value: {"~timedelta": [value.days, value.seconds, value.microseconds]},
    **dict.fromkeys(_PATHS.values(), _path),
}


_places: weakref.WeakKeyDictionary[type, tuple[str, str]] = weakref.WeakKeyDictionary()


def _located(kind: type) -> tuple[str, str]:
    """Module and name by which a worker finds a class again."""
    if (known := _places.get(kind)) is not None:
        return known
    place = (kind.__module__, kind.__qualname__)
    try:
        found = _find(*place)
    except StateError:
        found = None
    if found is not kind:
        raise Refused(
            f"is a {place[0]}.{place[1]}, a class that a worker cannot import by that name: "
            f"define it at the top level of a module"
        )
    _places[kind] = place
    return place


def _find(module: str, qualname: str) -> Any:
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for name in qualname.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise StateError(
            f"a state needs the class {qualname} of module {module}, which is not there: {error}"
        ) from None
    return found


def _read_enum(payload: list[str]) -> Any:
    module, qualname, name = payload
    kind = _find(module, qualname)
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise StateError(f"a state needs {name!r} of the enum {module}.{qualname}, which has no such member")
    return kind.__members__[name]


def _read_flag(payload: list[Any]) -> Any:
    module, qualname, value = payload
    kind = _find(module, qualname)
    if not (isinstance(kind, enum.EnumMeta) and issubclass(kind, enum.Flag)):
        raise StateError(f"a state needs the flag enum {module}.{qualname}, which is none")
    return kind(value)


def _read_named(payload: list[Any]) -> Any:
    module, qualname, values = payload
    kind = _find(module, qualname)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) == len(values)):
        raise StateError(f"a state needs the named tuple {module}.{qualname} with {len(values)} fields")
    return tuple.__new__(kind, values)


def _read_zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None or isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone) if zone else None
    microseconds, name = zone
    offset = datetime.timedelta(microseconds=microseconds)
    return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)


def _read_moment(kind: Any) -> Reader:
    return lambda p: kind.fromisoformat(p[0]).replace(fold=p[1], tzinfo=_read_zone(p[2]))


def _read_scalar(payload: list[str]) -> Any:
    import numpy as np

    dtype = dtype_of(payload[0])
    raw = bytes.fromhex(payload[1])
    return np.frombuffer(raw, dtype)[0] if dtype.itemsize else np.zeros(1, dtype)[0]


def _read_path(payload: list[str]) -> Any:
    if payload[0] not in _PATHS:
        raise StateError(f"a state has a path of kind {payload[0]}, which this platform does not have")
    return _PATHS[payload[0]](payload[1])


_READERS: dict[str, Reader] = {
    "~text": lambda p: bytes.fromhex(p).decode("utf-8", "surrogatepass"),
    "~int": lambda p: int(p, 16),
    "~float": float,
    "~complex": lambda p: complex(*p),
    "~bytes": base64.b64decode,
    "~bytearray": lambda p: bytearray(base64.b64decode(p)),
    "~range": lambda p: range(*p),
    "~tuple": tuple,
    "~dict": dict,
    "~ordered": collections.OrderedDict,
    "~counter": lambda p: collections.Counter(dict(p)),
    "~defaultdict": lambda p: collections.defaultdict(_FACTORIES[p[0]] if p[0] else None, p[1]),
    "~deque": lambda p: collections.deque(p[1], p[0]),
    "~set": set,
    "~frozenset": frozenset,
    "~simplenamespace": lambda p: types.SimpleNamespace(**dict(p)),
    "~namespace": lambda p: Namespace(**dict(p)),
    "~enum": _read_enum,
    "~flag": _read_flag,
    "~named": _read_named,
    "~scalar": _read_scalar,
    "~date": datetime.date.fromisoformat,
    "~datetime": _read_moment(datetime.datetime),
    "~time": _read_moment(datetime.time),
    "~timedelta": lambda p: datetime.timedelta(*p),
    "~path": _read_path,
}

Encoder.handlers = _HANDLERS
