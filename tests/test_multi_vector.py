"""Multi-vector models: PyLate's layout, with the vectors, scores and loss of torch."""

import json
import string

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from modernbert_jax import AutoTokenizer, Embedder, ModernBertModel, MultiVectorEmbedder
from modernbert_jax.inference.colbert import max_sim, read_colbert
from modernbert_jax.serve import cli as serving
from modernbert_jax.serve.app import Limits, Service
from modernbert_jax.serve.endpoints import endpoints_of
from modernbert_jax.weights import to_hf
from train import cli
from train.finetune.retrieval.config import RetrievalConfig
from train.finetune.retrieval.multi_vector import MultiVectorEncoder

st = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

QUERIES = ["no fever?", "denies cough, and pain; " * 9, "", "a RASH today"]
DOCUMENTS = [
    "the patient has no fever",
    "Denies COUGH and pain, seen today: a rash (on the left arm)!",
    "fever, " * 60,
    "",
    "a rash",
]
HIDDEN, WINDOW = 32, 8
PYLATE = {
    "model_type": "ColBERT", "prompts": {}, "default_prompt_name": None,
    "similarity_fn_name": "MaxSim", "query_prefix": "[Q] ", "document_prefix": "[D] ",
    "query_length": 24, "document_length": 40, "attend_to_expansion_tokens": False,
    "do_query_expansion": True, "skiplist_words": list(string.punctuation),
}  # fmt: skip
DENSE = {
    "in_features": HIDDEN, "out_features": 12, "bias": False, "use_residual": False,
    "activation_function": "torch.nn.modules.linear.Identity",
}  # fmt: skip


def seeded(folder, tokenizer):
    """Saves a seeded encoder of transformers beside its tokenizer."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, local_attention=2 * WINDOW,
        pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_tokenizer):
    """An encoder whose tokenizer has no prefixes."""
    return seeded(tmp_path_factory.mktemp("plain"), small_tokenizer)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, plain):
    """An encoder and a tokenizer with the prefixes of PyLate."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(plain)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    return seeded(tmp_path_factory.mktemp("encoder"), tokenizer)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def edit(path, **changes):
    write(path, json.loads(path.read_text()) | changes)


def made(encoder, folder, *more, **settings):
    """Writes a folder as PyLate does. more: settings of Dense modules after the first."""
    for path in encoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(1)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models."
                "Transformer"}]  # fmt: skip
    for number, changes in enumerate([{}, *more], start=1):
        config, name = DENSE | changes, f"{number}_Dense"
        into, out = config["in_features"], config["out_features"]
        weights = {"linear.weight": torch.randn(out, into) / 4}
        if config["bias"]:
            weights["linear.bias"] = torch.randn(out)
        if config["use_residual"] and into != out:
            weights["residual.weight"] = torch.randn(out, into) / 4
        write(folder / name / "config.json", config)
        save_file(weights, folder / name / "model.safetensors")
        modules.append({"idx": number, "name": str(number), "path": name,
                        "type": "pylate.models.Dense.Dense"})  # fmt: skip
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 39, "do_lower_case": False})
    write(folder / "config_sentence_transformers.json", PYLATE | settings)
    return folder


def close(got, want):
    """Compares the vectors of several texts."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def vectors_of(model):
    options = {} if isinstance(model, MultiVectorEmbedder) else {"convert_to_numpy": True}
    return model.encode_query(QUERIES, **options), model.encode_document(DOCUMENTS, **options)


def theirs_of(folder):
    return st.MultiVectorEncoder(str(folder), device="cpu")


# (settings of further Dense modules, changed settings of the model)
FOLDERS = {
    "PyLate's defaults": ([], {"skiplist_words": None, "do_query_expansion": None}),
    "three Dense, expansion beyond the window": (
        [
            {"in_features": 12, "out_features": 20, "bias": True, "use_residual": True,
             "activation_function": "torch.nn.modules.activation.GELU"},
            {"in_features": 20, "out_features": 20, "use_residual": True},
        ],
        {"query_length": 60, "document_length": 16},
    ),
    "attended expansion, own skiplist": (
        [],
        {"attend_to_expansion_tokens": True, "skiplist_words": ["rash", "e", "[SEP]", "no token"]},
    ),
    "prompts, no expansion": (
        [],
        {"prompts": {"query": "seen: ", "document": "text "}, "do_query_expansion": False},
    ),
    "no prefixes, no skiplist": (
        [], {"query_prefix": "", "document_prefix": "", "skiplist_words": []},
    ),
}  # fmt: skip


class TestVectors:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_equal_sentence_transformers(self, encoder, tmp_path, name):
        """And sentence-transformers gives them for what we save, which we read as what we saved."""
        more, settings = FOLDERS[name]
        (tmp_path / "theirs").mkdir()
        folder = made(encoder, tmp_path / "theirs", *more, **settings)
        theirs, ours = theirs_of(folder), MultiVectorEmbedder.from_pretrained(folder)
        want, got = vectors_of(theirs), vectors_of(ours)
        for some, others in zip(got, want, strict=True):
            close(some, others)
        assert ours.dimension == theirs.get_embedding_dimension() == got[0][0].shape[1]
        np.testing.assert_allclose(
            ours.similarity(*got), theirs.similarity(*want), rtol=1e-5, atol=1e-4
        )
        ours.save(tmp_path / "ours")
        for some, others in zip(vectors_of(theirs_of(tmp_path / "ours")), want, strict=True):
            close(some, others)
        read, wrote = read_colbert(tmp_path / "ours"), read_colbert(folder)
        for a, b in zip(read.sentence.modules, wrote.sentence.modules, strict=True):
            jax.tree.map(np.testing.assert_array_equal, vars(a), vars(b))
        assert {**vars(read), "sentence": 0} == {**vars(wrote), "sentence": 0}

    def test_packing_and_devices_do_not_change_them(self, encoder, tmp_path):
        folder = made(encoder, tmp_path)
        want = vectors_of(MultiVectorEmbedder.from_pretrained(folder))
        mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
        ours = MultiVectorEmbedder.from_pretrained(folder, mesh=mesh)
        texts = [*QUERIES, *QUERIES[:1]]
        got = ours.encode_query(texts, batch_tokens=24, show_progress_bar=False)
        close(got, [*want[0], want[0][0]])
        close([ours.encode_document(DOCUMENTS[1])], want[1][1:2])

    def test_lengths_and_prompts(self, encoder, tmp_path):
        folder = made(encoder, tmp_path, do_query_expansion=False, skiplist_words=[])
        ours = MultiVectorEmbedder.from_pretrained(folder, query_length=10, document_length=100)
        assert len(ours.encode_query(QUERIES[1])) == 10
        assert len(ours.encode_document(DOCUMENTS[2])) == 100
        want = ours.encode_query(["the RASH: no fever?"])
        close(ours.encode_query(["no fever?"], prompt="the RASH: "), want)
        with pytest.raises(ValueError, match="prompt_name: expected query, document, got 'title'"):
            ours.encode_query("a", prompt_name="title")
        with pytest.raises(TypeError, match="inputs: expected texts, number 2 is a tuple"):
            ours.encode_query(["a", ("a", "b")])
        assert ours.encode_document([]) == []


class TestScores:
    def test_formula(self):
        """The sum over a query's vectors of the largest product, also if all are negative."""
        rng = np.random.default_rng(0)
        sizes = ([3, 9, 1, 0, 4000, 200], [5, 1, 8000, 0, 300, 7])
        queries, documents = ([rng.normal(size=(n, 4)).astype("f") for n in of] for of in sizes)
        queries[2] = np.abs(queries[2])
        documents[1] = -np.abs(documents[1])
        want = np.zeros((6, 6))
        for i, query in enumerate(map(torch.from_numpy, queries)):
            for j, document in enumerate(map(torch.from_numpy, documents)):
                if len(query) and len(document):
                    want[i, j] = (query @ document.T).max(dim=1).values.double().sum()
        assert want[2, 1] < 0 and not want[3].any() and not want[:, 3].any()
        np.testing.assert_allclose(max_sim(queries, documents), want, rtol=1e-5, atol=1e-5)

    def test_similarity_and_rank(self, encoder, tmp_path):
        folder = made(encoder, tmp_path)
        ours, theirs = MultiVectorEmbedder.from_pretrained(folder), theirs_of(folder)
        queries, documents = vectors_of(ours)
        want = theirs.similarity_pairwise(queries, documents[:4]).numpy()
        np.testing.assert_allclose(
            ours.similarity_pairwise(queries, documents[:4]), want, rtol=1e-5, atol=1e-5
        )
        scores = theirs.similarity(queries[3], documents)[0].numpy()
        found = ours.rank(QUERIES[3], DOCUMENTS, top_k=3, return_documents=True)
        order = np.argsort(-scores)[:3]
        assert [(x["corpus_id"], x["text"]) for x in found] == [(i, DOCUMENTS[i]) for i in order]
        np.testing.assert_allclose([x["score"] for x in found], scores[order], rtol=1e-5)
        with pytest.raises(ValueError, match="expected as many, got 4 and 5"):
            ours.similarity_pairwise(queries, documents)
        with pytest.raises(ValueError, match=r"documents: expected arrays .* got shapes \(\)"):
            ours.similarity(queries, documents[0][0])


SETTINGS = "config_sentence_transformers.json"
REFUSED = {
    "a pooling": (
        lambda f: edit_type(f, "sentence_transformers.models.Pooling"),
        "Pooling makes a model of one vector per text, which Embedder loads",
    ),
    "another module": (
        lambda f: edit_type(f, "sentence_transformers.models.LayerNorm"),
        "LayerNorm is not supported in a multi-vector model; supported are Transformer, Dense",
    ),
    "no Dense": (
        lambda f: edit_type(f, "sentence_transformers.models.Dropout"),
        "expected a Dense after the Transformer, found none; PyLate would add one with random",
    ),
    "no modules": (
        lambda f: (f / "modules.json").unlink(),
        "expected a multi-vector model with modules.json, found none; train one with",
    ),
    "another class": (
        lambda f: edit(f / SETTINGS, model_type="SentenceTransformer"),
        "model_type: expected ColBERT, got 'SentenceTransformer', which Embedder loads",
    ),
    "a similarity": (
        lambda f: edit(f / SETTINGS, similarity_fn_name="XTR"),
        "similarity_fn_name: expected MaxSim, maxsim, cosine, got 'XTR'",
    ),
    "a length": (
        lambda f: edit(f / SETTINGS, query_length="32"),
        "query_length: expected a number, got '32'",
    ),
    "a long document": (
        lambda f: edit(f / SETTINGS, document_length=129),
        "document_length: expected a whole number from 4 to 128, got 129",
    ),
    "a flag": (
        lambda f: edit(f / SETTINGS, do_query_expansion=1),
        "do_query_expansion: expected true or false, got 1",
    ),
    "a cut": (
        lambda f: edit(f / SETTINGS, truncate_dim=8),
        "truncate_dim is not supported in a multi-vector model",
    ),
    "a skiplist": (
        lambda f: edit(f / SETTINGS, skiplist_words=["a", 1]),
        "skiplist_words: expected a list of texts, got a list of 2",
    ),
    "a prefix that is no token": (
        lambda f: edit(f / SETTINGS, query_prefix="[X] "),
        r"tokenizer: expected '\[X\] ', the query_prefix, as one token, found none",
    ),
    "a Dense that does not fit": (
        lambda f: edit_type(f, "pylate.models.Dense.Dense", "2_Dense"),
        r"module 1 .Dense.: expected 32 features, as come in, got 12",
    ),
}  # fmt: skip


def edit_type(folder, kind, path="1_Dense"):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1] |= {"type": kind, "path": path}
    write(folder / "modules.json", modules[:2])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(encoder, tmp_path, name):
    folder = made(encoder, tmp_path, {"in_features": 12, "out_features": 12})
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        MultiVectorEmbedder.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_embedder_names_this_class(encoder, tmp_path):
    folder = made(encoder, tmp_path)
    with pytest.raises(ValueError, match="got 'ColBERT', which MultiVectorEmbedder loads"):
        Embedder.from_pretrained(folder)
    (folder / SETTINGS).unlink()  # early releases of PyLate do not name the class
    with pytest.raises(ValueError, match="'pylate.models.Dense.Dense' makes a multi-vector model"):
        Embedder.from_pretrained(folder)


NEGATIVES = ["a cough", "seen: no rash, no pain", "itching", "a rash, and seen"]


@pytest.mark.parametrize(
    "loss, attend, chunk, devices",
    [("mnrl", False, 2, 2), ("mnrl", True, 64, 1), ("kl", False, 2, 8)],
)
def test_loss_and_gradient_equal_torch(encoder, tmp_path, loss, attend, chunk, devices):
    """The whole batch at once in torch, padded; here in chunks, packed, over devices."""
    negatives = NEGATIVES if loss == "kl" else NEGATIVES[:2]
    folder = made(encoder, tmp_path, attend_to_expansion_tokens=attend)
    theirs = theirs_of(folder)
    sides = []
    for task, texts in (("query", QUERIES), ("document", DOCUMENTS[:4] + negatives)):
        inputs = theirs.preprocess(texts, prompt=theirs.prompts[task], task=task)
        found = theirs(inputs, task=task)
        sides.append((found["token_embeddings"], found["attention_mask"].bool()))
    (queries, _), (documents, kept) = sides
    products = torch.einsum("qle,nme->qnlm", queries, documents)
    products = products.masked_fill(~kept[None, :, None], -torch.inf)
    scores = products.amax(-1).sum(-1) / 0.5
    targets = None
    if loss == "kl":  # the documents of each query are in its row
        targets = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
        own = torch.stack([scores[:, :4].diagonal(), scores[:, 4:].diagonal()], dim=-1)
        log_softmax = torch.nn.functional.log_softmax
        pair = log_softmax(own, dim=-1), log_softmax(torch.tensor(targets) / 0.5, dim=-1)
        want = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(*pair) * 0.5**2
    else:
        want = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    want.backward()

    config = RetrievalConfig(
        "", str(folder), multi_vector=True, chunk=chunk, devices=devices, query_length=24,
        max_length=40, temperature=0.5, loss=loss, teacher="t" if loss == "kl" else None,
    )  # fmt: skip
    config.validate()
    model, tokenizer = (
        ModernBertModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ours = MultiVectorEncoder(config, model, tokenizer, folder)
    columns = [ours.tokens(QUERIES, True)]
    columns += [ours.tokens(texts, False) for texts in (DOCUMENTS[:4], negatives)]
    params = jax.device_put(ours.params, ours.everywhere)
    value, grads = ours.gradient(params, columns, targets)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    pairs = {p: (to_hf(p, grads[p]), w) for p, w in theirs[0].auto_model.named_parameters()}
    pairs["Dense"] = (grads["sentence.0.weight"], theirs[1].linear.weight)
    for got, weight in pairs.values():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("prompts", [{}, {"query": "find this: ", "document": "pain: "}])
def test_served(encoder, tmp_path, prompts):
    """/rerank gives the scores of `rank`, and counts and limits the tokens that are computed."""
    folder = made(encoder, tmp_path, prompts=prompts)
    runner, reranker = serving.load(serving.parser().parse_args([str(folder)]))
    assert isinstance(runner, MultiVectorEmbedder) and reranker is None
    endpoints, missing = endpoints_of(runner, "tiny", 128)
    documents = [text for text in DOCUMENTS if len(text) < 50]
    service = Service(endpoints, missing, Limits(128, 4000))
    try:
        client = TestClient(service.app, base_url="http://127.0.0.1")
        for query in ("no fever?", "a RASH today", ""):
            body = {"query": query, "documents": documents}
            answer = client.post("/rerank", json=body).json()
            want = runner.rank(query, documents)
            assert [x["index"] for x in answer["results"]] == [x["corpus_id"] for x in want]
            got = [x["relevance_score"] for x in answer["results"]]
            np.testing.assert_allclose(got, [x["score"] for x in want], atol=1e-5)
            texts = [(query, True), *((text, False) for text in documents)]
            ids = [
                runner.colbert.token_ids(runner.tokenizer, [runner.prompt(q) + text], query=q)[0]
                for text, q in texts
            ]
            assert answer["usage"]["total_tokens"] == sum(text.attended for text in ids)
            work = endpoints[0].read(body)
            assert endpoints[0].count(work)[0] == [len(text.ids) for text in ids]
        long = {"query": QUERIES[1], "documents": DOCUMENTS}
        for field, body in (("query", long), ("documents", long | {"query": "a"})):
            response = client.post("/rerank", json=body)
            expected = {"query": 23, "documents": 39}[field]
            assert response.status_code == 413
            error = response.json()["error"]["message"]
            assert f"{field}: expected at most {expected} tokens per text" in error
        answer = client.post("/rerank", json=long | {"truncate": True}).json()
        want = runner.rank(QUERIES[1], DOCUMENTS)
        got = [x["relevance_score"] for x in answer["results"]]
        np.testing.assert_allclose(got, [x["score"] for x in want], atol=1e-5)
        refused = client.post("/v1/embeddings", json={"input": "a"})
        assert refused.status_code == 404
        expected = "/v1/embeddings: this model (a vector per token) answers /rerank"
        assert refused.json()["error"]["message"] == expected
    finally:
        service.close()
    endpoints[0].warm_up([100])
    for option in (["--task", "embed"], ["--exported"]):
        with pytest.raises(ValueError, match=f"{option[0][2:]}: expected none for a multi-vector"):
            serving.load(serving.parser().parse_args([str(folder), *option]))


WORDS = ("fever", "cough", "rash", "arm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs about one of four words, and a search."""
    folder = tmp_path_factory.mktemp("data")
    lines = lambda name, records: (folder / name).write_text(  # noqa: E731
        "".join(json.dumps(r) + "\n" for r in records)
    )
    texts = [f"{WORDS[i % 4]} {'seen today, ' * (i % 3)}{WORDS[i % 4]}!" for i in range(24)]
    lines("train.jsonl", [
        {"query": f"no {WORDS[i % 4]}?", "positive": text} | ({"negative": "pain"} if i % 2 else {})
        for i, text in enumerate(texts)
    ])  # fmt: skip
    lines("corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    lines("queries.jsonl", [{"_id": f"q{i}", "text": f"a {w}"} for i, w in enumerate(WORDS)])
    qrels = [f"q{i % 4}\td{i}\t1\n" for i in range(24)]
    (folder / "qrels.tsv").write_text("".join(qrels))
    return folder


def trained(data, start, out, *more):
    args = ["finetune", "--task", "retrieval", "--data", str(data), "--model", str(start), "--out",
            str(out), "--multi-vector", "--query-length", "12", "--max-length", "40",
            "--batch-size", "8", "--chunk", "8", "--learning-rate", "3e-3", *more]  # fmt: skip
    assert cli.main(args) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_training(plain, data, tmp_path):
    """From an encoder to a model that sentence-transformers reads, and from that one on."""
    result = trained(data, plain, tmp_path / "a", "--embedding-size", "16", "--epochs", "4")
    assert np.mean(result["losses"][-3:]) < 0.8 * np.mean(result["losses"][:3])
    assert result["after"]["ndcg@10"] > result["before"]["ndcg@10"]
    folder = tmp_path / "a" / "model"
    ours, theirs = MultiVectorEmbedder.from_pretrained(folder), theirs_of(folder)
    for some, others in zip(vectors_of(ours), vectors_of(theirs), strict=True):
        close(some, others)
    assert ours.dimension == 16 and len(ours.encode_query("a rash")) == 12
    card = (folder / "README.md").read_text()
    assert "- ColBERT\n" in card and "MultiVectorEmbedder.from_pretrained(" in card
    again = trained(data, folder, tmp_path / "b", "--epochs", "1")
    for name, score in result["after"].items():
        assert again["before"][name] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "cosent"}, "loss: expected mnrl or kl with --multi-vector, got cosent"),
        ({"pooling": "cls"}, "pooling: expected mean with --multi-vector, got cls"),
        ({"matryoshka_dims": (8, 4)}, "matryoshka_dims: expected none with .*, got 8 4"),
        ({"embedding_size": 0}, "embedding_size: expected at least 1, got 0"),
        (
            {"multi_vector": False, "query_length": 8},
            "query_length: expected 32 without --multi-vector, got 8",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig("d", "m", **{"multi_vector": True, **changes}).validate()
