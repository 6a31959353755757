"""Reads and writes PyTorch's zip checkpoints (`.pt`, `.bin`) as NumPy arrays, through torch.

`torch.load(weights_only=True)` does the reading. Before it runs, the pickle inside the file is
listed with inert placeholders: a name outside ADMITTED is refused by name, and a storage whose
size is not the one that the archive holds is refused, which torch does not check. The harmless
names that Composer adds (clocks, random states, enumerations) become inert `Stub` objects.
"""

import ctypes
import io
import math
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modernbert_jax.untrusted import printable, refuse_pointer, shown

OLDEST_TORCH = (2, 6)  # Before 2.6, weights_only=True could be tricked into running code.

# Bytes per element of the storage classes; an untyped storage counts bytes.
STORAGES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}
# torch's names of the dtypes that NumPy does not have, and the integers that carry their bits.
EXTENSION_DTYPES = {
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e5m2fnuz": np.uint8,
}
DTYPES = """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
complex64 complex128""".split()
# Names that only hold other values in Composer's checkpoints, beside the tensors.
STUBS = """builtins.dict builtins.float builtins.int builtins.list
composer.core.precision.Precision composer.core.time.Time composer.core.time.TimeUnit
composer.core.time.Timestamp datetime.datetime datetime.timedelta datetime.timezone numpy.dtype
numpy.ndarray numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar
numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar
torch.torch_version.TorchVersion""".split()
# Containers that torch does not admit by itself.
CONTAINERS: dict[str, Callable[..., Any]] = {
    "builtins.frozenset": frozenset,
    "builtins.slice": slice,
    "collections.defaultdict": lambda factory=None, items=(): dict(items),
}
ADMITTED = frozenset(
    [
        *STUBS,
        *CONTAINERS,
        *(f"torch.{name}" for name in (*STORAGES, *DTYPES, *EXTENSION_DTYPES, "Size", "device")),
        *(f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter")),
        "torch._utils._rebuild_parameter_with_state",
        "torch.storage.UntypedStorage",
        "collections.OrderedDict",
        "builtins.set",
        "builtins.complex",
        "_codecs.encode",  # how protocol 2 stores bytes
    ]
)


class Stub:
    """Stands for an object that the converter does not need; drops everything it is given."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Refused(pickle.UnpicklingError):
    """The file is refused; the message completes a sentence that starts with its path."""


def read(path: Path) -> Any:
    """Returns the object saved in `path`, with read-only NumPy arrays mapped from the file.

    Strides, offsets and shared storages are kept; bfloat16 and float8 use ml_dtypes. Parameters
    become arrays, OrderedDict and defaultdict become dict, torch.Size becomes tuple.
    Raises ImportError if torch is missing or too old, ValueError (one line) for a name outside
    ADMITTED and for a legacy, truncated or damaged file.
    """
    torch = require_torch("reading")
    refuse_pointer(path)
    stubs = [(Stub, name) for name in STUBS] + [(make, name) for name, make in CONTAINERS.items()]
    try:
        values = _check(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(stubs):
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return _Arrays(torch, values, path.stat().st_size).of(loaded)
    except Refused as error:
        raise ValueError(f"{path} {error}") from error
    except OSError:
        raise
    except Exception as error:  # A crafted or broken file can raise anything.
        # torch wraps the cause in advice to set weights_only=False, which would run the file.
        cause = str(error.__context__ or error).strip() or repr(error)
        cause = printable(cause.splitlines()[0].partition(" Please use")[0])
        raise ValueError(f"{path} is damaged: {cause}") from error


def write(path: Path, obj: Any) -> None:
    """Saves `obj` so that `torch.load(path, weights_only=True)` reads it bit for bit.

    obj: nested dict, list, tuple, str, int, float, bool, None and NumPy arrays (also bfloat16);
    arrays over the same memory share one storage. Raises ImportError if torch is missing,
    TypeError for anything else in `obj`.
    """
    torch = require_torch("writing")
    tensors = _tensors(obj, torch, {})
    with path.open("wb") as file:  # torch reports a full disk as OSError only for a file object
        torch.save(tensors, file)


def release_pages(array: np.ndarray) -> None:
    """Returns the memory that reading an array of `read` took; it can be read again.

    Without this, a conversion keeps the complete file in memory beside its result.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    assert not array.flags.writeable, "would lose what was written to the private mapping"
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = array.ctypes.data + array.nbytes - start
    if size > 0:
        args = ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED
        ctypes.CDLL(None).madvise(*args)


def require_torch(action: str) -> Any:
    """Returns the module torch. Raises ImportError if it is missing or too old for `action`."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"{action} .pt files needs torch: pip install torch") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ImportError(f"expected torch 2.6 or newer, got {torch.__version__}: upgrade torch")
    return torch


# Reading.


def _check(path: Path) -> int:
    """Raises Refused unless torch can safely read what the file claims to hold.

    Returns the size of its pickle, in which each value takes a byte or more.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise Refused(
                "is not a checkpoint: expected a zip file written by torch.save. A legacy file "
                "(PyTorch before 1.6) must be saved again: torch.save(torch.load(old), new)"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            packed = [i.filename for i in infos if i.compress_type or i.flag_bits & 1]
            if packed:
                raise Refused(f"has a compressed or encrypted entry {packed[0]!r}: expected none")
            names = [i.filename for i in infos]
            roots = [n.removesuffix("/data.pkl") for n in names if n.endswith("/data.pkl")]
            if len(roots) != 1:
                raise Refused("is a zip file, but no PyTorch checkpoint: it has no data.pkl")
            sizes = {i.filename.removeprefix(f"{roots[0]}/"): i.file_size for i in infos}
            if "constants.pkl" in sizes:
                raise Refused("is a TorchScript archive: save the model's state_dict() instead")
            order = archive.read(f"{roots[0]}/byteorder") if "byteorder" in sizes else b"little"
            if order != b"little":
                raise Refused("was written on a big-endian machine: save it on a usual one")
            data = archive.read(f"{roots[0]}/data.pkl")
    except zipfile.BadZipFile as error:
        raise Refused(f"is a truncated or damaged zip file ({error})") from error
    _Checker(data, sizes).load()
    return len(data)


class _Checker(pickle._Unpickler):  # type: ignore[name-defined]
    """Walks through a pickle in which every name is a placeholder, and checks names and sizes.

    In Python, because the memo of the unpickler in C is a table as large as any index in the file.
    """

    def __init__(self, data: bytes, sizes: Mapping[str, int]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._sizes = sizes

    def find_class(self, module: str, name: str, /) -> type:
        name = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if name not in ADMITTED:
            raise Refused(
                f"names {shown(name)}, which is not on the list of names that tensors and plain "
                "containers need: refused, nothing of it was run"
            )
        return type("Placeholder", (_Placeholder,), {"name": name})

    def persistent_load(self, pid: Any, /) -> None:
        match pid:
            case ("storage", type(name=str(kind)), str(key), _, int(count)) if (
                width := STORAGES.get(kind.rpartition(".")[2])
            ):
                size = self._sizes.get(f"data/{key}")
                if size is None:
                    raise Refused(f"is damaged: it has no entry {shown(f'data/{key}')}")
                if size != count * width:
                    expected = f"expected {count * width} bytes, got {size}"
                    raise Refused(f"is damaged: storage {printable(key)} {expected}")
            case _:
                raise Refused("names an external object that is not a storage")


class _Placeholder(Stub):
    """Stands for any admitted name while a file is checked; acts as a container of anything."""

    name = ""

    def __init__(self, *args: Any):
        self.keys = set()

    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self.keys:
            raise Refused(f"sets the key {shown(key)} twice")
        self.keys.add(key)


class _Arrays:
    """Replaces tensors by arrays over the same memory, and subclasses of dict and tuple.

    A few bytes of a pickle can name one list, or one storage, any number of times; a tensor with
    stride 0 has any shape. values, size: the bytes of the pickle and of the file, which bound what
    is made of them.
    """

    def __init__(self, torch: Any, values: int, size: int):
        self._torch, self._values = torch, values + 10_000
        self._bytes = 4 * size + 2**20

    def of(self, obj: Any) -> Any:
        self._values -= 1
        if self._values < 0:
            raise Refused("is refused: its lists name each other too often")
        if isinstance(obj, self._torch.Tensor):
            size = math.prod(obj.shape) * obj.element_size()
            self._bytes -= size
            if size > obj.untyped_storage().nbytes() or self._bytes < 0:
                raise Refused(
                    f"is refused: a tensor of shape {printable(tuple(obj.shape))} repeats the same "
                    "memory; save it with .clone()"
                )
            return _array(obj, self._torch)
        if isinstance(obj, dict):
            return {self.of(key): self.of(value) for key, value in obj.items()}
        if isinstance(obj, list | tuple):
            values = [self.of(value) for value in obj]
            return values if isinstance(obj, list) else tuple(values)
        return obj


def _array(tensor: Any, torch: Any) -> np.ndarray:
    name = str(tensor.dtype).removeprefix("torch.")
    bits = EXTENSION_DTYPES.get(name)
    if bits is None:
        array = tensor.detach().numpy()
    else:
        carrier = getattr(torch, np.dtype(bits).name)
        array = tensor.detach().view(carrier).numpy().view(getattr(ml_dtypes, name))
    array.flags.writeable = False
    return array


# Writing.


def _tensors(obj: Any, torch: Any, seen: dict[tuple, Any]) -> Any:
    """Replaces arrays by tensors; arrays over the same memory become the same tensor."""
    if isinstance(obj, np.ndarray):
        key = (obj.ctypes.data, obj.shape, obj.strides, obj.dtype)
        if key not in seen:
            seen[key] = _tensor(obj, torch)
        return seen[key]
    if isinstance(obj, dict):
        return {key: _tensors(value, torch, seen) for key, value in obj.items()}
    if type(obj) in (list, tuple):
        return type(obj)(_tensors(value, torch, seen) for value in obj)
    if obj is None or type(obj) in (bool, int, float, str):
        return obj
    raise TypeError(f"a PyTorch file cannot hold a {type(obj).__name__} here")


def _tensor(array: np.ndarray, torch: Any) -> Any:
    array = np.asarray(array, order="C")
    bits = EXTENSION_DTYPES.get(array.dtype.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of read-only memory: nothing writes to the tensor
        if bits is None:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
