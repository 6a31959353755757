"""config.json of both generations, refusals, and that every field changes something."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax.config import ACTIVATION_NAMES, FULL, SLIDING, ModernBertConfig
from modernbert_jax.layers import ACTIVATIONS

SMALL = ModernBertConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    local_attention=4,
    pad_token_id=2,
    initializer_range=0.5,
    bos_token_id=0,
    cls_token_id=0,
    eos_token_id=1,
    sep_token_id=1,
)


class TestReading:
    def test_released_large(self, shared):
        config = ModernBertConfig.from_json(shared / "data" / "tokenizer" / "config.json")
        large = ModernBertConfig.large()
        for field in dataclasses.fields(large):
            if field.name != "hf_extra":
                assert getattr(config, field.name) == getattr(large, field.name), field.name

    def test_generation_4_48(self):
        config = ModernBertConfig.from_dict(
            {
                "model_type": "modernbert",
                "num_hidden_layers": 4,
                "global_attn_every_n_layers": 2,
                "global_rope_theta": 5e4,
                "local_rope_theta": 7e3,
                "torch_dtype": "bfloat16",
            }
        )
        assert config.layer_types == (FULL, SLIDING, FULL, SLIDING)
        assert (config.rope_theta(FULL), config.rope_theta(SLIDING)) == (5e4, 7e3)
        assert config.param_dtype == "bfloat16"

    def test_generation_5_wins_over_left_over_keys(self):
        config = ModernBertConfig.from_dict(
            {
                "num_hidden_layers": 3,
                "layer_types": [SLIDING, FULL, SLIDING],
                "global_attn_every_n_layers": 3,
                "rope_parameters": {
                    FULL: {"rope_type": "default", "rope_theta": 1e5},
                    SLIDING: {"rope_type": "default"},
                },
                "global_rope_theta": 1.0,
                "local_rope_theta": 2e4,
            }
        )
        assert config.layer_types == (SLIDING, FULL, SLIDING)
        assert (config.rope_theta(FULL), config.rope_theta(SLIDING)) == (1e5, 2e4)

    @pytest.mark.parametrize("theta", [None, -1, 0, -1.0])
    def test_no_local_theta_means_the_global_one(self, theta):
        config = ModernBertConfig.from_dict({"global_rope_theta": 1e4, "local_rope_theta": theta})
        assert config.rope_theta(SLIDING) == 1e4

    def test_labels(self):
        names = {str(i): f"name {i}" for i in (10, 9, 8, 7, 0, 1, 2, 3, 4, 5, 6)}
        config = ModernBertConfig.from_dict({"id2label": names, "label2id": {"LABEL_0": 0}})
        assert config.num_labels == 11  # as numbers: 2 before 10
        assert config.id2label == tuple(f"name {i}" for i in range(11))

    @pytest.mark.parametrize(
        "labels, message",
        [
            ({"id2label": {"0": "a", "10": "c"}}, "id2label: expected the ids 0 to 1, got 0, 10"),
            ({"id2label": {"1": "a"}}, "id2label: expected the ids 0 to 0, got 1"),
            ({"id2label": {"a": "0"}}, "id2label: expected the ids 0 to 0, got a"),
            ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "id2label: expected 3 names"),
            (
                {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}},
                "label2id: expected . for '.', as in id2label",
            ),
        ],
    )
    def test_labels_that_disagree(self, labels, message):
        with pytest.raises(ValueError, match=message):
            ModernBertConfig.from_dict(labels)
        changes = {k: {int(i): n for i, n in v.items()} if k == "id2label" and "a" not in v else v
                   for k, v in labels.items()}  # fmt: skip
        with pytest.raises(ValueError, match=message.split(":")[0] + ": expected"):
            ModernBertConfig().replace(**changes)
        with pytest.raises(ValueError, match="label2id: expected the reverse of id2label"):
            ModernBertConfig().replace(label2id={"a": 0, "b": 1})

    @pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
    def test_a_quantized_model_is_refused(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected none, got the method 'fp8'"):
            ModernBertConfig.from_dict({name: {"quant_method": "fp8"}})
        assert name not in ModernBertConfig.from_dict({name: None}).to_dict()

    def test_round_trip_keeps_everything(self):
        data = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "local_rope_theta": -1,
                "sparse_prediction": True, "architectures": ["X"], "num_labels": 4}  # fmt: skip
        config = ModernBertConfig.from_dict(data)
        written = json.loads(config.to_json())
        assert written["sparse_prediction"] is True
        assert "architectures" not in written  # it belongs to the checkpoint
        again = ModernBertConfig.from_dict(written)
        assert again.replace(id2label=(), hf_extra="{}") == config.replace(hf_extra="{}")

    @pytest.mark.parametrize("radius", [0, 4])
    @pytest.mark.parametrize("others", [{}, {"local_attention": 32}])
    def test_sliding_window_as_in_transformers(self, radius, others):
        transformers = pytest.importorskip("transformers")
        data = {"sliding_window": radius, **others}
        theirs, ours = transformers.ModernBertConfig(**data), ModernBertConfig.from_dict(data)
        assert ours.local_attention == theirs.local_attention
        assert ours.window == theirs.sliding_window == radius
        assert ModernBertConfig.from_dict(ours.to_dict()).window == radius

    def test_transformers_reads_what_we_write(self):
        transformers = pytest.importorskip("transformers")
        ours = SMALL.replace(
            layer_types=(SLIDING, FULL, SLIDING), global_rope_theta=3e4, attention_out_dropout=0.1
        )
        theirs = transformers.ModernBertConfig(**json.loads(ours.to_json()))
        assert theirs.layer_types == list(ours.layer_types)
        assert theirs.rope_parameters[FULL]["rope_theta"] == 3e4
        assert theirs.attention_dropout == 0.0  # ours is never written as theirs
        back = ModernBertConfig.from_dict(theirs.to_dict())
        assert back.replace(hf_extra="{}", id2label=()) == ours


def test_activations_are_those_of_transformers():
    """Every name in transformers' table, except activations with weights of their own."""
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-12, 12, 97, dtype=np.float32)
    for name in activations.ACT2FN.keys() - {"prelu", "xielu"}:
        want = activations.ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), want, atol=2e-6, rtol=1e-5)
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 3}, "16 is not a multiple of num_attention_heads 3"),
        ({"num_attention_heads": 16}, "head size 1 .* must be even"),
        ({"hidden_activation": "prelu"}, "hidden_activation: expected one of gelu, .*'prelu'"),
        ({"classifier_activation": "x"}, "classifier_activation"),
        ({"layer_types": (FULL,)}, "layer_types: expected 3 entries .* got 1"),
        ({"layer_types": (FULL, FULL, "causal")}, "got 'causal'"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, got 0"),
        ({"local_attention": -1}, "local_attention: expected an integer of at least 0, got -1"),
        ({"output_attentions": 1}, "output_attentions: expected true or false, got 1"),
        ({"mlp_dropout": 1.0}, "mlp_dropout: expected 0 <= rate < 1"),
        ({"classifier_pooling": "max"}, "expected 'cls' or 'mean'"),
        ({"pad_token_id": 40}, "below vocab_size 40"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"dtype": "bf16"}, "dtype: expected one of float32, bfloat16, float16, got 'bf16'"),
        ({"norm_eps": 0.0}, "norm_eps: expected a positive number"),
        ({"num_labels": 3, "id2label": ("a",)}, "id2label: expected 3 names"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"model_type": "bert"}, "expected 'modernbert', got 'bert'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'default', .* got 'yarn'"),
        (
            {
                "rope_parameters": dict.fromkeys((FULL, SLIDING), {"rope_type": "default"}),
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},  # wins in transformers
            },
            "'default', .* got 'linear'",
        ),
        ({"rope_parameters": {FULL: {"rope_type": "linear"}}}, "'default', .* got 'linear'"),
        ({"global_attn_every_n_layers": 0}, "expected a positive integer, got 0"),
        ({"head_dim": 32}, "head_dim: expected 64, got 32"),
        ({"sliding_window": None}, "sliding_window: expected an integer of at least 0, got None"),
        ({"return_dict": False}, "return_dict: expected true .outputs are always named., got"),
        ({"is_causal": True}, "is_causal: expected false .an encoder attends in both"),
    ],
)
def test_refusals_of_files(data, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        ModernBertConfig.from_json(tmp_path / "config.json")


# What shows that each field is read. Fields about text only are named with the reason.
CHANGES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "layer_types": (SLIDING, SLIDING, FULL),
    "local_attention": 2,
    "global_rope_theta": 3.0,
    "local_rope_theta": 2.0,
    "hidden_activation": "relu",
    "classifier_activation": "silu",
    "norm_eps": 0.1,
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "decoder_bias": False,
    "classifier_bias": True,
    "tie_word_embeddings": False,
    "embedding_dropout": 0.5,
    "attention_dropout": 0.5,
    "attention_out_dropout": 0.5,
    "mlp_dropout": 0.5,
    "classifier_dropout": 0.5,
    "initializer_range": 0.25,
    "initializer_cutoff_factor": 1.0,
    "classifier_pooling": "mean",
    "num_labels": 5,
    "pad_token_id": 7,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "residual_dtype": "bfloat16",
}
NOT_OF_THE_GRAPH = {
    "output_hidden_states": "which outputs a call returns (tests/test_calls.py)",
    "output_attentions": "which outputs a call returns (tests/test_calls.py)",
    "max_position_embeddings": "training refuses longer rows (tests/test_pretrain.py)",
    "id2label": "names only",
    "problem_type": "chooses a loss, in fine-tuning",
    "bos_token_id": "written for transformers' tokenizers",
    "eos_token_id": "written for transformers' tokenizers",
    "cls_token_id": "written for transformers' tokenizers",
    "sep_token_id": "written for transformers' tokenizers",
    "hf_extra": "keys that change nothing, kept for a round trip",
}


def test_every_field_is_accounted_for():
    assert {f.name for f in dataclasses.fields(SMALL)} == set(CHANGES) | set(NOT_OF_THE_GRAPH)


@functools.cache
def numbers(config, gradients=False):
    """Logits of two models, or the gradients of one. Compiling takes longer than running."""
    mlm, head = (
        nnx.split(cls(config, rngs=nnx.Rngs(0)))
        for cls in (mj.ModernBertForMaskedLM, mj.ModernBertForSequenceClassification)
    )
    ids = jnp.arange(30, dtype=jnp.int32)[None] % 19

    def logits(graph, state):
        return nnx.merge(graph, state)(ids, dropout_key=jax.random.key(0)).logits

    def run(a, b):
        if gradients:
            return jax.tree.leaves(jax.grad(lambda a: jnp.sum(jnp.sin(logits(mlm[0], a))))(a))
        return [logits(mlm[0], a), logits(head[0], b)]

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    found = jax.jit(run, compiler_options=quick)(mlm[1], head[1])
    return [np.asarray(x, np.float32) for x in found]


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_graph_or_the_output(field):
    """Parameters' shapes or dtypes, else the outputs or gradients of two models with one seed."""
    changed = SMALL.replace(**{field: CHANGES[field]})

    def shapes(config):
        return [
            jax.tree.map(lambda x: (x.shape, str(x.dtype)), nnx.to_pure_dict(nnx.state(m)))
            for m in (
                nnx.eval_shape(lambda c=c: c(config, rngs=nnx.Rngs(0)))
                for c in (mj.ModernBertForMaskedLM, mj.ModernBertForSequenceClassification)
            )
        ]

    if shapes(changed) != shapes(SMALL):
        return

    for gradients in (False, True):
        pairs = zip(numbers(SMALL, gradients), numbers(changed, gradients), strict=True)
        if any(np.abs(a - b).max() > 1e-5 for a, b in pairs):
            return
    raise AssertionError(f"{field} changes neither outputs nor gradients")
