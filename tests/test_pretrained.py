"""from_pretrained and save_pretrained: HF's layout both ways, Orbax, prefixes, heads, refusals."""

import json
import pathlib
import shutil
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import modernbert_jax as mj
from modernbert_jax.checkpoint.hf import SafetensorsFolder
from modernbert_jax.checkpoint.orbax import load_orbax, save_orbax
from modernbert_jax.checkpoint.params import flatten, param_shapes
from modernbert_jax.weights import WEIGHTS, from_hf, to_hf, weight_of
from tests.parity_cases import BIASES, hf_model, inputs, relative_error

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "tiny"
CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=3, **BIASES
)
CLASSES = [
    mj.ModernBertModel,
    mj.ModernBertForMaskedLM,
    mj.ModernBertForSequenceClassification,
    mj.ModernBertForTokenClassification,
    mj.ModernBertForQuestionAnswering,
    mj.ModernBertForMultipleChoice,
]


def same(a, b):
    a, b = flatten(a), flatten(b)
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), err_msg=key)


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "golden")


def edit(folder, change):
    """Rewrites the weights of a folder after `change(dict)`."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_transformers_loads_what_we_save(cls, tmp_path):
    """No missing and no unexpected key, and the same numbers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    ours = cls(CONFIG, rngs=nnx.Rngs(0))
    ours.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, cls.__name__).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = inputs(20, rows=4)
    ids, mask = ids % 40, mask
    if cls is mj.ModernBertForMultipleChoice:
        ids, mask = ids.reshape(2, 2, 20), mask.reshape(2, 2, 20)
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
    got = ours(ids, mask)
    got = getattr(got, "logits", None) if hasattr(got, "logits") else got
    got = getattr(got, "last_hidden_state", getattr(got, "start_logits", got))
    assert relative_error(got, want) < 1e-5
    same(cls.from_pretrained(tmp_path), ours)


@pytest.mark.filterwarnings("ignore:dtype. float16 is slow on a CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_of_every_dtype_is_bit_exact(dtype, tmp_path):
    model = mj.ModernBertForMaskedLM(CONFIG.replace(param_dtype=dtype), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    again = mj.ModernBertForMaskedLM.from_pretrained(tmp_path)
    same(again, model)
    assert again.config.dtype == again.config.param_dtype == dtype
    master = mj.ModernBertForMaskedLM.from_pretrained(
        tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.float32
    )
    assert master.config.dtype == "bfloat16"
    assert {str(v.dtype) for v in flatten(master).values()} == {"float32"}
    assert master(np.ones((1, 4), np.int32)).logits.dtype == jnp.float32


def test_shards_and_their_index(tmp_path):
    model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path, max_shard_size=5000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    same(mj.ModernBertForMaskedLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path)  # over it: nothing of the shards stays
    names = {"model.safetensors", "config.json", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == names
    same(mj.ModernBertForMaskedLM.from_pretrained(tmp_path), model)


def test_transformers_shards_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    reference = hf_model("ModernBertForMaskedLM")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids, _ = inputs(9)
    got = mj.ModernBertForMaskedLM.from_pretrained(tmp_path)(ids).logits
    with torch.no_grad():
        assert relative_error(got, reference(torch.tensor(ids)).logits) < 1e-5


class TestPrefixes:
    """Bare encoders into heads and the reverse, as transformers does."""

    def test_bare_encoder_into_a_head(self, tmp_path):
        encoder = mj.ModernBertModel(CONFIG, rngs=nnx.Rngs(3))
        encoder.save_pretrained(tmp_path)
        keys = list(SafetensorsFolder(tmp_path))
        assert not any(k.startswith("model.") for k in keys)
        with pytest.warns(UserWarning, match="5 weights of the head are new.*head.dense.weight"):
            model = mj.ModernBertForMaskedLM.from_pretrained(tmp_path, seed=4)
        same(model.model, encoder)
        fresh = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(4))
        # Compiled as a whole or one operation at a time: the last bit may differ.
        np.testing.assert_allclose(
            model.head.dense.weight[...], fresh.head.dense.weight[...], rtol=1e-6
        )

    def test_head_into_a_bare_encoder(self, golden):
        model = mj.ModernBertForMaskedLM.from_pretrained(golden)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(mj.ModernBertModel.from_pretrained(golden), model.model)

    def test_one_head_into_another_reports_once(self, golden):
        with pytest.warns(UserWarning) as record:
            model = mj.ModernBertForSequenceClassification.from_pretrained(golden, num_labels=7)
        assert len(record) == 1 and "classifier.bias, classifier.weight" in str(record[0].message)
        mlm = mj.ModernBertForMaskedLM.from_pretrained(golden)
        np.testing.assert_array_equal(model.head.dense.weight[...], mlm.head.dense.weight[...])
        assert model(np.ones((1, 4), np.int32)).logits.shape == (1, 7)

    def test_other_number_of_labels(self, tmp_path):
        model = mj.ModernBertForTokenClassification(CONFIG.replace(num_labels=3), rngs=nnx.Rngs(0))
        model.save_pretrained(tmp_path)
        load = mj.ModernBertForTokenClassification.from_pretrained
        with pytest.raises(ValueError, match=r"classifier.bias: expected shape \(5,\), got"):
            load(tmp_path, num_labels=5)
        with pytest.warns(UserWarning, match="classifier.weight"):
            assert load(tmp_path, num_labels=5, ignore_mismatched_sizes=True).config.num_labels == 5


def test_a_repeated_tied_decoder_is_dropped_another_one_refused(golden):
    model = mj.ModernBertForMaskedLM.from_pretrained(golden)
    embedding = "model.embeddings.tok_embeddings.weight"
    edit(golden, lambda t: t.update({"decoder.weight": t[embedding].copy()}))
    same(mj.ModernBertForMaskedLM.from_pretrained(golden), model)
    edit(golden, lambda t: t["decoder.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(ValueError, match="decoder.weight: expected the same values"):
        mj.ModernBertForMaskedLM.from_pretrained(golden)


class TestRefusals:
    load = staticmethod(mj.ModernBertForMaskedLM.from_pretrained)

    def test_unknown_missing_and_misshapen(self, golden):
        edit(golden, lambda t: t.update({"model.layers.0.attn_norm.weight": np.ones(16, "f4")}))
        with pytest.raises(ValueError, match="unknown keys: model.layers.0.attn_norm.weight"):
            self.load(golden)
        edit(golden, lambda t: [t.pop("model.layers.0.attn_norm.weight"),
                                t.pop("model.final_norm.weight")])  # fmt: skip
        with pytest.raises(ValueError, match="missing keys: model.final_norm.weight"):
            self.load(golden)
        edit(golden, lambda t: t.update({"model.final_norm.weight": np.ones(17, "f4")}))
        with pytest.raises(
            ValueError, match=r"final_norm.weight: expected shape \(16,\), got \(17,"
        ):
            self.load(golden)

    def test_truncated_file(self, golden):
        path = golden / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
            self.load(golden)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x", "a/b", "..", ""])
    def test_index_that_leaves_the_folder(self, golden, name):
        (golden / "model.safetensors").rename(golden.parent / "model.safetensors")
        index = {"weight_map": {"model.final_norm.weight": name}}
        (golden / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="expected plain file names, got"):
            self.load(golden)

    def test_index_that_promises_too_much(self, tmp_path):
        mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(
            tmp_path, max_shard_size=5000
        )
        path = tmp_path / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["extra"] = (
            "model-00001-of-" + sorted(index["weight_map"].values())[0].split("-of-")[1]
        )
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no shard has extra"):
            self.load(tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected config.json, found none"):
            self.load(tmp_path)
        shutil.copy(GOLDEN / "config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match="expected model.safetensors or"):
            self.load(tmp_path)
        with pytest.raises(FileNotFoundError, match="expected a checkpoint folder or a hub id"):
            self.load(tmp_path / "nowhere")

    def test_hub_id_offline_says_what_the_hub_said(self):
        with pytest.raises(OSError, match="not a local folder, and the hub raised"):
            self.load("someone/some-model", local_files_only=True)

    def test_integer_weights(self, golden):
        edit(
            golden, lambda t: [t.clear(), t.update({"model.final_norm.weight": np.ones(16, "i4")})]
        )
        with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got int32"):
            self.load(golden)


def test_hub_cache_is_used_offline(tmp_path, golden):
    """A folder in the hub's cache layout loads by its id without a network."""
    repo = tmp_path / "models--someone--tiny"
    snapshot = repo / "snapshots" / "0123abc"
    shutil.copytree(golden, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    model = mj.ModernBertForMaskedLM.from_pretrained(
        "someone/tiny", cache_dir=tmp_path, local_files_only=True
    )
    same(model, mj.ModernBertForMaskedLM.from_pretrained(golden))


class TestOrbax:
    def save(self, folder, **extra):
        model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
        params = {k: np.asarray(v) for k, v in flatten(model).items()}
        save_orbax(
            folder, architecture="ModernBertForMaskedLM", config=CONFIG, params=params, **extra
        )
        return model, params

    def test_from_pretrained_reads_it(self, tmp_path):
        model, params = self.save(tmp_path / "c")
        same(mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "c"), model)
        same(mj.ModernBertModel.from_pretrained(tmp_path / "c"), model.model)
        with pytest.warns(UserWarning, match="classifier"):
            mj.ModernBertForTokenClassification.from_pretrained(tmp_path / "c")

    def test_moments_and_position(self, tmp_path):
        params = self.save(tmp_path / "a")[1]
        optimizer = {"step": 7, "mu": params, "nu": {k: v * 2 for k, v in params.items()}}
        self.save(tmp_path / "b", optimizer=optimizer, data={"row": 3})
        loaded = load_orbax(tmp_path / "b", optimizer=True)
        assert loaded["optimizer"]["step"] == 7 and loaded["data"] == {"row": 3}
        for key, value in params.items():
            np.testing.assert_array_equal(loaded["optimizer"]["nu"][key], value * 2)
        assert load_orbax(tmp_path / "b")["optimizer"] is None
        with pytest.raises(FileNotFoundError, match="no optimizer/"):
            load_orbax(tmp_path / "a", optimizer=True)

    def test_bfloat16_stays(self, tmp_path):
        config = CONFIG.replace(param_dtype="bfloat16")
        model = mj.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
        save_orbax(
            tmp_path / "c", architecture=type(model).__name__, config=config, params=flatten(model)
        )
        loaded = load_orbax(tmp_path / "c")
        assert all(v.dtype == ml_dtypes.bfloat16 for v in loaded["params"].values())
        same(mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "c"), model)

    @pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
    def test_a_large_array(self, tmp_path, kind):
        """One that alone reaches the limit of what is in flight, as the embeddings of base."""
        params = {"wte": np.arange(17 * 1024**2, dtype=np.float32).reshape(1024, -1)}
        given = {path: kind(x) for path, x in params.items()}
        save_orbax(tmp_path / "c", architecture="ModernBertModel", config=CONFIG, params=given)
        np.testing.assert_array_equal(load_orbax(tmp_path / "c")["params"]["wte"], params["wte"])

    def test_half_written_is_no_checkpoint_and_a_complete_one_is_not_overwritten(self, tmp_path):
        self.save(tmp_path / "c")
        with pytest.raises(FileExistsError, match="found a checkpoint"):
            self.save(tmp_path / "c")
        (tmp_path / "c" / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="expected a complete checkpoint"):
            mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "c")
        self.save(tmp_path / "c")  # what was half-written gives way


class TestKeyTable:
    def test_covers_every_parameter_of_every_class_and_nothing_else(self):
        every = CONFIG.replace(tie_word_embeddings=False)
        paths = {k for cls in CLASSES for k in param_shapes(cls, every)}
        import re

        used = {re.sub(r"layers\.\d+", "layers.N", p) for p in paths if p.startswith("model.")}
        used |= {p for p in paths if p.split(".")[0] in ("head", "decoder", "classifier")}
        assert used == {row.name for row in WEIGHTS}
        assert len({row.name for row in WEIGHTS}) == len(WEIGHTS)

    def test_axes_name_every_size(self):
        """The letters of a row are the sizes of the parameter, for every class and option."""
        every = CONFIG.replace(tie_word_embeddings=False)
        sizes = {"V": 40, "D": 16, "F": 12, "H": every.num_attention_heads, "K": every.head_dim}
        for cls in CLASSES:
            for path, leaf in param_shapes(cls, every).items():
                row = weight_of(path)
                assert len(row.axes) == len(leaf.shape), path
                for letter, size in zip(row.axes, leaf.shape, strict=True):
                    assert size == sizes.get(letter, size), (path, letter)

    def test_matrices_decay_and_nothing_else(self):
        decaying = {row.name.removesuffix(".weight") for row in WEIGHTS if row.decays}
        layer = "model.layers.N."
        assert decaying == {
            *(layer + name for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
            *("model.embeddings.tok_embeddings", "head.dense", "decoder", "classifier"),
        }

    @pytest.mark.parametrize(
        "key, hf, ours, index",
        [
            # Row h*K + k of the k-block of Wqkv is head h, place k.
            ("model.layers.1.attn.Wqkv.weight", (12, 4), (4, 3, 2, 2), ((7, 3), (3, 1, 1, 1))),
            ("model.layers.1.attn.Wo.weight", (4, 4), (2, 2, 4), ((3, 2), (1, 0, 3))),
            ("model.layers.1.mlp.Wi.weight", (10, 4), (4, 2, 5), ((8, 1), (1, 1, 3))),
            ("model.layers.1.mlp.Wo.weight", (4, 5), (5, 4), ((3, 2), (2, 3))),
            ("model.layers.1.attn.Wqkv.bias", (12,), (3, 2, 2), ((7,), (1, 1, 1))),
            ("model.embeddings.tok_embeddings.weight", (9, 4), (9, 4), ((8, 1), (8, 1))),
            ("layers.1.mlp.Wi.bias", (10,), (2, 5), ((8,), (1, 3))),
        ],
    )
    def test_where_each_number_goes(self, key, hf, ours, index):
        array = np.arange(np.prod(hf), dtype=np.float32).reshape(hf)
        moved = from_hf(key, array, ours)
        assert moved[index[1]] == array[index[0]]
        np.testing.assert_array_equal(to_hf(key, moved), array)
