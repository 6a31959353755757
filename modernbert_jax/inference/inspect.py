"""Looking inside: hidden states and attention maps by name."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from modernbert_jax.attention import make_segment_ids
from modernbert_jax.attention.bounds import check_segment_ids
from modernbert_jax.heads import ModernBertForQuestionAnswering
from modernbert_jax.model import refuse_input


def look(model: Any, names: str | Sequence[str], **inputs: Any) -> dict[str, jax.Array]:
    """What goes on inside a model, by name: {name: array}, names in the model's order.

    names: "hidden_states.0" (the embeddings) to "hidden_states.N" (the last layer's, after the
    final norm), "attentions.0" to "attentions.N-1" (probabilities, [B, H, L, M]), "logits" of a
    head ("start_logits", "end_logits"); or patterns ("attentions.*"). inputs: as for the model
    (input_ids, segment_ids, ...). Only what is asked for is computed, and nothing in a call that
    does not ask. Raises ValueError for a name that the model has not, and what the model raises.
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
                f"of them, got {pattern!r}"
            )
        wanted.update(found)
    for name, value in inputs.items():
        refuse_input(name, value)
    # What can be seen on arrays alone: masks with holes, ids that fall.
    if (mask := inputs.get("attention_mask")) is not None:
        rows = np.reshape(mask, (-1, np.shape(mask)[-1]))
        make_segment_ids(rows.shape, rows)
    if (ids := inputs.get("segment_ids")) is not None:
        check_segment_ids(np.asarray(ids))
    plain = {k: v for k, v in inputs.items() if v is None or isinstance(v, int)}
    arrays = {k: np.asarray(v) for k, v in inputs.items() if k not in plain}
    graph, state = nnx.split(model)
    names = tuple(n for n in known if n in wanted)
    found = _run(graph, tuple(plain.items()), names, state, arrays)
    return {name: found[name] for name in names}  # jit sorts them


def _look(graph, plain, names: tuple[str, ...], state, arrays) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    out = model(**arrays, **dict(plain), output_hidden_states=True, output_attentions=True)
    found = {}
    for name in names:
        field, _, index = name.partition(".")
        found[name] = getattr(out, field)[int(index)] if index else getattr(out, field)
    return found


_run = jax.jit(_look, static_argnums=(0, 1, 2))
