"""Dtypes as in transformers, names of labels, and parameters that ModernBERT does not have."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import modernbert_jax as mj
from convert import files
from modernbert_jax.auto import read_params
from modernbert_jax.checkpoint.hf import SafetensorsFolder
from modernbert_jax.checkpoint.orbax import save_orbax
from modernbert_jax.checkpoint.params import flatten
from tests.parity_cases import hf_model, inputs, relative_error
from tests.test_pretrained import CONFIG, GOLDEN, same


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "golden")


class TestDtypes:
    """Each tensor is judged; the dtype of the model is config.json's, as in transformers 5."""

    KEY = "model.layers.1.mlp.Wi.weight"
    load = staticmethod(mj.ModernBertForMaskedLM.from_pretrained)

    def recast(self, folder, dtype, where=KEY.__eq__):
        """Stores some tensors in one of torch's dtypes."""
        torch = pytest.importorskip("torch")
        import safetensors.torch

        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors |= {k: t.to(getattr(torch, dtype)) for k, t in tensors.items() if where(k)}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        return tensors

    @pytest.mark.parametrize(
        "dtype, name",
        [("int8", "int8"), ("bool", "bool"), ("float8_e4m3fn", "float8_e4m3")],
    )
    def test_one_tensor_that_is_no_float_is_refused_by_key(self, golden, dtype, name):
        torch = pytest.importorskip("torch")
        tensors = self.recast(golden, dtype)
        for read in (self.load, read_params, files.load):
            with pytest.raises(ValueError, match=f"{self.KEY}: expected float32.* got {name}$"):
                read(golden)
        (golden / "model.safetensors").unlink()
        torch.save(tensors, golden / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"{self.KEY}: expected float32, .* got {dtype}$"):
            files.load(golden)

    def test_float64_is_cast_with_one_line(self, golden):
        before = self.load(golden)
        self.recast(golden, "float64")
        with pytest.warns(UserWarning) as record:
            same(self.load(golden), before)
        assert [f"1 weights are float64 and become float32: {self.KEY}" in str(w.message)
                for w in record] == [True]  # fmt: skip
        with pytest.raises(ValueError, match=f"{self.KEY}: expected float32, .* got float64; load"):
            read_params(golden)  # the converters and averages keep every bit

    def test_norms_in_float32_and_the_rest_in_bfloat16(self, tmp_path):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        hf_model("ModernBertForMaskedLM", {"num_hidden_layers": 4}).save_pretrained(tmp_path)
        self.recast(tmp_path, "bfloat16", lambda key: "norm" not in key)
        theirs = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path)
        ids, _ = inputs(9)
        ours = self.load(tmp_path)
        with torch.no_grad():
            assert relative_error(ours(ids).logits, theirs(torch.tensor(ids)).logits) < 1e-5
        checkpoint = files.load(tmp_path)  # keeps every tensor's dtype
        dtypes = {k: str(v.dtype) for k, v in checkpoint.params.items()}
        assert dtypes == {k: "float32" if "norm" in k else "bfloat16" for k in dtypes}
        files.save_composer(checkpoint, tmp_path / "c.pt", lr=1e-3, weight_decay=0.0)
        again = files.load_composer(tmp_path / "c.pt", tmp_path)  # its configuration states none
        assert again.config.param_dtype == "float32"
        assert {k: str(v.dtype) for k, v in again.params.items()} == dtypes

    @pytest.mark.parametrize(
        "stored, stated",
        [
            ("bfloat16", "float32"),
            ("bfloat16", "float64"),
            ("bfloat16", None),
            ("float32", "bfloat16"),
        ],
    )
    def test_the_dtype_that_the_configuration_states(self, golden, stored, stated):
        transformers = pytest.importorskip("transformers")
        self.recast(golden, stored, lambda key: True)
        data = json.loads((golden / "config.json").read_text())
        data.pop("torch_dtype", None)
        (golden / "config.json").write_text(json.dumps(data | {"dtype": stated}))
        ours = self.load(golden)
        theirs = transformers.ModernBertForMaskedLM.from_pretrained(golden)
        expected = str(theirs.dtype).removeprefix("torch.").replace("float64", "float32")
        assert {str(v.dtype) for v in flatten(ours).values()} == {expected}
        assert ours.config.dtype == expected
        config = files.load(golden).config  # the Orbax folder states the same
        assert config.param_dtype == read_params(golden)[1].param_dtype == expected

    def test_saving_keeps_each_dtype_and_states_one_that_loses_nothing(self, golden, tmp_path):
        model = self.load(golden, dtype="bfloat16")
        norm = model.model.final_norm.weight
        norm.set_value(jnp.full(norm.shape, 1.001, jnp.float32))
        model.save_pretrained(tmp_path / "saved")
        assert SafetensorsFolder(tmp_path / "saved").dtypes["model.final_norm.weight"] == "float32"
        assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == "float32"
        again = flatten(self.load(tmp_path / "saved"))
        for key, value in flatten(model).items():
            np.testing.assert_array_equal(again[key], np.asarray(value, np.float32))


class TestLabels:
    load = staticmethod(mj.ModernBertForSequenceClassification.from_pretrained)

    @pytest.mark.parametrize(
        "more", [{}, {"num_labels": 3}, {"label2id": {"a": 0, "b": 1, "c": 2}}]
    )
    @pytest.mark.parametrize("ids", [(0, 1, 2), (2, 0, 1)])
    def test_saved_as_transformers_saves_them(self, tmp_path, ids, more):
        transformers = pytest.importorskip("transformers")
        config = CONFIG.replace(num_labels=3)
        mj.ModernBertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
        names = {2: "c", 0: "a", 1: "b"}
        ours = self.load(tmp_path, id2label=names, **more)
        assert ours.config.id2label == ("a", "b", "c")
        ours.save_pretrained(tmp_path / "ours")
        theirs = transformers.AutoConfig.from_pretrained(
            tmp_path, id2label=names, label2id={"a": 0, "b": 1, "c": 2}
        )
        theirs.save_pretrained(tmp_path / "theirs")
        found = [json.loads((tmp_path / name / "config.json").read_text())
                 for name in ("ours", "theirs")]  # fmt: skip
        for key in ("id2label", "label2id"):
            assert found[0][key] == found[1][key]

    def test_names_alone_set_their_number(self, golden):
        with pytest.warns(UserWarning, match="classifier.weight"):
            model = self.load(golden, id2label={0: "a", 1: "b", 2: "c"})
        assert model.config.num_labels == model.classifier.weight.shape[1] == 3
        with pytest.raises(ValueError, match=r"id2label: expected 2 names \(num_labels\), got 3"):
            self.load(golden, id2label={0: "a", 1: "b", 2: "c"}, num_labels=2)


class Custom(mj.ModernBertForMaskedLM):
    """A class of one's own, with a parameter that ModernBERT does not have."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.extra = nnx.Linear(32, 4, rngs=rngs)


class Misnamed(mj.ModernBertForMaskedLM):
    """Its classifier has a name of ModernBERT's and other axes."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.classifier = nnx.Module()
        self.classifier.weight = nnx.Param(jnp.ones((32, 4)))


class TestOwnParameters:
    def test_are_stored_unchanged_and_read_again(self, tmp_path):
        model = Custom(CONFIG, rngs=nnx.Rngs(0))
        model.save_pretrained(tmp_path / "hf")
        stored = safetensors.numpy.load_file(tmp_path / "hf/model.safetensors")
        np.testing.assert_array_equal(stored["extra.kernel"], model.extra.kernel[...])
        same(Custom.from_pretrained(tmp_path / "hf"), model)
        params = {k: np.asarray(v) for k, v in flatten(model).items()}
        save_orbax(tmp_path / "orbax", architecture="Custom", config=CONFIG, params=params)
        same(Custom.from_pretrained(tmp_path / "orbax"), model)
        for folder in ("hf", "orbax"):
            with pytest.raises(ValueError, match="unknown keys: extra.bias, extra.kernel"):
                mj.ModernBertForMaskedLM.from_pretrained(tmp_path / folder)
        with pytest.raises(ValueError, match="unknown keys: extra.bias, extra.kernel"):
            files.load(tmp_path / "hf")
        checkpoint = files.load(tmp_path / "orbax")
        with pytest.raises(ValueError, match="unknown keys: extra.bias, extra.kernel"):
            files.to_hf(checkpoint, checkpoint.params)

    def test_are_new_if_the_file_lacks_them(self, golden):
        with pytest.warns(UserWarning, match="2 weights .* are new.*: extra.bias, extra.kernel"):
            assert Custom.from_pretrained(golden).extra.kernel.shape == (32, 4)

    def test_what_from_pretrained_would_refuse_is_not_saved(self, tmp_path):
        with pytest.raises(ValueError, match=r"classifier.weight: expected shape \(16, E\), got"):
            Misnamed(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "c")
        model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
        model.extra = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="unknown keys: extra.bias, extra.kernel"):
            model.save_pretrained(tmp_path / "c")
        del model.extra
        bias = model.decoder.bias
        bias.set_value(jnp.zeros(41))
        with pytest.raises(ValueError, match=r"decoder.bias: expected shape \(40,\), got \(41,\)"):
            model.save_pretrained(tmp_path / "c")
        bias.set_value(jnp.zeros(40, jnp.int8))
        with pytest.raises(ValueError, match="decoder.bias: expected float32, .* got int8"):
            model.save_pretrained(tmp_path / "c")
        params = {k: np.asarray(v) for k, v in flatten(model).items()}
        with pytest.raises(ValueError, match="decoder.bias: expected float32, .* got int8"):
            save_orbax(tmp_path / "c", architecture="X", config=CONFIG, params=params)
        assert not (tmp_path / "c").exists()
