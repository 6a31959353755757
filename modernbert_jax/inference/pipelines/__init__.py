"""Pipelines with transformers' calls and results: one file per task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modernbert_jax.inference.export import load
from modernbert_jax.inference.pipelines.fill_mask import FillMask
from modernbert_jax.inference.pipelines.text_classification import TextClassification
from modernbert_jax.inference.pipelines.text_ranking import Reranker
from modernbert_jax.inference.pipelines.token_classification import TokenClassification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS: dict[str, Any] = {
    "fill-mask": FillMask,
    "text-classification": TextClassification,
    "text-ranking": Reranker,
    "token-classification": TokenClassification,
    "ner": TokenClassification,
}
# Arguments of transformers' pipeline that have no meaning here, and what to use instead.
_DEVICE = "expected none, jax's default device computes; use `with jax.default_device(d)`"
UNSUPPORTED = {
    "device": _DEVICE,
    "device_map": _DEVICE,
    "batch_size": "expected none, texts are packed; batch_tokens=N sets the tokens per sequence",
}


def pipeline(
    task: str = "",
    model: Any = None,
    tokenizer: PreTrainedTokenizerFast | str | os.PathLike[str] | None = None,
    *,
    dtype: Any = None,
    torch_dtype: Any = None,
    param_dtype: Any = None,
    revision: str | None = None,
    compile_cache: str | os.PathLike[str] | None = None,
    exported: bool = False,
    batch_tokens: int | None = None,
    top_k: int | str | None = "",
    aggregation_strategy: str | None = None,
    stride: int | None = None,
    max_length: int | None = None,
    ignore_labels: Sequence[str] | None = None,
    **unsupported: Any,
) -> Any:
    """Returns FillMask, TextClassification, TokenClassification or Reranker, as transformers does.

    task: "fill-mask", "text-classification", "token-classification" or "ner", or "text-ranking",
    which is sentence-transformers' CrossEncoder. model: a folder, a
    hub id, or a model of the task's class together with a tokenizer. dtype, torch_dtype,
    param_dtype, revision: as for from_pretrained. compile_cache: a folder that keeps compiled
    programs for later processes. exported: use the functions that you have exported into the folder
    `model`; other people's are refused. batch_tokens: the most tokens in a packed sequence. top_k
    is for fill-mask and text-classification; aggregation_strategy, stride, max_length and
    ignore_labels are for token-classification; see those classes. As in transformers, a literal
    "[SEP]" in a text is the special token; in corpora and task files it is text. Raises ValueError
    for another task, TypeError for an argument that the task does not have.
    """
    if task not in TASKS:
        raise ValueError(
            f"task: expected {', '.join(TASKS)}, got {task!r}; for vectors use Embedder"
        )
    for name in unsupported:
        raise TypeError(f"{name}: {UNSUPPORTED.get(name, 'not an argument of pipeline')}")
    loading = {
        "dtype": dtype,
        "torch_dtype": torch_dtype,
        "param_dtype": param_dtype,
        "revision": revision,
    }
    options = {
        "batch_tokens": batch_tokens,
        "aggregation_strategy": aggregation_strategy,
        "stride": stride,
        "max_length": max_length,
        "ignore_labels": ignore_labels,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if top_k != "":  # None is a value: all labels
        options["top_k"] = top_k
    cls = TASKS[task]
    if cls is Reranker and isinstance(model, str | os.PathLike) and tokenizer is None:
        if given := [name for name in ("torch_dtype", "param_dtype") if loading.pop(name)]:
            raise TypeError(f"{', '.join(given)}: expected none for {task}, which takes dtype")
        cached = {"compile_cache": compile_cache, "exported": exported}
        return Reranker.from_pretrained(model, **loading, **cached, **options)
    return cls(
        *load(cls.model_class, model, tokenizer, loading, compile_cache, exported), **options
    )
