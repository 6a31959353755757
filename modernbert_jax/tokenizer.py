"""Loads tokenizers as transformers' fast tokenizers, and adds what transformers lacks.

transformers is imported when a tokenizer is first loaded or made, so that importing this library
stays fast. A tokenizer's folder is data: no code in it is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modernbert_jax.tokenizer_files import FILES, TOKENIZER_FILE, check_files
from modernbert_jax.untrusted import panics_as_errors, printable

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

# ModernBERT's names, used if no file names the special tokens.
SPECIAL_TOKENS = {
    f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")
}
UNUSED = re.compile(r"\[unused(\d{1,6})\]")  # the slots that ModernBERT keeps for new tokens


def _register_batches() -> None:
    """Makes BatchEncoding, what a tokenizer returns, a pytree, so that jax compiles its callers.

    Lists become NumPy arrays. What else it holds (offsets, words) is not passed on.
    """
    import jax
    from transformers import BatchEncoding

    def flatten(batch: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        array = lambda x: np.asarray(x) if isinstance(x, list) else x  # noqa: E731
        names = tuple(sorted(batch.data))
        return [(jax.tree_util.DictKey(n), array(batch.data[n])) for n in names], names

    def unflatten(names: tuple[str, ...], values: Any) -> Any:
        return BatchEncoding(dict(zip(names, values, strict=True)))

    with contextlib.suppress(ValueError):  # registered before, perhaps by the caller
        jax.tree_util.register_pytree_with_keys(BatchEncoding, flatten, unflatten)


class AutoTokenizer:
    """Loads a tokenizer; the name and the method of transformers' AutoTokenizer."""

    @staticmethod
    def from_pretrained(
        path_or_repo: str | os.PathLike[str],
        *,
        add_prefix_space: bool | None = None,
        model_max_length: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        use_fast: bool = True,
        trust_remote_code: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> PreTrainedTokenizerFast:
        """Returns transformers' PreTrainedTokenizerFast for a folder or a hub id.

        What it returns for texts, a BatchEncoding, is a pytree: compiled functions take it.

        The folder holds tokenizer.json (a Hugging Face or an Orbax checkpoint). A tokenizer class
        or an `auto_map` in tokenizer_config.json is ignored: their code is not loaded.

        add_prefix_space: whether a space is put before the first word, and before each word of
            `is_split_into_words` input, as token classification needs; None keeps the setting of
            tokenizer.json. transformers 5 ignores this argument for ModernBERT's tokenizer.
        model_max_length, padding_side, truncation_side: as in transformers; None keeps those of
            tokenizer_config.json. use_fast: True, since there are fast tokenizers only.
            trust_remote_code is accepted and ignored: code of a checkpoint is never run.
        revision, cache_dir, local_files_only, token: as in transformers, for a hub id.

        Raises FileNotFoundError if there is no such folder, repository or file, and ValueError for
        a file that cannot be read.
        """
        from transformers import PreTrainedTokenizerFast

        if not use_fast:
            raise ValueError("use_fast: expected True, there are fast tokenizers only")
        _register_batches()
        folder = pathlib.Path(path_or_repo).expanduser()
        if not folder.is_dir():
            hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
            folder = _download(os.fspath(path_or_repo), revision=revision, **hub)
        if not (folder / TOKENIZER_FILE).is_file():
            raise FileNotFoundError(f"{path_or_repo}: expected {TOKENIZER_FILE}, found none")
        check_files(folder)
        try:
            with panics_as_errors():
                # transformers ignores the files' clean_up_tokenization_spaces for a BPE, but warns.
                tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    os.fspath(folder), clean_up_tokenization_spaces=False
                )
                # A file that loads may still panic at the first text.
                with contextlib.suppress(Exception):
                    tokenizer.backend_tokenizer.encode("A text, 1.")
                    tokenizer.backend_tokenizer.encode("A text, 1.", "Two")
        except Exception as error:  # the backend raises a bare Exception
            raise ValueError(
                f"{path_or_repo}: expected tokenizer files that transformers can read, got "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        if not tokenizer.all_special_tokens:
            for name, special in _special_tokens(tokenizer.backend_tokenizer).items():
                setattr(tokenizer, name, special)
        if add_prefix_space is not None:
            _set_prefix_space(tokenizer, add_prefix_space)
        for name, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in (None, "left", "right"):
                raise ValueError(f"{name}: expected 'left' or 'right', got {side!r}")
            if side is not None:
                setattr(tokenizer, name, side)
        if model_max_length is not None:
            if type(model_max_length) is not int or model_max_length < 1:
                raise ValueError(
                    f"model_max_length: expected a positive integer, got {model_max_length!r}"
                )
            tokenizer.model_max_length = model_max_length
        return tokenizer


def from_backend(backend: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """Returns a copy of a `tokenizers.Tokenizer`, for example a trained one, for transformers.

    Its special tokens are those of ModernBERT that the vocabulary has.
    """
    from transformers import PreTrainedTokenizerFast

    _register_batches()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **_special_tokens(backend),
    )


def backend_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the tokenizer as JSON, for `tokenizers.Tokenizer.from_str` in worker processes.

    Truncation and padding are off: transformers stores those of its last call in the backend.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the sha256 (hex) of `backend_json`: equal fingerprints give equal ids.

    Saving and loading keep it, and so does the layout of the file. It says nothing about
    split_special_tokens, which corpora and tasks always set.
    """
    return hashlib.sha256(backend_json(tokenizer).encode()).hexdigest()


def max_tokens(tokenizer: PreTrainedTokenizerFast, limit: int) -> int:
    """Returns the most tokens of a text or a pair, special tokens included.

    The smaller of `limit` (the model's, or what was asked for) and the tokenizer's model_max_length
    holds; transformers stands for a missing one, or null, with a huge number. Raises ValueError for
    a model_max_length that is not a number from 1 on, and if the result leaves no room beside the
    special tokens: tokenizers would then silently cut nothing.
    """
    own: Any = tokenizer.model_max_length
    if isinstance(own, bool) or not isinstance(own, int | float) or not own >= 1:
        raise ValueError(
            f"tokenizer_config.json: model_max_length: expected a number from 1 on, or null, got "
            f"{own!r}"
        )
    least = tokenizer.num_special_tokens_to_add(pair=True) + 1
    most = int(min(own, limit))
    if most < least:
        raise ValueError(
            f"max_length: expected at least {least} tokens, got {most} (the smaller of {limit} and "
            "the tokenizer's model_max_length)"
        )
    return most


def lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes a tokenizer read text in lower case, except special tokens, unless it does already."""
    from tokenizers import normalizers

    backend: Any = tokenizer.backend_tokenizer
    own = backend.normalizer
    steps = list(own) if type(own).__name__ == "Sequence" else [own] if own else []
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns one more than the largest id, which exceeds the number of tokens if ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_ids(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    """Raises ValueError if the tokenizer has ids beyond a model's vocabulary of `limit` tokens."""
    if vocab_size(tokenizer) > limit:
        raise ValueError(
            f"tokenizer: expected ids below the model's vocab_size {limit:,}, got "
            f"{vocab_size(tokenizer) - 1:,}; use the tokenizer of this model"
        )


def add_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], *, use_unused: bool = False
) -> int:
    """Adds tokens that the vocabulary lacks, in place; returns how many.

    use_unused: gives them the ids of "[unused0]" and so on first, of which ModernBERT has 83, so
    that the model need not grow: the others get ids at the end, for which
    `model.resize_token_embeddings(vocab_size(tokenizer))` makes room.
    Raises ValueError for an empty token, and if the ids have gaps, which a new token could not fill
    without taking another's id.
    """
    if isinstance(tokens, str) or not all(isinstance(t, str) and t.strip() for t in tokens):
        raise ValueError("tokens: expected a list of texts that are not empty")
    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    slots = sorted(
        (int(match[1]), token)
        for token in (vocabulary if use_unused else ())
        if (match := UNUSED.fullmatch(token))
    )
    names = {slot: token for (_, slot), token in zip(slots, new, strict=False)}
    rest = new[len(names) :]
    if rest and (absent := absent_ids(tokenizer)):
        raise ValueError(f"tokenizer: expected ids without gaps, none has the id {absent[0]}")
    if names:
        import tokenizers

        private: Any = tokenizer
        content = json.loads(private.backend_tokenizer.to_str())
        for added in content["added_tokens"]:
            if name := names.get(added["content"]):
                added |= {"content": name, "normalized": True, "special": False}
        own = content["model"].get("vocab")
        if isinstance(own, dict):
            content["model"]["vocab"] = {names.get(k, k): v for k, v in own.items()}
        private._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(new)  # a slot that was no added token becomes one, with its id
    return len(new)


def absent_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids below `vocab_size` that no token has, in order."""
    ids = set(tokenizer.get_vocab().values())
    return tuple(i for i in range(max(ids, default=-1)) if i not in ids)


def _download(repo_id: str, **hub: Any) -> pathlib.Path:
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(repo_id, allow_patterns=[*FILES], **hub)
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{repo_id}: expected a folder or a hub id; no such folder exists, and the hub raised "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _special_tokens(backend: tokenizers.Tokenizer) -> dict[str, str]:
    return {k: v for k, v in SPECIAL_TOKENS.items() if backend.token_to_id(v) is not None}


def _set_prefix_space(tokenizer: PreTrainedTokenizerFast, value: bool) -> None:
    outer: Any = tokenizer.backend_tokenizer.pre_tokenizer
    steps = list(outer) if type(outer).__name__ == "Sequence" else [outer]
    steps = [step for step in steps if hasattr(step, "add_prefix_space")]
    if not steps:
        raise ValueError(
            "add_prefix_space: expected a tokenizer with a ByteLevel pre-tokenizer, got none; "
            "leave the argument out"
        )
    for step in steps:
        step.add_prefix_space = value


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0])
