"""Inspects activations: hidden states and attention maps by name."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from modernbert_jax.attention import make_segment_ids
from modernbert_jax.attention.bounds import check_segment_ids, host_array
from modernbert_jax.heads import ModernBertForQuestionAnswering, check_num_segments
from modernbert_jax.model import check_positions, check_range, one_of, refuse_input


def capture(
    model: Any,
    names: str | Sequence[str],
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    segment_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    predict_positions: Any = None,
    num_segments: int | None = None,
    **unsupported: Any,
) -> dict[str, jax.Array]:
    """Runs a model and returns the named activations: {name: array}, in the model's order.

    names: "hidden_states.0" (the embeddings) to "hidden_states.N" (the last layer, after the final
    norm), each [B, L, D]; "attentions.0" to "attentions.N-1" (probabilities, [B, H, L, M]); the
    "logits" of a head, or its "start_logits" and "end_logits"; or patterns ("attentions.*"). The
    other arguments are those of the model's call. The compiled program computes only what is named.
    Raises ValueError for an unknown name, and whatever the model raises.
    """
    layers = model.config.num_hidden_layers
    known = [f"hidden_states.{i}" for i in range(layers + 1)]
    known += [f"attentions.{i}" for i in range(layers)]
    if isinstance(model, ModernBertForQuestionAnswering):
        known += ["start_logits", "end_logits"]
    elif hasattr(model, "model"):
        known += ["logits"]
    wanted: set[str] = set()
    for pattern in [names] if isinstance(names, str) else names:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise ValueError(
                f"names: expected hidden_states.0 to hidden_states.{layers}, attentions.0 to "
                f"{', '.join([f'attentions.{layers - 1}', *known[2 * layers + 1 :]])} or a pattern "
                f"that matches one of them, got {pattern!r}"
            )
        wanted.update(found)
    inputs = unsupported | {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "segment_ids": segment_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "predict_positions": predict_positions,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name, value in inputs.items():
        refuse_input(name, value)
    # These checks need concrete values, which the compiled program does not see.
    arrays: dict[str, Any] = {
        name: np.asarray(value) if isinstance(value, jax.Array) else host_array(name, value)
        for name, value in inputs.items()
    }
    _, tokens = one_of(arrays.get("input_ids"), arrays.get("inputs_embeds"))
    if input_ids is not None:
        check_range("input_ids", tokens, model.config.vocab_size, "vocab_size - 1")
    if predict_positions is not None:
        check_range("predict_positions", arrays["predict_positions"], tokens.shape[1], "L - 1")
    if position_ids is not None:
        check_positions(arrays["position_ids"])
    if attention_mask is not None:
        mask = arrays["attention_mask"].reshape(-1, arrays["attention_mask"].shape[-1])
        make_segment_ids(mask.shape, mask)
    if segment_ids is not None:
        check_segment_ids(arrays["segment_ids"])
    if num_segments is not None:
        check_num_segments(num_segments, arrays.get("segment_ids"))
    static = () if num_segments is None else (("num_segments", num_segments),)
    graph, state = nnx.split(model)
    ordered = tuple(name for name in known if name in wanted)
    captured = _jitted(graph, static, ordered, state, arrays)
    return {name: captured[name] for name in ordered}  # jit returns dicts sorted by name


def _capture(graph, static, names: tuple[str, ...], state, arrays) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state).eval()
    out = model(**arrays, **dict(static), output_hidden_states=True, output_attentions=True)
    captured = {}
    for name in names:
        field, _, index = name.partition(".")
        captured[name] = getattr(out, field)[int(index)] if index else getattr(out, field)
    return captured


_jitted = jax.jit(_capture, static_argnums=(0, 1, 2))
