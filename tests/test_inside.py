"""capture() and output_attentions against transformers; what newcomers do wrong and are told."""

import warnings

import jax
import numpy as np
import pytest

from modernbert_jax import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertModel,
    capture,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, transformers') masked LM, three layers, one set of weights; attention written out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, local_attention=8, pad_token_id=0, cls_token_id=1, bos_token_id=1,
        sep_token_id=2, eos_token_id=2, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    theirs = transformers.ModernBertForMaskedLM(config).eval()
    theirs.save_pretrained(folder)
    return ModernBertForMaskedLM.from_pretrained(folder), theirs


def rows(padded: bool):
    ids = np.random.default_rng(0).integers(3, 100, (2, 24))
    mask = np.ones_like(ids)
    if padded:
        mask[0, 15:] = 0
    return ids, mask


@pytest.mark.parity
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(pair, padded):
    import torch

    ours, theirs = pair
    ids, mask = rows(padded)
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
            output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
    got = capture(ours, ["*"], input_ids=ids, attention_mask=mask)
    assert len(got) == 4 + 3 + 1
    some = mask.astype(bool)
    for layer in range(3):
        maps = np.asarray(got[f"attentions.{layer}"]).transpose(0, 2, 1, 3)  # B L H M
        reference = want.attentions[layer].numpy().transpose(0, 2, 1, 3)
        np.testing.assert_allclose(maps[some], reference[some], atol=1e-5)
        assert not maps[~some].any()  # padding looks at nothing
        np.testing.assert_allclose(maps[some].sum(-1), 1.0, atol=1e-5)
    for i, states in enumerate(want.hidden_states):
        states = states.numpy()
        np.testing.assert_allclose(
            np.asarray(got[f"hidden_states.{i}"])[some], states[some], atol=1e-4
        )
    np.testing.assert_allclose(
        np.asarray(got["logits"])[some], want.logits.numpy()[some], atol=1e-4
    )


def tiny(cls=ModernBertModel, **changes):
    from flax import nnx

    return cls(ModernBertConfig.tiny(num_hidden_layers=3, **changes), rngs=nnx.Rngs(0))


def test_a_packed_row_sees_its_own_texts():
    model = tiny()
    segment_ids = np.array([[1] * 5 + [2] * 7 + [0] * 4])
    maps = capture(model, "attentions.*", input_ids=np.arange(16)[None], segment_ids=segment_ids)
    assert list(maps) == ["attentions.0", "attentions.1", "attentions.2"]
    same = (segment_ids[0][:, None] == segment_ids[0]) & (segment_ids[0] > 0)
    for layer, p in enumerate(maps.values()):
        near = np.abs(np.subtract.outer(np.arange(16), np.arange(16))) <= model.config.window
        seen = same if model.config.layer_types[layer] == "full_attention" else same & near
        np.testing.assert_array_equal(np.asarray(p[0]).max(0) > 0, seen)


def test_only_what_is_asked_for_is_computed():
    """The compiled program for one state holds no [H, L, M] array, and stops at its layer."""
    from flax import nnx

    from modernbert_jax.inference.inspect import _capture

    model, ids = tiny(), np.zeros((1, 48), np.int32)
    graph, state = nnx.split(model)

    def compiled(*names):
        run = jax.jit(lambda state, inputs: _capture(graph, (), names, state, inputs))
        return run.lower(state, {"input_ids": ids}).compile().cost_analysis()["flops"]

    costs = [compiled(f"hidden_states.{i}") for i in range(4)]
    assert costs == sorted(costs) and costs[1] < 0.5 * costs[3]
    plain = jax.jit(lambda state: nnx.merge(graph, state)(ids).last_hidden_state)
    alone = plain.lower(state).compile().cost_analysis()["flops"]
    assert costs[3] == pytest.approx(alone, rel=0.01)
    assert compiled("attentions.0") < costs[1]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="expected hidden_states.0 to hidden_states.3.*'layers.1'"):
        capture(tiny(), "layers.1", input_ids=np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match="output_attentions: expected inference, got remat"):
        tiny()(np.zeros((1, 4), np.int32), output_attentions=True, remat=True)


def test_inputs_as_for_the_model():
    """Ints stay ints, and what the model refuses is refused."""
    ids, segment_ids = np.zeros((1, 6), np.int32), np.array([[1, 1, 1, 2, 2, 0]])
    classifier = tiny(ModernBertForSequenceClassification)
    packed = {"input_ids": ids, "segment_ids": segment_ids, "num_segments": 2}
    found = capture(classifier, "logits", **packed)["logits"]
    np.testing.assert_allclose(found, classifier(**packed).logits, atol=1e-6)
    answers = capture(tiny(ModernBertForQuestionAnswering), "*_logits", input_ids=ids)
    assert list(answers) == ["start_logits", "end_logits"]
    with pytest.raises(ValueError, match="one run of ones per sequence"):
        capture(classifier, "logits", input_ids=ids, attention_mask=np.array([[1, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="ids that rise along a row"):
        capture(classifier, "attentions.0", input_ids=ids, segment_ids=segment_ids[:, ::-1] + 1)


class TestNewcomers:
    """Each message says what to do."""

    ids = np.zeros((1, 6), np.int32)

    def test_token_type_ids(self):
        for cls in (ModernBertModel, ModernBertForMaskedLM, ModernBertForSequenceClassification):
            with pytest.raises(
                TypeError, match=r"token_type_ids: .*del inputs\['token_type_ids'\]"
            ):
                tiny(cls)(input_ids=self.ids, token_type_ids=self.ids)

    def test_what_else_a_tokenizer_returns(self, small_tokenizer):
        inputs = small_tokenizer(
            ["the patient has no fever"], truncation=True, max_length=6, padding=True,
            return_overflowing_tokens=True, return_length=True, return_special_tokens_mask=True,
            return_offsets_mapping=True, return_tensors="np",
        )  # fmt: skip
        others = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        assert len(others) == 4
        for name, value in others.items():
            with pytest.raises(TypeError, match=rf"{name}: .*not an input; .*inputs\.pop"):
                tiny()(input_ids=inputs["input_ids"], **{name: value})

    def test_labels(self):
        with pytest.raises(TypeError, match="labels: an argument of the models for masked LM"):
            tiny(ModernBertModel)(input_ids=self.ids, labels=self.ids)

    def test_a_torch_tensor(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(TypeError, match=r"input_ids: .*got a torch tensor; pass input_ids.num"):
            tiny()(input_ids=torch.zeros(1, 6, dtype=torch.int64))
        with pytest.raises(TypeError, match="got a torch tensor"):
            tiny()(torch.zeros(1, 6, dtype=torch.int64))
        with pytest.raises(TypeError, match="got a torch tensor"):
            capture(tiny(), "attentions.0", input_ids=torch.zeros(1, 6, dtype=torch.int64))

    def test_habits(self):
        model = tiny()
        assert model.eval() is model and model.train() is model
        with pytest.raises(AttributeError, match="to: not supported, arrays go to jax's default"):
            model.to("cuda")
        mask = [[1, 1, 1, 1, 0, 0]]
        a, b = (model(self.ids, m).last_hidden_state for m in (mask, np.array(mask)))
        np.testing.assert_array_equal(a, b)

    def test_a_row_that_is_too_long(self):
        model = tiny(max_position_embeddings=16)
        ids = np.zeros((1, 17), np.int32)
        with pytest.raises(ValueError, match="at most 16 tokens, got 17; truncate them .trunc"):
            model(ids)
        model(ids, segment_ids=np.array([[1] * 9 + [2] * 8]))  # packed rows may be longer
        longer = tiny(max_position_embeddings=17)
        assert longer(ids).last_hidden_state.shape[1] == 17

    def test_a_bert_checkpoint(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
        with pytest.raises(ValueError, match="expected 'modernbert', got 'bert'; only ModernBERT"):
            ModernBertModel.from_pretrained(tmp_path)

    def test_what_from_pretrained_takes_elsewhere(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        for name, value, what in (
            ("attn_implementation", "sdpa", "each call chooses an implementation"),
            ("device_map", "auto", "jax.default_device"),
            ("num_layer", 3, "expected a field of ModernBertConfig"),
        ):
            with pytest.raises(TypeError, match=f"{name}: .*{what}"):
                ModernBertModel.from_pretrained(tmp_path, **{name: value})
        with pytest.raises(ValueError, match="dtype: expected one of float32, .*got 'bf16'"):
            ModernBertModel.from_pretrained(tmp_path, dtype="bf16")
        for dtype, what in (("bfloat16", "bfloat16"), ("auto", "float32")):
            loaded = ModernBertModel.from_pretrained(
                tmp_path, torch_dtype=dtype, trust_remote_code=True
            )
            assert loaded.config.dtype == what

    def test_float16_on_a_cpu(self, tmp_path):
        tiny(ModernBertForMaskedLM).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="float16 is slow on a CPU.*dtype='float32'"):
            ModernBertForMaskedLM.from_pretrained(tmp_path, dtype="float16")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ModernBertForMaskedLM.from_pretrained(tmp_path, dtype="float32")
