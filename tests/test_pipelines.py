"""FillMask against transformers' pipeline, Embedder against torch and sentence-transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from modernbert_jax import (
    AutoTokenizer,
    Embedder,
    ModernBertForMaskedLM,
    pipeline,
)
from modernbert_jax.inference.pipelines.token_classification import split_windows, split_words
from modernbert_jax.packing import batch_rows

ROOT = Path(__file__).resolve().parents[1]
WORDS = "fever cough pain no denies possible rash edema today left the patient has a disease of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A seeded masked LM of transformers; with the real tokenizer where it is at hand."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.ModernBertForMaskedLM(config_for(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    """ModernBERT's own where it is at hand."""
    shared = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "tokenizer")
    return AutoTokenizer.from_pretrained(shared) if os.path.isdir(shared) else small_tokenizer


def config_for(tokenizer, **changes):
    import transformers

    return transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id, bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(folder):
    import transformers

    theirs = transformers.pipeline("fill-mask", model=str(folder))
    return pipeline("fill-mask", model=folder), theirs


def same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert {k: v for k, v in ours.items() if k != "score"} == {
            k: v for k, v in theirs.items() if k != "score"
        }
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


class TestFillMask:
    @pytest.mark.parametrize(
        "inputs",
        [
            "[MASK] is a disease caused by an uncontrolled division of abnormal cells.",
            "The [MASK] has a [MASK] today.",
            ["The patient has [MASK].", "No [MASK], no [MASK]."],
            ["Only one [MASK] in a list."],
        ],
        ids=["one", "several", "list", "list of one"],
    )
    def test_equals_transformers(self, both, inputs):
        ours, theirs = both
        same(ours(inputs), theirs(inputs))
        same(ours(inputs, top_k=3), theirs(inputs, top_k=3))

    def test_targets(self, both):
        ours, theirs = both
        text = "The patient has [MASK]."
        same(ours(text, targets=["a", "b", "c"]), theirs(text, targets=["a", "b", "c"]))
        same(ours(text, targets="xylophones"), theirs(text, targets="xylophones"))

    def test_the_model_cards_first_snippet(self, folder):
        """torch's own dtype is understood; bfloat16 is what computes."""
        import torch
        import transformers

        text = "[MASK] is a disease caused by an uncontrolled division of abnormal cells."
        ours = pipeline("fill-mask", model=str(folder), torch_dtype=torch.bfloat16)
        theirs = transformers.pipeline("fill-mask", model=str(folder), dtype=torch.bfloat16)
        assert ours.model.config.dtype == "bfloat16"
        got = {a["token"]: a["score"] for a in ours(text, top_k=50)}
        want = {a["token"]: a["score"] for a in theirs(text, top_k=10)}
        for token, score in want.items():  # a step of bfloat16 in a logit of 8 is 0.03
            assert got[token] == pytest.approx(score, rel=0.1)
        with pytest.raises(TypeError, match="device: expected none, jax's default device"):
            pipeline("fill-mask", model=folder, device=0)

    @pytest.mark.parametrize("top_k", [0, 1, None])
    def test_top_k(self, both, top_k):
        ours, theirs = both
        same(ours("No [MASK].", top_k=top_k), theirs("No [MASK].", top_k=top_k))

    def test_errors_say_what_to_do(self, both, folder):
        ours, _ = both
        for top_k in (-1, 10**6, "3", True, 2.0):
            with pytest.raises(ValueError, match="top_k: expected a whole number from 0 to"):
                ours("No [MASK].", top_k=top_k)
        with pytest.raises(ValueError, match="batch_tokens: .*of at least 1, got 0"):
            pipeline("fill-mask", model=folder, batch_tokens=0)
        with pytest.raises(ValueError, match="targets: expected words, number 2 has no token"):
            ours("No [MASK].", targets=["fever", ""])
        with pytest.raises(TypeError, match="inputs: expected texts, number 2 is a tuple"):
            ours(["No [MASK].", ("No [MASK].", "a")])
        with pytest.raises(TypeError, match="inputs: expected a text or a list of texts, got a"):
            ours({"text": "No [MASK]."})
        with pytest.raises(ValueError, match=r"expected \[MASK\] in place of a word"):
            ours("no mask here")
        with pytest.raises(ValueError, match="expected at most 256 tokens, got .*; shorten it"):
            ours("word " * 300 + "[MASK]")
        with pytest.raises(ValueError, match="fill-mask, .*, got 'summarization'"):
            pipeline("summarization", model=folder)
        with pytest.raises(TypeError, match="model: expected a folder"):
            pipeline("fill-mask", model=3)
        with pytest.raises(TypeError, match="tokenizer: expected"):
            pipeline("fill-mask", model=ModernBertForMaskedLM.from_pretrained(folder))


def saved(cls_name, folder, tokenizer, names, seed=1, scale=30, **changes):
    """Saves a seeded transformers classifier with named labels, and its tokenizer.

    scale: factor of the classifier's weights, so that labels differ from token to token.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    config = config_for(tokenizer, **labels, **changes)
    model = getattr(transformers, cls_name)(config)
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("classifier")
    names = ["denied", "affirmed", "possible"]
    return saved("ModernBertForSequenceClassification", folder, tokenizer, names)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tagger")
    names = ["O", "B-NAME", "I-NAME", "B-DATE", "I-DATE"]
    # At a larger scale the softmax saturates, and the mean of two one-hot tokens is an exact tie.
    return saved("ModernBertForTokenClassification", folder, tokenizer, names, seed=16, scale=3)


class TestTextClassification:
    def test_equals_transformers(self, classifier):
        import transformers

        ours = pipeline("text-classification", classifier)
        theirs = transformers.pipeline("text-classification", str(classifier))
        for inputs in ("No fever.", ["No fever.", "A rash today, and a cough."], ["One."]):
            same_labels(ours(inputs), theirs(inputs))
            same_labels(ours(inputs, top_k=2), theirs(inputs, top_k=2))
            same_labels(ours(inputs, top_k=None), theirs(inputs, top_k=None))
        pair = {"text": "No fever.", "text_pair": "fever"}
        same_labels(ours([pair]), theirs([pair]))
        same_labels([ours(pair)], [theirs(pair)])
        same_labels(ours(pair, top_k=2), theirs(pair, top_k=2))
        same_labels(ours("No fever.", top_k=0), theirs("No fever.", top_k=0))
        every = pipeline("text-classification", classifier, top_k=None)
        theirs = transformers.pipeline("text-classification", str(classifier), top_k=None)
        for inputs in ("No fever.", ["No fever."]):
            same_labels(every(inputs), theirs(inputs))
        with pytest.raises(TypeError, match="batch_size: expected none, texts are packed"):
            pipeline("text-classification", classifier, batch_size=8)

    @pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
    def test_other_problems(self, tmp_path, tokenizer, problem):
        kind = "ModernBertForSequenceClassification"
        folder = saved(kind, tmp_path, tokenizer, ["a", "b"], problem_type=problem)
        import transformers

        theirs = transformers.pipeline("text-classification", str(folder))
        ours = pipeline("text-classification", folder)
        same_labels(ours("No fever.", top_k=None), theirs("No fever.", top_k=None))

    @pytest.mark.parametrize(
        ("item", "got"),
        [
            (("No fever.", "fever"), "a tuple"),
            (["No fever.", "fever"], "a list"),
            ({"text": "No fever.", "pair": "fever"}, "a dict with text, pair"),
        ],
    )
    def test_what_is_no_pair_is_refused(self, classifier, item, got):
        pipe = pipeline("text-classification", classifier)
        with pytest.raises(TypeError, match=f"pairs {{.text.: ..., .text_pair.: ...}}, got {got}"):
            pipe([item])
        with pytest.raises(ValueError, match="top_k: .*of at least 0, got '3'"):
            pipe("No fever.", top_k="3")

    def test_too_long(self, classifier):
        pipe = pipeline("text-classification", classifier)
        with pytest.raises(
            ValueError, match="at most 256 tokens, got .*; truncation=True truncates it"
        ):
            pipe("fever " * 400)
        assert pipe("fever " * 400, truncation=True)[0]["label"] in (
            "denied",
            "affirmed",
            "possible",
        )


def same_labels(ours, theirs):
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, list):
            same_labels(a, b)
        else:
            assert a["label"] == b["label"]
            assert a["score"] == pytest.approx(b["score"], rel=1e-4)


SEEN = "Seen by Dr. Low at St. Mary's on 3 May, with fever, a cough and pain; denies any rash."


class TestTokenClassification:
    @pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
    @pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
    def test_equals_transformers(self, tagger, strategy):
        import transformers

        ours = pipeline("token-classification", tagger, aggregation_strategy=strategy)
        theirs = transformers.pipeline("ner", str(tagger), aggregation_strategy=strategy)
        for text in (SEEN, "Fever.", "fever"):
            assert smallest_margin(theirs, text) > 0.005, "rounding would decide the labels"
        for inputs in (SEEN, [SEEN, "Fever."], "fever"):
            same_entities(ours(inputs), theirs(inputs))
        kinds = {e.get("entity", e.get("entity_group")) for e in ours(SEEN)}
        assert len(kinds) > 1  # or the test would say little

    def test_offsets_are_of_the_text_as_given(self, tagger):
        text = "  Dr.  Low\n\tseen\r\n on 3\u00a0May — naïve 😀 Dr. Low.  "
        for strategy in ("none", "simple", "first"):
            pipe = pipeline("ner", tagger, aggregation_strategy=strategy, ignore_labels=())
            found = pipe(text)
            covered = {n for e in found for n in range(e["start"], e["end"])}
            assert covered >= {n for n, c in enumerate(text) if not c.isspace()}
            assert [e["start"] for e in found] == sorted(e["start"] for e in found)

    def test_words_end_at_white_space(self, tokenizer):
        """Also at the end of a line, where transformers' rule sees no border."""
        text = "Dr. Low\nseen\t3 May\nno rash"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [{"start": start, "end": end} for start, end in encoded["offset_mapping"]]
        words = [text[w[0]["start"] : w[-1]["end"]].strip() for w in split_words(text, spans)]
        assert [w for w in words if w] == text.split()

    def test_long_notes(self, tagger):
        """A text of many windows: inside a window's reach of context, as the whole would be."""
        rng = np.random.default_rng(0)
        text = " ".join(rng.choice(WORDS.split(), 600))
        short = pipeline("ner", tagger, ignore_labels=(), max_length=200, stride=100)
        whole = pipeline("ner", tagger, ignore_labels=())
        whole.window = 10_000  # one row, longer than the model was made for: the oracle
        a, b = short(text), whole(text)
        assert [(e["start"], e["end"]) for e in a] == [(e["start"], e["end"]) for e in b]
        assert [e["index"] for e in a] == list(range(1, len(a) + 1))
        # Global layers see the whole text, so scores differ a little; labels rarely do.
        agree = np.mean([x["entity"] == y["entity"] for x, y in zip(a, b, strict=True)])
        assert agree > 0.8

    def test_windows_equal_each_alone(self, tagger):
        """Every token's score is that of transformers on the window it is read in."""
        import torch
        import transformers

        model = transformers.AutoModelForTokenClassification.from_pretrained(tagger).eval()
        text = " ".join(np.random.default_rng(1).choice(WORDS.split(), 150))
        pipe = pipeline("ner", tagger, ignore_labels=(), max_length=64, stride=20)
        ids = pipe.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = pipe(text)
        assert len(found) == len(ids)
        for start, end, keep, until in split_windows(len(ids), 62, 20):
            first, last = pipe.tokenizer("")["input_ids"]
            window = torch.tensor([[first, *ids[start:end], last]])
            with torch.no_grad():
                p = torch.softmax(model(window).logits[0], -1).max(-1).values[1:-1].numpy()
            got = [e["score"] for e in found[keep:until]]
            np.testing.assert_allclose(got, p[keep - start : until - start], rtol=1e-4)

    @pytest.mark.parametrize("tokens", [0, 1, 10, 11, 25, 26, 997])
    def test_windows_cover_once(self, tokens):
        windows = split_windows(tokens, 10, 4)
        kept = [t for _, _, keep, until in windows for t in range(keep, until)]
        assert kept == list(range(tokens))
        for start, end, keep, until in windows:
            assert start <= keep <= until <= end <= tokens and end - start <= 10
            assert keep == 0 or keep - start >= 2  # half of what neighbours share
        starts = [w[0] for w in windows]
        assert all(b - a <= 6 for a, b in zip(starts, starts[1:], strict=False))

    def test_refusals(self, tagger):
        with pytest.raises(ValueError, match="aggregation_strategy: expected none, simple"):
            pipeline("ner", tagger, aggregation_strategy="longest")
        for options, expect in (
            ({"max_length": 2}, "max_length: expected a whole number from 3 to 256, got 2"),
            ({"max_length": 257}, "max_length: .*from 3 to 256, got 257"),
            ({"max_length": 64, "stride": 62}, "stride: .*from 0 to 61, got 62"),
            ({"stride": 2.0}, "stride: .*got 2.0"),
            ({"ignore_labels": "O"}, "ignore_labels: expected a list of labels, got 'O'"),
        ):
            with pytest.raises(ValueError, match=expect):
                pipeline("ner", tagger, **options)


def smallest_margin(theirs, text):
    """Smallest gap between the two best labels of a token, or of a word under any aggregation.

    A word's label is that of its first token, of its most confident token, or of the mean over its
    tokens; the gap between its two most confident tokens counts too. theirs: a transformers
    pipeline.
    """
    import torch

    encoded = theirs.tokenizer(text, return_offsets_mapping=True)
    with torch.no_grad():
        logits = theirs.model(torch.tensor([encoded["input_ids"]])).logits[0, 1:-1]
    offsets = encoded["offset_mapping"][1:-1]
    spans = [
        {"p": p, "start": start, "end": end}
        for p, (start, end) in zip(torch.softmax(logits, -1).numpy(), offsets, strict=True)
    ]
    gaps = []
    for word in split_words(text, spans):
        p = np.stack([span["p"] for span in word])
        gaps += [np.diff(np.sort(values)[-2:])[0] for values in (*p, p.mean(0))]
        gaps += list(np.diff(np.sort(p.max(-1))[-2:]))  # empty for a word of one token
    return min(gaps)


def same_entities(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, list):
            same_entities(a, b)
        else:
            assert list(a) == list(b)
            assert {k: v for k, v in a.items() if k != "score"} == {
                k: v for k, v in b.items() if k != "score"
            }
            assert a["score"] == pytest.approx(float(b["score"]), rel=1e-4)


def texts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(1, longest))) for _ in range(count)]


def by_torch(folder, some, pooling, layer, normalize):
    """One text at a time, no padding and no packing."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = []
    for text in some:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
        vector = hidden.mean(0) if pooling == "mean" else hidden[0]
        out.append((vector / vector.norm() if normalize else vector).numpy())
    return np.stack(out)


class TestEmbedder:
    @pytest.mark.parametrize(
        "pooling, layer, normalize",
        [("mean", -1, True), ("cls", -1, False), ("mean", 2, False), ("cls", -3, True)],
    )
    def test_equals_torch(self, folder, pooling, layer, normalize):
        some = texts(13)
        embedder = Embedder.from_pretrained(
            folder, pooling=pooling, layer=layer, normalize=normalize
        )
        got = embedder.encode(some, batch_tokens=128)
        want = by_torch(folder, some, pooling, layer, normalize)
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()))
        np.testing.assert_allclose(embedder.encode(some[3]), got[3], atol=1e-5)

    def test_over_devices(self, folder):
        mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
        some = texts(11)
        alone = Embedder.from_pretrained(folder).encode(some, batch_tokens=128)
        spread = Embedder.from_pretrained(folder, mesh=mesh).encode(some, batch_tokens=128)
        np.testing.assert_allclose(spread, alone, atol=1e-6)
        last = Embedder.from_pretrained(folder, device=jax.devices()[-1])
        np.testing.assert_allclose(last.encode(some, batch_tokens=128), alone, atol=1e-6)
        arrays = last._placement.put_rows(*np.ones((2, 1, 64), np.int32))
        where = last._embed(last._params, *arrays, 1).devices()
        assert where == {jax.devices()[-1]}
        assert {d for leaf in last._params.values() for d in leaf.devices()} == where
        with pytest.raises(ValueError, match="device, mesh: expected one of them"):
            Embedder.from_pretrained(folder, device=jax.devices()[0], mesh=mesh)

    def test_few_shapes(self, folder):
        embedder = Embedder.from_pretrained(folder)
        shapes = set()
        embed = embedder._embed

        def watched(params, ids, segments, count):
            shapes.add((ids.shape, count))
            return embed(params, ids, segments, count)

        embedder._embed = watched
        for n in (1, 2, 3, 5, 9, 20, 40):
            embedder.encode(texts(n, seed=n), batch_tokens=512)
        assert len(shapes) <= 10

    def test_batches_hold_every_text_once(self):
        lengths = [5, 900, 3, 44, 17, 2, 44]
        batches = list(batch_rows(lengths, 2, 64))
        assert sorted(i for batch in batches for row in batch for i in row) == list(range(7))
        for batch in batches:
            assert len(batch) == 2
            for row in batch:
                assert len(row) <= 1 or sum(lengths[i] for i in row) <= 64

    def test_progress_goes_to_stderr(self, folder, capsys):
        embedder = Embedder.from_pretrained(folder)
        embedder.encode(texts(4), show_progress_bar=True)
        shown = capsys.readouterr()
        assert "embedding: 100%" in shown.err and "4/4" in shown.err and not shown.out
        assert embedder.encode([]).shape == (0, 32)

    def test_refusals(self, folder):
        with pytest.raises(ValueError, match="pooling: expected cls, max, mean.* got 'sum'"):
            Embedder.from_pretrained(folder, pooling="sum")
        with pytest.raises(ValueError, match="layer: expected -5 to 4, got 7"):
            Embedder.from_pretrained(folder, layer=7)
        with pytest.raises(TypeError, match="device: not an argument of encode; pass device, mesh"):
            Embedder.from_pretrained(folder).encode("fever", device="cpu")

    def test_sentence_transformers(self, folder, tmp_path):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        from sentence_transformers.sentence_transformer import modules

        word = modules.Transformer(str(folder))
        pooling = modules.Pooling(word.get_embedding_dimension())
        model = sentence_transformers.SentenceTransformer(
            modules=[word, pooling, modules.Normalize()], device="cpu"
        )
        some = texts(9)
        got = Embedder.from_pretrained(folder).encode(some)
        np.testing.assert_allclose(got, model.encode(some), atol=1e-5)
        assert json.loads((folder / "config.json").read_text())["hidden_size"] == got.shape[1]

    def test_is_a_model_for_mteb(self, folder, tmp_path, monkeypatch):
        """mteb takes an Embedder as it is; its score is that of torch's vectors."""
        monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
        mteb = pytest.importorskip("mteb")
        import datasets
        from mteb.abstasks.sts import AbsTaskSTS
        from scipy.stats import spearmanr

        a, b = texts(12, seed=1), texts(12, seed=2)
        gold = np.random.default_rng(0).random(12).tolist()

        class Pairs(AbsTaskSTS):
            metadata = mteb.TaskMetadata(
                name="Pairs", description="made here", type="STS", category="t2t",
                dataset={"path": "made/here", "revision": "1"}, modalities=["text"],
                eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
            )  # fmt: skip
            min_score, max_score = 0, 1

            def load_data(self, **_):
                rows = {"sentence1": a, "sentence2": b, "score": gold}
                self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows))
                self.data_loaded = True

        result = mteb.evaluate(Embedder.from_pretrained(folder), Pairs(), cache=None)
        x, y = (by_torch(folder, t, "mean", -1, True) for t in (a, b))
        want = spearmanr((x * y).sum(-1), gold).statistic
        got = result.task_results[0].scores["test"][0]["cosine_spearman"]
        assert got == pytest.approx(want, abs=1e-6)


class TestLimits:
    """A tokenizer with a model_max_length of 16, in front of models that take 256 tokens."""

    LONG = " ".join(WORDS.split() * 2)

    def limited(self, source, folder):
        shutil.copytree(source, folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 16}))
        return folder

    def test_text_classification(self, classifier, tmp_path):
        import transformers

        short = self.limited(classifier, tmp_path / "short")
        ours = pipeline("text-classification", short)
        theirs = transformers.pipeline("text-classification", str(short))
        pair = [{"text": self.LONG, "text_pair": "A rash, and a cough."}]
        for options in ({"truncation": True}, {}):  # transformers only logs that it is too long
            same_labels(ours(self.LONG, **options), theirs(self.LONG, **options))
        for options in ({"truncation": True}, {"truncation": "only_first"}):
            same_labels(ours(pair, **options), theirs(pair, **options))

    def test_token_classification(self, tagger, tmp_path):
        short = self.limited(tagger, tmp_path / "short")
        assert pipeline("ner", short).window == 14  # with [CLS] and [SEP]: windows are tested above
        with pytest.raises(ValueError, match="max_length: .*from 3 to 16, got 17"):
            pipeline("ner", short, max_length=17)

    def test_embedder(self, folder, tmp_path):
        import torch
        import transformers

        short = self.limited(folder, tmp_path / "short")
        tokenizer = transformers.AutoTokenizer.from_pretrained(short)
        inputs = tokenizer(self.LONG, truncation=True, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 16)
        with torch.no_grad():
            model = transformers.AutoModel.from_pretrained(short).eval()
            vector = model(**inputs).last_hidden_state[0].mean(0)
        got = Embedder.from_pretrained(short).encode(self.LONG)
        np.testing.assert_allclose(got, vector / vector.norm(), atol=1e-5)


def test_warnings_as_errors(folder, classifier, tagger):
    """A user may run with -W error, imports included."""
    code = (
        "import sys; from modernbert_jax import Embedder, pipeline; "
        "print(len(pipeline('fill-mask', sys.argv[1])('No [MASK].')), "
        "len(pipeline('text-classification', sys.argv[2])('No fever.', truncation=True)), "
        "type(pipeline('ner', sys.argv[3], aggregation_strategy='first')('No fever.')).__name__, "
        "Embedder.from_pretrained(sys.argv[1]).encode('No fever.').shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, folder, classifier, tagger],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "5 1 list (32,)\n", done.stderr[-2000:]
