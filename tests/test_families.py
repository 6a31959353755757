"""Public checkpoints of ModernBERT's architecture, by family: a cut-down seeded copy of each loads.

FAMILIES says in which fields a family's config.json differs from ModernBERT base's, as its public
files, model cards and ports state it. A copy has those fields, small sizes and random weights: no
released weights are read here.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import modernbert_jax as mj
from tests.parity_cases import randomized, relative_error

GUIDE = Path(__file__).resolve().parents[1] / "notebooks" / "guides" / "conversion.md"

# config.json of answerdotai/ModernBERT-base, in the form of transformers 4.48.
BASE = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False,
    "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281,
    "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False,
    "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05,
    "pad_token_id": 50283, "position_embedding_type": "absolute", "sep_token_id": 50282,
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.48.0",
    "vocab_size": 50368,
}  # fmt: skip
ENCODER = {"architectures": ["ModernBertModel"]}
ONE_THETA = {"local_rope_theta": 160000.0, "position_embedding_type": "sans_pos"}
HIDDEN = ("architectures", "id2label", "label2id")  # fields that the table does not show


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table in the guide."""

    # {id on the hub: (published parameters in millions, layers, D, F, heads)}
    sizes: dict[str, tuple[int, int, int, int, int]]
    differs: dict  # fields of config.json that differ from BASE
    tokenizer: str = "ModernBERT's"
    loads_as: str = "`AutoModelForMaskedLM`"
    pooling: str | None = None  # of an embedding model
    prompt: str | None = None


FAMILIES = {
    "ModernBERT": Family(
        {
            "answerdotai/ModernBERT-base": (149, 22, 768, 1152, 12),
            "answerdotai/ModernBERT-large": (395, 28, 1024, 2624, 16),
        },
        {},
    ),
    "Ettin encoders": Family(
        {
            "jhu-clsp/ettin-encoder-17m": (17, 7, 256, 384, 4),
            "jhu-clsp/ettin-encoder-32m": (32, 10, 384, 576, 6),
            "jhu-clsp/ettin-encoder-68m": (68, 19, 512, 768, 8),
            "jhu-clsp/ettin-encoder-150m": (150, 22, 768, 1152, 12),
            "jhu-clsp/ettin-encoder-400m": (400, 28, 1024, 2624, 16),
            "jhu-clsp/ettin-encoder-1b": (1028, 28, 1792, 3840, 28),
        },
        {**ONE_THETA, "max_position_embeddings": 7999},
    ),
    "mmBERT": Family(
        {
            "jhu-clsp/mmBERT-small": (140, 22, 384, 1152, 6),
            "jhu-clsp/mmBERT-base": (307, 22, 768, 1152, 12),
        },
        {
            **ONE_THETA, "vocab_size": 256000, "pad_token_id": 0, "bos_token_id": 2,
            "cls_token_id": 1, "eos_token_id": 1, "sep_token_id": 1,
        },
        tokenizer="Gemma 2's",
    ),
    "ModernBERT-Ja": Family(
        {
            "sbintuitions/modernbert-ja-30m": (37, 10, 256, 1024, 4),
            "sbintuitions/modernbert-ja-70m": (70, 13, 384, 1536, 6),
            "sbintuitions/modernbert-ja-130m": (132, 19, 512, 2048, 8),
            "sbintuitions/modernbert-ja-310m": (315, 25, 768, 3072, 12),
        },
        {"vocab_size": 102400},
        tokenizer="Unigram",
    ),
    "gte-modernbert": Family(
        {"Alibaba-NLP/gte-modernbert-base": (149, 22, 768, 1152, 12)},
        ENCODER, loads_as="`Embedder`", pooling="cls",
    ),
    "gte-reranker-modernbert": Family(
        {"Alibaba-NLP/gte-reranker-modernbert-base": (149, 22, 768, 1152, 12)},
        {
            "architectures": ["ModernBertForSequenceClassification"],
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        },
        loads_as="`Reranker`",
    ),
    "nomic modernbert-embed": Family(
        {"nomic-ai/modernbert-embed-base": (149, 22, 768, 1152, 12)},
        ENCODER, loads_as="`Embedder`", pooling="mean", prompt="search_query: ",
    ),
    "granite-embedding r2": Family(
        {"ibm-granite/granite-embedding-english-r2": (149, 22, 768, 1152, 12)},
        {**ENCODER, "global_rope_theta": 80000.0}, loads_as="`Embedder`", pooling="cls",
    ),
    "granite-embedding small r2": Family(
        {"ibm-granite/granite-embedding-small-english-r2": (47, 12, 384, 1536, 12)},
        {**ENCODER, "global_rope_theta": 80000}, loads_as="`Embedder`", pooling="cls",
    ),
}  # fmt: skip
DECODERS = tuple(f"jhu-clsp/ettin-decoder-{n}" for n in ("17m", "32m", "68m", "150m", "400m", "1b"))
# The same kind of copy as another row: those are quick, and these run in test-matrix.
FURTHER = ("ModernBERT", "Ettin encoders", "granite-embedding r2", "gte-modernbert")
ROWS = [pytest.param(n, marks=[pytest.mark.matrix] * (n in FURTHER)) for n in FAMILIES]

TEXTS = ["the patient has no fever", "denies cough and pain; seen today with a rash", "a rash"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
JAPANESE = "熱はありません。咳もありません。発疹があります。"


def gemma():
    """A tokenizer of Gemma 2's kind: a BPE of characters that falls back to bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=special + BYTES, max_token_length=8
    )
    made.train_from_iterator([*TEXTS, JAPANESE] * 9, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are no added tokens
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.post_processor = ends("<bos>", "<eos>", made)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = {"bos": "<bos>", "eos": "<eos>", "cls": "<bos>", "sep": "<eos>"}
    return made, names, "GemmaTokenizerFast"


def unigram():
    """A tokenizer of sentencepiece's other kind, with bytes, as ModernBERT-Ja's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", "<pad>", "<sep>", "<mask>", "<cls>"]
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=100, show_progress=False, special_tokens=special, unk_token="<unk>"
    )
    made.train_from_iterator([*TEXTS, JAPANESE] * 9, trainer)
    content = json.loads(made.to_str())
    pieces = content["model"]["vocab"]
    n = len(special)
    content["model"]["vocab"] = [*pieces[:n], *([b, -10.0] for b in BYTES), *pieces[n:]]
    content["model"]["byte_fallback"] = True
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.post_processor = ends("<s>", "</s>", made)
    made.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = {"bos": "<s>", "eos": "</s>", "cls": "<cls>", "sep": "<sep>"}
    return made, names, "PreTrainedTokenizerFast"


def ends(first, last, made):
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}",
        special_tokens=[(t, made.token_to_id(t)) for t in (first, last)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory, small_tokenizer):
    """{kind: folder}, with the files of the hub."""
    found = {"ModernBERT's": tmp_path_factory.mktemp("modernbert")}
    small_tokenizer.save_pretrained(found["ModernBERT's"])
    for kind, make in (("Gemma 2's", gemma), ("Unigram", unigram)):
        found[kind] = tmp_path_factory.mktemp("tokenizer")
        made, names, cls = make()
        made.save(str(found[kind] / "tokenizer.json"))
        settings = {f"{role}_token": token for role, token in names.items()}
        settings |= {f"{role}_token": f"<{role}>" for role in ("pad", "unk", "mask")}
        settings |= {"tokenizer_class": cls, "model_max_length": 8192}
        write(found[kind] / "tokenizer_config.json", settings)
    return found


def write(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def save_copy(folder, family, tokenizer):
    """Writes the files of a family's model, small; returns transformers' model of these files."""
    torch = pytest.importorskip("torch")
    import transformers

    tokenizer.save_pretrained(folder)
    _, layers, width, _, heads = next(iter(family.sizes.values()))
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "cls", "sep")}
    config = BASE | ids | {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    config |= family.differs | {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 24,
        "num_attention_heads": 2 if width // heads == 64 else 4, "local_attention": 8,
        "initializer_range": 0.06,
        "num_hidden_layers": 4 if layers % 3 == 1 else 6,  # the last is global or local, as there
    }  # fmt: skip
    write(folder / "config.json", config)
    (architecture,) = config["architectures"]
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    randomized(cls(cls.config_class.from_pretrained(folder))).save_pretrained(folder)
    write(folder / "config.json", config)  # not in the form of transformers 5
    return cls.from_pretrained(folder).eval()


@pytest.mark.parity
@pytest.mark.optimized
@pytest.mark.parametrize("name", ROWS)
def test_loads_and_equals_transformers(name, tokenizers_of, tmp_path):
    """And transformers gives the same for what we save."""
    torch = pytest.importorskip("torch")
    family = FAMILIES[name]
    tokenizer = mj.AutoTokenizer.from_pretrained(tokenizers_of[family.tokenizer])
    theirs = save_copy(tmp_path / "theirs", family, tokenizer)
    ours = getattr(mj, type(theirs).__name__).from_pretrained(tmp_path / "theirs")
    to_48 = {
        "padding": "max_length",
        "truncation": True,
        "max_length": 48,
    }  # one shape compiles once
    batch = tokenizer([*TEXTS, JAPANESE], **to_48, return_tensors="np")
    tensors = {k: torch.tensor(v) for k, v in batch.items()}
    assert (batch["attention_mask"].sum(-1) > 2 * ours.config.window).any()
    with torch.no_grad():
        want = theirs(**tensors)[0]
        ours.save_pretrained(tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours")(**tensors)[0]
    where = batch["attention_mask"] if want.ndim == 3 else None
    out = ours(**batch)
    got = out.last_hidden_state if isinstance(ours, mj.ModernBertModel) else out.logits
    assert relative_error(got, want, where) < 1e-5
    assert relative_error(again, want, where) < 1e-6


@pytest.mark.parity
@pytest.mark.optimized
@pytest.mark.parametrize("name", [
    pytest.param(n, marks=[pytest.mark.matrix] * (n in FURTHER))
    for n, family in FAMILIES.items() if family.pooling
])  # fmt: skip
def test_embeds_as_sentence_transformers(name, tokenizers_of, tmp_path):
    """From the files of their repositories, which release 2 and 3 wrote."""
    st = pytest.importorskip("sentence_transformers")
    family = FAMILIES[name]
    save_copy(tmp_path, family, mj.AutoTokenizer.from_pretrained(tokenizers_of[family.tokenizer]))
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kind = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind + part}
        for i, (path, part) in enumerate(parts.items())
    ]
    write(tmp_path / "modules.json", modules)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 8192, "do_lower_case": False})
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": family.pooling == "cls",
             "pooling_mode_mean_tokens": family.pooling == "mean"}  # fmt: skip
    write(tmp_path / "1_Pooling" / "config.json", flags)
    settings = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write(tmp_path / "config_sentence_transformers.json", settings)
    theirs = st.SentenceTransformer(str(tmp_path), device="cpu")
    ours = mj.Embedder.from_pretrained(tmp_path)
    assert ours.pooling == family.pooling and ours.max_length == 8192
    got = ours.encode(TEXTS, prompt=family.prompt)
    np.testing.assert_allclose(got, theirs.encode(TEXTS, prompt=family.prompt), rtol=0, atol=1e-5)
    if family.prompt:
        texts = [family.prompt + text for text in TEXTS]
        np.testing.assert_allclose(got, theirs.encode(texts), rtol=0, atol=1e-5)


class TestTokenizers:
    """Kinds that are not byte-level: their files load, and the ids are those of the file."""

    texts = (*TEXTS, JAPANESE, "the <mask> has", "a <mask>  rash", "naïve 🩺\n\tfever", " ", "")

    @pytest.mark.parametrize("kind", ["Gemma 2's", "Unigram"])
    def test_ids_are_those_of_the_backend(self, kind, tokenizers_of):
        import tokenizers
        import transformers

        folder = tokenizers_of[kind]
        ours = mj.AutoTokenizer.from_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in self.texts:
            want = backend.encode(text)
            assert ours(text)["input_ids"] == want.ids == theirs(text)["input_ids"]
            assert ours(text, return_offsets_mapping=True)["offset_mapping"] == want.offsets
            assert ours.decode(want.ids) == theirs.decode(want.ids)
        pair = backend.encode(TEXTS[0], JAPANESE).ids
        assert ours(TEXTS[0], JAPANESE)["input_ids"] == pair
        assert any(token in BYTES for token in backend.encode("naïve 🩺").tokens)
        assert ours.decode(ours("naïve 🩺")["input_ids"], skip_special_tokens=True) == "naïve 🩺"
        assert (ours.cls_token, ours.mask_token) == (theirs.cls_token, theirs.mask_token)

    @pytest.mark.parity
    @pytest.mark.optimized
    @pytest.mark.parametrize(
        "name", ["mmBERT", pytest.param("ModernBERT-Ja", marks=pytest.mark.matrix)]
    )
    def test_fill_mask_equals_transformers(self, name, tokenizers_of, tmp_path):
        """With a mask token of another name, and pieces that begin with a space."""
        import transformers

        family = FAMILIES[name]
        tokenizer = mj.AutoTokenizer.from_pretrained(tokenizers_of[family.tokenizer])
        model = save_copy(tmp_path, family, tokenizer)
        theirs = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
        ours = mj.pipeline("fill-mask", model=tmp_path)
        for text in ("the patient has <mask> today", "<mask>はありません。"):
            for got, want in zip(ours(text), theirs(text), strict=True):
                assert got.pop("score") == pytest.approx(want.pop("score"), rel=1e-4)
                assert got == want


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_published(name):
    """The parameters that a row's sizes give, without biases, within 3 %."""
    family = FAMILIES[name]
    vocabulary = (BASE | family.differs)["vocab_size"]
    for hub_id, (millions, layers, d, f, heads) in family.sizes.items():
        count = vocabulary * d + layers * (4 * d * d + 3 * d * f)
        assert count == pytest.approx(millions * 1e6, rel=0.03), hub_id
        assert d % heads == 0


@pytest.mark.parametrize("load", [mj.AutoConfig, mj.ModernBertForMaskedLM, mj.ModernBertModel])
def test_the_decoders_are_refused_by_name(load, tmp_path):
    decoder = {
        "model_type": "modernbert-decoder",
        "architectures": ["ModernBertDecoderForCausalLM"],
    }
    write(tmp_path / "config.json", BASE | decoder)
    with pytest.raises(ValueError, match="model_type: .* got 'modernbert-decoder'; only Modern"):
        load.from_pretrained(tmp_path)


def table() -> list[str]:
    """The rows of the guide's table."""
    rows = []
    for name, family in FAMILIES.items():
        ids = ", ".join(f"`{hub_id}`" for hub_id in family.sizes)
        sizes = ", ".join(dict.fromkeys(f"{size[0]}M" for size in family.sizes.values()))
        fields = [f"`{k}` {v}" for k, v in family.differs.items() if k not in HIDDEN]
        rows.append(
            f"| {name} | {ids} | {sizes} | {', '.join(fields) or 'nothing'} | {family.tokenizer} | "
            f"{family.loads_as} |"
        )
    ids = ", ".join(f"`{hub_id}`" for hub_id in DECODERS)
    rows.append(f"| Ettin decoders | {ids} | 17M to 1B | `model_type` | ModernBERT's | refused |")
    return rows


def test_the_guide_has_this_table():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| family | hub ids | parameters | differs in | tokenizer | loads as |")
    assert lines[start + 2 : start + 3 + len(FAMILIES)] == table()
    assert lines[start + 3 + len(FAMILIES)] == ""
