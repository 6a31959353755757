"""PyTorch's zip checkpoints (`.pt`, `.bin`), read and written without PyTorch.

Such a file is a zip archive, stored without compression: `NAME/data.pkl` is a pickle, and
`NAME/data/0`, `NAME/data/1`, ... are the bytes of the tensors' storages. Nothing in the pickle
runs: a name in it is looked up in the tables of this file, and the outcome is a plain container, a
tensor, or an inert `Stub`. Every other name is refused.

Source: torch/serialization.py and torch/_utils.py (PyTorch 1.6 to 2.13).
"""

import io
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

# The plain dtypes: torch's name, its storage class (None: saved as an untyped storage), NumPy's.
_DTYPES = (
    ("float32", "FloatStorage", np.float32),
    ("float64", "DoubleStorage", np.float64),
    ("float16", "HalfStorage", np.float16),
    ("bfloat16", "BFloat16Storage", ml_dtypes.bfloat16),
    ("int64", "LongStorage", np.int64),
    ("int32", "IntStorage", np.int32),
    ("int16", "ShortStorage", np.int16),
    ("int8", "CharStorage", np.int8),
    ("uint8", "ByteStorage", np.uint8),
    ("bool", "BoolStorage", np.bool_),
    ("complex64", "ComplexFloatStorage", np.complex64),
    ("complex128", "ComplexDoubleStorage", np.complex128),
    ("uint16", None, np.uint16),
    ("uint32", None, np.uint32),
    ("uint64", None, np.uint64),
    ("float8_e4m3fn", None, ml_dtypes.float8_e4m3fn),
    ("float8_e4m3fnuz", None, ml_dtypes.float8_e4m3fnuz),
    ("float8_e5m2", None, ml_dtypes.float8_e5m2),
    ("float8_e5m2fnuz", None, ml_dtypes.float8_e5m2fnuz),
)

# Names that stay inert: a `Stub` holds their arguments. They are what Composer's training
# checkpoints hold beside tensors: clocks, random states, versions, enumerations.
STUBS = frozenset(
    {
        ("datetime", "timedelta"),
        ("datetime", "datetime"),
        ("datetime", "timezone"),
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("torch", "device"),
        ("torch.torch_version", "TorchVersion"),
        ("composer.core.precision", "Precision"),
        ("composer.core.time", "Time"),
        ("composer.core.time", "TimeUnit"),
        ("composer.core.time", "Timestamp"),
        # The default of a defaultdict.
        ("builtins", "dict"),
        ("builtins", "list"),
        ("builtins", "int"),
        ("builtins", "float"),
    }
)

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # PyTorch before 1.6
_ZIP_MAGIC = b"PK\x03\x04"
_ALIGNMENT = 64  # bytes; torch places each storage so


class Stub:
    """An admitted name that this reader does not act on: `name`, `args` and, if any, `state`."""

    __slots__ = ("args", "state")
    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        self = object.__new__(cls)
        self.args = (*args, kwargs) if kwargs else args
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"


def read(path: str | os.PathLike) -> Any:
    """The object saved in `path`. Tensors are read-only NumPy arrays mapped from the file.

    Strides, offsets and shared storages are kept; bfloat16 and float8 use ml_dtypes. Parameters
    become arrays, OrderedDict and defaultdict become dict, torch.Size becomes tuple.
    Raises ValueError (one line) for a name outside the tables above, a key set twice in an
    OrderedDict, a legacy (before 1.6) or TorchScript file, a truncated or damaged one.
    """
    return _read(Path(path))


def write(path: str | os.PathLike, obj: Any) -> None:
    """Saves `obj` so that `torch.load(path, weights_only=True)` reads it, bit for bit.

    obj: nested dict, list, tuple, str, int, float, bool, None and NumPy arrays (also bfloat16);
    arrays over the same memory share one storage. The file appears under `path` when it is whole.
    Raises TypeError for anything else.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            _write(file, obj)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def let_go(array: np.ndarray) -> None:
    """Returns the memory of the file pages that reading took; `array` can be read again."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


# Reading.


class _Refused(pickle.UnpicklingError):
    """The message is for the user."""


class _Fixed:
    """A value that a pickle can name but not alter."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused(f"sets the state of {self!r}")


class _Function(_Fixed):
    """One of the functions below, callable from the pickle and nothing more."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Callable[..., Any]):
        self._name, self._call = name, call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __repr__(self) -> str:
        return self._name


class _Dtype(_Fixed):
    """A torch dtype or typed storage class; `dtype` None is torch's UntypedStorage (bytes)."""

    __slots__ = ("dtype", "_name")

    def __init__(self, name: str, dtype: Any):
        self._name, self.dtype = name, None if dtype is None else np.dtype(dtype)

    def __repr__(self) -> str:
        return self._name


class _Storage(_Fixed):
    """`size` elements of `dtype` at `start` bytes in the file; dtype None counts bytes."""

    __slots__ = ("key", "dtype", "size", "start", "mapped")

    def __init__(self, key: str, dtype: Any, size: int, start: int, mapped: mmap.mmap):
        self.key, self.dtype, self.size, self.start, self.mapped = key, dtype, size, start, mapped

    def __repr__(self) -> str:
        return f"storage {self.key}"


class _Dict(dict):
    """OrderedDict, without attributes and without a second value for a key."""

    __slots__ = ()

    def __init__(self, items: Any = ()):
        super().__init__()
        for key, value in items:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self:
            raise _Refused(f"sets the key {key!r} twice")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        pass  # state_dict() hangs `_metadata` (module versions) on it


class _DefaultDict(_Dict):
    __slots__ = ()

    def __init__(self, factory: Any = None, items: Any = ()):
        super().__init__(items)


def _is_size(*values: Any) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> np.ndarray:
    """The array over a storage; offset, size and stride in elements."""
    if not isinstance(storage, _Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise _Refused("holds a tensor without a storage, a size or a stride")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None or len(size) != len(stride) or not _is_size(offset, *size, *stride):
        raise _Refused(
            f"holds a tensor of offset {offset!r}, size {size!r}, stride {stride!r}: "
            "expected sizes of zero and more, one stride for each"
        )
    limit = storage.size if storage.dtype is not None else storage.size // dtype.itemsize
    if 0 in size:
        array = np.zeros(size, dtype)
        array.flags.writeable = False
        return array
    end = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if end > limit:
        raise _Refused(
            f"holds a tensor of offset {offset}, size {size}, stride {stride}, which reaches "
            f"element {end} of storage {storage.key}: expected at most {limit}"
        )
    width = dtype.itemsize
    return np.ndarray(
        size,
        dtype,
        buffer=storage.mapped,
        offset=storage.start + offset * width,
        strides=[s * width for s in stride],
    )


def _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    return _tensor(storage, offset, size, stride)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    if not isinstance(dtype, _Dtype):
        raise _Refused(f"holds a tensor of dtype {dtype!r}")
    return _tensor(storage, offset, size, stride, dtype.dtype)


def _rebuild_parameter(data, requires_grad, hooks, state=None):
    if not isinstance(data, np.ndarray):
        raise _Refused("holds a parameter that is no tensor")
    return data


def _names() -> dict[tuple[str, str], Any]:
    """Every name a pickle may use, to what it becomes. Built anew for each file."""
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Dict,
        ("collections", "defaultdict"): _DefaultDict,
        ("torch", "Size"): tuple,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "slice"): slice,
        ("builtins", "complex"): complex,
        ("torch.storage", "UntypedStorage"): _Dtype("torch.storage.UntypedStorage", None),
        ("torch", "UntypedStorage"): _Dtype("torch.UntypedStorage", None),
    }
    for name, function in (
        ("_rebuild_tensor_v2", _rebuild_tensor_v2),
        ("_rebuild_tensor_v3", _rebuild_tensor_v3),
        ("_rebuild_parameter", _rebuild_parameter),
        ("_rebuild_parameter_with_state", _rebuild_parameter),
    ):
        names["torch._utils", name] = _Function(f"torch._utils.{name}", function)
    for name, storage, dtype in _DTYPES:
        names["torch", name] = _Dtype(f"torch.{name}", dtype)
        if storage:
            names["torch", storage] = _Dtype(f"torch.{storage}", dtype)
    for module, name in STUBS:
        body = {"__slots__": (), "name": f"{module}.{name}"}
        names[module, name] = type("Stub", (Stub,), body)
    for (module, name), value in list(names.items()):  # protocol 2 speaks Python 2
        if module == "builtins":
            names["__builtin__", name] = value
    return names


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Callable[[str, Any, int], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._names = _names()
        self._storage = storage

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise _Refused(
                f"names {f'{module}.{name}'!r}, which is not on the list of names that tensors and "
                "plain containers need: refused, nothing of it was run"
            ) from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise _Refused("names an external object that is no storage")
        _, kind, key, _, size = pid
        if not isinstance(kind, _Dtype) or type(key) is not str or not _is_size(size):
            raise _Refused("names a storage without a type, a key or a size")
        return self._storage(key, kind.dtype, size)


class _Entries:
    """Where each file of the archive lies: name (without the archive's own) to (start, size)."""

    def __init__(self, path: Path, mapped: mmap.mmap):
        self.mapped = mapped
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except Exception as error:
            raise _Refused(f"is a truncated or damaged zip file ({error})") from error
        roots = {i.filename[: -len("/data.pkl")] for i in infos if i.filename.endswith("/data.pkl")}
        roots = {r for r in roots if "/" not in r}
        if len(roots) != 1:
            raise _Refused("is a zip file, but no PyTorch checkpoint: it has no data.pkl")
        root = f"{roots.pop()}/"
        names = [i.filename.removeprefix(root) for i in infos]
        if "constants.pkl" in names or any(n.startswith("code/") for n in names):
            raise _Refused(
                "is a TorchScript archive: save the model's state_dict() with torch.save"
            )
        if len(set(names)) != len(names):
            raise _Refused("is a damaged zip file: it holds an entry twice")
        self._infos = dict(zip(names, infos, strict=True))
        if "byteorder" in self._infos and self.bytes("byteorder") != b"little":
            raise _Refused("was written on a big-endian machine: save it again on a usual one")

    def bytes(self, name: str) -> bytes:
        start, size = self.locate(name)
        return self.mapped[start : start + size]

    def locate(self, name: str) -> tuple[int, int]:
        info = self._infos.get(name)
        if info is None:
            raise _Refused(f"is damaged: it has no entry {name!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(
                f"has a compressed or encrypted entry {name!r}, which torch never writes"
            )
        header = self.mapped[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != _ZIP_MAGIC:
            raise _Refused(f"is damaged: the entry {name!r} is not where the zip file says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size > len(self.mapped):
            raise _Refused(
                f"is truncated: {name!r} ends at byte {start + info.file_size}, "
                f"the file at {len(self.mapped)}"
            )
        return start, info.file_size


def _read(path: Path) -> Any:
    try:
        mapped = _map(path)
        entries = _Entries(path, mapped)

        def storage(key: str, dtype: Any, size: int) -> _Storage:
            start, length = entries.locate(f"data/{key}")
            expected = size * (1 if dtype is None else dtype.itemsize)
            if length != expected:
                raise _Refused(f"is damaged: storage {key} expected {expected} bytes, got {length}")
            return _Storage(key, dtype, size, start, mapped)

        return _Unpickler(io.BytesIO(entries.bytes("data.pkl")), storage).load()
    except _Refused as error:
        raise ValueError(f"{path} {error}") from error
    except OSError:
        raise
    except Exception as error:
        # Whatever a crafted or broken pickle provokes in the unpickler itself.
        kind = type(error).__name__
        raise ValueError(f"{path} is damaged: its pickle cannot be read ({kind})") from error


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
        if start == _LEGACY_MAGIC:
            raise _Refused(
                "is a legacy PyTorch file (before 1.6): open it with torch.load in PyTorch "
                "and save it again with torch.save"
            )
        if not start.startswith(_ZIP_MAGIC):
            raise _Refused("is no PyTorch checkpoint: expected a zip file written by torch.save")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# Writing.

_STORAGES = {np.dtype(dtype): storage for _, storage, dtype in _DTYPES if storage}


class _Emitter:
    """Pickle protocol 2 by hand, because pickle would import torch to name its functions."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.storages: list[np.ndarray] = []  # in the order of their keys
        self._keys: dict[tuple, int] = {}  # where an array lies in memory, to its key

    def emit(self, obj: Any) -> None:
        out = self.out
        kind = type(obj)
        if obj is None:
            out += b"N"
        elif kind is bool:
            out += b"\x88" if obj else b"\x89"
        elif kind is int:
            self._int(obj)
        elif kind is float:
            out += b"G" + struct.pack(">d", obj)
        elif kind is str:
            data = obj.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<I", len(data)) + data
        elif kind is tuple or kind is list:
            out += b"(" if kind is tuple else b"]("
            for item in obj:
                self.emit(item)
            out += b"t" if kind is tuple else b"e"
        elif isinstance(obj, dict):
            out += b"}("
            for key, value in obj.items():
                self.emit(key)
                self.emit(value)
            out += b"u"
        elif isinstance(obj, np.ndarray):
            self._array(obj)
        else:
            raise TypeError(f"a PyTorch file cannot hold a {kind.__name__} here")

    def _int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
            return
        data = pickle.encode_long(value)
        if len(data) > 255:
            raise TypeError("a PyTorch file cannot hold an integer of more than 255 bytes here")
        self.out += b"\x8a" + bytes([len(data)]) + data

    def _array(self, array: np.ndarray) -> None:
        storage = _STORAGES.get(array.dtype)
        if storage is None:
            raise TypeError(f"a PyTorch file cannot hold an array of {array.dtype} here")
        where = (array.ctypes.data, array.shape, array.strides, array.dtype)
        key = self._keys.setdefault(where, len(self.storages))
        if key == len(self.storages):
            self.storages.append(array)
        strides, step = [], 1
        for n in reversed(array.shape):
            strides.append(step)
            step *= max(n, 1)
        out = self.out
        out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.emit("storage")
        out += b"ctorch\n" + storage.encode() + b"\n"
        for item in (str(key), "cpu", array.size):
            self.emit(item)
        out += b"tQ"
        for item in (0, array.shape, tuple(reversed(strides)), False):
            self.emit(item)
        out += b"ccollections\nOrderedDict\n)RtR"


def _write(file: BinaryIO, obj: Any) -> None:
    emitter = _Emitter()
    emitter.emit(obj)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            info.file_size = len(data)
            used = file.tell() + 30 + len(info.filename)
            padding = -(used + 4) % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
            with archive.open(info, "w") as entry:
                entry.write(data)

        add("data.pkl", bytes(emitter.out) + b".")
        add("byteorder", b"little")
        for key, array in enumerate(emitter.storages):
            flat = np.ascontiguousarray(array).reshape(-1)  # a copy of one array at a time
            add(f"data/{key}", flat.view(np.uint8).data)
        add("version", b"3\n")
