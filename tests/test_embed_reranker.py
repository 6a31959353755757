"""Reranker: the scores of sentence-transformers' CrossEncoder."""

import json
import shutil

import numpy as np
import pytest

from modernbert_jax import Reranker, pipeline

st = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDENTITY = "torch.nn.modules.linear.Identity"
QUERY = "no fever"
DOCUMENTS = ["the patient has a cough", "", "denies fever and RASH " * 20, "seen today", "a rash"]
PAIRS = [(QUERY, d) for d in DOCUMENTS] + [("denies pain " * 30, "seen today " * 20)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    """{number of labels: a seeded classifier of transformers}."""
    found = {}
    for labels in (1, 3):
        found[labels] = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(labels)
        config = transformers.ModernBertConfig(
            vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
            pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2,
            initializer_range=0.2, num_labels=labels, classifier_pooling="mean",
        )  # fmt: skip
        model = transformers.ModernBertForSequenceClassification(config)
        model.save_pretrained(found[labels])
        small_tokenizer.save_pretrained(found[labels])
    return found


def edit(path, **changes):
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


def both(folder, **options):
    theirs = st.CrossEncoder(str(folder), device="cpu")
    return Reranker.from_pretrained(folder, **options), theirs


class TestPredict:
    @pytest.mark.parametrize("labels", [1, 3])
    def test_equals_sentence_transformers(self, folders, labels):
        ours, theirs = both(folders[labels], batch_tokens=256)
        want = theirs.predict(PAIRS)
        got = ours.predict(PAIRS)
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        np.testing.assert_allclose(ours(PAIRS[0]), theirs.predict(PAIRS[0]), atol=1e-5)
        for name, options in (("apply_softmax", True), ("prompt", "text: ")):
            want = theirs.predict(PAIRS, **{name: options})
            got = ours.predict(PAIRS, **{name: options})
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        want = theirs.predict(PAIRS, activation_fn=torch.nn.Tanh())
        np.testing.assert_allclose(ours.predict(PAIRS, activation_fn="Tanh"), want, atol=1e-5)
        assert ours.predict([]).shape[0] == 0

    @pytest.mark.parametrize("place", ["settings", "config", "old"])
    def test_activation_of_the_files(self, folders, tmp_path, place):
        """As releases 6, 4 and 3 stored it; with a prompt, a length and lower case in the first."""
        ours, theirs = both(folders[1])
        theirs.activation_fn = torch.nn.Tanh() if place == "settings" else torch.nn.Identity()
        theirs.prompts, theirs.default_prompt_name = {"task": "judge: "}, "task"
        theirs.save(str(tmp_path))
        if place != "settings":
            for name in ("modules.json", "config_sentence_transformers.json",
                         "sentence_bert_config.json"):  # fmt: skip
                (tmp_path / name).unlink()
            edit(tmp_path / "config.json", **{
                "config": {"sentence_transformers": {"activation_fn": IDENTITY}},
                "old": {"sbert_ce_default_activation_function": IDENTITY},
            }[place])  # fmt: skip
        else:
            edit(tmp_path / "sentence_bert_config.json", max_seq_length=40, do_lower_case=True)
        ours, theirs = both(tmp_path)
        want = theirs.predict(PAIRS)
        assert (want < 0).any()  # no sigmoid
        np.testing.assert_allclose(ours.predict(PAIRS), want, rtol=0, atol=1e-5)
        assert ours.max_length == theirs.max_seq_length == (40 if place == "settings" else 128)

    def test_the_settings_come_before_the_config(self, folders, tmp_path):
        shutil.copytree(folders[1], tmp_path / "m")
        both(tmp_path / "m")[1].save(str(tmp_path / "m"))
        edit(tmp_path / "m" / "config_sentence_transformers.json", activation_fn="torch.nn.Tanh")
        edit(tmp_path / "m" / "config.json", sentence_transformers={"activation_fn": IDENTITY})
        ours, theirs = both(tmp_path / "m")
        want = theirs.predict(PAIRS)
        np.testing.assert_allclose(ours.predict(PAIRS), want, rtol=0, atol=1e-5)
        assert np.abs(want - ours.predict(PAIRS, activation_fn="Identity")).max() > 0.1

    def test_refusals(self, folders, tmp_path):
        ours, theirs = both(folders[1])
        for inputs, number in ((["a", "b"][:1], 1), ([("a", "b"), ("a",)], 2), ([("a", 3)], 1)):
            with pytest.raises(TypeError, match=f"expected pairs of texts, number {number}"):
                ours.predict(inputs)
        with pytest.raises(ValueError, match="prompt_name: expected none, as the model has no"):
            ours.predict(PAIRS, prompt_name="query")
        with pytest.raises(ValueError, match="activation_fn: expected a function or Identity"):
            ours.predict(PAIRS, activation_fn="Softmax")
        with pytest.raises(ValueError, match="activation_fn: expected a score per label, got"):
            ours.predict(PAIRS, activation_fn=lambda x: x.sum())
        with pytest.raises(ValueError, match="rank: expected a model with 1 label, got 3"):
            both(folders[3])[0].rank(QUERY, DOCUMENTS)
        theirs.save(str(tmp_path))
        edit(tmp_path / "config_sentence_transformers.json", activation_fn="evil.Sigmoid")
        with pytest.raises(ValueError, match="activation_fn: 'evil.Sigmoid' is not supported"):
            Reranker.from_pretrained(tmp_path)


def test_rank(folders):
    ours, theirs = both(folders[1])
    for options in ({}, {"top_k": 2, "return_documents": True}):
        got, want = (x.rank(QUERY, DOCUMENTS, **options) for x in (ours, theirs))
        assert [g.keys() for g in got] == [w.keys() for w in want]
        for g, w in zip(got, want, strict=True):
            assert {**g, "score": 0} == {**w, "score": 0}
            assert g["score"] == pytest.approx(w["score"], abs=1e-5)


def test_pipeline_and_export(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folders[1], tmp_path / "in")
    edit(tmp_path / "in" / "config_sentence_transformers.json", activation_fn="torch.nn.Tanh")
    pipe = pipeline("text-ranking", tmp_path / "in")
    want = pipe(PAIRS[:2])
    plain = pipe.predict(PAIRS[:2], activation_fn="Identity")
    np.testing.assert_allclose(want, np.tanh(plain), atol=1e-6)
    assert pipe.export(tmp_path / "out", tokens=[64]) == [64]
    again = pipeline("text-ranking", tmp_path / "out", exported=True)
    np.testing.assert_allclose(again(PAIRS[:2]), want, atol=1e-6)


@pytest.mark.parametrize("release", [6, 5], ids=["this release", "before 6"])
def test_save_loads_in_sentence_transformers(folders, tmp_path, release):
    """The same scores there and here; releases before 6 read config.json alone."""
    shutil.copytree(folders[1], tmp_path / "in")
    edit(tmp_path / "in" / "config.json", sentence_transformers={"activation_fn": IDENTITY})
    edit(tmp_path / "in" / "sentence_bert_config.json", max_seq_length=40, do_lower_case=True)
    ours = Reranker.from_pretrained(tmp_path / "in")
    ours.save(tmp_path / "out")
    if release == 5:
        for name in ("modules.json", "config_sentence_transformers.json",
                     "sentence_bert_config.json"):  # fmt: skip
            (tmp_path / "out" / name).unlink()
    again, theirs = both(tmp_path / "out")
    want = ours.predict(PAIRS)
    assert want.max() > 1  # no sigmoid
    np.testing.assert_allclose(theirs.predict(PAIRS), want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(again.predict(PAIRS), want)
    assert again.max_length == theirs.max_seq_length == 40
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1


def test_save_keeps_prompts_and_refuses_an_unnamed_activation(folders, tmp_path):
    shutil.copytree(folders[3], tmp_path / "in")
    edit(
        tmp_path / "in" / "config_sentence_transformers.json",
        prompts={"task": "judge: "}, default_prompt_name="task",
    )  # fmt: skip
    ours = Reranker.from_pretrained(tmp_path / "in", activation_fn="Tanh")
    ours.save(tmp_path / "out")
    again, theirs = both(tmp_path / "out")
    want = ours.predict(PAIRS)
    np.testing.assert_allclose(theirs.predict(PAIRS), want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(again.predict(PAIRS), want)
    ours = Reranker.from_pretrained(tmp_path / "in", activation_fn=lambda x: x * 2)
    for write in (ours.save, ours.export):
        with pytest.raises(ValueError, match="activation_fn: expected one of Identity, .*pass its"):
            write(tmp_path / "not written")
    assert not (tmp_path / "not written").exists()
