"""PyTorch's zip files: read and written bit for bit, and nothing in them is ever executed."""

import collections
import datetime
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from convert import torch_file

torch = pytest.importorskip("torch")

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
OTHERS = ("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


def archive(path, data_pkl, entries=(), **others):
    """A file of torch's layout around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", data_pkl)
        for name, data in {"version": b"3\n", **dict(entries), **others}.items():
            file.writestr(f"archive/{name}", data)
    return path


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def same_bits(array, tensor):
    """Equal to a tensor of torch in dtype, shape and every bit."""
    contiguous = tensor.detach().contiguous()
    raw = contiguous.reshape(-1).view(torch.uint8) if contiguous.numel() else contiguous
    assert str(tensor.dtype) == f"torch.{array.dtype}"
    assert tuple(tensor.shape) == array.shape
    assert raw.numpy().tobytes() == np.ascontiguousarray(array).tobytes()


# Reading what torch writes.


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, *OTHERS])
def test_reads_every_dtype(tmp_path, name):
    dtype = getattr(torch, name)
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    if name in FLOATS:
        x[0, 0, 0], x[0, 0, 1] = float("nan"), float("-inf")
    torch.save({"x": x}, tmp_path / "x.pt")
    same_bits(torch_file.read(tmp_path / "x.pt")["x"], x)


def test_reads_strides_offsets_and_shared_storages(tmp_path):
    base = torch.arange(60.0)
    matrix = base[7:55].reshape(6, 8)
    saved = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "every third": matrix[1::3, ::3],
        "expanded": base[3].expand(2, 5),
        "scalar": base[9],
        "empty": base[:0].reshape(0, 4),
        "parameter": torch.nn.Parameter(matrix),
        "of one": matrix[2:3],
    }
    torch.save(saved, tmp_path / "x.pt")
    read = torch_file.read(tmp_path / "x.pt")
    for name, tensor in saved.items():
        same_bits(read[name], tensor)
    assert np.shares_memory(read["matrix"], read["transposed"])
    assert read["transposed"].strides == (4, 32)


def test_arrays_are_read_only_and_mapped(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.full((1000,), 1.25), "empty": torch.zeros(0)}, path)
    read = torch_file.read(path)
    for array in read.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
    torch_file.release_pages(read["x"])
    data = path.read_bytes()
    at = data.index(struct.pack("<f", 1.25) * 1000)
    with path.open("r+b") as file:  # a mapping shows what the file holds now
        file.seek(at)
        file.write(struct.pack("<f", 2.5))
    assert read["x"][0] == 2.5


def test_reads_containers_and_keeps_the_rest_inert(tmp_path):
    module = torch.nn.Linear(3, 2)
    saved = {
        "state_dict": module.state_dict(),  # an OrderedDict with an attribute
        "defaultdict": collections.defaultdict(dict, {1: {"a": 2}}),
        "set": {1, 2},
        "slice": slice(1, 5, 2),
        "size": torch.Size([3, 4]),
        "complex": 2 + 3j,
        "nested": [({"k": (None, True, 1.5, "é", 2**70)},)],
        "wall clock": datetime.timedelta(seconds=90),
        "version": torch.__version__,
        "device": torch.device("cpu"),
        "numpy": np.random.default_rng(0).bit_generator.random_raw(3),
        "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "numpy scalar": np.float64(1.5),
        "dtype": torch.bfloat16,
        "bytes": b"ab",
    }
    torch.save(saved, tmp_path / "x.pt")
    read = torch_file.read(tmp_path / "x.pt")
    same_bits(read["state_dict"]["weight"], module.weight)
    assert list(read["state_dict"]) == ["weight", "bias"]
    for name in ("defaultdict", "set", "slice", "size", "complex", "nested", "bytes"):
        assert read[name] == saved[name], name
        assert type(read[name]) is {"defaultdict": dict, "size": tuple}.get(name, type(saved[name]))
    for name in ("wall clock", "version", "numpy", "numpy scalar"):
        assert type(read[name]) is torch_file.Stub, name
    assert type(read["rng"][1][1]) is torch_file.Stub
    assert read["rng"][0] == saved["rng"][0]
    same_bits(read["rng"][2], saved["rng"][2])


def test_releasing_pages_keeps_the_values(tmp_path):
    saved = {"a": torch.randn(300, 70), "b": torch.randn(5), "half": torch.randn(99).half()}
    saved["view"] = saved["a"][7:].t()
    torch.save(saved, tmp_path / "x.pt")
    read = torch_file.read(tmp_path / "x.pt")
    for _ in range(2):
        for name, tensor in saved.items():
            torch_file.release_pages(read[name])
            same_bits(read[name], tensor)
    with pytest.raises(AssertionError):
        torch_file.release_pages(np.ones(2000))


# Writing what torch reads.


def test_torch_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(5, 7)).astype(np.float32)
    matrix[0, 0] = np.float32("nan")
    obj = {
        "matrix": matrix,
        "transposed": matrix.T,
        "sliced": matrix[1:4, ::2],
        "bf16": matrix.astype(ml_dtypes.bfloat16),
        "half": matrix.astype(np.float16),
        "step": np.asarray(7, np.int32),
        "empty": np.zeros((0, 3), np.int64),
        "flags": np.asarray([True, False]),
        5: [1, -2, 2**40, -(2**70), 0.1, True, None, ("é", ())],
    }
    torch_file.write(tmp_path / "x.pt", obj)
    for mapped in (False, True):
        read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert list(read) == list(obj)
        assert read[5] == obj[5]
        for name, value in obj.items():
            if isinstance(value, np.ndarray):
                same_bits(value, read[name])
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.testzip() is None


def test_an_array_under_two_names_is_one_storage(tmp_path):
    x = np.arange(1000, dtype=np.float32)
    torch_file.write(tmp_path / "x.pt", {"embedding": x, "decoder": x, "view": x[:]})
    assert (tmp_path / "x.pt").stat().st_size < 2 * x.nbytes
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    read["embedding"][0] = 9
    assert read["decoder"][0] == read["view"][0] == 9


arrays = st.builds(
    lambda dtype, shape, seed: (
        np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from([np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16, np.int64)]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(0, 9),
)  # fmt: skip
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | arrays
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def plain(tree):
    if isinstance(tree, np.ndarray):
        return bits(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(plain(x) for x in tree)
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    return type(tree), tree


@given(tree=trees)
def test_read_gives_back_what_write_took(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "x.pt"
    torch_file.write(path, tree)
    assert plain(torch_file.read(path)) == plain(tree)


def test_storages_are_aligned(tmp_path):
    torch_file.write(tmp_path / "x.pt", {str(i): np.ones(i, np.float32) for i in range(1, 9)})
    for array in torch_file.read(tmp_path / "x.pt").values():
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("bad", [object(), np.float32(1), {1, 2}, np.zeros(2, object)])
def test_writes_only_plain_values(tmp_path, bad):
    with pytest.raises(TypeError, match="cannot hold|can't convert"):
        torch_file.write(tmp_path / "x.pt", {"good": np.ones(3), "bad": bad})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left"):
        torch_file.write(pathlib.Path("/dev/full"), {"x": np.ones(10**6)})


def test_asks_for_torch(tmp_path, monkeypatch):
    torch_file.write(tmp_path / "x.pt", {"x": np.ones(3)})
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(ImportError, match="expected torch 2.6 or newer, got 2.5.1"):
        torch_file.read(tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="^reading .pt files needs torch: pip install torch$"):
        torch_file.read(tmp_path / "x.pt")
    with pytest.raises(ImportError, match="^writing .pt files needs torch: pip install torch$"):
        torch_file.write(tmp_path / "y.pt", {})
    assert not (tmp_path / "y.pt").exists()


# Attacks: each would leave a mark if anything in the file ran.


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(mark):
    return Runs(os.system, f"touch {mark}")


def crafted(mark):
    """name -> (pickle, the name that must be refused)."""
    command = f"touch {mark}"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    code = f"open({str(mark)!r}, 'w').close()"
    python = b"X" + struct.pack("<I", len(code)) + code.encode()

    def dotted(*names):  # STACK_GLOBAL looks up attributes of attributes
        return b"\x80\x04" + b"".join(b"\x8c%c%s" % (len(n), n) for n in names) + b"\x93)R."

    return {
        "os.system": (pickle.dumps(touch(mark), 2), "system"),
        "os.system, protocol 4": (pickle.dumps(touch(mark), 4), "system"),
        "os.system, protocol 0": (pickle.dumps(touch(mark), 0), "system"),
        "eval": (b"\x80\x02c__builtin__\neval\n" + python + b"\x85R.", "eval"),
        "builtins.exec": (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + python + b"\x85R.", "exec"),
        "nested": (pickle.dumps({"a": [({"b": touch(mark)},)]}, 2), "system"),
        "inside arguments": (pickle.dumps(Runs(list, [touch(mark)]), 2), "system"),
        "INST": (b"(" + text + b"ios\nsystem\n.", "system"),
        "OBJ": (b"(cos\nsystem\n" + text + b"o.", "system"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.", "subprocess.Popen"),
        "getattr": (b"\x80\x02c__builtin__\ngetattr\n" + text + b"\x85R.", "getattr"),
        "an attribute of a function": (
            dotted(b"torch._utils", b"_rebuild_tensor_v2.__globals__.keys"),
            "_rebuild_tensor_v2.__globals__.keys",
        ),
        "an attribute of a class": (
            dotted(b"collections", b"OrderedDict.__init__.__globals__"),
            "OrderedDict.__init__",
        ),
        "an attribute of a stub": (dotted(b"datetime", b"timedelta.__new__"), "timedelta.__new__"),
        "a module": (b"\x80\x02ctorch\n_utils\n.", "torch._utils"),
        "pickle itself": (b"\x80\x02c_pickle\nloads\n.", "loads"),
        "numpy's loader": (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
        "torch's loader": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
        "torch.load": (b"\x80\x02ctorch\nload\n.", "torch.load"),
        "this reader": (b"\x80\x02cconvert.torch_file\nwrite\n.", "convert.torch_file"),
    }


@pytest.mark.parametrize("attack", crafted("x"))
def test_refuses_other_names_and_runs_nothing(tmp_path, attack):
    mark = tmp_path / "mark"
    data, name = crafted(mark)[attack]
    path = archive(tmp_path / "x.pt", data)
    with pytest.raises(ValueError, match="refused, nothing of it was run") as caught:
        torch_file.read(path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_attacks_work_on_an_ordinary_unpickler(tmp_path):
    """So that the test above could fail."""
    for name in ("os.system", "nested", "INST", "eval"):
        mark = tmp_path / name.replace(".", "")
        pickle.loads(crafted(mark)[name][0])
        assert mark.exists(), name


@pytest.mark.parametrize(
    "state",
    [
        # (None, slots) sets attributes; a dictionary is merged into __dict__.
        b"N}X\x0c\x00\x00\x00__defaults__)s\x86",
        b"N}X\x08\x00\x00\x00__call__NsX\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86",
        b"N}X\x05\x00\x00\x00_callNs\x86",
        b"N}X\x05\x00\x00\x00dtypeNs\x86",
        b"}X\x05\x00\x00\x00dtypeNs",
        b"(K\x01K\x02K\x03t",
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        b"torch._utils\n_rebuild_tensor_v2",
        b"torch\nFloatStorage",
        b"torch\nfloat32",
        b"collections\nOrderedDict",
        b"collections\ndefaultdict",
        b"torch\nSize",
        b"__builtin__\nset",
        b"datetime\ntimedelta",
        b"numpy\ndtype",
        b"composer.core.time\nTimestamp",
    ],
)
def test_a_name_cannot_be_altered(tmp_path, name, state):
    """BUILD on the name itself, not on what it makes."""
    path = archive(tmp_path / "x.pt", b"\x80\x02c" + name + b"\n" + state + b"b.")
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match="is damaged"):
        torch_file.read(path)
    good = tmp_path / "good.pt"
    torch_file.write(good, {"x": np.arange(3.0)})
    assert torch_file.read(good)["x"].tolist() == [0, 1, 2]
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert not set(vars(torch_file.Stub)) & {"dtype", "name", "_call", "a"}


@pytest.mark.parametrize("first", ["checker", "torch"])
def test_torch_refuses_what_the_checker_would(tmp_path, monkeypatch, first):
    """Two walls: a file that gets past the first is refused by torch's own unpickler."""
    mark = tmp_path / "mark"
    path = archive(tmp_path / "x.pt", crafted(mark)["os.system"][0])
    if first == "torch":
        monkeypatch.setattr(torch_file, "_check", lambda path: None)
    with pytest.raises(ValueError, match="posix.system") as caught:
        torch_file.read(path)
    assert "weights_only" not in str(caught.value)  # torch's advice to run the file anyway
    assert not mark.exists()


def test_a_stub_is_inert(tmp_path):
    data = b"\x80\x02cdatetime\ntimedelta\nK\x01\x85R}X\x01\x00\x00\x00aK\x02sb."
    stub = torch_file.read(archive(tmp_path / "x.pt", data))
    assert type(stub) is torch_file.Stub
    assert not isinstance(stub, datetime.timedelta)
    assert not vars(stub)


def test_a_stub_cannot_be_called(tmp_path):
    data = b"\x80\x02cdatetime\ntimedelta\nK\x01\x85RK\x02\x85R."
    with pytest.raises(ValueError, match="is damaged"):
        torch_file.read(archive(tmp_path / "x.pt", data))


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = archive(tmp_path_factory.mktemp("any") / "x.pt", b"\x80\x02" + data)
    try:
        torch_file.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


# Damage.


def tensor_pickle(*, kind=torch.FloatStorage, key="0", numel=6, offset=0, size=(6,), stride=(1,)):
    """The pickle of one tensor, with any numbers in it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", kind, key, "cpu", numel) if obj is storage else None

    storage, file = object(), io.BytesIO()
    hooks = collections.OrderedDict()
    tensor = Runs(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)
    Pickler(file, 2).dump(tensor)
    return file.getvalue()


def test_the_hand_made_tensor_is_right(tmp_path):
    path = archive(tmp_path / "x.pt", tensor_pickle(), {"data/0": bytes(24)})
    assert torch_file.read(path).tolist() == [0] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "Trying to resize"),
        ({"size": (7,)}, "Trying to resize"),
        ({"size": (2, 3), "stride": (4, 1)}, "Trying to resize"),
        ({"stride": (2,)}, "Trying to resize"),
        ({"stride": (2**62,)}, "is damaged: "),
        ({"offset": -1}, "invalid storage offset -1"),
        ({"size": (-6,)}, "is damaged: "),
        ({"stride": (-1,)}, "is damaged: "),
        ({"size": (2, 3)}, "unequal size length"),
        ({"size": (6.0,)}, "is damaged: "),
        ({"numel": 7}, "storage 0 expected 28 bytes, got 24"),
        ({"numel": -1}, "storage 0 expected -4 bytes, got 24"),
        ({"numel": "6"}, "external object that is not a storage"),
        ({"kind": torch.DoubleStorage}, "expected 48 bytes, got 24"),
        ({"kind": datetime.timedelta}, "external object that is not a storage"),
        ({"key": "1"}, "no entry 'data/1'"),
        ({"key": "../data.pkl"}, "no entry"),
    ],
)
def test_refuses_a_tensor_beyond_its_storage(tmp_path, changes, message):
    path = archive(tmp_path / "x.pt", tensor_pickle(**changes), {"data/0": bytes(24)})
    with pytest.raises(ValueError, match=message):
        torch_file.read(path)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_refuses_a_truncated_file(tmp_path, keep):
    path = tmp_path / "x.pt"
    torch_file.write(path, {"a": np.ones(500), "b": np.zeros((9, 9), np.float32)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated or damaged zip"):
        torch_file.read(path)


def test_refuses_a_storage_that_the_file_no_longer_holds(tmp_path):
    """A directory that is whole, of a file that is not."""
    path = archive(tmp_path / "x.pt", tensor_pickle(), {"data/0": bytes(24)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # of data/0
    data[entry + 20 : entry + 28] = struct.pack("<II", 10**6, 10**6)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="storage 0 expected 24 bytes, got 1000000"):
        torch_file.read(path)
    # The pickle and the directory agree, and both go beyond the end of the file.
    path = archive(tmp_path / "x.pt", tensor_pickle(numel=10**6, size=(10**6,)), {"data/0": b""})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 4 * 10**6, 4 * 10**6)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        torch_file.read(path)


def test_refuses_a_key_set_twice(tmp_path):
    pairs = b"(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u"
    data = b"\x80\x02ccollections\nOrderedDict\n)R" + pairs + b"."
    with pytest.raises(ValueError, match="sets the key 'a' twice"):
        torch_file.read(archive(tmp_path / "x.pt", data))


def test_says_what_to_do_with_a_legacy_file(tmp_path):
    legacy = tmp_path / "legacy.pt"
    torch.save({"x": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"legacy file.*before 1.6.*must be saved again: torch.save"
    ):
        torch_file.read(legacy)


def test_refuses_what_is_no_checkpoint(tmp_path):
    def read(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return torch_file.read(path)

    for name, data in {"empty": b"", "text": b"hello", "pickle": pickle.dumps({})}.items():
        with pytest.raises(ValueError, match="expected a zip file written by torch.save"):
            read(name, data)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match="has no data.pkl"):
        torch_file.read(tmp_path / "other.zip")
    with pytest.raises(ValueError, match="TorchScript"):
        torch_file.read(archive(tmp_path / "script.pt", b"\x80\x02N.", {"constants.pkl": b""}))
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read(archive(tmp_path / "big.pt", b"\x80\x02N.", byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(ValueError, match="compressed"):
        torch_file.read(tmp_path / "small.pt")
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "nowhere.pt")
