"""Embedder.encode takes what SentenceTransformer.encode takes, with the same results."""

import inspect

import jax
import numpy as np
import pytest

from modernbert_jax import Embedder
from modernbert_jax.inference.export import packed_batches

st = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from sentence_transformers.sentence_transformer import modules as m  # noqa: E402

TEXTS = ["no fever", "denies cough and pain", "", "seen today with a rash", "a rash"]
PROMPTS = {"query": "query: ", "document": "text: ", "task": "judge "}


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, pad_token_id=0,
        cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(folder / "encoder")
    small_tokenizer.save_pretrained(folder / "encoder")
    theirs = st.SentenceTransformer(
        modules=[m.Transformer(str(folder / "encoder")), m.Pooling(32, "mean")], device="cpu",
        prompts=PROMPTS, default_prompt_name="task",
    )  # fmt: skip
    theirs.save(str(folder), create_model_card=False)
    return Embedder.from_pretrained(folder), theirs


def close(got, want):
    """Compares arrays, lists of them, and dictionaries of them."""
    if isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            close(a, b)
        return
    want = np.asarray(want)
    assert np.shape(got) == want.shape and np.asarray(got).dtype == want.dtype
    exact = want.dtype.kind != "f"
    limit = 0 if exact else 1e-5 * np.abs(want).max(initial=1)
    # A rounding at the edge of a step may move an int8 by one.
    off = np.abs(np.asarray(got, np.float64) - want)
    assert (off > limit).mean() <= (0.02 if exact else 0) and off.max(initial=0) <= max(limit, 1)


# The values of every parameter of SentenceTransformer.encode: same results, or a refusal.
HONORED = {
    "inputs": [TEXTS, "a rash", {"text": "a rash"}, [{"text": "a rash"}], tuple(TEXTS),
               [("no fever", "a rash")], [["no fever", "a rash"], "a rash"], np.array(TEXTS)],
    "prompt_name": ["query", "document", "task"],
    "prompt": ["", "note: "],
    "batch_size": [1, 2],
    "show_progress_bar": [False, True],
    "output_value": ["sentence_embedding", "token_embeddings"],
    "precision": ["float32", "int8", "uint8", "binary", "ubinary", None],
    "convert_to_numpy": [True, False],
    "convert_to_tensor": [True],
    "normalize_embeddings": [True],
    "truncate_dim": [8, 100, None],
}  # fmt: skip
REFUSED = {"device": "cpu", "pool": {}, "chunk_size": 3, "kwargs": 1}


def test_every_parameter_is_honored_or_refused(both):
    parameters = inspect.signature(st.SentenceTransformer.encode).parameters
    assert {*HONORED, *REFUSED, "self"} == set(parameters)
    assert list(inspect.signature(Embedder.encode).parameters)[:9] == list(parameters)[:9]


@pytest.mark.parametrize("name", HONORED)
def test_honored(both, name):
    ours, theirs = both
    for value in HONORED[name]:
        options = {"inputs": TEXTS} | {name: value}
        if name == "output_value" and value == "token_embeddings":
            assert [type(x) for x in ours.encode(**options)] == [np.ndarray] * len(TEXTS)
        close(ours.encode(**options), theirs.encode(**options))
    both_of = {"truncate_dim": 8, "normalize_embeddings": True, "precision": "binary"}
    close(ours.encode(TEXTS, **both_of), theirs.encode(TEXTS, **both_of))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(both, name):
    with pytest.raises(TypeError, match=f"{name}: not an argument of encode; pass device"):
        both[0].encode(TEXTS, **{name: REFUSED[name]})


def test_batch_size_is_the_most_texts_in_a_row_unless_mteb_passes_it(both, monkeypatch):
    ours, _ = both
    rows = []

    def spy(*args):
        for found in packed_batches(*args):
            rows.extend(found[0])
            yield found

    monkeypatch.setattr("modernbert_jax.inference.embedder.packed_batches", spy)
    for options, expected in (
        ({}, [6]),
        ({"batch_size": 4}, [4, 2]),
        ({"batch_size": 4, "task_metadata": object()}, [6]),
    ):
        rows.clear()
        ours.encode(["a rash"] * 6, **options)
        assert [len(row) for row in rows] == expected


def test_kinds_of_results(both):
    ours, theirs = both
    assert isinstance(ours.encode("a", convert_to_tensor=True), jax.Array)
    assert all(isinstance(v, jax.Array) for v in ours.encode(["a"], convert_to_numpy=False))
    got, want = (x.encode(TEXTS, output_value=None) for x in both)
    for a, b in zip(got, want, strict=True):
        length = int(b["attention_mask"].sum())
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"][:length])
        close(a["token_embeddings"], b["token_embeddings"][:length])
        close(a["sentence_embedding"], b["sentence_embedding"])
    assert ours.encode("a", output_value=None).keys() == got[0].keys()


def test_queries_and_documents(both):
    ours, theirs = both
    for name in ("query", "document"):
        want = getattr(theirs, f"encode_{name}")(TEXTS)
        close(getattr(ours, f"encode_{name}")(TEXTS), want)
        close(ours.encode(TEXTS, prompt_type=name, task_metadata=0, batch_size=1), want)
        close(ours.encode([{"text": TEXTS[:2]}, {"text": TEXTS[2:]}], prompt_type=name), want)
        close(
            getattr(ours, f"encode_{name}")(TEXTS, prompt="x "), theirs.encode(TEXTS, prompt="x ")
        )
    assert np.abs(ours.encode_query(TEXTS) - ours.encode(TEXTS)).max() > 0.01


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(both, kind):
    ours, theirs = both
    theirs.similarity_fn_name = kind
    model = Embedder(ours.model, ours.tokenizer, sentence=type(ours.sentence)(similarity=kind))
    a, b = np.random.default_rng(0).normal(size=(2, 4, 7)).astype(np.float32)
    np.testing.assert_allclose(model.similarity(a, b[:3]), theirs.similarity(a, b[:3]), atol=1e-4)
    want = theirs.similarity_pairwise(a, b)
    np.testing.assert_allclose(model.similarity_pairwise(a, b), want, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": [3]}, TypeError, "inputs: expected texts, .* got a int"),
        ({"inputs": 3}, TypeError, "inputs: expected texts, got a int"),
        ({"inputs": [("a", "b", "c")]}, TypeError, "pairs of texts .* got a tuple"),
        ({"inputs": [{"text": "a", "x": 1}]}, TypeError, "got a dict with text, x"),
        ({"prompt_name": "nope"}, ValueError, "expected query, document, task, got 'nope'"),
        ({"prompt_name": "task", "prompt": ""}, ValueError, "expected one of them, got both"),
        ({"prompt_type": "x"}, ValueError, "prompt_type: expected query or document, got 'x'"),
        ({"batch_size": 0}, ValueError, "batch_size: .*of at least 1, got 0"),
        ({"output_value": "x"}, ValueError, "output_value: expected sentence_embedding, token"),
        ({"precision": "int4"}, ValueError, "precision: expected float32, int8, .* got 'int4'"),
        ({"inputs": "a", "precision": "int8"}, ValueError, "int8 needs the ranges of several"),
        ({"output_value": None, "truncate_dim": 3}, TypeError, "expected none with output_value"),
    ],
)
def test_refusals(both, options, error, message):
    with pytest.raises(error, match=message):
        both[0].encode(**({"inputs": TEXTS} | options))
