"""Pipelines with transformers' calls and results: one file per task."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modernbert_jax.inference.export import load
from modernbert_jax.inference.pipelines.feature_extraction import FeatureExtraction
from modernbert_jax.inference.pipelines.fill_mask import FillMask
from modernbert_jax.inference.pipelines.question_answering import QuestionAnswering
from modernbert_jax.inference.pipelines.text_classification import TextClassification
from modernbert_jax.inference.pipelines.text_ranking import Reranker
from modernbert_jax.inference.pipelines.token_classification import TokenClassification
from modernbert_jax.inference.pipelines.zero_shot_classification import ZeroShotClassification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS: dict[str, Any] = {
    "feature-extraction": FeatureExtraction,
    "fill-mask": FillMask,
    "question-answering": QuestionAnswering,
    "text-classification": TextClassification,
    "text-ranking": Reranker,
    "token-classification": TokenClassification,
    "ner": TokenClassification,
    "sentiment-analysis": TextClassification,
    "zero-shot-classification": ZeroShotClassification,
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
    """Returns the pipeline of a task: an instance of a class in `modernbert_jax`.

    task: "feature-extraction", "fill-mask", "question-answering", "text-classification" or
    "sentiment-analysis", "token-classification" or "ner", "zero-shot-classification", all as in
    transformers, or "text-ranking", which is sentence-transformers' CrossEncoder. model: a folder,
    a hub id, or a model of the task's class together with a tokenizer. dtype, torch_dtype,
    param_dtype, revision: as for from_pretrained. compile_cache: a folder that keeps compiled
    programs for later processes. exported: use the functions that you have exported into the folder
    `model`; other people's are refused. batch_tokens: the most tokens in a packed sequence. top_k
    is for fill-mask and text-classification; aggregation_strategy, stride, max_length and
    ignore_labels are for token-classification, and max_length for text-ranking too; see those
    classes. What depends on the texts, such as candidate_labels, is an argument of the pipeline's
    call. As in transformers, a literal "[SEP]" in a text is the special token; in corpora and task
    files it is text. Raises ValueError for another task, TypeError for an argument that the task
    does not have.
    """
    if task not in TASKS:
        raise ValueError(
            f"task: expected {', '.join(TASKS)}, got {task!r}; for vectors use Embedder"
        )
    for name in unsupported:
        if name in UNSUPPORTED:
            raise TypeError(f"{name}: {UNSUPPORTED[name]}")
        where = "of pipeline"
        if name in inspect.signature(TASKS[task].__call__).parameters:
            where += "; pass it with the texts"
        raise TypeError(f"{name}: not an argument {where}")
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
    taken = inspect.signature(cls).parameters
    for name in options:
        if name not in taken:
            raise TypeError(f"{name}: expected none for {task} in pipeline")
    if cls is Reranker and isinstance(model, str | os.PathLike) and tokenizer is None:
        if given := [name for name in ("torch_dtype", "param_dtype") if loading.pop(name)]:
            raise TypeError(f"{', '.join(given)}: expected none for {task}, which takes dtype")
        cached = {"compile_cache": compile_cache, "exported": exported}
        return Reranker.from_pretrained(model, **loading, **cached, **options)
    return cls(
        *load(cls.model_class, model, tokenizer, loading, compile_cache, exported), **options
    )
