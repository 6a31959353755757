"""Which class a checkpoint holds, and the names of transformers for the same things."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from modernbert_jax.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, read_config
from modernbert_jax.checkpoint.hf import SafetensorsFolder, hf_to_params
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax
from modernbert_jax.checkpoint.params import check_dtypes, with_dtype
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.heads import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert_jax.model import ModernBertModel
from modernbert_jax.weights import BACKBONE

# With these names a snippet written for transformers needs one changed import.
AutoModel = ModernBertModel
AutoModelForMaskedLM = ModernBertForMaskedLM
AutoModelForSequenceClassification = ModernBertForSequenceClassification
AutoModelForTokenClassification = ModernBertForTokenClassification
AutoModelForQuestionAnswering = ModernBertForQuestionAnswering
AutoModelForMultipleChoice = ModernBertForMultipleChoice


class AutoConfig:
    """Reads a configuration; the name and the method of transformers' AutoConfig."""

    @staticmethod
    def from_pretrained(
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **config_changes: Any,
    ) -> ModernBertConfig:
        """Returns the configuration of a Hugging Face folder, a hub id or an Orbax directory.

        config_changes: fields to replace, as in `ModernBertConfig.replace`. revision, cache_dir,
        local_files_only, token: passed to the hub, from which only config.json is downloaded.
        Raises FileNotFoundError or OSError if there is no config.json, ValueError for one that is
        not of a ModernBERT, TypeError for an unknown field.
        """
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        folder = resolve(path_or_repo, revision, files=(CONFIG_FILE, ADAPTER_FILE), **hub)
        return read_config(folder)[0].replace(**config_changes)


def class_of(keys: Iterable[str], architecture: str | None) -> type[Any]:
    """Returns the model class that a checkpoint with these keys holds.

    architecture: the class that config.json names; it decides between the classifiers, whose keys
    are the same.
    """
    keys = list(keys)
    if any(k.startswith(BACKBONE) for k in keys):
        return ModernBertModel
    if any(k.startswith("classifier.") for k in keys):
        for cls in (
            ModernBertForMultipleChoice,
            ModernBertForTokenClassification,
            ModernBertForQuestionAnswering,
        ):
            if cls.__name__ == architecture:
                return cls
        return ModernBertForSequenceClassification
    return ModernBertForMaskedLM


def read_class(folder: str | os.PathLike[str]) -> type[Any]:
    """Returns the model class that a Hugging Face folder or an Orbax directory holds.

    Raises as `read_params` does for a folder without a checkpoint.
    """
    if is_orbax(folder):
        return read_params(folder)[0]
    config, architecture = read_config(folder)
    return class_of(SafetensorsFolder(folder, config.tie_word_embeddings), architecture)


def read_params(
    folder: str | os.PathLike[str],
) -> tuple[type[Any], ModernBertConfig, dict[str, np.ndarray]]:
    """Reads a Hugging Face folder or an Orbax directory: its class, configuration and parameters.

    The parameters are {path: array} with the dtypes of the file. Raises FileNotFoundError if there
    is no checkpoint, ValueError if keys or shapes do not fit the configuration.
    """
    if is_orbax(folder):
        loaded = load_orbax(folder)
        params = loaded["params"]
        check_dtypes(params)
        return class_of(params, loaded["architecture"]), loaded["config"], params
    config, architecture = read_config(folder)
    tensors = SafetensorsFolder(folder, config.tie_word_embeddings)
    config, cls = with_dtype(config, folder, tensors), class_of(tensors, architecture)
    return cls, config, hf_to_params(cls, config, tensors)
