"""Embeds texts: Embedder packs texts of any lengths into full sequences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.params import with_arrays
from modernbert_jax.inference.export import (
    Function,
    check_exported,
    load,
    packed_batches,
    save,
    tokens_per_sequence,
    whole_number,
)
from modernbert_jax.inference.placement import Placement
from modernbert_jax.inference.sentence import (
    SentenceModel,
    read_sentence,
    resolve_prompt,
    unit_array,
    write_sentence,
)
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import placed, segment_slots
from modernbert_jax.tokenizer import check_ids, lower_case, max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
_MODULES = "sentence."  # begins the names of the weights that follow the encoder's


@dataclasses.dataclass
class Embedder:
    """Turns texts into vectors: `Embedder.from_pretrained(path).encode(texts)`.

    sentence: how, as the files of sentence-transformers describe it; without them the mean over
    the tokens, scaled to length 1. The next four, if they are given, replace a part of it. pooling:
    one or several of "mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens" and "weightedmean".
    layer: the hidden states to pool; -1 is the last layer, 0 the embeddings. normalize: whether
    vectors are scaled to length 1 at the end. max_length: in tokens; the smallest of this, the
    model's, the tokenizer's and the files' limit holds, and longer texts are truncated. device:
    computes, by default jax's first device. mesh: each device of its axis "data" gets one packed
    sequence per step. An instance is a model for `mteb.evaluate`.
    """

    model: ModernBertModel
    tokenizer: PreTrainedTokenizerFast
    pooling: str | Sequence[str] | None = None
    layer: int = -1
    normalize: bool | None = None
    max_length: int | None = None
    device: Any = None
    mesh: Mesh | None = None
    folder: str | os.PathLike[str] | None = None  # of functions that this user exported
    mteb_model_meta: Any = None  # mteb files results under the name in an mteb.ModelMeta
    sentence: SentenceModel = SentenceModel()

    def __post_init__(self) -> None:
        self.sentence = sentence = self.sentence.chosen(self.pooling, self.normalize)
        config = self.model.config
        modes = sentence.pooling.modes
        self.pooling = modes[0] if len(modes) == 1 else modes
        self.normalize = sentence.normalizes
        self._dimension = sentence.dimension(config.hidden_size)
        layers = config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer: expected {-layers - 1} to {layers}, got {self.layer}")
        check_ids(self.tokenizer, config.vocab_size)
        limits = [config.max_position_embeddings]
        if self.max_length is not None:
            limits.append(whole_number("max_length", self.max_length, 1))
        if sentence.max_length is not None:
            limits.append(sentence.max_length)
        self.max_length = max_tokens(self.tokenizer, min(limits))
        if sentence.lower_case:
            lower_case(self.tokenizer)
        self._placement = place = Placement(self.device, self.mesh, config)
        attention = place.attention
        arrays, build = with_arrays(self.model)
        own = {_MODULES + key: jnp.asarray(array) for key, array in sentence.params().items()}
        self._params = place.put_params(arrays | own)
        layer = self.layer % (layers + 1)

        def embed_tokens(params, input_ids_BL, segment_ids_BL, segments: int, skip: int = 0):
            last = layer == layers
            out = build(params)(
                input_ids_BL, segment_ids=segment_ids_BL, attention=attention,
                output_hidden_states=not last,
            )  # fmt: skip
            hidden_BLD = out.last_hidden_state if last else out.hidden_states[layer]
            weights = {key.removeprefix(_MODULES): params[key] for key in own}
            return sentence.apply(weights, hidden_BLD, segment_ids_BL, segments, skip)

        def embed(params, input_ids_BL, segment_ids_BL, segments: int, skip: int = 0):
            found = embed_tokens(params, input_ids_BL, segment_ids_BL, segments, skip)
            return found["sentence_embedding"]

        name = "-".join([str(layer), sentence.name])
        folder = None if place.mesh else self.folder
        self._embed = Function(f"embed-{name}", embed, config, folder, (3, 4))
        self._embed_tokens = Function(f"tokens-{name}", embed_tokens, config, folder, (3, 4))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        pooling: str | Sequence[str] | None = None,
        layer: int = -1,
        normalize: bool | None = None,
        max_length: int | None = None,
        device: Any = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        revision: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        exported: bool = False,
    ) -> Embedder:
        """Loads an embedding model of sentence-transformers, or any encoder, and its tokenizer.

        modules.json and the files that it names decide the vectors, which are those of
        `SentenceTransformer(path).encode`. A folder without modules.json gives the mean over the
        tokens, scaled to length 1. dtype, revision: as in `ModernBertModel.from_pretrained`.
        compile_cache: a folder that keeps compiled programs for later processes. exported: use the
        functions that you have exported into this local folder; other people's are refused. The
        other arguments are the fields of the class. Raises ValueError for a module or an option in
        the files that is not supported.
        """
        if exported:
            check_exported(path_or_repo)
        folder = resolve(path_or_repo, revision)
        sentence = read_sentence(folder)
        options = {"dtype": dtype}
        model, tokenizer, _ = load(
            ModernBertModel, folder / sentence.encoder, None, options, compile_cache
        )
        if sentence.max_length is not None:  # as in sentence-transformers, it replaces this one
            tokenizer.model_max_length = sentence.max_length
        functions = folder if exported else None
        return cls(
            model, tokenizer, pooling, layer, normalize, max_length, device, mesh, functions,
            sentence=sentence,
        )  # fmt: skip

    @property
    def dimension(self) -> int:
        """The embedding dimension: at most the truncate_dim of the files, if they have one."""
        return min(self._dimension, self.sentence.truncate_dim or self._dimension)

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        task_metadata: Any = None,
        hf_split: Any = None,
        hf_subset: Any = None,
        prompt_type: Any = None,
        **unsupported: Any,
    ) -> Any:
        """Returns vectors [texts, E], float32, in the order of `inputs`; [E] for a single text.

        inputs: a text, or several. As in sentence-transformers, a text may be {"text": ...}, and a
        pair of texts in a list is encoded as one. {"text": [...]} is a batch, as mteb passes them.
        prompt: put before each text (the first of a pair); prompt_name: one of the model's prompts,
        by default its default prompt. batch_tokens: the most tokens in a packed sequence, of which
        each device gets one; by default 16,384, on a CPU 512. batch_size: the most texts in one;
        by default as many as fit. Sequence
        lengths come from a short list, so that few programs are compiled. show_progress_bar: None
        shows it in a terminal only. output_value: "token_embeddings" returns an array [L, D] per
        text, and None a dictionary with both and "input_ids". truncate_dim: keeps the first numbers
        of a vector, by default as many as the model's files say; after that normalize_embeddings
        scales it to length 1 and precision ("int8", "uint8", "binary", "ubinary", with the ranges
        of these vectors) stores it in fewer bits.
        Results are NumPy's; convert_to_tensor returns a jax array, convert_to_numpy=False a list of
        them. mteb also passes task_metadata, hf_split and hf_subset, which have no effect, and
        prompt_type ("query" or "document"), as `encode_query` and `encode_document` do; beside
        task_metadata a batch_size has no effect, since mteb always passes one. Raises
        TypeError for other arguments (device, mesh and max_length are Embedder's) and for inputs
        that are no texts, ValueError for values.
        """
        if unsupported:
            raise TypeError(
                f"{', '.join(sorted(unsupported))}: not an argument of encode; pass device, mesh, "
                "pooling, layer, normalize and max_length to Embedder itself"
            )
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(
                "output_value: expected sentence_embedding, token_embeddings or None, got "
                f"{output_value!r}"
            )
        precision = "float32" if precision is None else precision
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected {', '.join(PRECISIONS)}, got {precision!r}")
        if output_value != "sentence_embedding" and (
            precision != "float32" or normalize_embeddings or truncate_dim is not None
        ):
            raise TypeError(
                "precision, normalize_embeddings, truncate_dim: expected none with output_value="
                f"{output_value!r}"
            )
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size, 1)
        begin = self._prompt(prompt, prompt_name, prompt_type)
        single = isinstance(inputs, str | dict) and not _is_batch(inputs)
        items = [_text(item, begin) for item in ([inputs] if single else _flat(inputs))]
        ids: list[list[int]] = []
        for first in range(0, len(items), 512):
            ids += self._token_ids(items[first : first + 512])
        limit = None if task_metadata is not None else batch_size
        out, tokens = self._run(
            ids, batch_tokens, show_progress_bar, limit, output_value, self._skip(begin)
        )
        dim = self.sentence.truncate_dim if truncate_dim is None else truncate_dim
        out = out if dim is None else out[:, :dim]
        results: Any = tokens
        if output_value is None:
            results = [
                {"input_ids": np.array(ids[i]), "token_embeddings": tokens[i],
                 "sentence_embedding": out[i]}
                for i in range(len(ids))
            ]  # fmt: skip
        elif output_value == "sentence_embedding":
            out = unit_array(out) if normalize_embeddings else out
            results = quantized(out, precision)
        if convert_to_tensor and output_value == "sentence_embedding":
            results = jnp.asarray(results)
        elif convert_to_tensor or not convert_to_numpy:
            results = jax.tree.map(jnp.asarray, list(results))
        return results[0] if single else results

    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Returns vectors [texts, E], float32, of texts given as token ids.

        ids: complete, with the special tokens and any prompt, of at most max_length each; all of
        them are pooled. The other arguments are those of `encode`.
        """
        out, _ = self._run(ids, batch_tokens, show_progress_bar, None, "sentence_embedding", ())
        return out[:, : self.dimension]

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        batch_tokens: int | None,
        show_progress_bar: bool | None,
        batch_size: int | None,
        output_value: str | None,
        skip: tuple[int, ...],
    ) -> tuple[np.ndarray, list[Any]]:
        """Returns the vectors and, unless output_value asks for them alone, those of the tokens."""
        tokens: list[Any] = [None] * len(ids)
        out = np.zeros((len(ids), self._dimension), np.float32)
        for batch, input_ids, segment_ids in packed_batches(
            ids,
            self._placement.sequences,
            tokens_per_sequence(batch_tokens),
            "embedding",
            show_progress_bar,
            batch_size,
        ):
            slots = segment_slots(input_ids.shape[1], max(map(len, batch)))
            input_ids, segment_ids = self._placement.put_rows(input_ids, segment_ids)
            function = self._embed if output_value == "sentence_embedding" else self._embed_tokens
            found = function(self._params, input_ids, segment_ids, slots, *skip)
            if output_value != "sentence_embedding":
                found, hidden_BLD = (
                    found["sentence_embedding"],
                    np.asarray(found["token_embeddings"]),
                )
                for row, _, start, i in placed(batch, lambda i: len(ids[i])):
                    tokens[i] = hidden_BLD[row, start : start + len(ids[i])]
            for indices, vectors_SD in zip(batch, np.asarray(found), strict=True):
                out[indices] = vectors_SD[: len(indices)]
        return out, tokens

    def encode_query(self, inputs: Any, *args: Any, **options: Any) -> Any:
        """Encodes queries: `encode` with the model's prompt "query" unless a prompt is given."""
        return self.encode(inputs, *args, prompt_type="query", **options)

    def encode_document(self, inputs: Any, *args: Any, **options: Any) -> Any:
        """Encodes documents: `encode` with the prompt "document" unless a prompt is given."""
        return self.encode(inputs, *args, prompt_type="document", **options)

    def _prompt(self, prompt: Any, name: Any, prompt_type: Any) -> str:
        """The prompt of a call. mteb's prompt_type is an enumeration of texts, or a text."""
        task = getattr(prompt_type, "value", prompt_type)
        if task not in (None, "query", "document"):
            raise ValueError(f"prompt_type: expected query or document, got {task!r}")
        known, default = self.sentence.prompts, self.sentence.default_prompt_name
        default = task if task in known else default
        return resolve_prompt(known, default, prompt, name)

    def _skip(self, prompt: str) -> tuple[int, ...]:
        """The tokens of the prompt that are not pooled, if there are any, for the function."""
        if not prompt or self.sentence.pooling.include_prompt:
            return ()
        return (self._prompt_tokens(prompt),)

    def _token_ids(self, texts: list[Any]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def _prompt_tokens(self, prompt: str) -> int:
        """The number of tokens that a prompt puts before a text, with [CLS] and without [SEP]."""
        (ids,) = self._token_ids([prompt])
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Returns the similarity of all vectors `a` [M, D] with all vectors `b` [N, D]: [M, N].

        It is the one that the model's files name: "cosine" (the default), "dot", or minus the
        "euclidean" or "manhattan" distance.
        """
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        kind = self.sentence.similarity
        if kind == "dot":
            return a @ b.T
        if kind == "cosine":
            return unit_array(a) @ unit_array(b).T
        rows = [self._distance(row[None], b) for row in a]
        return -np.stack(rows) if rows else np.zeros((0, len(b)), np.float32)

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Returns the similarity of each vector of `a` [N, D] with the same one of `b`: [N]."""
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        kind = self.sentence.similarity
        if kind in ("dot", "cosine"):
            a, b = (unit_array(a), unit_array(b)) if kind == "cosine" else (a, b)
            return (a * b).sum(-1)
        return -self._distance(a, b)

    def _distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        order = 1 if self.sentence.similarity == "manhattan" else 2
        return np.linalg.norm(a - b, ord=order, axis=-1)

    def save(
        self, folder: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a folder that sentence-transformers, transformers and `from_pretrained` load.

        card: facts for the model card, as in `ModernBertModel.save_pretrained`. Raises ValueError
        for another layer than the last, which these files cannot describe.
        """
        if self.layer % (self.model.config.num_hidden_layers + 1) < (
            self.model.config.num_hidden_layers
        ):
            raise ValueError(
                f"layer: expected -1, the last layer, got {self.layer}; the files of "
                "sentence-transformers describe no other"
            )
        self.model.save_pretrained(folder, tokenizer=self.tokenizer, card=card)
        self._write_sentence(folder)

    def _write_sentence(self, folder: str | os.PathLike[str]) -> None:
        write_sentence(
            folder, self.sentence, self.model.config.hidden_size, int(self.max_length or 0)
        )

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles the function for sequences of up to each number of tokens."""
        self._embed.warm_up(self._params, tokens, self._further_args)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model and its function for one text of up to each number of tokens.

        Returns the sequence lengths. `Embedder.from_pretrained(folder, exported=True)` with the
        same options uses the functions. platforms: "cpu", "cuda", "tpu"; by default the platform of
        this process.
        """
        save(folder, self.model, self.tokenizer)
        self._write_sentence(folder)
        return self._embed.export(folder, self._params, tokens, self._further_args, platforms)

    def _further_args(self, sequence_length: int) -> tuple[int, ...]:
        return (segment_slots(sequence_length), *self._skip(self._prompt(None, None, None)))


def quantized(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Stores float32 vectors [N, E] in fewer bits.

    "int8" and "uint8": in 256 steps between the least and the largest value of each dimension.
    "binary" and "ubinary": whether each value is above 0, eight in an int8 or a uint8. Raises
    ValueError for fewer than two vectors where ranges are needed.
    """
    if precision == "float32":
        return vectors
    if precision in ("int8", "uint8"):
        if len(vectors) == 1:
            raise ValueError(f"precision: {precision} needs the ranges of several texts, got one")
        if not len(vectors):
            return vectors.astype(precision)
        least = vectors.min(0)
        steps = (vectors.max(0) - least) / 255
        found = np.floor((vectors - least) / np.where(steps == 0, 1, steps)).clip(0, 255)
        return (found - 128 if precision == "int8" else found).astype(precision)
    bits = np.packbits(vectors > 0, axis=-1)
    return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)


def _is_batch(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("text"), list)


def _flat(inputs: Any) -> list[Any]:
    """Returns the items of `inputs`, with mteb's batches taken apart."""
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected texts, got a {type(inputs).__name__}")
    items: list[Any] = []
    for item in [inputs] if isinstance(inputs, dict) else inputs:
        items += item["text"] if _is_batch(item) else [item]
    return items


def _text(item: Any, prompt: str) -> Any:
    """Returns a text, or a pair of texts, with the prompt before it."""
    if isinstance(item, dict) and item.keys() == {"text"}:
        item = item["text"]
    if isinstance(item, str):
        return prompt + item
    pair = isinstance(item, list | tuple) and len(item) == 2
    if pair and all(isinstance(text, str) for text in item):
        return (prompt + item[0], item[1])
    keys = f" with {', '.join(map(str, item))}" if isinstance(item, dict) else ""
    raise TypeError(
        f'inputs: expected texts, pairs of texts or {{"text": ...}}, got a '
        f"{type(item).__name__}{keys}"
    )
