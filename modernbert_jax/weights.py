"""One row per weight of ModernBERT: its name, its axes and how Hugging Face stores it.

A parameter's path in a module is its Hugging Face key ("layers.3.attn.Wqkv.weight"). Everything
that depends on which weight a tensor is follows from its row: the shape and orientation in a
Hugging Face file, sharding, weight decay, norms by kind, Composer's keys.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from modernbert_jax.config import ModernBertConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """A row of the table.

    name: the Hugging Face key in a model with a head, with N for the layer index. axes: one letter
    per axis of our parameter, in the letters of `modernbert_jax/__init__.py`; T counts the parts of
    a fused projection (query, key and value, or the two halves of GeGLU), E is the output size of
    the head. inputs: how many leading axes a linear layer contracts; 0 for everything else.
    """

    name: str
    axes: str
    inputs: int = 0

    @property
    def kind(self) -> str:
        """The group that metrics report together, such as "attn.Wqkv" or "norms"."""
        stem = self.name.rpartition(".")[0]
        if stem.endswith("norm"):
            return "norms"
        if stem.endswith("tok_embeddings"):
            return "embeddings"
        if ".layers.N." in stem:
            return stem.partition(".layers.N.")[2]
        return stem.partition(".")[0]

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.name.endswith(".weight") and len(self.axes) > 1

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in a Hugging Face file of a parameter of `shape`.

        Hugging Face stores a linear layer as [out, in] and flattens the axes of each side.
        """
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (math.prod(shape),) if self.name.endswith(".bias") else shape


def _norm(stem: str) -> tuple[Weight, Weight]:
    return Weight(f"{stem}.weight", "D"), Weight(f"{stem}.bias", "D")


def _linear(stem: str, axes: str, inputs: int = 1) -> tuple[Weight, Weight]:
    return Weight(f"{stem}.weight", axes, inputs), Weight(f"{stem}.bias", axes[inputs:])


# In the order in which ModernBERT's own training code registers them. Biases exist where the
# configuration turns them on, the decoder's weight where it is not tied to the embedding.
WEIGHTS: tuple[Weight, ...] = (
    Weight("model.embeddings.tok_embeddings.weight", "VD"),
    *_norm("model.embeddings.norm"),
    *_norm("model.layers.N.attn_norm"),
    *_linear("model.layers.N.attn.Wqkv", "DTHK"),
    *_linear("model.layers.N.attn.Wo", "HKD", inputs=2),
    *_norm("model.layers.N.mlp_norm"),
    *_linear("model.layers.N.mlp.Wi", "DTF"),
    *_linear("model.layers.N.mlp.Wo", "FD"),
    *_norm("model.final_norm"),
    *_linear("head.dense", "DE"),
    *_norm("head.norm"),
    Weight("decoder.weight", "VD"),
    Weight("decoder.bias", "V"),
    *_linear("classifier", "DE"),
)
BACKBONE = ("embeddings.", "layers.", "final_norm.")  # keys of a checkpoint without a head
HEADS = ("head.", "decoder.", "classifier.")
EMBEDDING, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"

_BY_NAME = {row.name: row for row in WEIGHTS}
# The factors of a linear layer's LoRA adapter have the names of PEFT, and rows that follow from the
# layer's own: R is the rank.
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


@functools.lru_cache(maxsize=4096)
def find_weight(path: str) -> Weight | None:
    """The row of a parameter's path, with or without "model."; None if ModernBERT has no such."""
    if path.startswith(BACKBONE):
        path = "model." + path
    name = re.sub(r"\.layers\.(0|[1-9]\d*)\.", ".layers.N.", path)
    if (factor := _FACTOR.fullmatch(name)) is None:
        return _BY_NAME.get(name)
    row = _BY_NAME.get(f"{factor[1]}.weight")
    if row is None or not row.inputs:
        return None
    inputs, outputs = row.axes[: row.inputs], row.axes[row.inputs :]
    return (
        Weight(name, inputs + "R", row.inputs)
        if factor[2] == "A"
        else Weight(name, "R" + outputs, 1)
    )


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is that of a factor of a LoRA adapter."""
    return bool(_FACTOR.fullmatch(path)) and find_weight(path) is not None


def weight_of(path: str) -> Weight:
    """The row of a parameter's path. Raises ValueError if ModernBERT has no such parameter."""
    row = find_weight(path)
    if row is None:
        raise ValueError(f"{path}: expected a parameter of ModernBERT")
    return row


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter. Raises ValueError as `weight_of` does."""
    return weight_of(path).decays


def check_axes(path: str, shape: tuple[int, ...], config: ModernBertConfig) -> None:
    """Raises ValueError if a parameter has a name of the table and other axes than its row."""
    row = find_weight(path)
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "K": config.head_dim,
    }
    axes = [(axis, sizes.get(axis)) for axis in row.axes] if row else []
    if row and (
        len(axes) != len(shape)
        or any(size not in (None, n) for (_, size), n in zip(axes, shape, strict=True))
    ):
        expected = ", ".join(str(size or axis) for axis, size in axes)
        raise ValueError(
            f"{path}: expected shape ({expected}), got {shape}; a parameter of another kind needs "
            "another name"
        )


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a Hugging Face file of a parameter of `shape`."""
    row = find_weight(path)
    return row.hf_shape(shape) if row else shape


def to_hf(path: str, array: Any) -> np.ndarray:
    """A parameter as Hugging Face stores it: contiguous, dtype unchanged.

    A parameter that ModernBERT does not have, one of your own class, is stored as it is.
    """
    row, array = find_weight(path), np.asarray(array)
    shape = hf_shape(path, array.shape)
    if row and row.inputs:
        array = array.reshape(shape[::-1]).T
    return np.asarray(array.reshape(shape), order="C")


def from_hf(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A Hugging Face tensor as a parameter of `shape`. Raises ValueError for any other shape."""
    row = find_weight(path)
    expected = hf_shape(path, shape)
    if tuple(array.shape) != expected:
        raise ValueError(f"{path}: expected shape {expected}, got {tuple(array.shape)}")
    return np.asarray((array.T if row and row.inputs else array).reshape(shape), order="C")
