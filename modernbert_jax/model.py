"""The encoder: inputs, modes, layers, outputs. Its only state are the keys of dropout."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from modernbert_jax.attention import (
    Bounds,
    attention as default_attention,
    make_bounds,
    make_segment_ids,
    reference,
)
from modernbert_jax.attention.bounds import has_holes, host_array, refuse_traced_list
from modernbert_jax.attention.rope import Rope, apply_rope, rope_tables
from modernbert_jax.checkpoint.pretrained import Pretrained
from modernbert_jax.checkpoint.surgery import check_layers
from modernbert_jax.config import FULL, ModernBertConfig
from modernbert_jax.dropout import Key, PartKeys, fold
from modernbert_jax.layers import Embeddings, EncoderLayer, LayerNorm, Op
from modernbert_jax.meshes import explicit_mesh, with_auto_axes

Array = jax.Array | np.ndarray
RngSource = nnx.Rngs | nnx.RngStream | jax.Array | None
Remat = bool | Callable[..., bool]  # True, or a policy of jax.checkpoint_policies


class ModelOutput:
    """What a call returns; as in transformers, also by name or number: out["logits"], out[0].

    The loss comes first, and what is None is left out: `loss, logits = model(...)[:2]`.
    """

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the outputs that are there, in transformers' order."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        names.sort(key=lambda name: name != "loss")
        return tuple(name for name in names if getattr(self, name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the outputs that are there."""
        return tuple(getattr(self, name) for name in self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key}: expected one of {', '.join(self.keys())}")
        return getattr(self, key)


@struct.dataclass
class BaseModelOutput(ModelOutput):
    """Outputs of the encoder.

    last_hidden_state: hidden_BLD. hidden_states: the embeddings, then each layer's output; the last
    one is last_hidden_state, after the final norm, as in transformers. attentions: the
    probabilities_BHLM of each layer.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


_DROPOUT_STREAM = 1_000_001  # what is folded into a key of rngs to derive the model's own stream

# Arguments of other models and libraries, and what to do instead.
FOREIGN = {
    "token_type_ids": "ModernBERT has none, remove them with `del inputs['token_type_ids']`; "
    "segment_ids separate texts that share a packed sequence",
    "labels": "an argument of the models for masked LM, sequence and token classification and "
    "multiple choice; question answering takes start_positions and end_positions, and the encoder "
    "has no loss; modernbert_jax.losses has the functions",
    "head_mask": "not supported, heads cannot be masked",
    "return_dict": "expected true, outputs are always named; out.to_tuple() is the tuple",
    "use_cache": "not supported, an encoder has no cache",
    **dict.fromkeys(
        (
            "overflow_to_sample_mapping",
            "overflowing_tokens",
            "num_truncated_tokens",
            "length",
            "special_tokens_mask",
            "offset_mapping",
        ),
        "a tokenizer returns it, but it is not an input; remove it with `inputs.pop(...)`",
    ),
}


def refuse_input(name: str, value: Any) -> None:
    """Raises TypeError, with advice, for an input that belongs to another model or library."""
    if name in FOREIGN:
        raise TypeError(f"{name}: {FOREIGN[name]}")
    if isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an array, got a dictionary; call model(**inputs)")
    refuse_traced_list(name, value)
    if type(value).__module__.partition(".")[0] == "torch":
        raise TypeError(
            f"{name}: expected a NumPy or JAX array, got a torch tensor; pass {name}.numpy(), or "
            'call the tokenizer with return_tensors="np"'
        )


def refuse_inputs(unsupported: Mapping[str, Any], **inputs: Any) -> None:
    """Applies `refuse_input` to all inputs and raises TypeError if any name is not supported."""
    unsupported = {k: v for k, v in unsupported.items() if (k, v) != ("return_dict", True)}
    for name, value in {**inputs, **unsupported}.items():
        refuse_input(name, value)
    for name in unsupported:
        raise TypeError(f"{name}: not an argument of this model; see help(type(model).__call__)")


def check_range(name: str, ids: Any, limit: int, of: str) -> None:
    """Raises ValueError for ids that are no integers or not 0 <= id < `limit`, which `of` explains.

    The values of jax arrays are not read, because that would wait for the device.
    """
    values = host_array(name, ids)
    dtype = ids.dtype if values is None else values.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {dtype}")
    if values is not None and values.size:
        for worst in (values.min(), values.max()):
            if not 0 <= worst < limit:
                raise ValueError(f"{name}: expected 0 to {limit - 1:,} ({of}), got {worst}")


def check_positions(position_ids: Any) -> None:
    """Raises ValueError for positions that int32 cannot hold; those of jax arrays are not read."""
    values = host_array("position_ids", position_ids)
    if values is not None and values.size and (worst := np.abs(values).max()) >= 2**31:
        raise ValueError(f"position_ids: expected at most {2**31 - 1:,} (int32), got {worst}")


def one_of(input_ids: Any, inputs_embeds: Any) -> tuple[str, Any]:
    """Returns the name and the value of the one that is given; raises ValueError otherwise."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: expected one of them, got {got}")
    return ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)


Call = TypeVar("Call", bound=Callable[..., Any])


def on_any_mesh(call: Call) -> Call:
    """Lets a model's method run on meshes with explicit axes (`with_auto_axes`)."""

    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoder = getattr(self, "model", self)
        weight = encoder.embeddings.tok_embeddings.weight.get_value()
        if explicit_mesh(weight, args, kwargs) is None:
            return call(self, *args, **kwargs)
        # Here, since what is called is a copy of the model, whose stream of keys is dropped.
        names = ("dropout_key", "deterministic", "rngs")
        key = draw_key(encoder, *(kwargs.pop(name, None) for name in names))
        kwargs |= {"dropout_key": key, "deterministic": key is None}
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows = next((x for x in inputs if x is not None), None)
        graph, state = nnx.split(self)

        def of_state(state: Any, args: Any, kwargs: Any) -> Any:
            return call(nnx.merge(graph, state), *args, **kwargs)

        return with_auto_axes(of_state, rows, state, args, kwargs)

    return cast(Call, run)


class ModernBertModel(Pretrained, nnx.Module):
    """The encoder without a head.

    Args: config; rngs (streams: params, dropout). Weights are initialized as in ModernBERT's own
    training. A new or loaded model is in evaluation mode: `train()` enables the dropout of the
    configuration, `eval()` and `nnx.view(model, deterministic=True)` disable it. The model then
    draws a key per call from `dropout_rngs`, which is None without dropout.

    Compile calls (`nnx.jit(model)`) under `jax.transfer_guard("disallow")` and jax_debug_infs: one
    operation at a time, a call passes numbers to the device, and the log-sum-exp of a query without
    keys is -inf. Attention has a reverse derivative only; for jvp and Hessians pass
    `attention=functools.partial(attention, implementation="reference")`.
    """

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.deterministic = True
        self.dropout_rngs = nnx.data(_dropout_stream(config, rngs))
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(
            [EncoderLayer(config, i, rngs) for i in range(config.num_hidden_layers)]
        )
        self.final_norm = LayerNorm(config)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
          deterministic: True disables dropout, False enables it.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @on_any_mesh
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        segment_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        inputs_embeds: Array | None = None,
        first_token: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: RngSource = None,
        attention: Op = default_attention,
        scan_layers: bool = False,
        remat: Remat = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **unsupported: Any,
    ) -> BaseModelOutput:
        """Encodes token ids [B, L]; last_hidden_state is hidden_BLD in config.residual_dtype.

        attention_mask: [B, L], 1 for tokens and 0 for padding (on the left or right). segment_ids:
        [B, L], for packed sequences; 0 is padding, and equal neighbors are one document that
        attends only to itself. position_ids: [B, L] or [1, L], in tokens; by default they restart
        at 0 in each segment. inputs_embeds: [B, L, D], instead of input_ids: embeddings before the
        norm. first_token: the index of the first token, if input_ids or inputs_embeds are a part
        [B, L/n] of each sequence, on n devices; then segment_ids and position_ids are of the
        complete ones and attention is from `context_parallel`. deterministic: False enables and
        True disables dropout in this call; None means the model's mode (`train()`, `eval()`).
        rngs: an nnx.Rngs (stream: dropout), an nnx.RngStream or a jax.random key for this call's
        dropout, instead of the model's own stream. dropout_key: a jax.random key, or keys [B], one
        per sequence (which parts need); it enables dropout in any mode.
        attention: the attention function, such as `functools.partial(attention,
        implementation="reference")` or a sharded one. scan_layers: compile one body for each
        repeated group of layers, which compiles faster. remat: recompute each layer in the backward
        pass, or whatever a policy of jax.checkpoint_policies does not save. output_attentions:
        costs [B, H, L, M] of memory per layer; `modernbert_jax.capture` selects some by name. None
        for either output means the configuration's value, in training (remat, dropout) False.
        Raises ValueError for shapes or dtypes that do not match, and unpacked sequences longer than
        max_position_embeddings; in lists and NumPy arrays also for ids outside the vocabulary and a
        mask with holes. The values of jax arrays are not read, because that would wait for the
        device: there the token of such an id, and the sequence of such a mask, become NaN, and
        `jax.experimental.checkify.checkify(f, errors=checkify.index_checks)` reports such ids.
        Raises TypeError for inputs of other models.
        """
        refuse_inputs(
            unsupported,
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        config = self.config
        check_layers(self)
        dropout_key = draw_key(self, dropout_key, deterministic, rngs)
        name, given = one_of(input_ids, inputs_embeds)
        if input_ids is not None:
            check_range("input_ids", input_ids, config.vocab_size, "vocab_size - 1")
        tokens = jnp.asarray(given)
        if inputs_embeds is not None and (
            tokens.ndim != 3 or tokens.shape[2] != config.hidden_size
        ):
            raise ValueError(f"{name}: expected [B, L, {config.hidden_size}], got {tokens.shape}")
        shape = tokens.shape if inputs_embeds is None else tokens.shape[:2]
        length, longest = shape[-1], config.max_position_embeddings
        if segment_ids is None and length > longest:
            raise ValueError(
                f"input_ids: expected at most {longest:,} tokens, got {length:,}; truncate them "
                "(truncation=True), use pipeline('token-classification'), which slides a window, "
                f"or raise the limit (from_pretrained(..., max_position_embeddings={length}))"
            )
        if dropout_key is not None and dropout_key.shape not in ((), shape[:1]):
            raise ValueError(
                f"dropout_key: expected one key or {shape[0]}, one per sequence, got an array of "
                f"shape {dropout_key.shape}"
            )
        if first_token is not None:
            shape, dropout_key = _complete(  # type: ignore[assignment]
                config, shape, segment_ids, attention_mask, first_token, dropout_key
            )
            length = shape[1]
        whole = attention_mask is None and segment_ids is None
        segment_ids_BL = make_segment_ids(shape, attention_mask, segment_ids)
        bounds = {
            kind: make_bounds(segment_ids_BL, None if kind == FULL else config.window, whole=whole)
            for kind in dict.fromkeys((FULL, *config.layer_types))
        }
        if position_ids is None:
            index_1L = jnp.arange(length, dtype=jnp.int32)[None, :]
            positions_BL = index_1L - bounds[FULL].lo_BL
        else:
            if np.shape(position_ids) not in (shape, (1, length)):
                raise ValueError(
                    f"position_ids: expected the shape {shape} or {(1, length)}, "
                    f"got {np.shape(position_ids)}"
                )
            check_positions(position_ids)
            positions_BL = jnp.asarray(position_ids)
        if first_token is not None:
            positions_BL = jax.lax.dynamic_slice_in_dim(
                positions_BL, first_token, tokens.shape[1], axis=1
            )
        rope = {
            kind: rope_tables(positions_BL, config.head_dim, config.rope_theta(kind))
            for kind in dict.fromkeys(config.layer_types)
        }

        def apply(layer: EncoderLayer, kind: str, x_BLD: jax.Array, key: Key | None):
            def run(state, x_BLD, key):
                layer = nnx.merge(graph, state)
                # As keywords: nnx.tabulate cannot show a dataclass among positional arguments.
                return layer(
                    x_BLD, rope=rope[kind], bounds=bounds[kind], attention=attention, key=key
                )

            graph, state = nnx.split(layer)
            if remat:
                run = jax.checkpoint(run, policy=None if remat is True else remat)
            return run(state, x_BLD, key)

        training = bool(remat) or dropout_key is not None
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states and not training
        if output_attentions is None:
            output_attentions = config.output_attentions and not training
        maps: list[jax.Array] = []
        if output_attentions:
            if training or first_token is not None:
                raise ValueError(
                    "output_attentions: expected inference, got remat, dropout or a "
                    "first_token; leave them out"
                )
            attention = _keeping_maps(attention, maps)

        x_BLD = self.embeddings(tokens, fold(dropout_key, 0))
        if isinstance(attention_mask, jax.Array) and segment_ids is None:
            holes_B11 = has_holes(attention_mask)[:, None, None]
            x_BLD = jnp.where(holes_B11, jnp.nan, x_BLD)
        states = [x_BLD]
        scans = scan_layers and not output_hidden_states and not output_attentions
        groups, period = self._groups() if scans else (0, 1)
        first = 1 if groups else 0
        for i in range(first):
            x_BLD = apply(self.layers[i], config.layer_types[i], x_BLD, fold(dropout_key, i + 1))
        if groups:
            x_BLD = self._scan(apply, x_BLD, groups, period, dropout_key)
        for i in range(first + groups * period, len(self.layers)):
            x_BLD = apply(self.layers[i], config.layer_types[i], x_BLD, fold(dropout_key, i + 1))
            states.append(x_BLD)
        x_BLD = self.final_norm(x_BLD).astype(config.residual_dtype)
        return BaseModelOutput(
            x_BLD,
            (*states[:-1], x_BLD) if output_hidden_states else None,
            tuple(maps) if output_attentions else None,
        )

    def _groups(self) -> tuple[int, int]:
        """(groups, period): after layer 0 the kinds repeat `groups` times with this period."""
        kinds = self.config.layer_types[1:]
        for period in range(1, len(kinds) // 2 + 1):
            groups = len(kinds) // period
            if kinds[: groups * period] == kinds[:period] * groups:
                return groups, period
        return 0, 1

    def _scan(self, apply, x_BLD, groups: int, period: int, dropout_key):
        """Runs layers 1 to groups * period as one loop over their stacked weights."""
        kinds = self.config.layer_types[1 : 1 + period]
        graph = nnx.graphdef(self.layers[1])
        if any(
            nnx.graphdef(layer) != graph for layer in list(self.layers)[2 : 1 + groups * period]
        ):
            raise ValueError(
                "scan_layers: expected layers 1 and up that are alike, got some with and without "
                "adapters, or of other parts; leave scan_layers out"
            )
        columns = [
            [nnx.state(self.layers[1 + g * period + j]) for g in range(groups)]
            for j in range(period)
        ]
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *column) for column in columns]

        def body(x_BLD, item):
            states, first = item
            for j in range(period):
                layer = nnx.merge(graph, states[j])
                x_BLD = apply(layer, kinds[j], x_BLD, fold(dropout_key, first + j))
            return x_BLD, None

        first = jnp.arange(groups) * period + 2
        return jax.lax.scan(body, x_BLD, (stacked, first))[0]


def draw_key(
    encoder: ModernBertModel,
    dropout_key: jax.Array | None,
    deterministic: bool | None,
    rngs: RngSource,
) -> jax.Array | None:
    """Returns the dropout key of a call with these arguments; None disables dropout."""
    if dropout_key is not None:
        if rngs is not None or deterministic:
            other = "deterministic=True" if rngs is None else "rngs"
            raise ValueError(f"dropout_key, {other}: expected one of them, got both")
        return dropout_key
    if deterministic is None:
        deterministic = encoder.deterministic
    if deterministic or not encoder.config.has_dropout:
        return None
    rngs = encoder.dropout_rngs if rngs is None else rngs
    if isinstance(rngs, jax.Array):
        return rngs
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    raise TypeError(
        "rngs: expected an nnx.Rngs, an nnx.RngStream or a jax.random key for dropout, got "
        f"{type(rngs).__name__}; pass rngs= to the call, or call eval()"
    )


def _dropout_stream(config: ModernBertConfig, rngs: nnx.Rngs) -> nnx.RngStream | None:
    """Returns a model's own stream of dropout keys; None without dropout or a stream to derive it.

    `rngs` is not advanced, so that the weights of a seed do not depend on the rates of dropout.
    """
    source = getattr(rngs, "dropout", None) if config.has_dropout else None
    if source is None:
        return None
    key = jax.random.fold_in(source.key[...], source.count[...])
    return nnx.RngStream(jax.random.fold_in(key, _DROPOUT_STREAM), tag="dropout")


def _complete(config, shape, segment_ids, attention_mask, first_token, dropout_key):
    """Returns the shape [B, L] of complete sequences and the dropout keys of a part of them."""
    if segment_ids is None or attention_mask is not None or np.shape(segment_ids)[0] != shape[0]:
        raise ValueError(
            f"first_token: expected segment_ids of the complete {shape[0]} sequences and no "
            "attention_mask"
        )
    if dropout_key is None:
        return np.shape(segment_ids), None
    if not dropout_key.ndim or config.attention_dropout:
        raise ValueError(
            "first_token: expected a dropout key per sequence and attention_dropout 0, got "
            f"{dropout_key.shape or 'one key'} and {config.attention_dropout}"
        )
    return np.shape(segment_ids), PartKeys(dropout_key, first_token)


def _keeping_maps(attention: Op, maps: list[jax.Array]) -> Op:
    """Wraps the attention function so that each call appends its probabilities to `maps`."""

    def run(q_BLHK, k_BLHK, v_BLHK, bounds: Bounds, *, scale: float, rope: Rope | None = None):
        q, k = q_BLHK, k_BLHK
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        maps.append(reference.probabilities(q, k, bounds, scale=scale))
        return attention(q_BLHK, k_BLHK, v_BLHK, bounds, scale=scale, rope=rope)

    return run
