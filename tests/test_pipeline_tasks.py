"""Feature extraction, question answering and zero-shot classification, against transformers."""

import functools
import json
import shutil

import numpy as np
import pytest

from modernbert_jax import ModernBertForQuestionAnswering, pipeline
from modernbert_jax.inference import cli
from modernbert_jax.inference.pipelines import TASKS
from modernbert_jax.inference.pipelines.question_answering import best_spans

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = (
    "fever cough pain no denies possible rash edema today left the patient has a disease".split()
)
LONGEST = 128
QUESTION = "What does the patient deny?"
NLI = ["contradiction", "neutral", "entailment"]


def texts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_tokenizer):
    """A function that saves a seeded model of transformers, and returns its folder."""

    def save(kind, names=None, seed=0):
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(seed)
        labels = {}
        if names:
            labels = {
                "id2label": dict(enumerate(names)),
                "label2id": {name: n for n, name in enumerate(names)},
            }
        config = transformers.ModernBertConfig(
            vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LONGEST,
            pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2,
            initializer_range=0.2, **labels,
        )  # fmt: skip
        model = getattr(transformers, kind)(config)
        if hasattr(model, "classifier"):
            with torch.no_grad():
                model.classifier.weight.mul_(5)  # or all spans and labels score the same
        model.save_pretrained(folder)
        small_tokenizer.save_pretrained(folder)
        return folder

    return save


PIPES = {}


def ours(task, folder):
    """A pipeline that all tests share, so that each program is traced once."""
    key = task, str(folder)
    if key not in PIPES:
        PIPES[key] = pipeline(task, folder, batch_tokens=128)
    return PIPES[key]


@functools.cache
def theirs(task, folder):
    return transformers.pipeline(task, str(folder))


@functools.cache
def torch_reader(folder):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(saved):
    return saved("ModernBertModel")


@pytest.fixture(scope="module")
def reader(saved):
    return saved("ModernBertForQuestionAnswering")


@pytest.fixture(scope="module")
def nli(saved):
    return saved("ModernBertForSequenceClassification", NLI)


@pytest.fixture(scope="module")
def reversed_nli(saved):
    return saved("ModernBertForSequenceClassification", NLI[::-1], seed=2)


class TestFeatureExtraction:
    @pytest.mark.parametrize("kind", ["text", "list", "list of one"])
    def test_equals_transformers(self, encoder, kind):
        pipe = ours("feature-extraction", encoder)
        inputs = {"text": "no fever", "list": texts(7), "list of one": ["a rash"]}[kind]
        got, want = pipe(inputs), theirs("feature-extraction", encoder)(inputs)
        assert type(got) is list and len(got) == len(want)
        arrays = pipe(inputs, return_tensors=True)
        if kind == "text":
            got, want, arrays = [got], [want], [arrays]
        for a, b, c in zip(got, want, arrays, strict=True):
            assert type(a[0][0][0]) is float
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=1e-5)
            assert c.shape == np.shape(b) and c.dtype == np.float32
            np.testing.assert_array_equal(np.array(a, np.float32), c)

    def test_truncation(self, encoder):
        pipe = ours("feature-extraction", encoder)
        long = "no fever " * 100
        with pytest.raises(ValueError, match="at most 128 tokens, got .*; truncation=True"):
            pipe(long)
        assert np.shape(pipe(long, truncation=True)) == (1, LONGEST, 32)
        for options in (
            {"truncation": True, "max_length": 20},
            {"truncation": True, "max_length": 20, "add_special_tokens": False},
        ):
            got = pipe(long, tokenize_kwargs=options)
            want = theirs("feature-extraction", encoder)(long, tokenize_kwargs=dict(options))
            np.testing.assert_allclose(np.array(got), np.array(want), rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="max_length: .*from 1 to 128, got 129"):
            pipe(long, tokenize_kwargs={"truncation": True, "max_length": 129})
        with pytest.raises(ValueError, match="max_length: expected truncation=True beside it"):
            pipe(long, tokenize_kwargs={"max_length": 20})
        with pytest.raises(ValueError, match="truncation: expected once"):
            pipe(long, truncation=True, tokenize_kwargs={"truncation": True})
        with pytest.raises(TypeError, match="tokenize_kwargs: expected truncation, .* got padding"):
            pipe(long, tokenize_kwargs={"padding": True})

    def test_the_tokenizers_limit_counts(self, encoder, tmp_path):
        shutil.copytree(encoder, tmp_path / "m")
        path = tmp_path / "m" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 40}))
        got = pipeline("feature-extraction", tmp_path / "m")("no fever " * 30, truncation=True)
        assert np.shape(got)[1] == 40


def by_torch(folder, question, context, **given):
    """The definition in transformers 4's documents, with transformers 5's own span functions.

    `select_starts_ends` of the pipeline for documents is what the one for texts used. No packing.
    """
    from transformers.pipelines.document_question_answering import select_starts_ends

    options = {"top_k": 1, "max_answer_len": 15, "handle_impossible_answer": False}
    options |= {"align_to_words": True, "max_seq_len": LONGEST, "doc_stride": LONGEST // 2} | given
    model, tokenizer = torch_reader(folder)
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    tokens, offsets = whole["input_ids"], whole["offset_mapping"]
    words = whole.word_ids()
    room = options["max_seq_len"] - len(asked) - 3
    starts = [0]
    while starts[-1] + room < len(tokens):
        starts.append(starts[-1] + room - options["doc_stride"])
    answers, null = {}, 1e6
    for start in starts:
        part = range(start, min(start + room, len(tokens)))
        ids = [1, *asked, 2, *(tokens[n] for n in part), 2]
        outside = np.array([[0] + [1] * (len(asked) + 1) + [0] * len(part) + [1]])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]))
        count = 2 * options["top_k"] + 10 if options["align_to_words"] else options["top_k"]
        firsts, lasts, scores, null = select_starts_ends(
            out.start_logits.numpy(), out.end_logits.numpy(), outside, np.ones((1, len(ids)), int),
            null, count, options["handle_impossible_answer"], options["max_answer_len"],
        )  # fmt: skip
        for first, last, score in zip(firsts, lasts, scores, strict=True):
            a, b = (int(n) - len(asked) - 2 + start for n in (first, last))
            if options["align_to_words"]:  # as far as the window has the word
                a = min(n for n in part if words[n] == words[a])
                b = max(n for n in part if words[n] == words[b])
            begin, end = offsets[a][0], offsets[b][1]
            text = context[begin:end]
            answer = answers.setdefault(
                text.lower(), {"score": 0.0, "start": begin, "end": end, "answer": text}
            )
            answer["score"] += float(score)
    found = list(answers.values())
    if options["handle_impossible_answer"]:
        found.append({"score": null, "start": 0, "end": 0, "answer": ""})
    found = sorted(found, key=lambda answer: answer["score"], reverse=True)[: options["top_k"]]
    return (found[0] if len(found) == 1 else found), len(starts)


def same_answers(got, want):
    assert type(got) is type(want)
    if isinstance(want, dict):
        got, want = [got], [want]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert list(a) == ["score", "start", "end", "answer"]
        assert {**a, "score": 0} == {**b, "score": 0}
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


class TestQuestionAnswering:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"top_k": 4},
            {"top_k": 3, "align_to_words": False, "max_answer_len": 4},
            {"top_k": 5, "handle_impossible_answer": True, "max_answer_len": 2},
            {"top_k": 4, "max_seq_len": 60, "doc_stride": 10},
            {"top_k": 2, "max_seq_len": 70, "doc_stride": 0, "handle_impossible_answer": True},
        ],
        ids=["best", "several", "tokens", "impossible", "windows", "apart"],
    )
    def test_equals_the_definition(self, reader, options):
        pipe = ours("question-answering", reader)
        windows = 0
        for n, context in enumerate([*texts(2, seed=3), "; ".join(texts(6, seed=4))]):
            want, count = by_torch(reader, QUESTION, context, **options)
            windows = max(windows, count)
            got = pipe(question=QUESTION, context=context, **options)
            same_answers(got, want)
            for answer in [got] if isinstance(got, dict) else got:
                assert context[answer["start"] : answer["end"]] == answer["answer"], n
        assert windows > 1

    def test_ways_to_ask(self, reader):
        pipe = ours("question-answering", reader)
        contexts = texts(3, seed=5)
        one = [pipe(question=QUESTION, context=context) for context in contexts]
        same_answers(pipe(QUESTION, contexts[0]), one[0])
        pairs = [{"question": QUESTION, "context": context} for context in contexts]
        for got in (pipe(pairs), pipe(question=[QUESTION] * 3, context=contexts)):
            for a, b in zip(got, one, strict=True):
                same_answers(a, b)
        same_answers(pipe(pairs[:1]), one[0])
        same_answers(pipe(pairs[1]), one[1])
        got = pipe(question=[QUESTION, "no?"], context=contexts[0])
        same_answers(got[0], one[0])
        assert len(got) == 2

    def test_refusals(self, reader):
        pipe = ours("question-answering", reader)
        for arguments, kind, match in (
            ((QUESTION,), TypeError, "context: expected a text beside the question"),
            (({"question": "a"},), TypeError, 'expected {"question": ..., "context": ...}'),
            (("", "a"), ValueError, "question: expected a text, number 1 is empty"),
            (("a", ""), ValueError, "context: expected a text, number 1 is empty"),
            ((["a", 3], "b"), TypeError, "question: expected a text, number 2 is a int"),
            ((["a"], ["b", "c"]), ValueError, "context: expected one, or 1 as there are"),
            (([],), ValueError, "question: expected at least one, got none"),
            (("edema " * 60, "a"), ValueError, "question: expected less than 125 tokens, .*number"),
        ):
            with pytest.raises(kind, match=match):
                pipe(*arguments)
        long = "no fever " * 100
        for options, match in (
            ({"top_k": 0}, "top_k: .*of at least 1, got 0"),
            ({"max_answer_len": 0}, "max_answer_len: .*of at least 1, got 0"),
            ({"max_seq_len": 129}, "max_seq_len: .*from 1 to 128, got 129"),
            ({"doc_stride": -1}, "doc_stride: .*of at least 0, got -1"),
            ({"doc_stride": 128}, "doc_stride: expected less than the .* tokens of the context"),
        ):
            with pytest.raises(ValueError, match=match):
                pipe("fever?", long, **options)
        assert pipe("fever?", "no fever", doc_stride=128)["answer"]  # one window: no stride
        model = ModernBertForQuestionAnswering.from_pretrained(reader)
        left = transformers.AutoTokenizer.from_pretrained(reader, padding_side="left")
        with pytest.raises(ValueError, match="expected padding_side right, got left"):
            pipeline("question-answering", model, left)

    def test_spans_by_hand(self):
        """Two tokens of context: three spans, each the product of two softmaxes over three."""
        logits = np.zeros((5, 2), np.float32)
        logits[3] = np.log(2), np.log(3)
        spans, null = best_spans(logits, [None, 0, None, 1, 1], 9, 5)
        assert [span[:2] for span in spans] == [(3, 3), (3, 4), (4, 4)]
        np.testing.assert_allclose(
            [span[2] for span in spans], [2 / 4 * 3 / 5, 2 / 4 * 1 / 5, 1 / 4 * 1 / 5], rtol=1e-6
        )
        assert null == pytest.approx(1 / 4 * 1 / 5)
        assert [span[:2] for span in best_spans(logits, [None, 0, None, 1, 1], 9, 1)[0]] == [
            (3, 3),
            (4, 4),
        ]


LABELS = ["a symptom", "a drug", "the heart"]


class TestZeroShotClassification:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"multi_label": True},
            {"hypothesis_template": "It is about {}!", "candidate_labels": "rash, pain ,,edema"},
            {"candidate_labels": "fever"},
        ],
        ids=["one of them", "several", "template", "one label"],
    )
    @pytest.mark.parametrize("last", [True, False], ids=["entailment last", "first"])
    def test_equals_transformers(self, nli, reversed_nli, last, options):
        folder = nli if last else reversed_nli
        task = "zero-shot-classification"
        options = {"candidate_labels": LABELS} | options
        for inputs in ("no fever today", texts(3), ["a rash"]):
            got = ours(task, folder)(inputs, **options)
            want = theirs(task, folder)(inputs, **options)
            assert type(got) is type(want)
            pairs = [(got, want)] if isinstance(want, dict) else zip(got, want, strict=True)
            for a, b in pairs:
                assert a["sequence"] == b["sequence"] and a["labels"] == b["labels"]
                np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-4)

    def test_the_text_is_truncated_and_the_hypothesis_is_not(self, nli):
        pipe = ours("zero-shot-classification", nli)
        other = transformers.pipeline("zero-shot-classification", str(nli))
        other.tokenizer.model_max_length = LONGEST
        long = " ".join(texts(9))
        got, want = pipe(long, LABELS), other(long, LABELS)
        assert got["labels"] == want["labels"] and got["sequence"] == long
        np.testing.assert_allclose(got["scores"], want["scores"], rtol=1e-4)
        with pytest.raises(ValueError, match="expected hypotheses of less than 125 tokens, number"):
            pipe("a", ["short", "edema " * 60])

    def test_refusals(self, nli, saved):
        pipe = ours("zero-shot-classification", nli)
        for arguments in (("", LABELS), ([], LABELS), ("a", []), ("a", " , "), (["a", ""], LABELS)):
            with pytest.raises(ValueError, match="expected at least one label and one text"):
                pipe(*arguments)
        for template in ("It is.", "{name}", "{1}", "{", "{0.nothing}"):
            with pytest.raises(ValueError, match="hypothesis_template: expected a text with {}"):
                pipe("a", LABELS, hypothesis_template=template)
        with pytest.raises(TypeError, match="inputs: expected texts, number 2 is a int"):
            pipe("a", ["b", 3])
        kind = "ModernBertForSequenceClassification"
        for names in (["entailment"], ["yes", "no"]):
            folder = saved(kind, names)
            with pytest.raises(ValueError, match="expected an NLI model, whose id2label names"):
                pipeline("zero-shot-classification", folder)


class TestPipeline:
    def test_arguments_of_the_call_and_of_other_tasks(self, nli, reader):
        with pytest.raises(TypeError, match="multi_label: not an argument of pipeline; pass it"):
            pipeline("zero-shot-classification", nli, multi_label=True)
        with pytest.raises(TypeError, match="multi_label: not an argument of pipeline$"):
            pipeline("question-answering", reader, multi_label=True)
        with pytest.raises(TypeError, match="stride: expected none for question-answering"):
            pipeline("question-answering", reader, stride=3)
        with pytest.raises(TypeError, match="top_k: expected none for zero-shot-classification"):
            pipeline("zero-shot-classification", nli, top_k=3)

    @pytest.mark.parametrize("task", ["feature-extraction", "question-answering"])
    def test_exported_functions(self, encoder, reader, tmp_path, monkeypatch, task):
        monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path / "cache"))
        folder, inputs = {
            "feature-extraction": (encoder, ("no fever",)),
            "question-answering": (reader, (QUESTION, "no fever")),
        }[task]
        pipe = ours(task, folder)
        want = pipe(*inputs)
        assert pipe.export(tmp_path / "out", tokens=[64]) == [64]
        again = pipeline(task, tmp_path / "out", exported=True)
        monkeypatch.setattr(again._run, "_jitted", None)  # the exported program or nothing
        got = again(*inputs)
        if task == "question-answering":
            same_answers(got, want)
        else:
            np.testing.assert_allclose(got, want, atol=1e-6)

    def test_one_exported_program_for_all_classifiers(self, nli, tmp_path, monkeypatch):
        monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path / "cache"))
        pipe = ours("text-classification", nli)
        pipe.export(tmp_path / "out", tokens=[96])
        again = pipeline("zero-shot-classification", tmp_path / "out", exported=True)
        monkeypatch.setattr(again._run, "_jitted", None)
        want = ours("zero-shot-classification", nli)("a", LABELS)
        assert again("a", LABELS)["labels"] == want["labels"]


class TestCommandLine:
    """`answer --task`: each task answers, or says in one line what it needs."""

    def answer(self, capsys, folder, task, *arguments):
        assert cli.main(["answer", str(folder), "--task", task, *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    def test_every_task_answers(self, saved, encoder, reader, nli, capsys, monkeypatch):
        monkeypatch.setattr(cli, "pipeline", lambda task, folder, **options: ours(task, folder))
        one = saved("ModernBertForSequenceClassification", ["relevant"])
        tagger = saved("ModernBertForTokenClassification", ["O", "B-X"])
        mlm = saved("ModernBertForMaskedLM")
        text, pair = ("--text", "no fever"), ("--pair", "denies fever")
        got = self.answer(capsys, encoder, "feature-extraction", *text)
        assert got == ours("feature-extraction", encoder)("no fever")
        got = self.answer(capsys, reader, "question-answering", *text, *pair)
        assert got == ours("question-answering", reader)("no fever", "denies fever")
        got = self.answer(capsys, nli, "zero-shot-classification", *text, "--labels", "a", "b c")
        assert got == ours("zero-shot-classification", nli)("no fever", ["a", "b c"])
        got = self.answer(capsys, one, "text-ranking", *text, *pair)
        assert got == pytest.approx(
            float(ours("text-ranking", one)(["no fever", "denies fever"])), abs=1e-6
        )
        pipe = ours("text-classification", nli)
        for task in ("text-classification", "sentiment-analysis"):
            assert self.answer(capsys, nli, task, *text) == pipe("no fever")
            got = self.answer(capsys, nli, task, *text, *pair)
            assert got == pipe({"text": "no fever", "text_pair": "denies fever"})
        for task in ("ner", "token-classification"):
            assert self.answer(capsys, tagger, task, *text) == ours(task, tagger)("no fever")
        assert len(self.answer(capsys, mlm, "fill-mask")) == 5
        assert len(self.answer(capsys, encoder, "embed", *text)) == 32
        assert len(TASKS) == 9  # another task belongs in this test

    @pytest.mark.parametrize(
        ("task", "arguments", "line"),
        [
            ("text-ranking", (), "--pair: expected one for text-ranking, got none"),
            ("question-answering", (), "--pair: expected one for question-answering, got none"),
            ("fill-mask", ("--pair", "a"), "--pair: expected none for fill-mask, got one"),
            ("embed", ("--labels", "a"), "--labels: expected none for embed, got one"),
            (
                "zero-shot-classification", (),
                "--labels: expected one for zero-shot-classification, got none",
            ),
            (
                "zero-shot-classification", ("--pair", "a"),
                "--pair: expected none for zero-shot-classification, got one",
            ),
        ],
    )  # fmt: skip
    def test_one_line_before_anything_loads(self, capsys, task, arguments, line):
        for command in ("answer", "benchmark"):
            assert cli.main([command, "no such folder", "--task", task, *arguments]) == 2
            assert capsys.readouterr().err == f"error: {line}\n"
