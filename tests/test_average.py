"""The mean of checkpoints, in both layouts, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from modernbert_jax import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from modernbert_jax.checkpoint.orbax import save_orbax
from modernbert_jax.checkpoint.params import flatten, module_of
from train import cli
from train.average import average

CONFIG = ModernBertConfig.tiny(
    vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=3
)


@functools.cache
def model_of(seed: int, config=CONFIG, cls=ModernBertForMaskedLM):
    return cls(config, rngs=nnx.Rngs(seed))


@pytest.fixture
def folders(tmp_path):
    """Three checkpoints: two HF folders and an Orbax directory that trained with dropout."""
    for seed in (0, 1):
        model_of(seed).save_pretrained(tmp_path / f"hf{seed}")
        (tmp_path / f"hf{seed}" / "tokenizer.json").write_text(f'{{"of": {seed}}}')
    params = {k: np.asarray(v) for k, v in flatten(model_of(2)).items()}
    config = CONFIG.replace(attention_out_dropout=0.1, dtype="bfloat16")
    save_orbax(
        tmp_path / "orbax", architecture="ModernBertForMaskedLM", config=config, params=params
    )
    return [tmp_path / "hf0", tmp_path / "hf1", tmp_path / "orbax"]


def test_mean_of_both_layouts(folders, tmp_path):
    average(folders, tmp_path / "mean")
    got = flatten(ModernBertForMaskedLM.from_pretrained(tmp_path / "mean"))
    each = [flatten(model_of(seed)) for seed in range(3)]
    assert set(got) == set(each[0])
    for path, value in got.items():
        want = np.mean([np.asarray(params[path], np.float64) for params in each], axis=0)
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, want.astype(np.float32), err_msg=path)
    assert (tmp_path / "mean" / "tokenizer.json").read_text() == '{"of": 0}'


def test_transformers_reads_it(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    average(folders, tmp_path / "mean")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "mean")
    got = theirs.state_dict()["model.layers.1.attn.Wqkv.weight"].numpy()
    each = [flatten(model_of(seed))["model.layers.1.attn.Wqkv.weight"] for seed in range(3)]
    want = np.mean([np.asarray(w, np.float64) for w in each], axis=0).reshape(32, 96).T
    np.testing.assert_allclose(got, want, rtol=1e-7)


def test_sums_are_float64(tmp_path):
    """1e8 + 1 - 1e8 is 0 in float32."""
    params = flatten(model_of(0))
    for i, value in enumerate((1e8, 1.0, -1e8)):
        weights = params | {"decoder.bias": jnp.full((128,), value, jnp.float32)}
        module_of(ModernBertForMaskedLM, CONFIG, weights).save_pretrained(tmp_path / str(i))
    average([tmp_path / str(i) for i in range(3)], tmp_path / "mean")
    tensors = safetensors.numpy.load_file(tmp_path / "mean" / "model.safetensors")
    np.testing.assert_array_equal(tensors["decoder.bias"], np.float32(1 / 3))


def test_bfloat16_stays(tmp_path):
    config = CONFIG.replace(param_dtype="bfloat16")
    for seed in (0, 1):
        model_of(seed, config).save_pretrained(tmp_path / str(seed))
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    got = flatten(ModernBertForMaskedLM.from_pretrained(tmp_path / "mean"))
    both = [flatten(model_of(seed, config)) for seed in (0, 1)]
    for path, value in got.items():
        pair = [np.asarray(params[path], np.float64) for params in both]
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, jnp.asarray(np.mean(pair, axis=0), jnp.bfloat16))


def test_command(folders, tmp_path, capsys):
    command = ["average", *map(str, folders), "--out", str(tmp_path / "mean")]
    assert cli.main(command) == 0
    assert "3 checkpoints" in capsys.readouterr().out
    assert (tmp_path / "mean" / "config.json").exists()
    assert cli.main(command) == 2
    assert capsys.readouterr().err.endswith("expected a new folder, found a checkpoint\n")


class TestRefusals:
    def check(self, error, match, sources, out):
        with pytest.raises(error, match=match) as caught:
            average(sources, out)
        assert "\n" not in str(caught.value)
        assert not (out / "model.safetensors").exists()

    def test_fewer_than_two(self, folders, tmp_path):
        self.check(ValueError, "at least 2 checkpoints, got 1", folders[:1], tmp_path / "mean")

    @pytest.mark.parametrize(
        "changes",
        [{"intermediate_size": 32}, {"num_hidden_layers": 4}, {"global_rope_theta": 10_000.0}],
        ids=lambda c: next(iter(c)),
    )
    def test_another_architecture(self, folders, tmp_path, changes):
        model_of(3, CONFIG.replace(**changes)).save_pretrained(tmp_path / "other")
        name = next(iter(changes))
        sources = [folders[0], tmp_path / "other"]
        self.check(ValueError, f"other: another architecture: .*{name}", sources, tmp_path / "mean")

    def test_another_head(self, folders, tmp_path):
        other = model_of(3, cls=ModernBertForSequenceClassification)
        other.save_pretrained(tmp_path / "other")
        sources = [folders[0], tmp_path / "other"]
        self.check(ValueError, "classifier.bias", sources, tmp_path / "mean")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, folders, tmp_path, value):
        params = flatten(model_of(3))
        norm = params["model.final_norm.weight"].at[5].set(value)
        bad = module_of(ModernBertForMaskedLM, CONFIG, params | {"model.final_norm.weight": norm})
        bad.save_pretrained(tmp_path / "bad")
        sources = [*folders, tmp_path / "bad"]
        self.check(ValueError, "bad: model.final_norm.weight: .*NaN", sources, tmp_path / "mean")

    def test_out_holds_a_checkpoint(self, folders):
        before = (folders[0] / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="hf0: expected a new folder"):
            average(folders[1:], folders[0])
        assert (folders[0] / "model.safetensors").read_bytes() == before

    def test_no_checkpoint(self, folders, tmp_path):
        (tmp_path / "empty").mkdir()
        sources = [folders[0], tmp_path / "empty"]
        self.check(FileNotFoundError, "expected config.json", sources, tmp_path / "mean")


def test_inputs_are_untouched(folders, tmp_path):
    before = (folders[0] / "model.safetensors").read_bytes()
    average(folders[:2], tmp_path / "mean")
    assert (folders[0] / "model.safetensors").read_bytes() == before
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(a, b),
            flatten(ModernBertForMaskedLM.from_pretrained(folders[0])),
            flatten(model_of(0)),
        )
    )
