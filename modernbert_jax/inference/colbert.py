"""The files of PyLate that turn an encoder into a multi-vector (ColBERT) model.

`read_colbert` reads them into a `Colbert`, which tokenizes queries and documents and computes one
vector of length 1 per token, and `write_colbert` writes them. `max_sim` scores documents: the sum
over a query's vectors of the largest product with a vector of the document. Sources: the layout of
PyLate 1; MaxSim and query expansion of ColBERT, arXiv 2004.12832.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax.attention import Bounds
from modernbert_jax.attention.rope import Rope
from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.sentence import (
    COLBERT,
    ENCODER,
    ENCODER_FILE,
    MODULES_FILE,
    SENTENCE,
    SETTINGS_FILE,
    TOKENS,
    Dense,
    Normalize,
    SentenceModel,
    read_dense,
    read_encoder,
    read_modules,
    read_settings,
    write_dense,
    write_json,
    write_modules,
)
from modernbert_jax.layers import Op
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import placed
from modernbert_jax.untrusted import MAX_MODEL_JSON, read_json, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIT = Normalize(TOKENS, TOKENS)
# The products of vectors that max_sim computes at once.
_QUERY_TOKENS, _DOCUMENT_TOKENS = 4096, 8192


class TokenIds(NamedTuple):
    """A text as tokens.

    ids: all of them. attended: the number of first tokens that the text's tokens attend to; those
    after them are expansion tokens that nothing attends to. kept: whether each token's vector
    counts, [L].
    """

    ids: list[int]
    attended: int
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class Colbert:
    """How a text becomes vectors, and which of them count; the defaults are PyLate's.

    sentence: the Dense modules on the tokens, then UNIT; also the prompts. query_prefix,
    document_prefix: tokens of the vocabulary that follow [CLS], "" for none. query_length,
    document_length: the most tokens, all special ones included. do_query_expansion: whether
    queries are filled up with [MASK] to query_length, and attend_to_expansion_tokens, whether
    tokens attend to these. skiplist_words: tokens of documents whose vectors do not count; a word
    that is no token of the vocabulary has no effect, as in sentence-transformers.
    """

    sentence: SentenceModel
    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_length: int = 32
    document_length: int = 180
    do_query_expansion: bool = True
    attend_to_expansion_tokens: bool = False
    skiplist_words: tuple[str, ...] = tuple(string.punctuation)

    def check(self, tokenizer: PreTrainedTokenizerFast, longest: int) -> None:
        """Raises ValueError if the tokenizer or a model of `longest` tokens does not fit."""
        vocabulary = tokenizer.get_vocab()
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if self.do_query_expansion and tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: expected a mask token, for query expansion, found none")
        for name, length, prefix in (
            ("query", self.query_length, self.query_prefix),
            ("document", self.document_length, self.document_prefix),
        ):
            if prefix and prefix not in vocabulary:
                raise ValueError(
                    f"tokenizer: expected {shown(prefix)}, the {name}_prefix, as one token, found "
                    "none; a model that was never trained with it gives random vectors"
                )
            whole_number(f"{name}_length", length, special + 1 + bool(prefix), longest)

    def token_ids(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: Sequence[Any],
        *,
        query: bool,
        **options: Any,
    ) -> list[TokenIds]:
        """Tokenizes queries or documents; longer ones are truncated. options: of the tokenizer."""
        prefix = self.query_prefix if query else self.document_prefix
        length = self.query_length if query else self.document_length
        vocabulary = tokenizer.get_vocab()
        skipped = [vocabulary[word] for word in self.skiplist_words if word in vocabulary]
        room = length - bool(prefix)
        found = []
        options = {"truncation": True, "max_length": room} | options
        for ids in tokenizer(list(texts), **options)["input_ids"] if len(texts) else []:
            if prefix:
                ids = [*ids[:1], vocabulary[prefix], *ids[1:]]
            attended = len(ids)
            if query and self.do_query_expansion:
                ids = ids + [tokenizer.mask_token_id] * (length - len(ids))
                attended = length if self.attend_to_expansion_tokens else attended
            kept = np.ones(len(ids), bool) if query else ~np.isin(ids, skipped)
            found.append(TokenIds(ids, attended, kept))
        return found

    def vectors(
        self,
        model: ModernBertModel,
        attention: Op,
        own: Mapping[str, jax.Array],
        input_ids_BL: jax.Array,
        segment_ids_BL: jax.Array,
        ends_BL: jax.Array | None,
    ) -> jax.Array:
        """Returns the vectors [B, L, E] of the tokens of packed texts, float32, of length 1.

        own: the weights of `sentence`. ends_BL: of `attended_ends`; None if all tokens are attended
        to.
        """
        if ends_BL is not None:
            attention = attending_to_first(attention, ends_BL)
        hidden_BLD = model(
            input_ids_BL, segment_ids=segment_ids_BL, attention=attention
        ).last_hidden_state
        return self.sentence.apply(own, hidden_BLD, segment_ids_BL, 0)[TOKENS]


def attended_ends(
    texts: Sequence[TokenIds], rows: Sequence[Sequence[int] | np.ndarray], size: int
) -> np.ndarray | None:
    """Returns for each token of packed texts the position after the last one that it attends to.

    rows, size: as for `packing.fill_rows`. Returns None if all tokens are attended to.
    """
    if all(texts[i].attended == len(texts[i].ids) for row in rows for i in row):
        return None
    ends_BL = np.zeros((len(rows), size), np.int32)
    for r, _, start, i in placed(rows, lambda i: len(texts[i].ids)):
        ends_BL[r, start : start + len(texts[i].ids)] = start + texts[i].attended
    return ends_BL


def attending_to_first(attention: Op, ends_BL: jax.Array) -> Op:
    """Wraps the attention function: token i attends to nothing from ends_BL[i] on."""

    def run(q_BLHK, k_BLHK, v_BLHK, bounds: Bounds, *, scale: float, rope: Rope | None = None):
        i_1L = jnp.arange(ends_BL.shape[1], dtype=jnp.int32)[None, :]
        hi_BL = jnp.minimum(bounds.hi_BL, ends_BL)
        lo_BL = jnp.minimum(bounds.lo_BL, hi_BL)
        seen_BL = i_1L < ends_BL
        bounds = Bounds(
            lo_BL, hi_BL, bounds.window, key_lo_BM=jnp.where(seen_BL, bounds.lo_BL, i_1L),
            key_hi_BM=jnp.where(seen_BL, bounds.hi_BL, i_1L),
        )  # fmt: skip
        return attention(q_BLHK, k_BLHK, v_BLHK, bounds, scale=scale, rope=rope)

    return run


def max_sim(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the MaxSim [Q, N] of all queries with all documents, each [tokens, E], float32.

    A document without vectors scores 0.
    """
    scores_QN = np.zeros((len(queries), len(documents)), np.float32)
    for some in _groups(queries, _QUERY_TOKENS):
        query_TE = np.concatenate([queries[i] for i in some])
        starts = np.cumsum([0, *(len(queries[i]) for i in some[:-1])])
        for others in _groups(documents, _DOCUMENT_TOKENS):
            document_ME = np.concatenate([documents[i] for i in others])
            firsts = np.cumsum([0, *(len(documents[i]) for i in others[:-1])])
            best_TN = np.maximum.reduceat(query_TE @ document_ME.T, firsts, axis=1)
            scores_QN[np.ix_(some, others)] = np.add.reduceat(best_TN, starts, axis=0)
    return scores_QN


def _groups(texts: Sequence[np.ndarray], tokens: int) -> list[list[int]]:
    """Returns the numbers of the texts that have vectors, in groups of about `tokens` vectors."""
    groups: list[list[int]] = []
    room = 0
    for number, vectors in enumerate(texts):
        if not len(vectors):
            continue
        if not groups or len(vectors) > room:
            groups.append([])
            room = tokens
        groups[-1].append(number)
        room -= len(vectors)
    return groups


# Files.


def is_colbert(folder: pathlib.Path) -> bool:
    """Whether the files of a folder name a multi-vector model."""
    path = folder / SETTINGS_FILE
    return path.exists() and read_json(path, MAX_MODEL_JSON).get("model_type") == COLBERT


def read_colbert(folder: pathlib.Path) -> Colbert:
    """Reads the files of a PyLate model.

    Raises ValueError, which names the file, for a folder of another kind, for what is not
    supported and for damaged files.
    """
    path = folder / MODULES_FILE
    if not path.exists():
        raise ValueError(
            f"{folder}: expected a multi-vector model with {MODULES_FILE}, found none; train one "
            "with `python -m train finetune --task retrieval --multi-vector`"
        )
    settings = read_settings(folder / SETTINGS_FILE, COLBERT)
    if settings.pop("activation_fn"):
        raise ValueError(f"{folder / SETTINGS_FILE}: activation_fn is not supported")
    (_, inner), *entries = read_modules(folder, ("sentence_transformers", "pylate"))
    modules = []
    for kind, name in entries:
        if kind == "Dense":
            module = read_dense(folder / name)
            modules.append(dataclasses.replace(module, reads=TOKENS, writes=TOKENS))
        elif kind == "Pooling":
            raise ValueError(
                f"{path}: Pooling makes a model of one vector per text, which Embedder loads"
            )
        elif kind != "Dropout":
            raise ValueError(
                f"{path}: {kind} is not supported in a multi-vector model; supported are "
                "Transformer, Dense and Dropout"
            )
    if not modules:
        raise ValueError(
            f"{path}: expected a Dense after the Transformer, found none; PyLate would add one "
            "with random weights"
        )
    encoder = read_encoder(folder / inner, ENCODER)
    encoder.pop("max_length")  # PyLate has a length for queries and one for documents instead
    sentence = SentenceModel((*modules, UNIT), encoder=inner, **settings, **encoder)
    return Colbert(sentence, **_knobs(folder / SETTINGS_FILE))


def _knobs(path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of Colbert that the settings have; null stands for PyLate's default."""
    data = read_json(path, MAX_MODEL_JSON) if path.exists() else {}
    if data.get("truncate_dim") is not None:
        raise ValueError(f"{path}: truncate_dim is not supported in a multi-vector model")
    kinds: dict[str, tuple[type, str]] = {
        "query_prefix": (str, "a text"),
        "document_prefix": (str, "a text"),
        "query_length": (int, "a number"),
        "document_length": (int, "a number"),
        "do_query_expansion": (bool, "true or false"),
        "attend_to_expansion_tokens": (bool, "true or false"),
        "skiplist_words": (list, "a list of texts"),
    }
    found = {}
    for key, (kind, expected) in kinds.items():
        value = data.get(key)
        if value is None:
            continue
        if type(value) is not kind or (kind is list and not all(type(x) is str for x in value)):
            raise ValueError(f"{path}: {key}: expected {expected}, got {shown(value)}")
        found[key] = tuple(value) if kind is list else value
    return found


def write_colbert(folder: str | os.PathLike[str], model: Colbert) -> None:
    """Writes the files that PyLate and `read_colbert` read into the encoder's folder."""
    root = pathlib.Path(folder)
    entries = [("", "sentence_transformers.models.Transformer")]
    denses = [module for module in model.sentence.modules if isinstance(module, Dense)]
    for number, module in enumerate(denses, start=1):
        # PyLate's Dense always reads tokens and knows no settings that say so.
        write_dense(
            root / f"{number}_Dense", dataclasses.replace(module, reads=SENTENCE, writes=SENTENCE)
        )
        entries.append((f"{number}_Dense", "pylate.models.Dense.Dense"))
    write_json(
        root / ENCODER_FILE,
        {"max_seq_length": model.document_length, "do_lower_case": model.sentence.lower_case},
    )
    settings = {
        "model_type": COLBERT,
        "prompts": dict(model.sentence.prompts),
        "default_prompt_name": model.sentence.default_prompt_name,
        "similarity_fn_name": "MaxSim",
        "query_prefix": model.query_prefix,
        "document_prefix": model.document_prefix,
        "query_length": model.query_length,
        "document_length": model.document_length,
        "do_query_expansion": model.do_query_expansion,
        "attend_to_expansion_tokens": model.attend_to_expansion_tokens,
        "skiplist_words": list(model.skiplist_words),
    }
    write_json(root / SETTINGS_FILE, settings)
    write_modules(root, entries)
