"""Looking inside: hidden states and attention maps by name."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx


def look(model: Any, names: str | Sequence[str], **inputs: Any) -> dict[str, jax.Array]:
    """What goes on inside a model, by name: {name: array}, names in the model's order.

    names: "hidden_states.0" (the embeddings) to "hidden_states.N" (the last layer's, after the
    final norm), "attentions.0" to "attentions.N-1" (probabilities, [B, H, L, M]), "logits" of a
    head; or patterns ("attentions.*"). inputs: as for the model (input_ids, segment_ids, ...).
    Only what is asked for is computed, and nothing in a call that does not ask.
    Raises ValueError for a name that the model has not.
    """
    layers = model.config.num_hidden_layers
    known = [f"hidden_states.{i}" for i in range(layers + 1)]
    known += [f"attentions.{i}" for i in range(layers)]
    known += ["logits"] if hasattr(model, "model") else []
    wanted: dict[str, None] = {}
    for pattern in [names] if isinstance(names, str) else names:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise ValueError(
                f"names: expected hidden_states.0 to hidden_states.{layers}, attentions.0 to "
                f"attentions.{layers - 1}{', logits' if 'logits' in known else ''} or a pattern of "
                f"them, got {pattern!r}"
            )
        wanted.update(dict.fromkeys(found))
    graph, state = nnx.split(model)
    return _run(graph, state, tuple(n for n in known if n in wanted), inputs)


def _look(graph, state, names: tuple[str, ...], inputs: dict[str, Any]) -> dict[str, jax.Array]:
    out = nnx.merge(graph, state)(**inputs, output_hidden_states=True, output_attentions=True)
    found = {}
    for name in names:
        field, _, index = name.partition(".")
        found[name] = getattr(out, field)[int(index)] if index else getattr(out, field)
    return found


_run = jax.jit(_look, static_argnums=(0, 2))
