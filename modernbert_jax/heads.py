"""The heads: masked LM, and sequence, token, question-answering and multiple-choice classifiers.

Calls take what ModernBertModel takes and pass it on (`attention=`, `scan_layers=`, ...).
Source: transformers' modeling_modernbert; init of the MLM head as ModernBERT's own training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, struct

from modernbert_jax.checkpoint.pretrained import Pretrained
from modernbert_jax.config import ModernBertConfig, init_std
from modernbert_jax.model import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    ModernBertModel,
    accepts_hf_names,
    as_segment_ids,
    dropout,
    fold,
    precision_of,
    truncated_normal,
)

_HEAD_KEY = 1_000_000  # the head's dropout key, beyond those of any layer


@struct.dataclass
class MaskedLMOutput:
    """logits_BLV, or logits_BPV where positions were asked for; float32."""

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class ClassifierOutput:
    """logits: [B, labels], packed rows [B, S, labels], tokens [B, L, labels], [B, choices]."""

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class QuestionAnsweringOutput:
    """start_logits_BL and end_logits_BL, float32."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class PredictionHead(nnx.Module):
    """norm(act(dense(x))), for [B, L, D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs, std: float):
        self.activation = config.classifier_activation
        D = config.hidden_size
        self.dense = Linear(
            "...D,DE->...E", (D, D), (D,) if config.classifier_bias else None, std, config, rngs
        )
        self.norm = LayerNorm(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.dense(x)
        act = ACTIVATIONS[self.activation]
        return self.norm(act(h.astype(jnp.float32)).astype(h.dtype))


class Decoder(nnx.Module):
    """The bias [V] and, where it is not tied to the embedding, the weight [V, D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        if not config.tie_word_embeddings:
            self.weight = nnx.Param(truncated_normal(rngs, (V, D), init_std(config, "out"), config))
        if config.decoder_bias:
            self.bias = nnx.Param(jnp.zeros((V,), config.param_dtype))


class ModernBertForMaskedLM(Pretrained, nnx.Module):
    """The encoder with its masked-LM head; the decoder is tied to the embedding by default."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.model = ModernBertModel(config, rngs=rngs)
        self.head = PredictionHead(config, rngs, init_std(config, "in"))
        self.decoder = Decoder(config, rngs)

    @property
    def decoder_weight_VD(self) -> jax.Array:
        """The output embedding, as stored."""
        if self.config.tie_word_embeddings:
            return self.model.embeddings.tok_embeddings.weight[...]
        return self.decoder.weight[...]

    @property
    def decoder_bias_V(self) -> jax.Array | None:
        """The output bias, as stored, or None."""
        return self.decoder.bias[...] if self.config.decoder_bias else None

    @accepts_hf_names
    def predict_hidden(
        self, input_ids_BL, *args, predict_positions_BP: jax.Array | None = None, **kwargs
    ) -> jax.Array:
        """The input of the decoder at the positions asked for, hidden_BPD (hidden_BLD without).

        predict_positions_BP: indices into the row, 0 <= p < L; the same one may come twice.
        Training chunks this against `decoder_weight_VD` in its loss: no [tokens, V] array exists.
        """
        hidden_BLD = self.model(input_ids_BL, *args, **kwargs).last_hidden_state
        return self.head(_gather(hidden_BLD, predict_positions_BP))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of what `predict_hidden` gave."""
        dtype = jnp.dtype(self.config.dtype)
        logits = jnp.einsum(
            "...D,VD->...V",
            hidden.astype(dtype),
            self.decoder_weight_VD.astype(dtype),
            precision=precision_of(dtype),
            preferred_element_type=jnp.float32,
        )
        if self.config.decoder_bias:
            bias_V = self.decoder.bias[...].astype(jnp.float32)
            logits = logits + bias_V.reshape((1,) * (logits.ndim - 1) + (-1,))
        return logits

    @accepts_hf_names
    def __call__(
        self, input_ids_BL, *args, predict_positions_BP: jax.Array | None = None, **kwargs
    ) -> MaskedLMOutput:
        """Logits of every position, or of `predict_positions_BP` only."""
        out = self.model(input_ids_BL, *args, **kwargs)
        hidden = self.head(_gather(out.last_hidden_state, predict_positions_BP))
        return MaskedLMOutput(self.logits(hidden), out.hidden_states, out.attentions)


def _gather(hidden_BLD: jax.Array, positions_BP: jax.Array | None) -> jax.Array:
    if positions_BP is None:
        return hidden_BLD
    return jnp.take_along_axis(hidden_BLD, jnp.asarray(positions_BP)[..., None], axis=1)


def pool(
    hidden_BLD: jax.Array, segment_ids_BL: jax.Array, num_segments: int = 1, pooling: str = "mean"
) -> jax.Array:
    """One vector a segment, hidden_BSD in float32: its first token ("cls") or its mean ("mean").

    Segment s (counted from 1, as in segment_ids) is at index s - 1; S is `num_segments`. A segment
    that the row lacks gives 0.
    """
    s_1S1 = jnp.arange(1, num_segments + 1)[None, :, None]
    member_BSL = jnp.asarray(segment_ids_BL)[:, None, :] == s_1S1
    if pooling == "cls":
        first_BS = jnp.argmax(member_BSL, axis=-1)
        picked_BSD = jnp.take_along_axis(hidden_BLD, first_BS[..., None], axis=1)
        present_BS1 = jnp.any(member_BSL, axis=-1, keepdims=True)
        return jnp.where(present_BS1, picked_BSD.astype(jnp.float32), 0.0)
    if pooling != "mean":
        raise ValueError(f"pooling: expected 'cls' or 'mean', got {pooling!r}")
    sum_BSD = jnp.einsum(
        "BSL,BLD->BSD",
        member_BSL.astype(jnp.float32),
        hidden_BLD.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return sum_BSD / jnp.maximum(jnp.sum(member_BSL, axis=-1, keepdims=True), 1)


class _Classifier(Pretrained, nnx.Module):
    """What the classifiers share: model, head, dropout, a linear classifier with a bias."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.model = ModernBertModel(config, rngs=rngs)
        self.head = PredictionHead(config, rngs, init_std(config, "out"))
        n = self.outputs(config)
        self.classifier = Linear(
            "...D,DE->...E",
            (config.hidden_size, n),
            (n,),
            init_std(config, "classifier"),
            config,
            rngs,
        )

    @staticmethod
    def outputs(config: ModernBertConfig) -> int:
        return config.num_labels

    def _classify(self, hidden: jax.Array, key: jax.Array | None) -> jax.Array:
        h = dropout(self.head(hidden), self.config.classifier_dropout, fold(key, _HEAD_KEY))
        return self.classifier(h).astype(jnp.float32)

    def _pooled(
        self, input_ids, attention_mask, segment_ids, positions, num_segments, kwargs
    ) -> ClassifierOutput:
        out = self.model(input_ids, attention_mask, segment_ids, positions, **kwargs)
        ids_BL = as_segment_ids(jnp.asarray(input_ids), attention_mask, segment_ids)
        pooled_BSD = pool(
            out.last_hidden_state, ids_BL, num_segments or 1, self.config.classifier_pooling
        )
        logits_BSE = self._classify(pooled_BSD, kwargs.get("dropout_key"))
        return ClassifierOutput(
            logits_BSE if num_segments else logits_BSE[:, 0], out.hidden_states, out.attentions
        )


class ModernBertForSequenceClassification(_Classifier):
    """One prediction a sequence: pooling, head, classifier."""

    @accepts_hf_names
    def __call__(
        self,
        input_ids_BL,
        attention_mask_BL=None,
        segment_ids_BL=None,
        positions_BL=None,
        *,
        num_segments: int | None = None,
        **kwargs,
    ) -> ClassifierOutput:
        """logits [B, labels]; with `num_segments` (packed rows) [B, S, labels], in segment order.

        With left padding "cls" is the first token, not position 0 as in transformers.
        Raises ValueError for segment_ids without num_segments.
        """
        if segment_ids_BL is not None and num_segments is None:
            raise ValueError(
                "segment_ids: packed rows need num_segments, the most sequences of a row (an int)"
            )
        return self._pooled(
            input_ids_BL, attention_mask_BL, segment_ids_BL, positions_BL, num_segments, kwargs
        )


class ModernBertForTokenClassification(_Classifier):
    """One prediction a token."""

    @accepts_hf_names
    def __call__(self, input_ids_BL, *args, **kwargs) -> ClassifierOutput:
        """logits [B, L, labels]; packed rows need nothing more."""
        out = self.model(input_ids_BL, *args, **kwargs)
        logits = self._classify(out.last_hidden_state, kwargs.get("dropout_key"))
        return ClassifierOutput(logits, out.hidden_states, out.attentions)


class ModernBertForQuestionAnswering(_Classifier):
    """Start and end of a span."""

    @accepts_hf_names
    def __call__(self, input_ids_BL, *args, **kwargs) -> QuestionAnsweringOutput:
        """start_logits_BL and end_logits_BL. Raises ValueError unless num_labels is 2."""
        if self.config.num_labels != 2:
            raise ValueError(f"num_labels: expected 2 (start, end), got {self.config.num_labels}")
        out = self.model(input_ids_BL, *args, **kwargs)
        logits_BLE = self._classify(out.last_hidden_state, kwargs.get("dropout_key"))
        return QuestionAnsweringOutput(
            logits_BLE[..., 0], logits_BLE[..., 1], out.hidden_states, out.attentions
        )


class ModernBertForMultipleChoice(_Classifier):
    """One score a choice."""

    @staticmethod
    def outputs(config: ModernBertConfig) -> int:
        return 1

    @accepts_hf_names
    def __call__(
        self,
        input_ids_BL,
        attention_mask_BL=None,
        segment_ids_BL=None,
        positions_BL=None,
        *,
        num_segments: int | None = None,
        **kwargs,
    ) -> ClassifierOutput:
        """logits [B, C] of inputs [B, C, L]; of packed rows [B, L], whose segments are the choices,
        [B, S] with `num_segments`."""
        if num_segments is not None:
            out = self._pooled(
                input_ids_BL, attention_mask_BL, segment_ids_BL, positions_BL, num_segments, kwargs
            )
            return dataclasses.replace(out, logits=out.logits[..., 0])
        if jnp.ndim(input_ids_BL) != 3:
            raise ValueError(
                f"input_ids: expected [B, choices, L], got shape {jnp.shape(input_ids_BL)}; packed "
                "rows need num_segments"
            )
        B, C, L = jnp.shape(input_ids_BL)
        rows = lambda x: None if x is None else jnp.reshape(jnp.asarray(x), (B * C, L))  # noqa: E731
        out = self._pooled(
            rows(input_ids_BL),
            rows(attention_mask_BL),
            rows(segment_ids_BL),
            rows(positions_BL),
            None,
            kwargs,
        )
        return dataclasses.replace(out, logits=out.logits.reshape(B, C))
