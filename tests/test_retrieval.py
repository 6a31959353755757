"""The bi-encoder against torch, its cached gradient, its scores, and sentence-transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from modernbert_jax import ModernBertModel
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.tokenizer import AutoTokenizer
from modernbert_jax.weights import to_hf
from train import cli
from train.corpora.build.bpe import train_bpe
from train.finetune.retrieval.config import RetrievalConfig
from train.finetune.retrieval.data import read_judged
from train.finetune.retrieval.losses import mnrl
from train.finetune.retrieval.model import Encoder
from train.finetune.retrieval.run import train
from train.finetune.retrieval.scores import retrieval_scores

TOPICS = ("fever cough chills", "fracture cast bone", "rash itch cream", "insulin sugar feet")


def sentence(rng, topic):
    words = TOPICS[topic].split()
    return " ".join(rng.choice([*words, "the", "patient", "has", "today"], rng.integers(4, 14)))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = [" ".join(TOPICS) + " the patient has today"] * 50
    tokenizer = train_bpe(texts, 320)
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id, bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("start")
    transformers.ModernBertModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 48  # less than the model's 64 and the default of 512
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = lambda name, records: (folder / name).write_text(  # noqa: E731
        "".join(json.dumps(r) + "\n" for r in records)
    )
    topics = rng.integers(0, 4, 64)
    lines("train.jsonl", [
        {"query": sentence(rng, t), "positive": sentence(rng, t)}
        | ({"negative": sentence(rng, (t + 1) % 4)} if i % 2 else {})
        for i, t in enumerate(topics)
    ])  # fmt: skip
    lines("corpus.jsonl", [{"_id": f"d{i}", "text": sentence(rng, i % 4)} for i in range(20)])
    lines("queries.jsonl", [{"_id": f"q{i}", "text": sentence(rng, i % 4)} for i in range(8)])
    qrels = [f"q{q}\td{d}\t1" for q in range(8) for d in range(20) if q % 4 == d % 4]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(qrels) + "\n")
    return folder


def config_of(data, start, out="", **changes):
    config = RetrievalConfig(
        str(data), str(start), str(out), batch_size=16, chunk=64, max_length=48
    )
    return dataclasses.replace(config, **changes)


def texts_of(start, count=12):
    rng = np.random.default_rng(1)
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts = [sentence(rng, i % 4) for i in range(count)]
    return texts, [np.asarray(i, np.int32) for i in tokenizer(texts)["input_ids"]]


@pytest.mark.parametrize(
    "chunk, devices", [(64, 1), pytest.param(3, 1, marks=pytest.mark.matrix), (2, 4)]
)
def test_loss_and_gradient_equal_torch(start, data, chunk, devices):
    """The whole batch at once in torch, padded; here in chunks, packed, over devices."""
    import torch
    import transformers

    texts, ids = texts_of(start)
    theirs = transformers.AutoModel.from_pretrained(start)
    inputs = transformers.AutoTokenizer.from_pretrained(start)(
        texts, padding=True, return_tensors="pt"
    )
    hidden = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    scores = vectors[:5] @ vectors[5:].T / 0.05
    want = torch.nn.functional.cross_entropy(scores, torch.arange(5))
    want.backward()

    model = ModernBertModel.from_pretrained(start)
    encoder = Encoder(config_of(data, start, chunk=chunk, devices=devices), model.config)
    params = jax.device_put(flatten(model), encoder.everywhere)
    np.testing.assert_allclose(encoder.encode(params, ids), vectors.detach(), atol=1e-5)
    loss, grads = encoder.gradient(params, [ids[:5], ids[5:]])
    np.testing.assert_allclose(loss, want.item(), atol=1e-5)
    for path, value in theirs.named_parameters():
        got, expected = to_hf(path, grads[path]), value.grad.numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max() + 1e-6)


def test_scores_by_another_road():
    """nDCG against scikit-learn, recall and MRR against sets."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(7, 8)), rng.normal(size=(150, 8))
    gains = [
        {int(d): float(rng.integers(1, 4)) for d in rng.choice(150, rng.integers(1, 15), False)}
        for _ in range(7)
    ]
    got = retrieval_scores(queries, documents, gains)
    scores = queries @ documents.T
    truth = np.zeros_like(scores)
    for q, row in enumerate(gains):
        truth[q, list(row)] = list(row.values())
    assert got["ndcg@10"] == pytest.approx(metrics.ndcg_score(truth, scores, k=10), abs=1e-12)
    top = np.argsort(-scores, axis=1)
    recall = lambda k: np.mean([len(set(t[:k]) & set(g)) / len(g) for t, g in zip(top, gains)])  # noqa: B905, E731
    assert got["recall@10"] == pytest.approx(recall(10))
    assert got["recall@100"] == pytest.approx(recall(100))
    ranks = [min(list(t).index(d) for d in g) + 1 for t, g in zip(top, gains, strict=True)]
    assert got["mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))


def test_in_batch_negatives_by_hand():
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 0, 1, 2]]  # two queries, their own, one more
    want = -np.log(np.exp(2.0) / (np.exp(2.0) + 2))
    np.testing.assert_allclose(mnrl([vectors[:2], vectors[2:]], temperature=0.5), want, rtol=1e-6)


def test_trains_and_sentence_transformers_gives_the_same_vectors(start, data, tmp_path, capsys):
    code = cli.main(
        ["finetune", "--task", "retrieval", "--data", str(data), "--model", str(start), "--out",
         str(tmp_path), "--batch-size", "16", "--chunk", "8", "--epochs", "6",
         "--learning-rate", "2e-3"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["after"]["ndcg@10"] > result["before"]["ndcg@10"] + 0.05
    assert result["losses"][-1] < result["losses"][0] - 0.3
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts, ids = texts_of(start)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert theirs.max_seq_length == 48
    card = (tmp_path / "model/README.md").read_text()
    assert f"| {result['after']['ndcg@10']:.4f} |" in card and "- Examples per step: 16\n" in card
    model = ModernBertModel.from_pretrained(tmp_path / "model")
    encoder = Encoder(config_of(data, start), model.config)
    ours = encoder.encode(flatten(model), ids)
    np.testing.assert_allclose(ours, theirs.encode(texts), atol=1e-5)


def test_judgments_with_and_without_a_header(data, tmp_path):
    for file in data.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    _, _, rows = (data / "qrels.tsv").read_text().partition("\n")
    (tmp_path / "qrels.tsv").write_text(rows)
    assert read_judged(tmp_path) == read_judged(data)


@pytest.mark.parametrize(
    "name, content, expect",
    [
        ("train.jsonl", '{"query": "a"}\n', "line 1: expected JSON with query, positive"),
        (
            "train.jsonl",
            '{"query": "a", "positive": "b", "negative": 3}\n',
            "line 1: expected .* negative is not text",
        ),
        ("train.jsonl", "", "at least 2 examples"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tnone\t1\n", "line 2: expected query-id"),
        ("qrels.tsv", "q0\tnone\t1\nq0\td0\t1\n", "line 1: expected query-id"),
        ("queries.jsonl", '{"_id": "q0", "text": "a"}\n' * 2, "each _id once, got one twice"),
        ("corpus.jsonl", "not json\n", "line 1: not valid JSON"),
    ],
)
def test_bad_files_are_one_line(start, data, tmp_path, name, content, expect):
    for file in data.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expect):
        train(config_of(tmp_path, start, tmp_path / "out"))
