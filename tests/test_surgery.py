"""Models that change: another vocabulary, fewer layers, heads of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax.tokenizer import add_tokens, from_backend, vocab_size
from tests.parity_cases import BASE, BIASES, hf_model, inputs, relative_error

IDS, MASK = inputs(24, padding="right")
CONFIG = mj.ModernBertConfig.from_dict({**BASE, "num_hidden_layers": 5})
HEADS = {
    "ModernBertForMaskedLM": BIASES,
    "ModernBertForMaskedLM untied": {"tie_word_embeddings": False},
    "ModernBertForTokenClassification": {},
    "ModernBertModel": {},
}


def first_output(model, ids=IDS, mask=MASK) -> np.ndarray:
    return np.asarray(jax.tree.leaves(model(ids, mask))[0])


def torch_output(model, ids=IDS, mask=MASK) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))[0].numpy()


# The vocabulary.


@pytest.mark.optimized
@pytest.mark.parametrize("n", [80, 97, 130])
@pytest.mark.parametrize("head", HEADS)
def test_resize_as_in_transformers(head, n, tmp_path):
    transformers = pytest.importorskip("transformers")
    cls = head.split()[0]
    reference = hf_model(cls, {"num_hidden_layers": 2} | HEADS[head])
    reference.save_pretrained(tmp_path / "base")
    ours = getattr(mj, cls).from_pretrained(tmp_path / "base")
    before = first_output(ours)
    reference.resize_token_embeddings(n, pad_to_multiple_of=8)
    ours.resize_token_embeddings(n, pad_to_multiple_of=8)
    size = {80: 80, 97: 104, 130: 136}[n]
    assert ours.config.vocab_size == reference.config.vocab_size == size

    ours.save_pretrained(tmp_path / "resized")
    loaded, info = getattr(transformers, cls).from_pretrained(
        tmp_path / "resized", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, saved = reference.state_dict(), loaded.state_dict()
    assert theirs.keys() == saved.keys()
    for key, value in theirs.items():
        kept = min(97, size) if size in value.shape[:1] else len(value)
        np.testing.assert_array_equal(saved[key][:kept], value[:kept], err_msg=key)
        # transformers draws added rows around the mean, with a millionth of the variance or less.
        np.testing.assert_allclose(saved[key][kept:], value[kept:], atol=1e-3, err_msg=key)

    ids = IDS.copy()
    ids[0, 3] = size - 1
    ids = np.minimum(ids, size - 1)
    assert relative_error(first_output(ours, ids), torch_output(loaded, ids), MASK) < 2e-5
    if size > 97:  # the tokens of before give the logits of before
        after = first_output(ours)
        after = after[..., :97] if "MaskedLM" in cls else after
        assert relative_error(after, before, MASK) < 1e-5


def test_resize_draws_as_a_new_model_does():
    model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
    old = np.asarray(model.model.embeddings.tok_embeddings.weight[...])
    model.resize_token_embeddings(100, mean_init=False, seed=3)
    new = np.asarray(model.model.embeddings.tok_embeddings.weight[...])
    assert new.shape == (128, 48)  # a multiple of 64
    np.testing.assert_array_equal(new[:97], old)
    fresh = mj.ModernBertForMaskedLM(CONFIG.replace(vocab_size=128), rngs=nnx.Rngs(3))
    expected = fresh.model.embeddings.tok_embeddings.weight[...][97:]
    np.testing.assert_allclose(new[97:], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "n: expected a positive integer, got 0"),
        ((99.5,), "n: expected a positive integer, got 99.5"),
        ((99, 0), "pad_to_multiple_of: expected a positive integer, got 0"),
        ((3, None), "pad_token_id: expected an id below vocab_size 3, got 3"),
    ],
)
def test_sizes_that_are_refused(arguments, message):
    model = mj.ModernBertModel(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(*arguments)
    assert model.embeddings.tok_embeddings.weight.shape == (97, 48)
    assert model.config.vocab_size == model.embeddings.config.vocab_size == 97


WORDS = ["tachypnoe", "dyspnoe", "nykturie", "exsikkose"]


@pytest.mark.parametrize("use_unused", [False, True])
def test_new_words(small_tokenizer, use_unused, tmp_path):
    """Read again by transformers, a saved tokenizer gives each word one id, and others theirs."""
    transformers = pytest.importorskip("transformers")
    tokenizer = from_backend(small_tokenizer.backend_tokenizer)
    text = "the patient has dyspnoe and tachypnoe, exsikkose."
    tokenizer.add_tokens([f"[unused{i}]" for i in (10, 2)])
    ids = tokenizer.convert_tokens_to_ids(["[unused10]", "[unused2]"])
    size = vocab_size(tokenizer)
    assert ids == [size - 2, size - 1]
    plain = tokenizer("the patient has a rash")["input_ids"]

    assert add_tokens(tokenizer, [*WORDS, WORDS[0]], use_unused=use_unused) == 4
    assert add_tokens(tokenizer, WORDS) == 0
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for own in (tokenizer, again):
        expected = [ids[1], ids[0], size, size + 1] if use_unused else range(size, size + 4)
        assert own.convert_tokens_to_ids(WORDS) == list(expected)
        assert vocab_size(own) == size + (2 if use_unused else 4)
        found = own(text)["input_ids"]
        assert [i for i in found if i in expected] == [
            expected[1], expected[0], expected[3]
        ]  # fmt: skip
        assert own("the patient has a rash")["input_ids"] == plain
        assert own.decode(found, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    unused = [t for t in again.get_vocab() if t.startswith("[unused")]
    assert len(unused) == (0 if use_unused else 2)


def test_words_that_cannot_be_added(small_tokenizer):
    for bad in ("fever", ["fever", " "], [3]):
        with pytest.raises(ValueError, match="tokens: expected a list of texts"):
            add_tokens(small_tokenizer, bad)


# Layers.


@pytest.mark.optimized
@pytest.mark.parametrize("dropped", [[2], [1, 4], range(1, 5)])
def test_a_model_without_some_layers_is_read_by_transformers(dropped, tmp_path):
    """The reference drops the layers itself: modules and kinds, in transformers' own model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference = hf_model("ModernBertForMaskedLM", {"num_hidden_layers": 5})
    reference.save_pretrained(tmp_path / "base")
    ours = mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "base")
    before = first_output(ours)
    ours.drop_layers(dropped)
    kept = [i for i in range(5) if i not in dropped]
    kinds = [reference.config.layer_types[i] for i in kept]
    reference.model.layers = torch.nn.ModuleList(reference.model.layers[i] for i in kept)
    reference.config.layer_types = kinds
    reference.config.num_hidden_layers = len(kept)
    expected = torch_output(reference)
    assert relative_error(first_output(ours), expected, MASK) < 2e-5
    assert relative_error(before, expected, MASK) > 0.01

    ours.save_pretrained(tmp_path / "small")
    loaded = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "small")
    assert list(loaded.config.layer_types) == kinds
    assert relative_error(torch_output(loaded), expected, MASK) < 2e-5
    again = mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "small")
    np.testing.assert_array_equal(first_output(again), first_output(ours))
    assert again.config.layer_types == tuple(kinds)
    scanned = ours(IDS, MASK, scan_layers=True).logits
    assert relative_error(scanned, expected, MASK) < 2e-5


def test_layers_that_cannot_go(tmp_path):
    model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
    for indices, message in (
        ([0], "indices: expected 1 to 4, got 0; layer 0 has no attention norm"),
        ([2, 5], "indices: expected 1 to 4, got 5"),
        ([-1], "indices: expected 1 to 4, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.drop_layers(indices)
    assert len(model.model.layers) == model.config.num_hidden_layers == 5

    model.model.layers = nnx.List(list(model.model.layers)[:3])  # by hand
    for use in (lambda: model(IDS, MASK), lambda: model.save_pretrained(tmp_path / "m")):
        with pytest.raises(ValueError, match=r"layers: expected 5 \(num_hidden_layers\), got 3"):
            use()
    assert not (tmp_path / "m").exists()


# Heads of one's own.


class TwoTasks(mj.Pretrained, nnx.Module):
    """Not derived from a class of the library's: an encoder in `model`, and anything else."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.model = mj.ModernBertModel(config, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tasks = nnx.List([nnx.Linear(config.hidden_size, n, rngs=rngs) for n in (2, 3)])

    def __call__(self, ids, mask):
        hidden = self.model(ids, mask).last_hidden_state
        return [task(self.drop(hidden)) for task in self.tasks]


NEW = "4 weights of the head are new.*tasks.0.bias, tasks.0.kernel, tasks.1.bias, tasks.1.kernel"


@pytest.mark.optimized
@pytest.mark.parametrize("cls", ["ModernBertForMaskedLM", "ModernBertModel"])
def test_a_class_of_ones_own_loads_an_encoder(cls, tmp_path):
    reference = hf_model(cls, {"num_hidden_layers": 2})
    reference.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=f"TwoTasks: {NEW}"):
        model = TwoTasks.from_pretrained(tmp_path / "base", seed=7)
    encoder = getattr(reference, "model", reference)
    hidden = torch_output(encoder)
    assert relative_error(model.model(IDS, MASK).last_hidden_state, hidden, MASK) < 2e-5
    fresh = TwoTasks(model.config, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(model.tasks[1].kernel[...], fresh.tasks[1].kernel[...])

    first, second = (model(IDS, MASK)[1] for _ in range(2))
    assert np.any(first != second)  # an nnx.Dropout draws anew
    model.drop.deterministic = True
    kernel, bias = model.tasks[1].kernel[...], model.tasks[1].bias[...]
    expected = hidden @ np.asarray(kernel) + np.asarray(bias)
    assert relative_error(model(IDS, MASK)[1], expected, MASK) < 2e-5

    model.save_pretrained(tmp_path / "own")  # without a warning, because nothing is new
    again = TwoTasks.from_pretrained(tmp_path / "own")
    again.drop.deterministic = True
    for a, b in zip(again(IDS, MASK), model(IDS, MASK), strict=True):
        np.testing.assert_array_equal(a, b)
    again.drop_layers([1])
    again.resize_token_embeddings(98)
    assert again.config == again.model.config and again.config.vocab_size == 128


def test_statistics_that_a_file_cannot_hold(tmp_path):
    class Normalized(mj.ModernBertModel):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            self.statistics = nnx.BatchStat(jnp.zeros(3))

    with pytest.raises(ValueError, match="expected parameters only, got BatchStat"):
        Normalized(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
