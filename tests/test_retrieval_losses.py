"""Each loss of `finetune --task retrieval` against sentence-transformers, and what goes with it."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from modernbert_jax import Embedder, ModernBertModel
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.inference.sentence import Normalize, Pooling, SentenceModel, write_sentence
from modernbert_jax.tokenizer import AutoTokenizer
from modernbert_jax.weights import to_hf
from train import cli
from train.corpora.build.bpe import train_bpe
from train.finetune.retrieval import teacher
from train.finetune.retrieval.config import RetrievalConfig
from train.finetune.retrieval.data import COLUMNS, SCORING, TRAINING, Examples, read_examples
from train.finetune.retrieval.losses import loss_of
from train.finetune.retrieval.model import Encoder
from train.finetune.retrieval.run import train
from train.finetune.retrieval.scores import pair_scores, read_measures
from train.finetune.retrieval.teacher import teach

WORDS = (
    "fever cough chills fracture cast bone rash itch cream insulin sugar the patient has".split()
)
D = 32
# (the flags, the number of columns, what the targets are)
LOSSES = {
    "mnrl": ({"loss": "mnrl"}, 4, None),
    "cosent": ({"loss": "cosent"}, 2, "scores"),
    "mse": ({"loss": "mse"}, 1, "vectors"),
    "margin-mse": ({"loss": "margin-mse"}, 3, "ranks"),
    "kl": ({"loss": "kl", "temperature": 0.5}, 4, "ranks"),
}
MATRYOSHKA = {"matryoshka_dims": (8, 32, 16), "matryoshka_weights": (0.25, 1.0, 0.5)}


CASES = [
    pytest.param(flags | more, columns, kind, id=name + suffix)
    for name, (flags, columns, kind) in LOSSES.items()
    for suffix, more in (("", {}), ("-matryoshka", MATRYOSHKA))
]


def texts_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(count)]


def targets_of(kind, count, columns, seed=1):
    rng = np.random.default_rng(seed)
    made = {
        "scores": lambda: rng.integers(0, 4, count) / 4,  # some are equal
        "vectors": lambda: rng.normal(size=(count, D)),
        "ranks": lambda: rng.normal(size=(count, columns - 1)),
    }
    return None if kind is None else made[kind]().astype(np.float32)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A seeded encoder, pooled by the mean and scaled to length 1, for both libraries."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe([" ".join(WORDS)] * 50, 320)
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=320, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id, bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("start")
    transformers.ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sentence(folder, SentenceModel((Pooling(), Normalize())), D, 48)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, start):
    """Seeded models: "vectors" (CLS, not scaled), "narrow", "ranker", and one of 3 labels."""
    import torch
    import transformers

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teachers")
    config = transformers.AutoConfig.from_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(start)
    models = {
        "vectors": transformers.ModernBertModel(config),
        "narrow": transformers.ModernBertModel(copied(config, hidden_size=16)),
        "ranker": transformers.ModernBertForSequenceClassification(copied(config, num_labels=1)),
        "labels": transformers.ModernBertForSequenceClassification(copied(config, num_labels=3)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    sentence = SentenceModel((Pooling(("cls",)),), prompts={"query": "fever ", "document": ""})
    write_sentence(folder / "vectors", sentence, D, 48)
    return folder


def copied(config, **changes):
    return type(config)(**config.to_dict() | changes)


def config_of(start, data="", out="", **changes):
    config = RetrievalConfig(
        str(data), str(start), str(out), batch_size=16, chunk=64, max_length=48
    )
    return dataclasses.replace(config, **changes)


def theirs(model, flags):
    """The loss of sentence-transformers."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    made = {
        "mnrl": losses.MultipleNegativesRankingLoss,
        "cosent": losses.CoSENTLoss,
        "mse": losses.MSELoss,
        "margin-mse": losses.MarginMSELoss,
        "kl": functools.partial(losses.DistillKLDivLoss, temperature=flags.get("temperature", 1.0)),
    }
    loss = made[flags["loss"]](model)
    if "matryoshka_dims" in flags:
        dims, weights = flags["matryoshka_dims"], flags["matryoshka_weights"]
        loss = losses.MatryoshkaLoss(model, loss, list(dims), list(weights))
    return loss


@pytest.fixture(scope="module")
def both(start):
    """(their model, our encoder on 8 devices in chunks of 2 texts each, its parameters)."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = ModernBertModel.from_pretrained(start)
    encoder = Encoder(config_of(start, chunk=2, devices=8), model.config)
    params = jax.device_put(flatten(model), encoder.everywhere)
    return sentence_transformers.SentenceTransformer(str(start), device="cpu"), encoder, params


@pytest.mark.parametrize("flags, columns, kind", CASES)
def test_value_and_gradient_equal_sentence_transformers(both, start, flags, columns, kind):
    """All texts at once in torch, padded; here packed, in chunks, over 8 devices."""
    import torch

    model, encoder, params = both
    count = 7
    texts = texts_of(count * columns)
    split = [texts[c * count : (c + 1) * count] for c in range(columns)]
    targets = targets_of(kind, count, columns)
    labels = None if targets is None else torch.tensor(targets)
    model.zero_grad()
    want = theirs(model, flags)([model.preprocess(column) for column in split], labels)
    want.backward()

    encoder.loss = jax.jit(jax.value_and_grad(loss_of(config_of(start, **flags))))
    tokenizer = AutoTokenizer.from_pretrained(start)
    ids = [[np.asarray(i, np.int32) for i in tokenizer(column)["input_ids"]] for column in split]
    loss, grads = encoder.gradient(params, ids, targets)
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    theirs_by_path = dict(model[0].auto_model.named_parameters())
    assert len(theirs_by_path) == len(grads)
    largest = max(p.grad.abs().max().item() for p in theirs_by_path.values())
    assert largest > 1e-3
    for path, value in theirs_by_path.items():
        got = to_hf(path, grads[path])
        np.testing.assert_allclose(got, value.grad.numpy(), rtol=0, atol=1e-5 * largest)


def write(folder, name, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def pairs_of(count, seed=2):
    texts, rng = texts_of(2 * count, seed), np.random.default_rng(seed)
    return [
        {"sentence1": a, "sentence2": b, "score": int(rng.integers(0, 5)) / 4}
        for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files for every loss, by its name, each with the files for scores."""
    folder = tmp_path_factory.mktemp("data")
    documents, queries = texts_of(20, seed=3), texts_of(4, seed=4)
    for loss in LOSSES:
        write(folder / loss, "pairs.jsonl", pairs_of(12))
        write(
            folder / loss,
            "corpus.jsonl",
            [{"_id": f"d{i}", "text": t} for i, t in enumerate(documents)],
        )
        write(
            folder / loss,
            "queries.jsonl",
            [{"_id": f"q{i}", "text": t} for i, t in enumerate(queries)],
        )
        rows = "".join(f"q{i % 4}\td{i}\t{1 + i % 2}\n" for i in range(8))
        (folder / loss / "qrels.tsv").write_text(rows)
    texts = texts_of(64, seed=5)
    names = ("query", "positive", "negative", "negative_1")
    rows = [dict(zip(names, texts[i : i + 4], strict=True)) for i in range(0, 64, 4)]
    for loss in ("margin-mse", "kl"):
        write(folder / loss, "train.jsonl", rows)
    few = [{k: v for k, v in r.items() if i % 2 or k != "negative_1"} for i, r in enumerate(rows)]
    write(folder / "mnrl", "train.jsonl", few)
    write(folder / "mse", "train.jsonl", [{"text": text} for text in texts[:16]])
    write(folder / "cosent", "train.jsonl", pairs_of(16, seed=6))
    return folder


def test_scores_of_each_dimension_equal_sentence_transformers(both, start, data):
    """nDCG, MRR and recall of a corpus and the correlations of pairs, at each dimension."""
    from sentence_transformers.sentence_transformer import evaluation

    model, encoder, params = both
    tokenizer = AutoTokenizer.from_pretrained(start)
    encode = lambda texts: encoder.encode(  # noqa: E731
        params, [np.asarray(i, np.int32) for i in tokenizer(texts)["input_ids"]]
    )
    measures = read_measures(data / "mse")
    got = measures.score(encode, (16, 32, 8))
    queries, documents, relevant = measures.judged
    assert len(got) == 3 * (4 + 2) and not any("dim_32" in name for name in got)
    for prefix, dim in (("", None), ("dim_16_", 16), ("dim_8_", 8)):
        pairs = evaluation.EmbeddingSimilarityEvaluator(
            *zip(*measures.pairs.texts, strict=True),
            measures.pairs.targets.tolist(),
            truncate_dim=dim,
        )(model)
        assert got[f"{prefix}spearman"] == pytest.approx(pairs["spearman_cosine"], abs=1e-6)
        assert got[f"{prefix}pearson"] == pytest.approx(pairs["pearson_cosine"], abs=1e-6)
        ranked = evaluation.InformationRetrievalEvaluator(
            {str(i): text for i, text in enumerate(queries)},
            {str(i): text for i, text in enumerate(documents)},
            {str(i): {str(d) for d in gains} for i, gains in enumerate(relevant)},
            truncate_dim=dim,
        )(model)
        assert got[f"{prefix}mrr@10"] == pytest.approx(ranked["cosine_mrr@10"], abs=1e-6)
        assert got[f"{prefix}recall@10"] == pytest.approx(ranked["cosine_recall@10"], abs=1e-6)


def test_ranks_of_equal_values_are_shared():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    first, second, scores = (
        rng.integers(-2, 3, (30, 3)),
        rng.integers(-2, 3, (30, 3)),
        rng.integers(0, 3, 30),
    )
    want = spearmanr(np.sum(first * second, axis=1), scores).statistic
    assert pair_scores(first, second, scores)["spearman"] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    "loss, truncate_dim",
    [pytest.param("mnrl", None, marks=pytest.mark.slow), ("cosent", 8)],
)
def test_trains_and_sentence_transformers_gives_the_same_vectors(
    start, data, tmp_path, capsys, loss, truncate_dim
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    code = cli.main(
        ["finetune", "--task", "retrieval", "--loss", loss, "--data", str(data / loss), "--model",
         str(start), "--out", str(tmp_path), "--batch-size", "8", "--chunk", "8", "--epochs", "3",
         "--learning-rate", "2e-3", "--matryoshka-dims", "32", "8", "--max-length", "48",
         "--pooling", "cls", *(["--truncate-dim", str(truncate_dim)] if truncate_dim else [])]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["losses"][-1] < result["losses"][0]
    assert {"spearman", "dim_8_spearman", "ndcg@10", "dim_8_ndcg@10"} <= result["after"].keys()
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    settings = json.loads((tmp_path / "model/config_sentence_transformers.json").read_text())
    assert settings.get("truncate_dim") == truncate_dim
    assert ("truncate_dim" in settings) == (truncate_dim is not None)
    ours = Embedder.from_pretrained(tmp_path / "model")
    texts = texts_of(5)
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    assert theirs.get_embedding_dimension() == ours.dimension == (truncate_dim or D)
    card = (tmp_path / "model/README.md").read_text()
    assert "also of the first 32, 8 dimensions (MatryoshkaLoss)" in card
    assert f"| dim_8_spearman | {result['before']['dim_8_spearman']:.4f} |" in card


def test_the_lines_that_help_shows_are_read(tmp_path, capsys):
    assert TRAINING.keys() == COLUMNS.keys() == LOSSES.keys()
    cli.main(["finetune", "--task", "retrieval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for loss, (use, line) in TRAINING.items():
        assert f"{loss} {use} {line}" in shown
        (tmp_path / "train.jsonl").write_text(f"{line}\n{line.replace('0.9', '0.1')}\n")
        want = [value for value in json.loads(line).values() if isinstance(value, str)]
        assert read_examples(tmp_path / "train.jsonl", loss).texts == [want, want]
    for use, files in SCORING.items():
        assert use in shown
        for file, line in files.items():
            assert f"{file} {' '.join(line.split())}" in shown
            (tmp_path / file).write_text(
                f"{line}\n{line.replace('0.9', '0.1') if file == 'pairs.jsonl' else ''}"
            )
    measures = read_measures(tmp_path)
    assert len(measures.pairs.texts) == 2 and measures.judged[2] == [{0: 1.0}]


def test_negatives_are_in_the_order_of_their_numbers(tmp_path):
    line = {"query": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative": "a"}
    write(
        tmp_path,
        "train.jsonl",
        [line | {"negative_3": None, "id": 7}, {"query": "q", "positive": "p"}],
    )
    assert read_examples(tmp_path / "train.jsonl", "mnrl").texts == [[*"qpabc"], [*"qp"]]


@pytest.mark.parametrize(
    "loss, lines, expect",
    [
        ("cosent", [{"sentence1": "a", "sentence2": "b"}] * 2, "line 1: score: expected a number"),
        (
            "cosent",
            [{"sentence1": "a", "sentence2": "b", "score": "0.5"}] * 2,
            "line 1: score: expected a number",
        ),
        (
            "cosent",
            [{"sentence1": "a", "sentence2": "b", "score": 1}] * 2,
            "expected different scores",
        ),
        ("cosent", [{"query": "a", "positive": "b"}], "expected JSON with sentence1, sentence2"),
        ("mse", [{"query": "a"}], "line 1: expected JSON with text"),
        ("mse", [{"text": "a"}], "expected at least 2 examples, got 1"),
        (
            "margin-mse",
            [{"query": "a", "positive": "b"}] * 2,
            "line 1: expected 1 in columns negative, negative_1, ..., or more, got 0",
        ),
        (
            "margin-mse",
            [{"query": "a", "positive": "b", "negative": "c"}, {"query": "a", "positive": "b"}],
            "line 2: expected 1 in columns negative, .*, as in the first line, got 0",
        ),
        (
            "kl",
            [{"query": "a", "positive": "b", "negative": "c"}, {"query": "a", "positive": "b"}],
            "line 2: expected 1 in columns negative, .*, as in the first line, got 0",
        ),
        (
            "mnrl",
            [{"query": "a", "positive": "b", "negatives": ["c"]}] * 2,
            "line 1: .* negatives is not text",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, loss, lines, expect):
    write(tmp_path, "train.jsonl", lines)
    with pytest.raises(ValueError, match=expect):
        read_examples(tmp_path / "train.jsonl", loss)


@pytest.mark.parametrize(
    "flags, expect",
    [
        (
            {"loss": "mse", "teacher": "t", "temperature": 0.1},
            "temperature: expected none with --loss mse",
        ),
        ({"batch_size": 1, "loss": "cosent"}, "batch_size: expected at least 2 with --loss cosent"),
        ({"matryoshka_dims": (8, 8)}, "matryoshka_dims: expected different numbers .* got 8 8"),
        ({"matryoshka_dims": (0,)}, "matryoshka_dims: expected different numbers from 1 on"),
        ({"matryoshka_dims": (64, 8)}, "matryoshka_dims: expected at most 32, .* got 64 8"),
        ({"loss": "mse"}, "teacher: expected a model with --loss mse, got none"),
        ({"loss": "kl"}, "teacher: expected a model with --loss kl, got none"),
        (
            {"loss": "kl", "teacher": "t", "temperature": 0.0},
            "temperature: expected above 0, got 0.0",
        ),
        ({"teacher": "t"}, "teacher: expected none with --loss mnrl, got t"),
        ({"teacher_backend": "torch"}, "teacher_backend: expected none without --teacher"),
        (
            {"loss": "mse", "teacher": "narrow"},
            "teacher: expected vectors of 32 numbers, .* got 16",
        ),
        ({"loss": "mse", "teacher": "ranker"}, "ranker is a cross-encoder, which has no vectors"),
        (
            {"loss": "margin-mse", "teacher": "labels"},
            "teacher: expected a cross-encoder with 1 label, got 3",
        ),
        ({"matryoshka_weights": (1.0,)}, "matryoshka_weights: expected one for each of the 0"),
        ({"truncate_dim": 8}, r"truncate_dim: expected one of the matryoshka_dims \(none\), got 8"),
        (
            {"matryoshka_dims": (8, 4), "matryoshka_weights": (1.0, 0.0)},
            "matryoshka_weights: expected above 0, got 1.0 0.0",
        ),
    ],
)
def test_unfit_flags_are_refused_before_tokenization(
    start, teachers, data, tmp_path, monkeypatch, flags, expect
):
    if flags.get("teacher", "t") != "t":
        flags = flags | {"teacher": str(teachers / flags["teacher"])}

    def fail(*args, **options):
        raise AssertionError("tokenized")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", fail)
    loss = flags.get("loss", "mnrl")
    with pytest.raises(ValueError, match=expect):
        train(config_of(start, data / loss, tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "loss, name", [("mse", "vectors"), ("margin-mse", "vectors"), ("kl", "ranker")]
)
def test_a_teacher_answers_once(start, teachers, data, tmp_path, loss, name):
    """Targets are those of sentence-transformers from both backends, and hold no text."""
    import sentence_transformers

    examples = read_examples(data / loss / "train.jsonl", loss)
    rows = examples.texts
    if name == "ranker":
        model = sentence_transformers.CrossEncoder(str(teachers / name), device="cpu")
        want = [model.predict([(row[0], text) for text in row[1:]]) for row in rows]
    else:
        model = sentence_transformers.SentenceTransformer(str(teachers / name), device="cpu")
        if loss == "mse":
            want = model.encode([text for (text,) in rows], normalize_embeddings=True)
        else:
            queries = model.encode_query([row[0] for row in rows])
            documents = [model.encode_document(row[1:]) for row in rows]
            want = [
                model.similarity(q, d)[0].numpy() for q, d in zip(queries, documents, strict=True)
            ]
    config = config_of(
        start, data / loss, tmp_path / "out", loss=loss, teacher=str(teachers / name)
    )
    targets, facts = teach(config, examples, D)
    np.testing.assert_allclose(targets, np.asarray(want), atol=1e-5)
    in_torch = dataclasses.replace(config, teacher_backend="torch", out=str(tmp_path / "torch"))
    np.testing.assert_allclose(teach(in_torch, examples, D)[0], targets, atol=1e-5)
    assert facts["teacher"] == name and len(facts["sha256"]) == 64

    (file,) = (tmp_path / "out").iterdir()
    stored = file.read_bytes()
    assert not any(word.encode() in stored for word in set(WORDS) - {"a"})
    assert str(tmp_path).encode() not in stored


def test_answers_are_reused_only_for_the_same_question(
    start, teachers, data, tmp_path, monkeypatch
):
    examples = read_examples(data / "mse/train.jsonl", "mse")
    config = config_of(start, data / "mse", tmp_path, loss="mse", teacher=str(teachers / "vectors"))
    targets, facts = teach(config, examples, D)
    monkeypatch.setattr(teacher, "_load", lambda *args: pytest.fail("the teacher was asked again"))
    again, same = teach(config, examples, D)
    assert np.array_equal(targets, again) and facts == same
    others = [
        (config, Examples([["another text"], *examples.texts[1:]])),
        (config, Examples(examples.texts[::-1])),
        (dataclasses.replace(config, teacher=str(start)), examples),
        (dataclasses.replace(config, teacher_backend="torch"), examples),
    ]
    for changed, asked in others:
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            teach(changed, asked, D)
    with pytest.raises(ValueError, match="teacher: expected vectors of 64 numbers"):
        teach(config, examples, 64)
    (file,) = tmp_path.glob("teacher-*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="safetensors: the file is damaged; delete it"):
        teach(config, examples, D)


def test_a_torch_teacher_runs_no_code_of_its_folder(start, teachers, data, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(teachers / "vectors", folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    examples = read_examples(data / "mse/train.jsonl", "mse")
    config = config_of(
        start, "", tmp_path, loss="mse", teacher=str(folder), teacher_backend="torch"
    )
    with pytest.raises(ValueError, match="evil.Pooling.* is not supported"):
        teach(config, examples, D)


def test_a_student_learns_from_a_teacher(start, teachers, data, tmp_path):
    config = config_of(
        start, data / "mse", tmp_path, loss="mse", teacher=str(teachers / "vectors"), epochs=30,
        batch_size=16, learning_rate=3e-3, pooling="cls", matryoshka_dims=(32, 16),
    )  # fmt: skip
    result = train(config)
    assert result["losses"][-1] < result["losses"][0] / 2
    assert result["teacher"]["teacher"] == "vectors"
    assert json.loads((tmp_path / "results.json").read_text())["teacher"] == result["teacher"]
    settings = json.loads((tmp_path / "model/config_sentence_transformers.json").read_text())
    assert "truncate_dim" not in settings
    assert "- Teacher: vectors (embedding model)\n" in (tmp_path / "model/README.md").read_text()
