"""`Pretrained`: from_pretrained and save_pretrained for every model class."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from modernbert_jax.checkpoint.files import read_config
from modernbert_jax.checkpoint.hf import SafetensorsFolder, tied_copy, write_hf
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax
from modernbert_jax.checkpoint.params import check_keys, flatten, module_of, param_shapes
from modernbert_jax.config import DTYPES, ModernBertConfig
from modernbert_jax.weights import BACKBONE, HEADS, from_hf, to_hf, weight_of

# Arguments of transformers' from_pretrained that have no meaning here, and what to use instead.
UNSUPPORTED = {
    "attn_implementation": "not supported, each call chooses an implementation for its device; "
    "to force one, call model(..., attention=functools.partial("
    "modernbert_jax.attention.attention, implementation=NAME))",
    "device_map": "not supported, arrays go to jax's default device; use "
    "`with jax.default_device(d)` to load to another",
    "quantization_config": "not supported, weights are float32, bfloat16 or float16",
}


class Pretrained:
    """Adds from_pretrained and save_pretrained to a model class."""

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
        **config_changes: Any,
    ) -> Self:
        """Loads a Hugging Face folder, a hub id or an Orbax directory.

        dtype (or torch_dtype, torch's own types included): the dtype of computation, by default the
        file's. param_dtype: the dtype of the stored weights, by default `dtype`. The weights of
        another class's head are ignored; a head that the file lacks is initialized from `seed`,
        with one warning. ignore_mismatched_sizes: also initialize a head of different sizes.
        revision, cache_dir, local_files_only, token: passed to the hub. config_changes: fields of
        the configuration to replace (num_labels=3). trust_remote_code is accepted and ignored: code
        of a checkpoint is never run.
        Raises FileNotFoundError or OSError if there is no checkpoint, ValueError for keys or shapes
        that do not fit, TypeError for an argument that is not supported.
        """
        dtype = torch_dtype if dtype is None else dtype
        dtype = None if isinstance(dtype, str) and dtype == "auto" else dtype
        if type(dtype).__module__ == "torch":
            dtype = str(dtype).removeprefix("torch.")
        for name in UNSUPPORTED.keys() & config_changes.keys():
            raise TypeError(f"{name}: {UNSUPPORTED[name]}")
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
            config, tensors = loaded["config"], loaded["params"]
        else:
            config, tensors = read_config(folder)[0], SafetensorsFolder(folder)
        stored = _float_dtype(tensors)
        compute = _dtype_name("dtype", stored if dtype is None else dtype)
        keep = _dtype_name("param_dtype", compute if param_dtype is None else param_dtype)
        if compute == "float16" and jax.default_backend() == "cpu":
            warnings.warn(
                "dtype: float16 is slow on a CPU and overflows early; pass dtype='float32'",
                stacklevel=2,
            )
        config = config.replace(dtype=compute, param_dtype=keep, **config_changes)
        return _load(cls, config, tensors, seed, ignore_mismatched_sizes, os.fspath(folder))

    def eval(self) -> Self:
        """Returns the model: dropout is active only in calls with a dropout_key."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Returns the model: dropout is active only in calls with a dropout_key."""
        return self

    def to(self, *_: Any, **__: Any) -> Self:
        """Raises TypeError: jax's default device holds the arrays."""
        raise TypeError(f"to: {UNSUPPORTED['device_map']}; pass dtype to from_pretrained")

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        max_shard_size: int = 5 * 1024**3,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a Hugging Face folder that transformers loads.

        tokenizer: any object with save_pretrained; it is saved into the same folder.
        max_shard_size: in bytes. card: facts for the model card README.md (base_model, language,
        license, datasets, training {name: value} and more, see `card.model_card`). A README.md
        written by a person is kept. Raises ValueError for a fact that a card does not support.
        """
        tensors = {k: to_hf(k, v) for k, v in flatten(self).items()}  # type: ignore[arg-type]
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_hf(
            path,
            self.config,
            tensors,
            architecture=type(self).__name__,
            max_shard_size=max_shard_size,
            card=card,
        )


def _dtype_name(name: str, dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r}") from None


def _float_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """The dtype of the first weight, which is what "auto" means in transformers."""
    for key in tensors:
        dtype = np.asarray(tensors[key]).dtype
        if dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            return dtype
        raise ValueError(f"{key}: expected float32, bfloat16 or float16, got {dtype}")
    raise ValueError("weights: expected at least one tensor, got none")


def _load(
    cls: type,
    config: ModernBertConfig,
    tensors: Mapping[str, Any],
    seed: int,
    ignore_mismatched_sizes: bool,
    source: str,
) -> Any:
    """Builds `cls(config)` from Hugging Face tensors (a SafetensorsFolder) or our parameters."""
    shapes = {path: tuple(leaf.shape) for path, leaf in param_shapes(cls, config).items()}
    # Keys start with "model." in a checkpoint or class with a head, and do not in a bare encoder.
    bare_class = all(not k.startswith("model.") for k in shapes)
    bare_file = any(k.startswith(BACKBONE) for k in tensors)
    path_of = {}
    for path in shapes:
        if bare_class:
            path_of[path if bare_file else "model." + path] = path
        else:
            path_of[path.removeprefix("model.") if bare_file else path] = path

    tied_copy(config, tensors)
    in_backbone = lambda keys: {k for k in keys if not k.startswith(HEADS)}  # noqa: E731
    found = {path_of.get(key, key) for key in tensors}
    check_keys(source, in_backbone(found), in_backbone(shapes))

    hf = isinstance(tensors, SafetensorsFolder)
    expected = {k: weight_of(k).hf_shape(v) if hf else v for k, v in shapes.items()}
    shape_of = (
        tensors.shape if isinstance(tensors, SafetensorsFolder) else lambda k: tensors[k].shape
    )
    missing = [path for key, path in path_of.items() if key not in tensors]
    mismatched = [
        path
        for key, path in path_of.items()
        if path.startswith(HEADS)
        and key in tensors
        and ignore_mismatched_sizes
        and shape_of(key) != expected[path]
    ]
    fresh = missing + mismatched
    if fresh:
        warnings.warn(
            f"{cls.__name__}: {len(fresh)} weights of the head are new, train them before use "
            f"({source} has none that fit): {', '.join(fresh)}",
            stacklevel=3,
        )
    values = initialize(cls, config, seed, tuple(fresh)) if fresh else {}
    for key, path in path_of.items():
        if path in values:
            continue
        array = np.asarray(tensors[key])
        if hf:
            array = from_hf(path, array, shapes[path])
        elif array.shape != shapes[path]:
            raise ValueError(f"{path}: expected shape {shapes[path]}, got {array.shape}")
        values[path] = jnp.asarray(array, config.param_dtype)
    return module_of(cls, config, values)


def initialize(
    cls: type, config: ModernBertConfig, seed: int, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Returns the initial values of some parameters; the compiler drops the others."""

    def some() -> dict[str, jax.Array]:
        flat = flatten(cls(config, rngs=nnx.Rngs(seed)))
        return {path: flat[path] for path in paths}

    return jax.jit(some)()
