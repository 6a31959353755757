"""`Pretrained`: from_pretrained and save_pretrained for every model class."""

import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from modernbert_jax.attention import check as check_attention
from modernbert_jax.checkpoint.files import read_config
from modernbert_jax.checkpoint.hf import SafetensorsFolder, params_to_hf, tied_copy, write_hf
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax, orbax_shapes
from modernbert_jax.checkpoint.params import (
    Int8,
    check_dtypes,
    check_keys,
    check_sizes,
    dtypes_of,
    flatten,
    initialize,
    module_of,
    param_shapes,
    variables,
    widest_dtype,
    with_dtype,
)
from modernbert_jax.checkpoint.surgery import (
    check_layers,
    drop_layers,
    padded,
    resize_vocabulary,
)
from modernbert_jax.config import DTYPES, ModernBertConfig
from modernbert_jax.sharding import param_shardings, put, shard_params
from modernbert_jax.weights import (
    BACKBONE,
    EMBEDDING,
    HEADS,
    find_weight,
    from_hf,
    hf_shape,
    is_adapter,
)

# Arguments of transformers' from_pretrained that have no meaning here, and what to use instead.
UNSUPPORTED = {
    "attn_implementation": "not supported, each call chooses an implementation for its device; "
    "to force one, call model(..., attention=functools.partial("
    "modernbert_jax.attention.attention, implementation=NAME))",
    "device_map": "not supported, arrays go to jax's default device; use "
    "`with jax.default_device(d)` to load to another, or mesh= for several",
    "quantization_config": "not supported, weights are read as float32, bfloat16 or float16; "
    "modernbert_jax.quantize(model) makes them int8",
}
# Attributes of torch's and transformers' models, and what to use instead.
_ON_DEVICE = (
    f"{UNSUPPORTED['device_map'].removeprefix('not supported, ')}; pass dtype to from_pretrained"
)
_PARAMS = "nnx.state(model, nnx.Param) has the parameters"
_FREEZE = f"{_PARAMS}, and a filter freezes some: nnx.Optimizer(..., wrt=) and nnx.DiffState"
TORCH = {
    **dict.fromkeys(("to", "cuda", "cpu", "device"), _ON_DEVICE),
    **dict.fromkeys(("half", "bfloat16", "float"), "pass dtype to from_pretrained"),
    "dtype": "config.dtype is the one of computation, config.param_dtype that of the weights",
    **dict.fromkeys(("parameters", "named_parameters", "requires_grad_", "zero_grad"), _FREEZE),
    **dict.fromkeys(("state_dict", "load_state_dict"), f"{_PARAMS}; nnx.update replaces them"),
    "base_model": "the encoder is model.model",
    "gradient_checkpointing_enable": "call model(..., remat=True)",
    "generate": "an encoder cannot generate",
}


class Pretrained:
    """Adds from_pretrained, save_pretrained and changes of size to a model class.

    A class of your own derives from it and from nnx.Module. It takes (config, *, rngs), and sets
    self.config and self.model, a ModernBertModel; whatever else it makes is its head:

        class SpanHead(Pretrained, nnx.Module):
            def __init__(self, config, *, rngs):
                self.config = config
                self.model = ModernBertModel(config, rngs=rngs)
                self.spans = nnx.Linear(config.hidden_size, 2, rngs=rngs)

    from_pretrained then loads the encoder of any checkpoint, and names what is new in a warning.
    """

    config: ModernBertConfig

    if not TYPE_CHECKING:  # it would hide unknown attributes from a type checker

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, with advice for an attribute of torch's models."""
            if name in TORCH:
                raise AttributeError(f"{name}: not supported, {TORCH[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        config: ModernBertConfig | None = None,
        revision: str | None = None,
        seed: int = 0,
        ignore_mismatched_sizes: bool = False,
        mesh: Mesh | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        torch_dtype: Any = None,
        trust_remote_code: bool = False,
        **config_changes: Any,
    ) -> Self:
        """Loads a Hugging Face folder, a hub id or an Orbax directory.

        config: replaces the checkpoint's, dtypes included; `AutoConfig.from_pretrained` reads one.
        dtype (or torch_dtype, torch's own types included): the dtype of computation. The default is
        transformers 5's: the dtype in config.json, whatever the dtypes of the tensors are; if it
        states none, the tensors' dtype, or float32 if they differ. param_dtype: the dtype of the
        stored weights, by default `dtype`; each tensor is cast to it. A tensor in float64 is cast
        with one warning; one in another dtype (int8, float8) and a quantized model are refused.
        The weights of another class's head are ignored; a head that the file lacks is initialized
        from `seed`, with one warning. ignore_mismatched_sizes: also initialize a head of different
        sizes. mesh: the devices that share the model, as in `modernbert_jax.shard_params`; each
        weight is read straight to its devices, one at a time, so that the host never holds a
        complete copy. revision, cache_dir, local_files_only, token: passed to the hub.
        config_changes: fields of the configuration to replace; num_labels=3, or id2label={0: "no",
        1: "yes"}, which sets num_labels, too, with or without its reverse, label2id.
        trust_remote_code is accepted and ignored: code of a checkpoint is never run.
        Raises FileNotFoundError or OSError if there is no checkpoint, ValueError for a damaged one,
        for keys, shapes or dtypes that do not fit and for labels that disagree, TypeError for an
        argument that is not supported.
        """
        dtype = torch_dtype if dtype is None else dtype
        dtype = None if isinstance(dtype, str) and dtype == "auto" else dtype
        if type(dtype).__module__ == "torch":
            dtype = str(dtype).removeprefix("torch.")
        for name in UNSUPPORTED.keys() & config_changes.keys():
            raise TypeError(f"{name}: {UNSUPPORTED[name]}")
        if not isinstance(config, ModernBertConfig | None):
            raise TypeError(
                f"config: expected a ModernBertConfig of modernbert_jax, got "
                f"{type(config).__module__}.{type(config).__name__}; AutoConfig.from_pretrained "
                "reads one"
            )
        folder = resolve(
            path_or_repo,
            revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        tensors: Mapping[str, Any]
        if is_orbax(folder):
            split = None if mesh is None else param_shardings(orbax_shapes(folder), mesh)
            loaded = load_orbax(folder, shardings=split)
            own, tensors = loaded["config"], loaded["params"]
        else:
            own = read_config(folder)[0]
            tensors = SafetensorsFolder(folder, (config or own).tie_word_embeddings)
        check_dtypes(tensors, also=("float64",))
        config = config or with_dtype(own, folder, tensors)
        compute = _dtype_name("dtype", config.dtype if dtype is None else dtype)
        if param_dtype is None:
            param_dtype = config.param_dtype if dtype is None else compute
        keep = _dtype_name("param_dtype", param_dtype)
        if compute == "float16" and jax.default_backend() == "cpu":
            warnings.warn(
                "dtype: float16 is slow on a CPU and overflows early; pass dtype='float32'",
                stacklevel=2,
            )
        wide = [key for key, found in dtypes_of(tensors).items() if found == "float64"]
        if wide:
            warnings.warn(
                f"{folder}: {len(wide)} weights are float64 and become {keep}: "
                f"{', '.join(wide[:5])}{', ...' if len(wide) > 5 else ''}",
                stacklevel=2,
            )
        config = config.replace(dtype=compute, param_dtype=keep, **config_changes)
        # Now, because a kernel's first use on a device runs it, which a trace of the model cannot.
        device = None if mesh is None else mesh.local_devices[0]
        check_attention(device, dtype=compute, head_dim=config.head_dim)
        return _load(cls, config, tensors, seed, ignore_mismatched_sizes, mesh, os.fspath(folder))

    @classmethod
    def from_config(cls, config: ModernBertConfig, *, seed: int = 0) -> Self:
        """Returns a new model with weights initialized from `seed`: `cls(config, rngs=...)`."""
        return cls(config, rngs=nnx.Rngs(seed))  # type: ignore[call-arg]

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Returns the number of parameters; a tied decoder shares those of the embedding.

        int8 weights count as what they were.
        """
        params = variables(self) | variables(self, Int8)  # type: ignore[arg-type]
        return sum(
            param.size
            for path, param in params.items()
            if not (exclude_embeddings and path in (EMBEDDING, EMBEDDING.removeprefix("model.")))
        )

    def eval(self, **attributes: Any) -> Self:
        """Disables dropout, as `nnx.Module.eval` does, and returns the model."""
        super().eval(**attributes)  # type: ignore[misc]
        return self

    def train(self, mode: bool = True, **attributes: Any) -> Self:
        """Enables dropout, as `nnx.Module.train` does, and returns the model.

        mode: False is `eval()`, as in torch.
        """
        if not mode:
            return self.eval(**attributes)
        super().train(**attributes)  # type: ignore[misc]
        return self

    def get_input_embeddings(self) -> Any:
        """Returns the module of the token embeddings, whose `weight` is [V, D]."""
        encoder: Any = getattr(self, "model", self)
        return encoder.embeddings.tok_embeddings

    def resize_token_embeddings(
        self,
        n: int,
        pad_to_multiple_of: int | None = 64,
        mean_init: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        """Changes the number of tokens, in place, with the decoder and the configuration.

        n: the vocabulary's size, such as `len(tokenizer)`; it is rounded up to a multiple of
        pad_to_multiple_of (None: not rounded). Added tokens get the mean of all embeddings, around
        which transformers draws theirs (their bias is 0, or the mean of the biases if the decoder
        is not tied); with mean_init=False they are drawn from `seed` as in a new model. A smaller n
        removes the last tokens. Functions and optimizers that were made for the old shapes must be
        made again.
        Raises ValueError for an n that is no positive integer or removes pad_token_id.
        """
        size = padded(n, pad_to_multiple_of)
        new = None
        if not mean_init and size > self.config.vocab_size:
            bare = not hasattr(self, "model")
            path = EMBEDDING.removeprefix("model.") if bare else EMBEDDING
            grown = self.config.replace(vocab_size=size)
            new = initialize(type(self), grown, seed, (path,))[path]
        resize_vocabulary(self, n, pad_to_multiple_of, new)

    def drop_layers(self, indices: Iterable[int]) -> None:
        """Removes layers, in place; num_hidden_layers and layer_types of the configuration follow.

        indices: from 1 on, because layer 0, which has no attention norm, must stay the first. The
        others keep their kind of attention, and are numbered anew. Raises ValueError for an index
        that no layer has, and for 0.
        """
        drop_layers(self, indices)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        max_shard_size: int | str = 5 * 1024**3,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a Hugging Face folder that transformers loads.

        A parameter that ModernBERT does not have, one of your own subclass, is stored unchanged
        under its path. config.json states the dtype of the weights, float32 if they differ.
        tokenizer: any object with save_pretrained; it is saved into the same folder.
        max_shard_size: in bytes, or "5GB". card: facts for the model card README.md (base_model,
        language, license, datasets, training {name: value} and more, see `card.model_card`). A
        README.md written by a person is kept. Raises ValueError for a fact that a card does not
        support, and for parameters that `from_pretrained` of this class and configuration would
        refuse, and for state other than parameters that a file cannot hold, such as a BatchNorm's.
        """
        check_layers(self)
        params = flatten(self)  # type: ignore[arg-type]
        kinds = {
            type(variable).__name__
            for path, variable in variables(self, nnx.Variable).items()  # type: ignore[arg-type]
            if not isinstance(variable, nnx.Param | nnx.RngState | nnx.Intermediate)
            and not is_adapter(path)  # a merged one, whose values the weights have
        }
        if kinds:
            raise ValueError(
                f"model: expected parameters only, got {', '.join(sorted(kinds))}, which a "
                "checkpoint does not hold; remove these parts before saving"
            )
        tensors = params_to_hf(type(self), self.config, params)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_hf(
            path,
            self.config.replace(param_dtype=widest_dtype(tensors)),
            tensors,
            architecture=type(self).__name__,
            max_shard_size=max_shard_size,
            card=card,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        commit_message: str = "Upload ModernBERT",
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = 5 * 1024**3,
        card: Mapping[str, Any] | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes in one commit and returns the commit's address.

        repo_id: "owner/name", created if it does not exist; private applies only then. revision:
        the branch. token: None uses the one of `hf auth login`. Raises as `save_pretrained`
        does, before anything is sent, and the errors of huggingface_hub.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, tokenizer=tokenizer, max_shard_size=max_shard_size, card=card
            )
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
            )
        return commit.commit_url


def _dtype_name(name: str, dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r}") from None


def _load(
    cls: type,
    config: ModernBertConfig,
    tensors: Mapping[str, Any],
    seed: int,
    ignore_mismatched_sizes: bool,
    mesh: Mesh | None,
    source: str,
) -> Any:
    """Builds `cls(config)` from Hugging Face tensors (a SafetensorsFolder) or our parameters."""
    check_sizes(config, tensors)
    leaves = param_shapes(cls, config)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    shardings = None if mesh is None else param_shardings(leaves, mesh)
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
    # The parameters that a file may lack: those of the head, and those of a class of your own.
    own = {k for k in shapes if find_weight(k) is None}
    in_backbone = lambda keys: {k for k in keys if not k.startswith(HEADS)} - own  # noqa: E731
    found = {path_of.get(key, key) for key in tensors}
    check_keys(source, in_backbone(found), in_backbone(shapes))

    hf = isinstance(tensors, SafetensorsFolder)
    expected = {k: hf_shape(k, v) if hf else v for k, v in shapes.items()}
    shape_of = (
        tensors.shape if isinstance(tensors, SafetensorsFolder) else lambda k: tensors[k].shape
    )
    missing = [path for key, path in path_of.items() if key not in tensors]
    mismatched = [
        path
        for key, path in path_of.items()
        if (path.startswith(HEADS) or path in own)
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
        array = tensors[key]
        if hf:
            array = from_hf(path, array, shapes[path])
        elif array.shape != shapes[path]:
            raise ValueError(f"{path}: expected shape {shapes[path]}, got {array.shape}")
        if shardings is not None and isinstance(array, np.ndarray):
            values[path] = put(np.asarray(array, jnp.dtype(config.param_dtype)), shardings[path])
        else:
            values[path] = jnp.asarray(array, config.param_dtype)
    model = module_of(cls, config, values, seed)
    return model if mesh is None else shard_params(model, mesh)  # moves what is new
