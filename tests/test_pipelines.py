"""FillMask against transformers' pipeline, Embedder against torch and sentence-transformers."""

import json
import os

import jax
import numpy as np
import pytest

from modernbert_jax import AutoTokenizer, Embedder, ModernBertForMaskedLM, pipeline
from modernbert_jax.pipelines import _batches

WORDS = "fever cough pain no denies possible rash edema today left the patient has a disease of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A seeded masked LM of transformers; with the real tokenizer where it is at hand."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    shared = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "tokenizer")
    if os.path.isdir(shared):
        tokenizer = AutoTokenizer.from_pretrained(shared)
    else:
        golden = os.path.join(os.path.dirname(__file__), "goldens", "tiny")
        tokenizer = AutoTokenizer.from_pretrained(golden)
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id, bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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

    def test_errors_say_what_to_do(self, both, folder):
        ours, _ = both
        with pytest.raises(ValueError, match=r"expected \[MASK\] where a word"):
            ours("no mask here")
        with pytest.raises(ValueError, match="the model takes 256; shorten it"):
            ours("word " * 300 + "[MASK]")
        with pytest.raises(ValueError, match="expected fill-mask, got 'summarization'"):
            pipeline("summarization", model=folder)
        with pytest.raises(TypeError, match="model: expected a folder"):
            pipeline("fill-mask", model=3)
        with pytest.raises(TypeError, match="tokenizer: expected"):
            pipeline("fill-mask", model=ModernBertForMaskedLM.from_pretrained(folder))


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

    def test_few_shapes(self, folder):
        embedder = Embedder.from_pretrained(folder)
        shapes = set()
        embed = embedder._embed

        def watched(state, ids, segments, count):
            shapes.add((ids.shape, count))
            return embed(state, ids, segments, count)

        embedder._embed = watched
        for n in (1, 2, 3, 5, 9, 20, 40):
            embedder.encode(texts(n, seed=n), batch_tokens=512)
        assert len(shapes) <= 12

    def test_batches_hold_every_text_once(self):
        lengths = [5, 900, 3, 44, 17, 2, 44]
        batches = list(_batches(lengths, 2, 64))
        assert sorted(i for batch in batches for row in batch for i in row) == list(range(7))
        for batch in batches:
            assert len(batch) == 2
            for row in batch:
                assert len(row) <= 1 or sum(lengths[i] for i in row) <= 64

    def test_progress_goes_to_stderr(self, folder, capsys):
        embedder = Embedder.from_pretrained(folder)
        embedder.encode(texts(4), show_progress_bar=True)
        shown = capsys.readouterr()
        assert "embedded 4 of 4 texts" in shown.err and not shown.out
        assert embedder.encode([]).shape == (0, 32)

    def test_refusals(self, folder):
        with pytest.raises(ValueError, match="pooling: expected mean or cls"):
            Embedder.from_pretrained(folder, pooling="max")
        with pytest.raises(ValueError, match="layer: expected -5 to 4, got 7"):
            Embedder.from_pretrained(folder, layer=7)

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
