"""A thin tokenizer on the `tokenizers` package, with the calling convention of transformers.

Reads the files of the hub layout (tokenizer.json, tokenizer_config.json, special_tokens_map.json)
and gives what transformers' AutoTokenizer gives for them. Nothing in the files is executed.
"""

from __future__ import annotations

import hashlib
import json
import operator
import threading
from collections import UserDict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import tokenizers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"

# In transformers' order, which is the order of `all_special_ids`.
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Used only where no file names the special tokens, as beside an Orbax checkpoint.
USUAL_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# transformers writes 1e30 where no length was ever set, and takes all above 1e20 for "no limit".
NO_LIMIT = int(1e30)
LARGEST_LIMIT = int(1e20)

PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
TENSORS = ("np", "jax", "pt")
SIDES = ("right", "left")


class BatchEncoding(UserDict):
    """What a tokenizer call returns: a dict whose keys are attributes too, so `model(**enc)` works.

    `input_ids` [B, L] and `attention_mask` [B, L]; a single text as lists has no B axis.
    """

    def __init__(self, data: Mapping[str, Any], encodings: Sequence[tokenizers.Encoding] = ()):
        super().__init__(data)
        self.encodings = list(encodings)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # not there yet while an object is being unpickled
        if name in data:
            return data[name]
        raise AttributeError(f"no {name!r} in this BatchEncoding, it holds {', '.join(data)}")

    def to(self, *_: Any, **__: Any) -> BatchEncoding:
        """Raises TypeError: arrays go to jax's default device when a model takes them."""
        raise TypeError("to: expected none, arrays go to jax's default device in the model")

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Tokens of one text, special tokens and padding included."""
        return self.encodings[batch_index].tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word each token of one text came from; None for special tokens and padding."""
        return self.encodings[batch_index].word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 or 1: the text of a pair that each token came from; None for special ones, padding."""
        return self.encodings[batch_index].sequence_ids


class Tokenizer:
    """A `tokenizers` tokenizer with its special tokens. Make one with `from_pretrained`.

    Attributes: `cls_token`, `cls_token_id` and likewise bos, eos, unk, sep, pad, mask (None where
    the files name none; ModernBERT's name no bos and no eos), `padding_side`, `truncation_side`,
    `model_max_length` in tokens, `backend_tokenizer` (leave its truncation and padding alone).
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    mask_token_id: int | None

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any]):
        """From the text of a tokenizer.json and the content of a tokenizer_config.json.

        Raises ValueError where the two disagree or either is broken.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise ValueError(f"not a tokenizer.json that `tokenizers` reads: {error}") from None
        stored_side = (backend.padding or {}).get("direction", "right")
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.padding_side: str = config.get("padding_side", stored_side)
        self.truncation_side: str = config.get("truncation_side", "right")
        self.model_max_length = int(config.get("model_max_length", NO_LIMIT))
        for side in (self.padding_side, self.truncation_side):
            _one_of("padding_side and truncation_side", side, SIDES)
        self._config = dict(config)
        self._json = tokenizer_json
        self._set_special_tokens()
        # Truncation and padding are settings of the backend: two threads must not mix theirs.
        self._lock = threading.Lock()

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        add_prefix_space: bool | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        use_fast: bool = True,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """Load from a folder in hub layout, or from a hub id through huggingface_hub.

        `add_prefix_space=True` puts a space before the first word, and before each word of
        `is_split_into_words` input, as token classification wants; None keeps what tokenizer.json
        says. `use_fast` and `trust_remote_code` are taken because snippets hold them; they change
        nothing. HF_HUB_OFFLINE and the hub's cache folders have their usual effect.

        Raises FileNotFoundError where there is no such folder, repository or cached copy, and
        ValueError for a broken file.
        """
        files = _find_files(
            path_or_repo,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        config = _read_json(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
        if SPECIAL_FILE in files:
            config = _read_json(files[SPECIAL_FILE]) | config
        given = {
            "add_prefix_space": add_prefix_space,
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "model_max_length": model_max_length,
        }
        config |= {name: value for name, value in given.items() if value is not None}
        try:
            # Bytes, because `fingerprint` and `save_pretrained` promise the file as it was.
            text = files[TOKENIZER_FILE].read_bytes().decode("utf-8")
            if add_prefix_space is not None:
                text = _with_prefix_space(text, add_prefix_space)
            return cls(text, config)
        except ValueError as error:
            raise ValueError(f"{files[TOKENIZER_FILE]}: {error}") from None

    @classmethod
    def from_tokenizers(
        cls,
        tokenizer: tokenizers.Tokenizer,
        *,
        model_max_length: int = NO_LIMIT,
        padding_side: str = "right",
        **special: str,
    ) -> Tokenizer:
        """From a `tokenizers.Tokenizer`, for example one just trained. The original is not changed.

        `special` names the special tokens (`cls_token="[CLS]"`, ...); without any, [UNK], [CLS],
        [SEP], [PAD] and [MASK] are used as far as the vocabulary has them. Raises TypeError for
        another name and ValueError for a token that is not in the vocabulary.
        """
        unknown = sorted(set(special) - set(SPECIAL_NAMES))
        if unknown:
            raise TypeError(f"unknown special token {unknown[0]!r}: expected {SPECIAL_NAMES}")
        limits = {"model_max_length": model_max_length, "padding_side": padding_side}
        return cls(tokenizer.to_str(pretty=True), limits | special)

    def save_pretrained(self, directory: str | PathLike[str]) -> tuple[str, str, str]:
        """Write the three files of the hub layout, which transformers' AutoTokenizer loads as well.

        tokenizer.json is written byte for byte as it was read, unless `add_prefix_space` changed
        it. Returns the paths written.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        flags = {
            token: {
                "content": token,
                "lstrip": added.lstrip,
                "normalized": added.normalized,
                "rstrip": added.rstrip,
                "single_word": added.single_word,
            }
            for token, added in self._added_tokens().items()
        }
        added_tokens = self.backend_tokenizer.get_added_tokens_decoder()
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config
        config |= {
            "added_tokens_decoder": {
                str(index): flags[added.content] | {"special": added.special}
                for index, added in sorted(added_tokens.items())
            },
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": self.model_max_length,
        }
        if self.padding_side != "right" or "padding_side" in config:
            config["padding_side"] = self.padding_side
        if self.truncation_side != "right" or "truncation_side" in config:
            config["truncation_side"] = self.truncation_side
        config |= self._special
        special = {name: flags[token] for name, token in self._special.items()}
        paths = folder / TOKENIZER_FILE, folder / CONFIG_FILE, folder / SPECIAL_FILE
        paths[0].write_bytes(self._json.encode("utf-8"))
        for path, content in zip(paths[1:], (config, special), strict=True):
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            path.write_bytes((text + "\n").encode("utf-8"))
        return str(paths[0]), str(paths[1]), str(paths[2])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content of tokenizer.json, which `save_pretrained` keeps."""
        return hashlib.sha256(self._json.encode("utf-8")).hexdigest()

    # Text to ids

    def __call__(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        is_split_into_words: bool = False,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
    ) -> BatchEncoding:
        """Tokenize a text, a pair, a batch of either, or words with `is_split_into_words=True`.

        `padding`: True or "longest" (of the batch), "max_length", False. `truncation`: True or
        "longest_first", "only_first", "only_second", False; left out, it is on when `max_length` is
        given without padding. `max_length` in tokens, special tokens included; by default
        `model_max_length`, and truncation does nothing where that is unlimited.

        `return_tensors`: None gives lists; "np" NumPy int64 [B, L]; "jax" int32 [B, L]. "pt" GIVES
        NUMPY ARRAYS TOO, never torch tensors, so that a snippet written for torch runs with its
        import changed.

        Raises ValueError or TypeError for input that cannot be tokenized as asked.
        """
        items, batched = _as_batch(text, text_pair, is_split_into_words)
        if return_tensors is not None:
            _one_of("return_tensors", return_tensors, TENSORS)
        if truncation is None:
            truncation = max_length is not None and padding is False
        limit = max_length
        if limit is None and self.model_max_length <= LARGEST_LIMIT:
            limit = self.model_max_length
        pair = any(_is_pair(item, is_split_into_words) for item in items)
        special = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
        padding_kw = self._padding(padding, limit, pad_to_multiple_of, padding_side)
        truncation_kw = self._truncation(truncation, limit, special)
        if padding_kw and truncation_kw and limit and limit % (pad_to_multiple_of or 1):
            raise ValueError(
                f"max_length={limit} is not a multiple of pad_to_multiple_of={pad_to_multiple_of}"
            )
        encodings = self._encode(
            items, padding_kw, truncation_kw, add_special_tokens, is_split_into_words
        )
        rows: dict[str, list[Any]] = {"input_ids": [row.ids for row in encodings]}
        if return_attention_mask:
            rows["attention_mask"] = [row.attention_mask for row in encodings]
        if return_special_tokens_mask:
            rows["special_tokens_mask"] = [row.special_tokens_mask for row in encodings]
        if return_offsets_mapping:
            rows["offset_mapping"] = [row.offsets for row in encodings]
        if return_tensors is not None:
            arrays = {name: _as_array(value, return_tensors) for name, value in rows.items()}
            return BatchEncoding(arrays, encodings)
        if not batched:
            return BatchEncoding({name: value[0] for name, value in rows.items()}, encodings)
        return BatchEncoding(rows, encodings)

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The input ids alone; options as in a call."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens of a text as they stand in the vocabulary."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    # Ids to text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """Text of ids: an int, a list or an array (0-d or [L]) -> str; [B, L] -> list of str.

        Arrays are NumPy's or JAX's. Spaces are not cleaned up, whatever the config says, as in
        transformers 5. Raises ValueError for negative ids (-100, the mark of no label, is not one).
        """
        ids = _as_ids(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        if any(index < 0 for index in ids):
            raise ValueError(f"token ids are 0 or more, got {min(ids)}: drop it first")
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each sequence."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token, or ids of a list; those not in the vocabulary get `unk_token_id`."""
        if isinstance(tokens, str):
            index = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of a list or array; None for an id outside the vocabulary."""
        ids = _as_ids(ids)
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(index) for index in ids if index not in skipped]

    # Vocabulary

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as transformers counts it; see `len`."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens that have a name here, each once."""
        return list(dict.fromkeys(self._special.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens that a call adds to one text, or to a pair."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, fingerprint {self.fingerprint[:12]})"

    # A lock cannot be pickled, and data workers need their tokenizer.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    # Private

    def _added_tokens(self) -> dict[str, tokenizers.AddedToken]:
        added = self.backend_tokenizer.get_added_tokens_decoder().values()
        return {token.content: token for token in added}

    def _set_special_tokens(self) -> None:
        backend, config = self.backend_tokenizer, self._config
        named = {name: config[name] for name in SPECIAL_NAMES if config.get(name) is not None}
        if not named:
            vocabulary = USUAL_SPECIAL_TOKENS.items()
            named = {n: token for n, token in vocabulary if backend.token_to_id(token) is not None}
        listed = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
        self._special = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in named.items()
        }
        for token in [*self._special.values(), *listed]:
            if backend.token_to_id(token) is None:
                raise ValueError(f"the token {token!r} of the config is not in the vocabulary")
        # A plain vocabulary entry is not yet recognised inside text.
        added = self._added_tokens()
        plain = [token for token in self.all_special_tokens if token not in added]
        if plain:
            backend.add_special_tokens(plain)
            self._json = backend.to_str(pretty=True)
        for name in SPECIAL_NAMES:
            token = self._special.get(name)
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else backend.token_to_id(token))

    def _padding(
        self, padding: bool | str, limit: int | None, multiple: int | None, side: str | None
    ) -> dict[str, Any] | None:
        """The arguments of the backend's padding; None for no padding."""
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        _one_of("padding", padding, PADDINGS)
        side = self.padding_side if side is None else side
        _one_of("padding_side", side, SIDES)
        if padding == "do_not_pad":
            return None
        if padding == "max_length" and limit is None:
            raise ValueError("padding='max_length' needs max_length: this tokenizer has no limit")
        if self.pad_token is None:
            raise ValueError("padding needs a pad token, and this tokenizer has none")
        return {
            "direction": side,
            "pad_id": self.pad_token_id,
            "pad_token": self.pad_token,
            "length": limit if padding == "max_length" else None,
            "pad_to_multiple_of": multiple,
        }

    def _truncation(
        self, truncation: bool | str, limit: int | None, special: int
    ) -> dict[str, Any] | None:
        """The arguments of the backend's truncation, or None; `special` tokens are to be added."""
        if isinstance(truncation, bool):
            truncation = "longest_first" if truncation else "do_not_truncate"
        _one_of("truncation", truncation, TRUNCATIONS)
        if truncation == "do_not_truncate" or limit is None:
            return None
        # Below this `tokenizers` would not truncate at all, and not say so.
        if limit < max(special, 1):
            raise ValueError(f"max_length={limit} has no room for {special} special tokens")
        return {"max_length": limit, "strategy": truncation, "direction": self.truncation_side}

    def _encode(
        self,
        items: list[Any],
        padding_kw: dict[str, Any] | None,
        truncation_kw: dict[str, Any] | None,
        add_special_tokens: bool,
        is_split_into_words: bool,
    ) -> list[tokenizers.Encoding]:
        backend = self.backend_tokenizer
        with self._lock:
            try:
                if padding_kw is not None:
                    backend.enable_padding(**padding_kw)
                if truncation_kw is not None:
                    backend.enable_truncation(**truncation_kw)
                return _encode_batch(backend, items, add_special_tokens, is_split_into_words)
            finally:
                backend.no_padding()
                backend.no_truncation()


# The name of transformers' factory, so that a snippet needs one import changed.
AutoTokenizer = Tokenizer


def _encode_batch(
    backend: tokenizers.Tokenizer,
    items: list[Any],
    add_special_tokens: bool,
    is_split_into_words: bool,
) -> list[tokenizers.Encoding]:
    try:
        return backend.encode_batch(
            items, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
        )
    except TypeError:
        # The types were checked, so this is text that has no UTF-8 form.
        raise ValueError(
            "a text holds half of a surrogate pair, which no encoding has: "
            "replace it, for example with text.encode('utf-8', 'replace').decode()"
        ) from None
    except Exception as error:
        if "Truncation" not in str(error):
            raise
        raise ValueError(
            "truncating one text of a pair cannot reach max_length: the other alone is too long; "
            "use truncation='longest_first' or a larger max_length"
        ) from None


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _is_pair(item: Any, is_split_into_words: bool) -> bool:
    if is_split_into_words:
        return bool(item) and not isinstance(item[0], str)
    return not isinstance(item, str)


def _as_batch(text: Any, text_pair: Any, is_split_into_words: bool) -> tuple[list[Any], bool]:
    """Texts (str, or lists of words) or pairs of them, checked; and whether a batch was given."""
    many = list, tuple
    batched = isinstance(text, many)
    if is_split_into_words:
        batched = isinstance(text, many) and len(text) > 0 and isinstance(text[0], many)
    if not batched:
        # transformers takes an empty second text of a single pair for none.
        items = [(text, text_pair)] if text_pair else [text]
    elif text_pair is None:
        items = list(text)
    elif not isinstance(text_pair, many) or len(text_pair) != len(text):
        got = len(text_pair) if isinstance(text_pair, many) else type(text_pair).__name__
        raise ValueError(f"a batch of {len(text)} texts needs as many in text_pair, got {got}")
    else:
        items = list(zip(text, text_pair, strict=True))
    return [_as_item(item, i, is_split_into_words) for i, item in enumerate(items)], batched


def _as_item(item: Any, index: int, is_split_into_words: bool) -> Any:
    """A text as `tokenizers` wants it: str or list of str, a pair of them as a tuple."""
    many = list, tuple

    def is_text(value: Any) -> bool:
        if is_split_into_words:
            return isinstance(value, many) and all(isinstance(word, str) for word in value)
        return isinstance(value, str)

    if is_text(item):
        return list(item) if is_split_into_words else item
    if isinstance(item, many) and len(item) == 2 and all(is_text(part) for part in item):
        return tuple(list(part) if is_split_into_words else part for part in item)
    expected = "a list of words" if is_split_into_words else "a str"
    raise TypeError(
        f"text {index} must be {expected} or a pair of them, got {type(item).__name__}: "
        "pass a text, a list of texts, or lists of words with is_split_into_words=True"
    )


def _as_array(rows: list[Any], return_tensors: str) -> Any:
    lengths = sorted({len(row) for row in rows}) or [0]
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens make no array: pass padding=True"
        )
    array = np.asarray(rows, dtype=np.int64)
    if not rows:
        array = array.reshape(0, 0)
    # int32 is what JAX has without x64, and what the embedding look-up wants.
    return jnp.asarray(array, dtype=jnp.int32) if return_tensors == "jax" else array


def _as_ids(ids: Any) -> Any:
    if hasattr(ids, "tolist"):  # NumPy, JAX, torch
        return _as_ids(ids.tolist())
    if isinstance(ids, list | tuple):
        return [_as_ids(index) for index in ids]
    return operator.index(ids)


def _with_prefix_space(tokenizer_json: str, add_prefix_space: bool) -> str:
    """tokenizer.json with that setting in its ByteLevel pre-tokenizer, or as it is where it agrees.

    transformers 4 did this. transformers 5 keeps the option in its config and does not apply it.
    """
    content = json.loads(tokenizer_json)
    outer = content.get("pre_tokenizer") or {}
    steps = [
        step for step in (outer, *outer.get("pretokenizers", ())) if "add_prefix_space" in step
    ]
    if not steps:
        raise ValueError("add_prefix_space needs a ByteLevel pre-tokenizer, and there is none")
    if all(step["add_prefix_space"] == add_prefix_space for step in steps):
        return tokenizer_json
    for step in steps:
        step["add_prefix_space"] = add_prefix_space
    return json.dumps(content, ensure_ascii=False, indent=2)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _find_files(path_or_repo: str | PathLike[str], **hub_options: Any) -> dict[str, Path]:
    """Where the files of the hub layout are; the two beside tokenizer.json may be missing."""
    folder = Path(path_or_repo).expanduser()
    names = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_FILE)
    if folder.is_dir():
        files = {name: folder / name for name in names if (folder / name).is_file()}
        if TOKENIZER_FILE not in files:
            raise FileNotFoundError(f"no {TOKENIZER_FILE} in the folder {folder}")
        return files
    files = {}
    for name in names:
        try:
            files[name] = Path(
                huggingface_hub.hf_hub_download(str(path_or_repo), name, **hub_options)
            )
        except Exception as error:
            if name != TOKENIZER_FILE and isinstance(error, EntryNotFoundError):
                continue
            raise FileNotFoundError(_not_found(path_or_repo, name, error)) from error
    return files


def _not_found(path_or_repo: str | PathLike[str], name: str, error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        reason = "is not in the hub's cache, and the hub is switched off or out of reach"
    elif isinstance(error, EntryNotFoundError):
        reason = "is not in that hub repository"
    else:
        reason = f"could not be had from the hub ({type(error).__name__})"
    return (
        f"{str(path_or_repo)!r} is no local folder, and {name} {reason}: "
        "pass a folder that holds it, or the id of a hub repository"
    )
