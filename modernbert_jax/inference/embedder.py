"""Embeds texts: Embedder packs texts of any lengths into full sequences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax.attention import attention as default_attention, check, sharded
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.inference.export import (
    Function,
    check_exported,
    load,
    packed_batches,
    save,
    tokens_per_sequence,
    whole_number,
)
from modernbert_jax.inference.sentence import (
    SentenceModel,
    read_sentence,
    unit,
    write_sentence,
)
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import segment_slots
from modernbert_jax.tokenizer import check_ids, lower_case, max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
        # A new mesh, because the axes may be explicit and these arrays are placed by the compiler.
        mesh = self.mesh and Mesh(self.mesh.devices, self.mesh.axis_names)
        if self.device is not None:
            if mesh is not None:
                raise ValueError("device, mesh: expected one of them, got both")
            mesh = Mesh(np.array([self.device]), ("data",))
        attention = default_attention if mesh is None else sharded(mesh, rows="data")
        if mesh is not None:  # may consist of other devices than the default one
            check(mesh.local_devices[0], dtype=config.dtype, head_dim=config.head_dim)
        self._sequences = 1 if mesh is None else mesh.shape["data"]
        self._sharding = mesh and NamedSharding(mesh, PartitionSpec("data", None))
        self._params = flatten(self.model)
        own = {_MODULES + key: jnp.asarray(array) for key, array in sentence.params().items()}
        self._params |= own
        if mesh is not None:
            self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        layer = self.layer % (layers + 1)

        def embed(params, input_ids_BL, segment_ids_BL, segments: int, skip: int = 0):
            model = module_of(ModernBertModel, config, params)
            last = layer == layers
            out = model(
                input_ids_BL, segment_ids=segment_ids_BL, attention=attention,
                output_hidden_states=not last,
            )  # fmt: skip
            hidden_BLD = out.last_hidden_state if last else out.hidden_states[layer]
            weights = {key.removeprefix(_MODULES): params[key] for key in own}
            found = sentence.apply(weights, hidden_BLD, segment_ids_BL, segments, skip)
            return found["sentence_embedding"]

        name = "-".join(["embed", str(layer), sentence.name])
        self._embed = Function(name, embed, config, None if mesh else self.folder, (3, 4))

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
        """The embedding dimension."""
        return self._dimension

    def encode(
        self,
        texts: str | Iterable[Any],
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        task_metadata: Any = None,
        hf_split: Any = None,
        hf_subset: Any = None,
        prompt_type: Any = None,
        batch_size: Any = None,
        precision: Any = None,
        **unsupported: Any,
    ) -> np.ndarray:
        """Returns vectors [texts, D], float32, in the order of `texts`; [D] for a single text.

        texts: one text, several, or batches {"text": [...]} as mteb passes them. batch_tokens: per
        packed sequence, of which each device gets one; by default 16,384, on a CPU 512. Sequence
        lengths come from a short list, so that few programs are compiled. show_progress_bar: None
        shows it in a terminal only. mteb also passes task_metadata, hf_split, hf_subset,
        prompt_type, batch_size and precision, which have no effect. Raises TypeError for other
        arguments.
        """
        if unsupported:
            raise TypeError(
                f"{', '.join(sorted(unsupported))}: expected batch_tokens and show_progress_bar; "
                "pass pooling, layer, normalize and max_length to Embedder; results are NumPy's"
            )
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else _flat(texts)
        prompt = self._prompt()
        ids: list[list[int]] = []
        for first in range(0, len(items), 512):
            ids += self._token_ids([prompt + item for item in items[first : first + 512]])
        skip = ()
        if prompt and not self.sentence.pooling.include_prompt:
            skip = (self._prompt_tokens(prompt),)
        out = np.zeros((len(ids), self.dimension), np.float32)
        for batch, input_ids, segment_ids in packed_batches(
            ids,
            self._sequences,
            tokens_per_sequence(batch_tokens),
            "embedding",
            show_progress_bar,
        ):
            slots = segment_slots(input_ids.shape[1], max(map(len, batch)))
            if self._sharding is not None:
                input_ids, segment_ids = jax.device_put((input_ids, segment_ids), self._sharding)
            vectors_BSD = np.asarray(
                self._embed(self._params, input_ids, segment_ids, slots, *skip)
            )
            for indices, vectors_SD in zip(batch, vectors_BSD, strict=True):
                out[indices] = vectors_SD[: len(indices)]
        return out[0] if single else out

    def _prompt(self) -> str:
        name = self.sentence.default_prompt_name
        return "" if name is None else self.sentence.prompts[name]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def _prompt_tokens(self, prompt: str) -> int:
        """The number of tokens that a prompt puts before a text, with [CLS] and without [SEP]."""
        (ids,) = self._token_ids([prompt])
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Returns the cosines of all vectors `a` [M, D] with all vectors `b` [N, D]: [M, N]."""
        return _unit(a) @ _unit(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Returns the cosine of each vector of `a` [N, D] with the same one of `b` [N, D]: [N]."""
        return (_unit(a) * _unit(b)).sum(-1)

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
        slots = lambda size: (segment_slots(size),)  # noqa: E731
        return self._embed.export(folder, self._params, tokens, slots, platforms)


def _unit(vectors: Any) -> np.ndarray:
    return np.asarray(unit(jnp.atleast_2d(np.asarray(vectors, np.float32))))


def _flat(texts: Iterable[Any]) -> list[str]:
    items: list[str] = []
    for item in texts:
        items += item["text"] if isinstance(item, dict) else [item]
    return items
