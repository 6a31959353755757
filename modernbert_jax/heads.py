"""The heads: masked LM, and sequence, token, question-answering and multiple-choice classifiers.

Every call takes the arguments of `ModernBertModel.__call__`, which documents them.
Source: transformers' modeling_modernbert; the MLM head is initialized as in ModernBERT's training.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from modernbert_jax import losses
from modernbert_jax.attention import attention as default_attention, make_segment_ids
from modernbert_jax.attention.bounds import host_array
from modernbert_jax.checkpoint.pretrained import Pretrained
from modernbert_jax.config import ModernBertConfig, init_std
from modernbert_jax.dropout import dropout, fold
from modernbert_jax.layers import ACTIVATIONS, LayerNorm, Linear, Op, truncated_normal
from modernbert_jax.model import (
    Array,
    BaseModelOutput,
    ModelOutput,
    ModernBertModel,
    Remat,
    RngSource,
    check_range,
    draw_key,
    on_any_mesh,
    one_of,
    refuse_inputs,
)
from modernbert_jax.precision import einsum

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_HEAD_KEY = 1_000_000  # the number of the head's dropout key, beyond those of any layer


@struct.dataclass
class MaskedLMOutput(ModelOutput):
    """logits: float32 [B, L, V], or [B, P, V] at the predicted positions. loss: with labels."""

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    loss: jax.Array | None = None


@struct.dataclass
class ClassifierOutput(ModelOutput):
    """logits: float32 [B, E], [B, S, E] for packed sequences, [B, L, E] for tokens, or [B, C].

    E is the number of labels, C the number of choices. loss: a float32 scalar, with labels.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    loss: jax.Array | None = None


@struct.dataclass
class QuestionAnsweringOutput(ModelOutput):
    """start_logits and end_logits: float32 [B, L]. loss: with start_positions and end_positions."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    loss: jax.Array | None = None


class PredictionHead(nnx.Module):
    """norm(act(dense(x))) for [B, L, D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs, std: float):
        self.activation = config.classifier_activation
        D = config.hidden_size
        bias = (D,) if config.classifier_bias else None
        self.dense = Linear("...D,DE->...E", (D, D), bias, std, config, rngs)
        self.norm = LayerNorm(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.dense(x)
        act = ACTIVATIONS[self.activation]
        return self.norm(act(h.astype(jnp.float32)).astype(h.dtype))


class Decoder(nnx.Module):
    """The bias [V] and, unless it is tied to the embedding, the weight [V, D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        if not config.tie_word_embeddings:
            self.weight = nnx.Param(truncated_normal(rngs, (V, D), init_std(config, "out"), config))
        if config.decoder_bias:
            self.bias = nnx.Param(jnp.zeros((V,), config.param_dtype))


class ModernBertForMaskedLM(Pretrained, nnx.Module):
    """The encoder with its masked-LM head; by default the decoder is tied to the embedding."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.model = ModernBertModel(config, rngs=rngs)
        self.head = PredictionHead(config, rngs, init_std(config, "in"))
        self.decoder = Decoder(config, rngs)

    @property
    def decoder_weight_VD(self) -> jax.Array:
        """The output embedding in its stored dtype."""
        if self.config.tie_word_embeddings:
            return self.model.embeddings.tok_embeddings.weight[...]
        return self.decoder.weight[...]

    @property
    def decoder_bias_V(self) -> jax.Array | None:
        """The output bias in its stored dtype, or None."""
        return self.decoder.bias[...] if self.config.decoder_bias else None

    @on_any_mesh
    def predict_hidden(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        predict_positions: Array | None = None, inputs_embeds: Array | None = None,
        dropout_key: jax.Array | None = None, deterministic: bool | None = None,
        rngs: RngSource = None, attention: Op = default_attention,
        scan_layers: bool = False, remat: Remat = False, **unsupported: Any,
    ) -> jax.Array:  # fmt: skip
        """Returns the decoder's input at the predicted positions, hidden_BPD (or hidden_BLD).

        predict_positions: [B, P], indices 0 <= p < L; repeats are allowed. Others raise ValueError
        in lists and NumPy arrays, and give NaN in jax arrays. The loss of training multiplies
        chunks of this by `decoder_weight_VD`, so that no [tokens, V] array exists.
        """
        hidden_BLD = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=dropout_key, deterministic=deterministic, rngs=rngs, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=False, output_attentions=False, **unsupported,
        ).last_hidden_state  # fmt: skip
        return self.head(_gather(hidden_BLD, predict_positions))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the float32 logits [..., V] of the output of `predict_hidden`."""
        dtype = jnp.dtype(self.config.dtype)
        logits = einsum("...D,VD->...V", hidden.astype(dtype), self.decoder_weight_VD.astype(dtype))
        if self.config.decoder_bias:
            bias_V = self.decoder.bias[...].astype(jnp.float32)
            logits = logits + bias_V.reshape((1,) * (logits.ndim - 1) + (-1,))
        return logits

    @on_any_mesh
    def __call__(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        predict_positions: Array | None = None,
        labels: Array | None = None,
        inputs_embeds: Array | None = None, dropout_key: jax.Array | None = None,
        deterministic: bool | None = None, rngs: RngSource = None,
        attention: Op = default_attention, scan_layers: bool = False, remat: Remat = False,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        """Returns logits at every position, or at `predict_positions` [B, P] only.

        labels: token ids at the same positions, -100 where there is none; the output then has a
        loss (`modernbert_jax.losses.cross_entropy`).
        """
        out = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=dropout_key, deterministic=deterministic, rngs=rngs, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **unsupported,
        )  # fmt: skip
        hidden = self.head(_gather(out.last_hidden_state, predict_positions))
        logits = self.logits(hidden)
        loss = None if labels is None else losses.cross_entropy(logits, labels)
        return MaskedLMOutput(logits, out.hidden_states, out.attentions, loss)


def _gather(hidden_BLD: jax.Array, positions_BP: Array | None) -> jax.Array:
    if positions_BP is None:
        return hidden_BLD
    B, L, _ = hidden_BLD.shape
    if len(np.shape(positions_BP)) != 2 or np.shape(positions_BP)[0] != B:
        raise ValueError(
            f"predict_positions: expected shape [B, P] with B = {B}, got {np.shape(positions_BP)}"
        )
    check_range("predict_positions", positions_BP, L, "L - 1")
    positions_BP = jnp.asarray(positions_BP)
    # NaN for a position outside the row, a negative one too.
    positions_BP = jnp.where(positions_BP < 0, L, positions_BP)
    return jnp.take_along_axis(hidden_BLD, positions_BP[..., None], axis=1, mode="fill")


def check_num_segments(num_segments: Any, segment_ids: Array | None) -> None:
    """Raises ValueError unless num_segments is a positive int that no segment id exceeds.

    The values of jax arrays are not read.
    """
    if not isinstance(num_segments, int | np.integer) or num_segments < 1:
        raise ValueError(f"num_segments: expected a positive int, got {num_segments!r}")
    ids = None if segment_ids is None else host_array("segment_ids", segment_ids)
    if ids is not None and ids.size and ids.max() > num_segments:
        raise ValueError(
            f"num_segments: expected at least the largest segment id {ids.max()}, "
            f"got {num_segments}"
        )


def pool(
    hidden_states: Array,
    segment_ids: Array,
    num_segments: int = 1,
    pooling: str = "mean",
    *,
    skip: int = 0,
) -> jax.Array:
    """Pools each segment into one float32 vector, hidden_BSD.

    hidden_states: [B, L, D]. segment_ids: [B, L]. num_segments: S; segment s (counted from 1, as in
    segment_ids) is at index s - 1, and is 0 if the row has no such segment. pooling: "mean", "cls"
    (the first token), "lasttoken", "max", "mean_sqrt_len_tokens" (the sum divided by the root of
    the length) or "weightedmean" (token n of a segment has the weight n). skip: leaves out the
    first tokens of each segment, such as a prompt; they keep their weights. Raises ValueError for
    another pooling and if segment_ids has larger ids than S; in a jax array, whose values are not
    read, those segments are left out.
    """
    check_num_segments(num_segments, segment_ids)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected {', '.join(POOLINGS)}, got {pooling!r}")
    segment_ids = jnp.asarray(segment_ids)
    member_BSL = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
    weight_BSL = member_BSL
    if skip or pooling == "weightedmean":
        number_BSL = jnp.cumsum(member_BSL, axis=-1) * member_BSL
        member_BSL = number_BSL > skip
        weight_BSL = number_BSL * member_BSL if pooling == "weightedmean" else member_BSL
    if pooling in ("cls", "lasttoken"):
        at_BS = jnp.argmax(member_BSL, axis=-1)
        if pooling == "lasttoken":
            at_BS = member_BSL.shape[-1] - 1 - jnp.argmax(member_BSL[..., ::-1], axis=-1)
        picked_BSD = jnp.take_along_axis(jnp.asarray(hidden_states), at_BS[..., None], axis=1)
        present_BS1 = jnp.any(member_BSL, axis=-1, keepdims=True)
        return jnp.where(present_BS1, picked_BSD.astype(jnp.float32), 0.0)
    hidden_BLD = jnp.asarray(hidden_states, jnp.float32)
    if pooling == "max":
        ids_BL = jnp.where(jnp.any(member_BSL, axis=1), segment_ids, 0)
        max_BSD = jax.vmap(lambda x, ids: jax.ops.segment_max(x, ids, num_segments + 1))(
            hidden_BLD, ids_BL
        )[:, 1:]
        return jnp.where(jnp.any(member_BSL, axis=-1, keepdims=True), max_BSD, 0.0)
    sum_BSD = einsum("BSL,BLD->BSD", weight_BSL.astype(jnp.float32), hidden_BLD)
    total_BS1 = jnp.maximum(jnp.sum(weight_BSL, axis=-1, keepdims=True), 1)
    if pooling == "mean_sqrt_len_tokens":
        total_BS1 = jnp.sqrt(total_BS1.astype(jnp.float32))
    return sum_BSD / total_BS1


class _Classifier(Pretrained, nnx.Module):
    """The encoder, the prediction head, dropout and a linear classifier with a bias."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.model = ModernBertModel(config, rngs=rngs)
        self.head = PredictionHead(config, rngs, init_std(config, "out"))
        shape = (config.hidden_size, self._outputs(config))
        std = init_std(config, "classifier")
        self.classifier = Linear("...D,DE->...E", shape, shape[1:], std, config, rngs)

    @staticmethod
    def _outputs(config: ModernBertConfig) -> int:
        return config.num_labels

    def _classify(self, hidden: jax.Array, key: jax.Array | None) -> jax.Array:
        h = dropout(self.head(hidden), self.config.classifier_dropout, fold(key, _HEAD_KEY))
        return self.classifier(h).astype(jnp.float32)

    def _classify_segments(
        self, out: BaseModelOutput, mask: Array | None, segment_ids: Array | None,
        num_segments: int | None, key: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        """Logits of the pooled segments [B, S, E], or [B, E] if num_segments is None."""
        if num_segments is not None:
            check_num_segments(num_segments, segment_ids)
        ids_BL = make_segment_ids(out.last_hidden_state.shape[:2], mask, segment_ids)
        pooled_BSD = pool(
            out.last_hidden_state, ids_BL, num_segments or 1, self.config.classifier_pooling
        )
        logits_BSE = self._classify(pooled_BSD, key)
        return logits_BSE if num_segments else logits_BSE[:, 0]


class ModernBertForSequenceClassification(_Classifier):
    """Predicts one label per sequence: pooling, head, classifier."""

    @on_any_mesh
    def __call__(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        num_segments: int | None = None,
        labels: Array | None = None,
        inputs_embeds: Array | None = None, dropout_key: jax.Array | None = None,
        deterministic: bool | None = None, rngs: RngSource = None,
        attention: Op = default_attention, scan_layers: bool = False, remat: Remat = False,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> ClassifierOutput:  # fmt: skip
        """Returns logits [B, E], or [B, S, E] for packed sequences, in segment order.

        num_segments: S, the largest number of sequences packed into one; an int. "cls" pools the
        first token, also with padding on the left, where transformers pools position 0.
        labels: [B] or [B, E], from which `modernbert_jax.losses.sequence_classification` computes
        the loss for config.problem_type; with num_segments class indices [B, S], and -100 for a
        segment that a row does not have.
        Raises ValueError for segment_ids without num_segments, and for ids above num_segments in a
        list or a NumPy array; in a jax array, whose values are not read, they are left out.
        """
        if segment_ids is not None and num_segments is None:
            raise ValueError(
                "segment_ids: packed sequences need num_segments, the largest number of segments "
                "in a row (an int)"
            )
        kind = self.config.problem_type
        if (
            labels is not None
            and num_segments
            and (self.config.num_labels == 1 or kind not in (None, "single_label_classification"))
        ):
            raise ValueError(
                "labels: packed sequences need one class index each (single_label_classification), "
                f"got problem_type {kind!r} and num_labels {self.config.num_labels}; compute the "
                "loss of the segments that exist from the logits"
            )
        key = draw_key(self.model, dropout_key, deterministic, rngs)
        out = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=key, deterministic=key is None, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **unsupported,
        )  # fmt: skip
        logits = self._classify_segments(out, attention_mask, segment_ids, num_segments, key)
        loss = None
        if labels is not None and num_segments:
            loss = losses.cross_entropy(logits, labels)
        elif labels is not None:
            loss = losses.sequence_classification(logits, labels, kind)
        return ClassifierOutput(logits, out.hidden_states, out.attentions, loss)


class ModernBertForTokenClassification(_Classifier):
    """Predicts one label per token."""

    @on_any_mesh
    def __call__(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        labels: Array | None = None,
        inputs_embeds: Array | None = None, dropout_key: jax.Array | None = None,
        deterministic: bool | None = None, rngs: RngSource = None,
        attention: Op = default_attention, scan_layers: bool = False, remat: Remat = False,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> ClassifierOutput:  # fmt: skip
        """Returns logits [B, L, E], for packed sequences too.

        labels: class indices [B, L], -100 for a token without one; the output then has a loss
        (`modernbert_jax.losses.cross_entropy`).
        """
        key = draw_key(self.model, dropout_key, deterministic, rngs)
        out = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=key, deterministic=key is None, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **unsupported,
        )  # fmt: skip
        logits = self._classify(out.last_hidden_state, key)
        loss = None if labels is None else losses.cross_entropy(logits, labels)
        return ClassifierOutput(logits, out.hidden_states, out.attentions, loss)


class ModernBertForQuestionAnswering(_Classifier):
    """Predicts the start and the end of a span."""

    @on_any_mesh
    def __call__(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        start_positions: Array | None = None, end_positions: Array | None = None,
        inputs_embeds: Array | None = None, dropout_key: jax.Array | None = None,
        deterministic: bool | None = None, rngs: RngSource = None,
        attention: Op = default_attention, scan_layers: bool = False, remat: Remat = False,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> QuestionAnsweringOutput:  # fmt: skip
        """Returns start_logits and end_logits [B, L].

        start_positions, end_positions: [B]; with both, the output has a loss
        (`modernbert_jax.losses.question_answering`). Raises ValueError for one of them alone, and
        unless num_labels is 2.
        """
        if self.config.num_labels != 2:
            raise ValueError(f"num_labels: expected 2 (start, end), got {self.config.num_labels}")
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions, end_positions: expected both or neither, got one")
        key = draw_key(self.model, dropout_key, deterministic, rngs)
        out = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=key, deterministic=key is None, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **unsupported,
        )  # fmt: skip
        logits_BLE = self._classify(out.last_hidden_state, key)
        start, end = logits_BLE[..., 0], logits_BLE[..., 1]
        loss = None
        if start_positions is not None:
            loss = losses.question_answering(start, end, start_positions, end_positions)
        return QuestionAnsweringOutput(start, end, out.hidden_states, out.attentions, loss)


class ModernBertForMultipleChoice(_Classifier):
    """Scores the choices of a question."""

    @staticmethod
    def _outputs(config: ModernBertConfig) -> int:
        return 1

    @on_any_mesh
    def __call__(
        self, input_ids: Array | None = None, attention_mask: Array | None = None,
        segment_ids: Array | None = None, position_ids: Array | None = None, *,
        num_segments: int | None = None,
        labels: Array | None = None,
        inputs_embeds: Array | None = None, dropout_key: jax.Array | None = None,
        deterministic: bool | None = None, rngs: RngSource = None,
        attention: Op = default_attention, scan_layers: bool = False, remat: Remat = False,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> ClassifierOutput:  # fmt: skip
        """Returns logits [B, C] for inputs [B, C, L].

        With num_segments (an int), the inputs are packed sequences [B, L] whose segments are the
        choices, and the logits are [B, S]. labels: the index of the right choice, [B]; the output
        then has a loss (`modernbert_jax.losses.cross_entropy`).
        """
        refuse_inputs(
            unsupported, input_ids=input_ids, attention_mask=attention_mask,
            segment_ids=segment_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        choices = ()
        if num_segments is None:
            name, given = one_of(input_ids, inputs_embeds)
            axes = "[B, choices, L]" if inputs_embeds is None else "[B, choices, L, D]"
            if np.ndim(given) != axes.count(",") + 1:
                raise ValueError(
                    f"{name}: expected {axes}, got {np.shape(given)}; packed sequences need "
                    "num_segments"
                )
            choices = np.shape(given)[:2]
            input_ids, inputs_embeds = _merge(input_ids), _merge(inputs_embeds)
            attention_mask, segment_ids = _merge(attention_mask), _merge(segment_ids)
            position_ids = _merge(position_ids)
        key = draw_key(self.model, dropout_key, deterministic, rngs)
        out = self.model(
            input_ids, attention_mask, segment_ids, position_ids, inputs_embeds=inputs_embeds,
            dropout_key=key, deterministic=key is None, attention=attention,
            scan_layers=scan_layers, remat=remat,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **unsupported,
        )  # fmt: skip
        logits = self._classify_segments(out, attention_mask, segment_ids, num_segments, key)
        logits = logits[..., 0] if num_segments else logits.reshape(choices)
        loss = None if labels is None else losses.cross_entropy(logits, labels)
        return ClassifierOutput(logits, out.hidden_states, out.attentions, loss)


def _merge(x: Array | None) -> Array | None:
    """Merges the first two axes; a NumPy array stays one, so that its values can be checked."""
    if x is None:
        return None
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x.reshape(-1, *x.shape[2:])
