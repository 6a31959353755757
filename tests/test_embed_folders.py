"""Embedder on folders of sentence-transformers: the vectors are those of SentenceTransformer."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from modernbert_jax import Embedder
from modernbert_jax.inference.sentence import read_sentence

st = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from sentence_transformers.sentence_transformer import modules as m  # noqa: E402

TEXTS = [
    "the patient has no fever",
    "Denies COUGH and pain, seen today with a rash [MASK]",
    "",
    "fever " * 40,
    "a rash",
    "seen today; no pain, no cough, no rash, no fever, and no edema of the left arm",
]
HIDDEN = 32


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, small_tokenizer):
    """A seeded encoder of transformers that takes 128 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(small_tokenizer), hidden_size=HIDDEN, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, pad_token_id=0,
        cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


def made(
    encoder, folder, *parts, similarity=None, prompts=None, default=None, truncate=None, **options
):
    """Saves a folder of sentence-transformers with these modules after the Transformer."""
    torch.manual_seed(1)
    parts = [part() if callable(part) and not isinstance(part, torch.nn.Module) else part
             for part in parts]  # fmt: skip
    with torch.no_grad():
        for part in parts:
            for weight in part.parameters():
                weight.normal_(0.2, 0.5)
    first = m.Transformer(str(encoder), **options)
    model = st.SentenceTransformer(
        modules=[first, *parts], device="cpu", prompts=prompts, default_prompt_name=default,
        similarity_fn_name=similarity, truncate_dim=truncate,
    )  # fmt: skip
    model.save(str(folder), create_model_card=False)
    return folder


def same(folder, texts=TEXTS, **options):
    """Compares the vectors; returns the two models."""
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = Embedder.from_pretrained(folder, **options)
    want, got = theirs.encode(texts), ours.encode(texts, show_progress_bar=False)
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert ours.dimension == want.shape[1] == theirs.get_embedding_dimension()
    return ours, theirs


def pooling(*modes, **options):
    return m.Pooling(HIDDEN, modes[0] if len(modes) == 1 else modes, **options)


def gelu_dense(**options):
    return m.Dense(HIDDEN, 24, activation_function=torch.nn.GELU(), **options)


PROMPTS = {"query": "query: ", "document": "text: ", "Long": "the patient has a rash today; "}
# (modules after the Transformer, options of the Transformer, options of the model)
FOLDERS = {
    "mean": ([pooling("mean")], {}, {}),
    "cls and Normalize, as gte": ([pooling("cls"), m.Normalize()], {}, {}),
    "max": ([pooling("max")], {}, {}),
    "mean_sqrt_len_tokens": ([pooling("mean_sqrt_len_tokens")], {}, {}),
    "weightedmean": ([pooling("weightedmean"), m.Normalize()], {}, {}),
    "lasttoken": ([pooling("lasttoken")], {}, {}),
    "three poolings": ([pooling("lasttoken", "mean", "cls"), m.Normalize()], {}, {}),
    "a default prompt, as nomic": (
        [pooling("mean"), m.Normalize()], {}, {"prompts": PROMPTS, "default": "query"},
    ),
    "prompts left out": (
        [pooling("mean", "weightedmean", "max", "cls", include_prompt=False)], {},
        {"prompts": PROMPTS, "default": "Long"},
    ),
    "Dense": ([pooling("mean"), lambda: m.Dense(HIDDEN, 8), m.Normalize()], {}, {}),
    "two Dense, one without bias": (
        [pooling("cls"), lambda: gelu_dense(bias=False), m.Dropout(0.5),
         lambda: m.Dense(24, 40, activation_function=None)], {}, {},
    ),
    "Dense with residuals": (
        [pooling("mean"), lambda: gelu_dense(use_residual=True),
         lambda: m.Dense(24, 24, activation_function=torch.nn.SiLU(), use_residual=True)], {}, {},
    ),
    "Dense and Normalize on the tokens": (
        [lambda: m.Dense(HIDDEN, 12, module_input_name="token_embeddings"),
         m.Normalize("token_embeddings"), lambda: m.Pooling(12, "max")], {}, {},
    ),
    "LayerNorm": ([pooling("mean"), lambda: m.LayerNorm(HIDDEN), m.Normalize()], {}, {}),
    "vectors cut to 8, as Matryoshka models": (
        [pooling("mean"), m.Normalize()], {}, {"truncate": 8},
    ),
    "a length of 16 in lower case": (
        [pooling("mean", "lasttoken")], {"max_seq_length": 16, "do_lower_case": True}, {},
    ),
}  # fmt: skip


class TestFolders:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_equals_sentence_transformers(self, encoder, tmp_path, name):
        """And sentence-transformers gives them for what we save, which we read as what we saved."""
        parts, first, options = FOLDERS[name]
        ours, theirs = same(made(encoder, tmp_path / "theirs", *parts, **first, **options))
        ours.save(tmp_path / "ours")
        back = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
        np.testing.assert_allclose(back.encode(TEXTS), theirs.encode(TEXTS), rtol=0, atol=1e-6)
        assert back.prompts == theirs.prompts and back.max_seq_length == theirs.max_seq_length
        read = read_sentence(tmp_path / "ours")
        assert read.max_length == ours.max_length
        jax.tree.map(
            np.testing.assert_array_equal,
            dataclasses.asdict(dataclasses.replace(read, max_length=None)),
            dataclasses.asdict(dataclasses.replace(ours.sentence, max_length=None)),
        )

    def test_old_spellings(self, encoder, tmp_path):
        """As release 2 wrote them: 0_Transformer, flags, and names below .models."""
        parts = [pooling("cls", "mean"), lambda: m.Dense(2 * HIDDEN, 8)]
        made(encoder, tmp_path / "new", *parts)
        old = tmp_path / "old"
        (old / "0_Transformer").mkdir(parents=True)
        for path in (tmp_path / "new").iterdir():
            if path.is_dir():
                shutil.copytree(path, old / path.name)
            elif path.name not in ("modules.json", "config_sentence_transformers.json"):
                shutil.copy(path, old / "0_Transformer")
        settings = {"max_seq_length": 20, "do_lower_case": True}
        write(old / "0_Transformer" / "sentence_bert_config.json", settings)
        flags = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True,
                 "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}  # fmt: skip
        write(old / "1_Pooling" / "config.json", flags)
        names = ["0_Transformer", "1_Pooling", "2_Dense"]
        modules = [{"idx": n, "name": str(n), "path": name, "type": "sentence_transformers.models."
                    + name[2:]} for n, name in enumerate(names)]  # fmt: skip
        write(old / "modules.json", modules)
        ours, _ = same(old)
        assert ours.max_length == 20 and ours.pooling == ("cls", "mean")

    def test_the_files_length_replaces_the_tokenizers(self, encoder, tmp_path):
        folder = made(encoder, tmp_path, pooling("mean"))
        edit(folder / "tokenizer_config.json", model_max_length=12)
        assert same(folder)[0].max_length == 12
        edit(folder / "sentence_bert_config.json", max_seq_length=24)
        assert same(folder)[0].max_length == 24
        assert Embedder.from_pretrained(folder, max_length=8).max_length == 8
        assert Embedder.from_pretrained(folder, max_length=800).max_length == 24

    def test_lower_case_that_the_tokenizers_file_does_not_state(self, encoder, tmp_path):
        folder = made(encoder, tmp_path, pooling("mean"))
        edit(folder / "sentence_bert_config.json", do_lower_case=True)
        ours, _ = same(folder)
        np.testing.assert_array_equal(ours.encode("No COUGH"), ours.encode("no cough"))

    def test_without_modules(self, encoder):
        """Another encoder gives the mean over the tokens, of length 1."""
        modules = [m.Transformer(str(encoder)), pooling("mean"), m.Normalize()]
        want = st.SentenceTransformer(modules=modules, device="cpu").encode(TEXTS)
        ours = Embedder.from_pretrained(encoder)
        np.testing.assert_allclose(ours.encode(TEXTS), want, atol=1e-5)
        assert (ours.pooling, ours.normalize, ours.max_length) == ("mean", True, 128)


class TestChoices:
    """Explicit arguments replace a part of what the files say."""

    def test_pooling_and_normalize(self, encoder, tmp_path):
        folder = made(encoder, tmp_path / "a", pooling("cls"), m.Normalize())
        theirs = st.SentenceTransformer(
            str(made(encoder, tmp_path / "b", pooling("max", "mean"))), device="cpu"
        )
        ours = Embedder.from_pretrained(folder, pooling=("max", "mean"), normalize=False)
        want = theirs.encode(TEXTS)
        np.testing.assert_allclose(ours.encode(TEXTS), want, atol=1e-5 * np.abs(want).max())
        unit = Embedder.from_pretrained(tmp_path / "b", normalize=True).encode(TEXTS)
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
        np.testing.assert_allclose(unit, want, atol=1e-5)

    def test_what_does_not_fit(self, encoder, tmp_path):
        folder = made(encoder, tmp_path, pooling("cls"), lambda: m.Dense(HIDDEN, 8))
        with pytest.raises(ValueError, match=r"module 2 .Dense.: expected 64 features.* got 32"):
            Embedder.from_pretrained(folder, pooling=("cls", "mean"))
        with pytest.raises(ValueError, match="pooling: expected cls, max, .* got 'sum'"):
            Embedder.from_pretrained(folder, pooling="sum")


def test_a_call_may_ask_for_more_than_the_files_keep(encoder, tmp_path):
    ours, theirs = same(made(encoder, tmp_path, pooling("mean"), m.Normalize(), truncate=8))
    want = theirs.encode(TEXTS, truncate_dim=20)
    np.testing.assert_allclose(ours.encode(TEXTS, truncate_dim=20), want, rtol=0, atol=1e-5)
    assert want.shape[1] == 20
    (found,) = ours.encode(TEXTS[:1], output_value=None)
    assert found["sentence_embedding"].shape == (8,)
    ids = [found["input_ids"]]
    np.testing.assert_allclose(ours.encode_ids(ids), want[:1, :8], rtol=0, atol=1e-5)


def test_another_layer_is_not_saved(encoder, tmp_path):
    with pytest.raises(ValueError, match="layer: expected -1, the last layer, got 1; the files of"):
        Embedder.from_pretrained(encoder, layer=1).save(tmp_path)


def write(path, data):
    path.write_text(json.dumps(data))


def edit(path, **changes):
    write(path, json.loads(path.read_text()) | changes)


def edit_type(folder, number, kind):
    modules = json.loads((folder / "modules.json").read_text())
    modules[number]["type"] = kind
    write(folder / "modules.json", modules)


REFUSED = {
    "a module": (
        lambda f: edit_type(f, 2, "sentence_transformers.models.CNN"),
        r"modules.json: 'sentence_transformers.models.CNN' is not supported; supported are",
    ),
    "code": (
        lambda f: edit_type(f, 1, "custom_pooling.Pooling"),
        "modules.json: 'custom_pooling.Pooling' is not supported",
    ),
    "two encoders": (
        lambda f: edit_type(f, 1, "sentence_transformers.models.Transformer"),
        "expected one Transformer, the first module, got Transformer as module 2",
    ),
    "no pooling": (
        lambda f: edit_type(f, 1, "sentence_transformers.models.Dropout"),
        "modules.json: expected a Pooling, found none",
    ),
    "a path": (
        lambda f: write(f / "modules.json", [{"path": "../x", "type": TRANSFORMER}]),
        "expected folders within the model's, got '../x'",
    ),
    "an entry": (
        lambda f: write(f / "modules.json", [3]), "expected objects with a type and a path, got 3",
    ),
    "no list": (
        lambda f: write(f / "modules.json", {}), "modules.json: expected a JSON array, got dict",
    ),
    "a flag": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode_median=True),
        "'pooling_mode_median' is not supported",
    ),
    "a mode": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode=["cls", "median"]),
        "pooling_mode: expected cls, max, mean",
    ),
    "an activation": (
        lambda f: edit(f / "2_Dense/config.json", activation_function="torch.nn.Softmax"),
        "activation_function: 'torch.nn.Softmax' is not supported; supported are torch's Identity",
    ),
    "an activation's code": (
        lambda f: edit(f / "2_Dense/config.json", activation_function="os.Tanh"),
        "activation_function: 'os.Tanh' is not supported",
    ),
    "another size": (
        lambda f: edit(f / "2_Dense/config.json", out_features=7),
        r"expected linear.bias \[7\], linear.weight \[7, 32\], got linear.bias \[8\]",
    ),
    "an input": (
        lambda f: edit(f / "2_Dense/config.json", module_input_name="all_layer_embeddings"),
        "module_input_name: expected token_embeddings or sentence_embedding, got 'all_layer",
    ),
    "a pickle": (
        lambda f: (f / "2_Dense/model.safetensors").rename(f / "2_Dense/pytorch_model.bin"),
        "expected model.safetensors, found pytorch_model.bin, a pickle",
    ),
    "an option": (
        lambda f: edit(f / "sentence_bert_config.json", query_length=32),
        "sentence_bert_config.json: 'query_length': 32 is not supported",
    ),
    "a task": (
        lambda f: edit(f / "sentence_bert_config.json", transformer_task="fill-mask"),
        "'transformer_task': 'fill-mask' is not supported",
    ),
    "a length": (
        lambda f: edit(f / "sentence_bert_config.json", max_seq_length=0),
        "max_seq_length: expected a number from 1 on, got 0",
    ),
    "a kind of model": (
        lambda f: edit(f / "config_sentence_transformers.json", model_type="SparseEncoder"),
        "model_type: expected SentenceTransformer, got 'SparseEncoder'",
    ),
    "a similarity": (
        lambda f: edit(f / "config_sentence_transformers.json", similarity_fn_name="maxsim"),
        "similarity_fn_name: expected cosine, dot, euclidean, manhattan, got 'maxsim'",
    ),
    "a dimension": (
        lambda f: edit(f / "config_sentence_transformers.json", truncate_dim=0),
        "truncate_dim: expected a number from 1 on, got 0",
    ),
    "a prompt's name": (
        lambda f: edit(f / "config_sentence_transformers.json", default_prompt_name="x"),
        "default_prompt_name: expected one of query, document, got 'x'",
    ),
}  # fmt: skip
TRANSFORMER = "sentence_transformers.models.Transformer"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(encoder, tmp_path, name):
    folder = made(encoder, tmp_path, pooling("mean"), lambda: m.Dense(HIDDEN, 8))
    read_sentence(folder)
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_sentence(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
