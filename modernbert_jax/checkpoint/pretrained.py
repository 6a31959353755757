"""Checkpoints: HF folders, hub ids and Orbax directories, in and out of the modules.

A parameter's path in a module is its HF key ("layers.3.attn.Wqkv.weight"), so the key table below
says only which way round each tensor is stored. Orbax layout, owned by this file:

    DIR/params/  DIR/optimizer/{step,mu,nu}  DIR/data/  DIR/config.json  DIR/tokenizer.json ...

`config.json` is written last: a directory without it is not whole and is refused.
Nothing that is read is executed: there is no pickle here.
"""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1 as ocp

from modernbert_jax.card import CARD_FILE, MARK, model_card
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.weights import BACKBONE, DECODER, EMBEDDING, HEADS, from_hf, to_hf, weight_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def param_shapes(cls: type, config: ModernBertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter of `cls(config)`, without making one."""
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(module).items()}


def flatten(module: nnx.Module) -> dict[str, Any]:
    """Path -> value of every parameter of a module."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def module_of(cls: type, config: ModernBertConfig, params: Mapping[str, Any]) -> Any:
    """The module `cls(config)` with the parameters {path: array}; works under jit."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    flat = {
        path: param.replace(params[".".join(map(str, path))])
        for path, param in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}: the tree that Orbax stores."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `unflatten`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(
            flatten_tree(value, path + ".") if isinstance(value, Mapping) else {path: value}
        )
    return flat


def hf_to_params(
    config: ModernBertConfig, tensors: Mapping[str, np.ndarray], cls: type | None = None
) -> dict[str, np.ndarray]:
    """HF tensors as parameters {path: array}, dtype kept; `cls` is guessed from the keys.

    A decoder.weight that repeats the tied embedding is dropped. Raises ValueError that lists
    unknown keys, missing keys, or a shape with expected and got.
    """
    cls = cls or class_of(tensors, config)
    return {k: from_hf(k, tensors[k], s) for k, s in _checked(config, tensors, cls).items()}


def params_to_hf(
    config: ModernBertConfig, params: Mapping[str, Any], *, in_place: bool = False
) -> dict[str, np.ndarray]:
    """Parameters {path: array} as HF tensors. Raises ValueError as `hf_to_params` does.

    in_place: the result takes over the memory of `params` (NumPy arrays that can be written to),
    so that there is never a second copy of all weights.
    """
    shapes = param_shapes(class_of(params, config), config)
    _refuse("parameters", set(params) - set(shapes), set(shapes) - set(params))
    for key, array in params.items():
        if tuple(array.shape) != tuple(shapes[key].shape):
            raise ValueError(
                f"{key}: expected shape {tuple(shapes[key].shape)}, got {tuple(array.shape)}"
            )
    tensors = {}
    for key, array in params.items():
        tensors[key] = to_hf(key, array)
        if in_place:
            memory = array.reshape(tensors[key].shape)
            memory[...] = tensors[key]
            tensors[key] = memory
    return tensors


def _checked(config, tensors, cls) -> dict[str, tuple[int, ...]]:
    shapes = {k: tuple(v.shape) for k, v in param_shapes(cls, config).items()}
    found = set(tensors) - _tied_copy(config, tensors)
    _refuse("weights", found - set(shapes), set(shapes) - found)
    return shapes


def _tied_copy(config: ModernBertConfig, tensors: Mapping[str, np.ndarray]) -> set[str]:
    """{"decoder.weight"} where the file repeats the tied embedding."""
    if not config.tie_word_embeddings or not {DECODER, EMBEDDING} <= set(tensors):
        return set()
    if not np.array_equal(tensors[DECODER], tensors[EMBEDDING], equal_nan=False):
        raise ValueError(
            "decoder.weight: expected the same values as the embedding (tie_word_embeddings is "
            "true), got others; set tie_word_embeddings to false in config.json to keep both"
        )
    return {DECODER}


def _refuse(what: str, unknown: set[str], missing: set[str]) -> None:
    if unknown or missing:
        parts = [
            f"{name} keys: {', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
            for name, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        raise ValueError(f"{what} do not fit the configuration; {'; '.join(parts)}")


def class_of(keys: Mapping[str, Any], config: ModernBertConfig) -> type:
    """The module class that a set of keys belongs to, helped by config.json's `architectures`."""
    from modernbert_jax import heads, model

    if any(k.startswith(BACKBONE) for k in keys):
        return model.ModernBertModel
    if any(k.startswith("classifier.") for k in keys):
        names = json.loads(config.hf_extra).get("architectures") or []
        if "ModernBertForMultipleChoice" in names:
            return heads.ModernBertForMultipleChoice
        for name in ("TokenClassification", "QuestionAnswering"):
            if f"ModernBertFor{name}" in names:
                return getattr(heads, f"ModernBertFor{name}")
        return heads.ModernBertForSequenceClassification
    return heads.ModernBertForMaskedLM


# HF folders.


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The tensors of model.safetensors, or of the shards that an index names, read one by one.

    Raises FileNotFoundError without weights, ValueError for a truncated file, an index that leaves
    the folder or a key that the index promises and no shard has.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = pathlib.Path(folder)
        if (folder / WEIGHTS_FILE).exists():
            files, index = [WEIGHTS_FILE], None
        elif (folder / INDEX_FILE).exists():
            index = read_index(folder / INDEX_FILE)
            files = sorted(set(index.values()))
        else:
            raise FileNotFoundError(
                f"{folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; "
                "`python -m convert from-hf` reads pytorch_model.bin"
            )
        # A file is opened for each read: an open one would keep all that was read in memory.
        self._where: dict[str, pathlib.Path] = {}
        for name in files:
            try:
                with safetensors.safe_open(folder / name, "np") as handle:
                    keys = list(handle.keys())
            except FileNotFoundError:
                raise FileNotFoundError(f"{folder / name}: named by the index, not found") from None
            except Exception as error:  # safetensors raises its own type; the file is at fault
                message = f"{folder / name}: not a whole safetensors file: {error}"
                raise ValueError(message) from None
            for key in keys:
                if index is not None and index.get(key) != name:
                    raise ValueError(
                        f"{folder / name}: {key}: expected in {index.get(key)} by the index, "
                        f"found in {name}"
                    )
                if key in self._where:
                    raise ValueError(f"{folder / name}: {key} is set twice")
                self._where[key] = folder / name
        if index is not None and set(index) - set(self._where):
            missing = sorted(set(index) - set(self._where))
            raise ValueError(f"{folder / INDEX_FILE}: no shard has {', '.join(missing[:5])}")

    def __getitem__(self, key: str) -> np.ndarray:
        with safetensors.safe_open(self._where[key], "np") as handle:
            return handle.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        with safetensors.safe_open(self._where[key], "np") as handle:
            return tuple(handle.get_slice(key).get_shape())


def read_index(path: pathlib.Path) -> dict[str, str]:
    """{key: file} of an index file; file names that leave the folder are refused."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a weight_map, got {error!r}") from None
    for name in set(names.values()):
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{path}: expected plain file names, got {name!r}")
    return names


def read_safetensors(folder: str | os.PathLike[str]) -> SafetensorsFolder:
    """The tensors of an HF folder, as a mapping that reads each when it is asked for."""
    return SafetensorsFolder(folder)


def write_hf(
    folder: str | os.PathLike[str],
    config: ModernBertConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int = 5 * 1024**3,
    architecture: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes HF's layout: config.json, weights (or shards with an index), tokenizer, README.md.

    `max_shard_size` in bytes. card: facts for the README.md, see `card.model_card`. Weights are
    written first and config.json last, each file under a temporary name until it is whole; weight
    files of an earlier save are removed.
    """
    folder = pathlib.Path(folder)
    data = config.to_dict()
    data["architectures"] = [architecture or class_of(tensors, config).__name__]
    text = model_card(data, sum(t.size for t in tensors.values()), card)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    n = len(shards)
    names = (
        [WEIGHTS_FILE]
        if n == 1
        else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    )
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name, keys in zip(names, shards, strict=True):
        part = {k: np.ascontiguousarray(tensors[k]) for k in keys}
        temporary = folder / f".{name}.tmp"
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(part, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        temporary.replace(folder / name)
    if n > 1:
        weight_map = {k: name for name, keys in zip(names, shards, strict=True) for k in keys}
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(tokenizer_dir, folder)
    _put_card(folder / CARD_FILE, text)
    write_text(folder / CONFIG_FILE, json.dumps(data, indent=2) + "\n")


def write_card(folder: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Writes the README.md of an HF folder anew, of any encoder, with these facts.

    Raises FileNotFoundError where it holds no model, ValueError as `card.model_card` does.
    """
    folder = pathlib.Path(folder)
    data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = read_safetensors(folder)
    parameters = sum(int(np.prod(tensors.shape(key))) for key in tensors)
    _put_card(folder / CARD_FILE, model_card(data, parameters, card))


def _put_card(path: pathlib.Path, text: str) -> None:
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)


def _path(path: str | os.PathLike[str]) -> Any:
    """An absolute path; one of another kind (etils' epath: gs://...) as it is."""
    return pathlib.Path(path).absolute() if isinstance(path, str | pathlib.Path) else path


def remove_tree(folder: Any) -> None:
    """Removes a directory with all that it holds; pathlib's or epath's."""
    folder.rmtree() if hasattr(folder, "rmtree") else shutil.rmtree(folder)


def write_text(path: Any, text: str) -> None:
    """Writes a whole file or nothing; pathlib's path or epath's."""
    write_bytes(path, text.encode())


def write_bytes(path: Any, content: bytes) -> None:
    """Writes a whole file or nothing; pathlib's path or epath's."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def copy_tokenizer(source: str | os.PathLike[str] | None, folder: Any) -> None:
    """Copies the tokenizer files that `source` has, tokenizer.json last; None copies nothing."""
    if source is None:
        return
    for name in reversed(TOKENIZER_FILES):
        path = _path(source) / name
        if path.exists() and path != folder / name:
            write_bytes(folder / name, path.read_bytes())


# Orbax directories.


def _orbax_context(largest_bytes: int, copy: bool = False) -> ocp.Context:
    # Uncompressed, at most the largest leaf in flight, and a copy of NumPy leaves only for a save
    # that goes on in the background: the defaults peak at 2.4 to 3.3 times the checkpoint's size in
    # memory.
    limit = max(largest_bytes, 64 * 1024**2)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = copy
    context.memory.write_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    return context


def save_orbax(folder: str | os.PathLike[str], **content: Any) -> None:
    """Writes the Orbax layout into a new directory; config.json comes last and makes it whole.

    Takes what `start_save_orbax` takes, raises what it raises, and returns when all is written.
    """
    start_save_orbax(folder, in_turn=True, **content)()


def start_save_orbax(
    folder: str | os.PathLike[str],
    *,
    config: ModernBertConfig,
    params: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    data: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    in_turn: bool = False,
) -> Callable[[], None]:
    """Takes the arrays off the devices and writes in the background; the result waits and commits.

    params: {path: array}. optimizer: {"step": int, "mu": {path: array}, "nu": {path: array}}.
    data: the position of a training run, plain JSON, or a function that gives it when the arrays
    are written. in_turn: one tree after the other, which takes less memory and leaves nothing to
    the background. Every process of a job calls this and the result; the first one writes what is
    not an array. Raises FileExistsError where `folder` is a
    whole checkpoint already, OSError (from the result, too) where it cannot be written.
    """
    root = _path(folder)
    first = jax.process_index() == 0
    if (root / CONFIG_FILE).exists():
        raise FileExistsError(f"{root}: expected a new directory, found a checkpoint")
    if first:
        if root.exists():
            remove_tree(root)  # an unfinished save of the same step
        root.mkdir(parents=True)
    trees: dict[str, Any] = {"params": unflatten(params)}
    if optimizer is not None:
        trees["optimizer"] = {
            "step": np.asarray(optimizer["step"], np.int32),
            "mu": unflatten(optimizer["mu"]),
            "nu": unflatten(optimizer["nu"]),
        }
    waiting = []
    for name, tree in trees.items():
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree))
        with _orbax_context(largest, copy=not in_turn):
            waiting.append(ocp.save_async(str(root / name), tree))
        if in_turn:
            waiting.pop().result()

    def finish() -> None:
        for response in waiting:
            response.result()
        if not first:
            return
        if data is not None:
            values = data() if callable(data) else data
            (root / "data").mkdir()
            write_text(root / "data" / "state.json", json.dumps(values, indent=2) + "\n")
        copy_tokenizer(tokenizer_dir, root)
        names = {"architectures": [class_of(params, config).__name__]}
        write_text(root / CONFIG_FILE, json.dumps(config.to_dict() | names, indent=2) + "\n")

    return finish


def load_orbax(
    folder: str | os.PathLike[str],
    optimizer: bool = False,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"config", "params" {path: array}, "optimizer" (asked for, else None), "data" (or None)}.

    The arrays are NumPy's, or with `shardings` {path: sharding} jax's, each read straight to where
    it belongs. Raises FileNotFoundError where the directory is no whole checkpoint or lacks the
    optimizer.
    """
    root = _path(folder)
    if not (root / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{root}: expected a whole checkpoint (params/ and {CONFIG_FILE}), found no "
            f"{CONFIG_FILE}"
        )
    out: dict[str, Any] = {"config": ModernBertConfig.from_json(root / CONFIG_FILE)}
    out["params"] = _restore(root / "params", shardings)
    out["optimizer"] = out["data"] = None
    if optimizer:
        if not (root / "optimizer").exists():
            raise FileNotFoundError(f"{root}: no optimizer/ in this checkpoint")
        where = {f"{m}.{k}": s for m in ("mu", "nu") for k, s in (shardings or {}).items()}
        state = _restore(root / "optimizer", where)
        out["optimizer"] = {"step": int(state["step"])} | {
            moment: {k[3:]: v for k, v in state.items() if k.startswith(moment + ".")}
            for moment in ("mu", "nu")
        }
    state_file = root / "data" / "state.json"
    if state_file.exists():
        out["data"] = json.loads(state_file.read_text(encoding="utf-8"))
    return out


def _restore(folder: Any, shardings: Mapping[str, Any] | None) -> dict[str, Any]:
    """{path: array} of one tree."""
    metadata = ocp.metadata(str(folder)).metadata
    parts: list[dict[str, Any]] = [{}]  # read in turn: all at once takes twice the memory
    size = largest = 0
    for path, leaf in flatten_tree(metadata).items():
        nbytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        largest = max(largest, nbytes)
        if parts[-1] and size + nbytes > 128 * 1024**2:
            parts.append({})
            size = 0
        parts[-1][path] = (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
            if shardings and path in shardings
            else np.empty((0,), leaf.dtype)
        )
        size += nbytes
    flat: dict[str, Any] = {}
    context = _orbax_context(largest)
    context.pytree.loading.partial_load = True
    with context:
        for part in parts:
            flat |= flatten_tree(ocp.load(str(folder), unflatten(part)))
    return flat


def is_orbax(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory is laid out as `save_orbax` does."""
    return (_path(folder) / "params").is_dir()


# from_pretrained, save_pretrained.


def resolve(
    path_or_repo: str | os.PathLike[str], revision: str | None = None, **hub: Any
) -> pathlib.Path:
    """A local folder as it is; a hub id through huggingface_hub (HF_HUB_OFFLINE is heeded)."""
    path = pathlib.Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(path_or_repo)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{text}: expected a checkpoint folder or a hub id, found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = [CONFIG_FILE, "model*.safetensors", INDEX_FILE, *TOKENIZER_FILES]
        return pathlib.Path(
            snapshot_download(text, revision=revision, allow_patterns=patterns, **hub)
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{text}: no such folder and no hub id: {error}") from None
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise OSError(
            f"{text}: not a local folder, and the hub gave {type(error).__name__}: {first}"
        ) from error


# What transformers' from_pretrained takes, and what stands for it here.
NOT_LOADED = {
    "attn_implementation": "expected none, a call chooses by the device; to insist: model(..., "
    "attention=functools.partial(modernbert_jax.attention.attention, implementation=NAME))",
    "device_map": "expected none, arrays go to jax's default device; `with jax.default_device(d)` "
    "loads to another",
    "quantization_config": "expected none, weights are float32, bfloat16 or float16",
}


class Pretrained:
    """from_pretrained and save_pretrained, for every model class."""

    config: ModernBertConfig

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        revision: str | None = None,
        seed: int = 0,
        ignore_mismatched_sizes: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        torch_dtype: Any = None,
        trust_remote_code: bool = False,
        **changes: Any,
    ) -> Self:
        """Loads an HF folder, a hub id or an Orbax directory.

        dtype (or torch_dtype, also torch's own): computes; by default the file's. param_dtype:
        stores; by default `dtype`. Weights of another class's head are left out; a head that the
        file lacks starts from `seed`, with one warning. ignore_mismatched_sizes: the same for a
        head of other sizes. revision, cache_dir, local_files_only, token: of the hub. Further
        keywords replace fields of the config (num_labels=3). trust_remote_code is taken because
        snippets hold it: no code of a checkpoint is ever run.
        Raises FileNotFoundError or OSError where nothing can be had, ValueError for keys or shapes
        that do not fit.
        """
        dtype = torch_dtype if dtype is None else dtype
        dtype = None if isinstance(dtype, str) and dtype == "auto" else dtype
        if type(dtype).__module__ == "torch":
            dtype = str(dtype).removeprefix("torch.")
        for name in NOT_LOADED.keys() & changes.keys():
            raise TypeError(f"{name}: {NOT_LOADED[name]}")
        folder = resolve(
            path_or_repo,
            revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        tensors: Mapping[str, Any]
        if is_orbax(folder):
            loaded = load_orbax(folder)
            config, tensors, hf = loaded["config"], loaded["params"], False
        else:
            if not (folder / CONFIG_FILE).exists():
                raise FileNotFoundError(f"{folder}: expected {CONFIG_FILE}, found none")
            config = ModernBertConfig.from_json(folder / CONFIG_FILE)
            tensors, hf = read_safetensors(folder), True
        stored = _float_dtype(tensors)
        compute = jnp.dtype(stored if dtype is None else dtype).name
        keep = jnp.dtype(compute if param_dtype is None else param_dtype).name
        if compute == "float16" and jax.default_backend() == "cpu":
            warnings.warn(
                "dtype: float16 is slow on a CPU and overflows early; pass dtype='float32'",
                stacklevel=2,
            )
        config = config.replace(dtype=compute, param_dtype=keep, **changes)
        return _fill(cls, config, tensors, hf, seed, ignore_mismatched_sizes, os.fspath(folder))

    def eval(self) -> Self:
        """Itself, for snippets: without a dropout_key nothing is ever dropped."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Itself, for snippets: a call with a dropout_key drops."""
        return self

    def to(self, *_: Any, **__: Any) -> Self:
        """Raises TypeError: arrays are where jax's default device is."""
        raise TypeError(f"to: {NOT_LOADED['device_map']}; dtype is for from_pretrained")

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        max_shard_size: int = 5 * 1024**3,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an HF folder that transformers loads: config.json, model.safetensors (or shards).

        tokenizer: anything with save_pretrained, written beside. max_shard_size in bytes. card:
        facts for README.md, the model card: base_model, language, license, datasets, training
        {name: value} and others, see `card.model_card`. A README.md that a person wrote stays.
        Raises ValueError with one line for a fact that a card does not take.
        """
        tensors = {k: to_hf(k, v) for k, v in flatten(self).items()}  # type: ignore[arg-type]
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_hf(
            path,
            self.config,
            tensors,
            max_shard_size=max_shard_size,
            architecture=type(self).__name__,
            card=card,
        )


def _float_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """The dtype of the first weight, as transformers' "auto"."""
    for key in tensors:
        dtype = np.asarray(tensors[key]).dtype
        if dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            return dtype
        raise ValueError(f"{key}: expected float32, bfloat16 or float16, got {dtype}")
    raise ValueError("weights: expected at least one tensor, got none")


def _fill(cls, config, tensors, hf, seed, ignore_mismatched_sizes, source) -> Any:
    bare_class = all(not k.startswith("model.") for k in param_shapes(cls, config))
    bare_file = any(k.startswith(BACKBONE) for k in tensors)

    def key_in_file(path: str) -> str:
        if bare_class:
            return path if bare_file else "model." + path
        return path.removeprefix("model.") if bare_file else path

    shapes = param_shapes(cls, config)
    wanted = {key_in_file(path): path for path in shapes}
    unknown = {k for k in tensors if k not in wanted and not k.startswith(HEADS)}
    _tied_copy(config, tensors)
    missing = [path for key, path in wanted.items() if key not in tensors]
    _refuse(source, unknown, {path for path in missing if not path.startswith(HEADS)})
    mismatched = [
        path
        for key, path in wanted.items()
        if path.startswith(HEADS)
        and key in tensors
        and ignore_mismatched_sizes
        and _shape(tensors, key)
        != (weight_of(path).hf_shape(shapes[path].shape) if hf else shapes[path].shape)
    ]
    fresh = missing + mismatched
    if fresh:
        warnings.warn(
            f"{cls.__name__}: {len(fresh)} weights of the head are new, train them before use "
            f"({source} has none that fit): {', '.join(fresh)}",
            stacklevel=3,
        )
    values = _initialised(cls, config, seed, tuple(fresh)) if fresh else {}
    for key, path in wanted.items():
        if path in values:
            continue
        array, shape = np.asarray(tensors[key]), tuple(shapes[path].shape)
        if hf:
            array = from_hf(path, array, shape)
        elif array.shape != shape:
            raise ValueError(f"{path}: expected shape {shape}, got {array.shape}")
        values[path] = jnp.asarray(array, config.param_dtype)
    return module_of(cls, config, values)


def _shape(tensors: Mapping[str, Any], key: str) -> tuple[int, ...]:
    return tensors.shape(key) if isinstance(tensors, SafetensorsFolder) else tensors[key].shape


def _initialised(cls, config, seed: int, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    """Fresh values of some parameters only; the compiler drops the rest."""

    def some():
        flat = flatten(cls(config, rngs=nnx.Rngs(seed)))
        return {path: flat[path] for path in paths}

    return jax.jit(some)()
