"""What modernbert_jax adds to transformers' tokenizers, and the training of a byte-level BPE."""

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from modernbert_jax import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import copy_tokenizer
from modernbert_jax.tokenizer import (
    FILES as ALL_FILES,
    absent_ids,
    backend_json,
    fingerprint,
    from_backend,
    max_tokens,
    vocab_size,
)
from train.corpora.build import bpe
from train.corpora.build.bpe import fewest_documents, train_bpe

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "tokenizer"
FILES = ("tokenizer.json", "tokenizer_config.json")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real tokenizer beside the checkout")

TEXTS = (
    "The quick ward nurse checks the chart, then the chart checks the nurse.",
    "It's the patient's third visit; they'll check the ward's charts at 10:45.",
    "Dose: 500 mg twice a day.\n\nPlan: check the dose, then check the chart.",
    "Fièvre à 39 °C, naïve café, and a chart of the dose.",
)


@pytest.fixture(scope="module")
def tiny():
    return train_bpe(TEXTS * 2, 320)  # a word of one text is not trained on


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


# Ids that transformers 5.23 gave.

LITERAL = {
    "": [1, 2],
    "The quick chart is [MASK].": [1, 297, 225, 315, 308, 272, 225, 306, 4, 18, 2],
    "the ward's dose": [1, 88, 261, 286, 274, 284, 2],
    "Fièvre\n\n 39 °C": [1, 294, 132, 106, 90, 317, 203, 203, 225, 290, 225, 131, 113, 39, 2],
    "[SEP] check[MASK]": [1, 2, 271, 4, 2],
}


@pytest.mark.parametrize("text", LITERAL)
def test_literal_ids(tiny, tiny_folder, text):
    assert tiny(text)["input_ids"] == LITERAL[text]
    assert AutoTokenizer.from_pretrained(tiny_folder)(text)["input_ids"] == LITERAL[text]


@needs_real
def test_the_real_tokenizer():
    import transformers

    ours = AutoTokenizer.from_pretrained(REAL)
    theirs = transformers.AutoTokenizer.from_pretrained(str(REAL))
    assert (ours.cls_token_id, ours.sep_token_id, ours.pad_token_id) == (50281, 50282, 50283)
    assert (ours.unk_token_id, ours.mask_token_id, len(ours)) == (50280, 50284, 50368)
    for text in TEXTS:
        assert dict(ours(text)) == dict(theirs(text))
    assert list(ours("a", return_tensors="np")) == ["input_ids", "attention_mask"]


# Prefix space


@pytest.mark.parametrize("source", ["tiny", pytest.param("real", marks=needs_real), "sequence"])
def test_add_prefix_space_puts_a_space_before_each_word(tiny_folder, tmp_path, source):
    folder = REAL if source == "real" else tiny_folder
    if source == "sequence":
        folder = tmp_path / "sequence"
        shutil.copytree(tiny_folder, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        digits = {"type": "Digits", "individual_digits": False}
        steps = [digits, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    plain = AutoTokenizer.from_pretrained(folder)
    spaced = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    assert spaced("the ward").input_ids == plain(" the ward").input_ids
    assert spaced("the ward").input_ids != plain("the ward").input_ids
    words = ["the", "ward", ",", "quick"]
    expected = plain([f" {word}" for word in words], is_split_into_words=True)
    got = spaced(words, is_split_into_words=True)
    assert got.input_ids == expected.input_ids and got.word_ids() == expected.word_ids()
    # The setting is saved, and can be taken back.
    spaced.save_pretrained(tmp_path / "saved")
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "saved")) == fingerprint(spaced)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", add_prefix_space=False)
    assert fingerprint(again) == fingerprint(plain) != fingerprint(spaced)


def test_add_prefix_space_needs_a_byte_level_pre_tokenizer(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    from_backend(backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="add_prefix_space: expected a tokenizer with a ByteLevel"):
        AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)


# Fingerprints


def test_the_fingerprint_is_of_what_decides_the_ids(tiny, tiny_folder, tmp_path):
    content = json.loads((tiny_folder / "tokenizer.json").read_text())
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    assert fingerprint(tiny) == hashlib.sha256(text.encode()).hexdigest()
    # Neither loading, saving, nor the layout of the file changes it.
    shutil.copytree(tiny_folder, tmp_path / "compact")
    (tmp_path / "compact" / "tokenizer.json").write_text(json.dumps(content))
    compact = AutoTokenizer.from_pretrained(tmp_path / "compact")
    compact.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert fingerprint(tiny) == fingerprint(compact) == fingerprint(again)
    # A merge less is another tokenizer.
    content["model"]["merges"].pop()
    (tmp_path / "compact" / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "compact")) != fingerprint(tiny)


def test_settings_of_a_call_reach_neither_fingerprint_nor_workers(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    before = fingerprint(tokenizer)
    cut = tokenizer(["The ward is quick.", "a"], padding=True, truncation=True, max_length=4)
    assert [len(ids) for ids in cut.input_ids] == [4, 4]
    assert fingerprint(tokenizer) == before
    worker = tokenizers.Tokenizer.from_str(backend_json(tokenizer))
    ids = [encoding.ids for encoding in worker.encode_batch(["The ward is quick.", "a"])]
    assert ids == tokenizer(["The ward is quick.", "a"]).input_ids and len(ids[0]) > 4


# Folders


def test_an_orbax_checkpoint_holds_its_tokenizer(tiny, tiny_folder, tmp_path):
    from flax import nnx

    from modernbert_jax.checkpoint.orbax import save_orbax
    from modernbert_jax.checkpoint.params import flatten

    config = ModernBertConfig.tiny(vocab_size=len(tiny), num_hidden_layers=1)
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    save_orbax(
        tmp_path / "orbax", architecture=type(model).__name__, config=config,
        params=flatten(model), tokenizer_dir=tiny_folder,
    )  # fmt: skip
    loaded = AutoTokenizer.from_pretrained(tmp_path / "orbax")
    assert fingerprint(loaded) == fingerprint(tiny) and loaded.mask_token_id == 4


def test_tokenizer_json_alone_is_enough(tiny, tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    names = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    assert [getattr(loaded, f"{name}_id") for name in names] == [0, 1, 2, 3, 4]
    assert sorted(loaded.all_special_ids) == [0, 1, 2, 3, 4] and loaded.bos_token is None
    assert fingerprint(loaded) == fingerprint(tiny)
    assert list(loaded("a")) == ["input_ids", "attention_mask"]
    # A file that names special tokens decides alone.
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "[CLS]"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.cls_token) == (1, None)


def test_transformers_loads_what_is_saved(tiny, tiny_folder):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(tiny_folder))
    for text in LITERAL:
        assert dict(theirs(text)) == dict(tiny(text))


NOTE = {"content": "<note>", "lstrip": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"extra_special_tokens": ["<note>", "<plan>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"note_token": "<note>"}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<note>"]}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": NOTE | {"normalized": False}}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<note>"]}),
        ("added_tokens.json", {"<note>": 320}),
    ],
)
def test_special_tokens_beside_tokenizer_json(tiny, tiny_folder, tmp_path, name, content):
    """In every file that transformers reads; also in a copy of the files, and saved again."""
    import transformers

    shutil.copytree(tiny_folder, tmp_path / "a")
    path = tmp_path / "a" / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | content))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    ours = AutoTokenizer.from_pretrained(tmp_path / "a")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "a", tmp_path / "copy")
    ours.save_pretrained(tmp_path / "saved")
    copies = [AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("copy", "saved")]
    text = "the <note> is [MASK] <plan> quick[SEP]"
    assert theirs(text).input_ids != tiny(text).input_ids
    for tokenizer in (ours, *copies):
        assert tokenizer(text).input_ids == theirs(text).input_ids
        assert tokenizer.all_special_ids == theirs.all_special_ids


def test_ids_may_have_gaps(tiny, tiny_folder, tmp_path):
    assert vocab_size(tiny) == len(tiny) == 320 and absent_ids(tiny) == ()
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 330
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    gaps = AutoTokenizer.from_pretrained(tmp_path)
    assert gaps.convert_tokens_to_ids(last) == 330
    assert (len(gaps), vocab_size(gaps), absent_ids(gaps)) == (320, 331, tuple(range(319, 330)))


@pytest.mark.parametrize(
    ("own", "limit", "expected"),
    [(16, 64, 16), (16.0, 64, 16), (100, 64, 64), (None, 64, 64), (10**30, 64, 64)],
)
def test_the_smaller_limit_holds(tiny_folder, tmp_path, own, limit, expected):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": own}))
    assert max_tokens(AutoTokenizer.from_pretrained(tmp_path), limit) == expected


@pytest.mark.parametrize("own", [-1, 0, "16", True])
def test_a_limit_that_is_none_is_refused(tiny, monkeypatch, own):
    monkeypatch.setattr(tiny, "model_max_length", own)
    with pytest.raises(ValueError, match="model_max_length: expected a number from 1 on, or null"):
        max_tokens(tiny, 64)


def test_a_limit_without_room_for_text_is_refused(tiny, monkeypatch):
    """[CLS] a [SEP] b [SEP]: transformers would silently truncate nothing."""
    assert len(tiny("quick", "ward", truncation="longest_first", max_length=2).input_ids) > 4
    assert max_tokens(tiny, 4) == 4
    with pytest.raises(ValueError, match="max_length: expected at least 4 tokens, got 3 "):
        max_tokens(tiny, 3)
    monkeypatch.setattr(tiny, "model_max_length", 2)
    with pytest.raises(ValueError, match="max_length: expected at least 4 tokens, got 2 "):
        max_tokens(tiny, 64)


def test_code_beside_a_tokenizer_is_not_run(tiny, tiny_folder, tmp_path):
    folder = tmp_path / "custom"
    shutil.copytree(tiny_folder, folder)
    marker = tmp_path / "ran"
    (folder / "custom.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Custom(PreTrainedTokenizerFast): pass\n"
    )
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {"model_type": "modernbert"}
        content["tokenizer_class"] = "Custom"
        content["auto_map"] = {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}
        path.write_text(json.dumps(content))
    import transformers

    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is transformers.PreTrainedTokenizerFast and not marker.exists()
    assert loaded("the ward").input_ids == tiny("the ward").input_ids
    # The same folder does run its code for someone who asks transformers to.
    transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_files_that_cannot_be_used_are_named(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, found none"):
        AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="/no/such/folder/here: expected a folder or a hub"):
        AutoTokenizer.from_pretrained("/no/such/folder/here")
    for name, content in (
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\udcff"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"padding_side": "middle"}'),
    ):
        shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError) as refusal:
            AutoTokenizer.from_pretrained(tmp_path)
        assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


# Hub ids


def hub_cache(folder: Path, source: Path, names=FILES) -> Path:
    repo = folder / "models--org--bert"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name in names:
        shutil.copy(source / name, snapshot / name)
    return folder


def test_every_file_is_asked_of_the_hub(monkeypatch, tiny_folder):
    import huggingface_hub

    from modernbert_jax.checkpoint.hub import resolve

    asked = []

    def snapshot_download(name, *, allow_patterns, **hub):
        asked.append(set(allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    AutoTokenizer.from_pretrained("org/bert")
    resolve("org/bert")
    assert all(patterns >= {*ALL_FILES, "added_tokens.json"} for patterns in asked)
    assert len(asked) == 2


def test_a_cached_hub_id_loads_without_the_hub(tiny, tiny_folder, tmp_path):
    cache = hub_cache(tmp_path, tiny_folder)
    for revision in (None, "main", "0" * 40):
        loaded = AutoTokenizer.from_pretrained(
            "org/bert", cache_dir=cache, local_files_only=True, revision=revision
        )
        assert fingerprint(loaded) == fingerprint(tiny) and loaded.mask_token_id == 4
    with pytest.raises(
        FileNotFoundError, match="org/other: expected a folder or a hub id"
    ) as raised:
        AutoTokenizer.from_pretrained("org/other", cache_dir=cache, local_files_only=True)
    assert "\n" not in str(raised.value)


def test_hub_variables_are_respected_and_imports_are_lazy(tiny, tiny_folder, tmp_path):
    code = (
        "import sys; from modernbert_jax.tokenizer import AutoTokenizer as A, fingerprint; "
        "print([name in sys.modules for name in ('transformers', 'tokenizers', 'torch')]); "
        "print(fingerprint(A.from_pretrained('org/bert'))); print('torch' in sys.modules)"
    )
    cache = hub_cache(tmp_path, tiny_folder, ("tokenizer.json",))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:3] == ["[False, False, False]", fingerprint(tiny), "False"]


# Training


def test_training_is_the_same_every_time(tiny):
    code = (
        "from train.corpora.build.bpe import train_bpe; import ast, sys; "
        "from modernbert_jax.tokenizer import fingerprint; "
        "print(fingerprint(train_bpe(ast.literal_eval(sys.argv[1]) * 2, 320)))"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, repr(TEXTS)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, parallel in (("1", "false"), ("2", "true"))
    }
    assert prints == {fingerprint(tiny)}


def test_a_small_corpus_gives_a_smaller_vocabulary():
    small = train_bpe(iter(["ab ab"]), 1000)
    # 5 special tokens, 256 bytes, and the merges "ab" and " ab".
    assert len(small) == 5 + 256 + 2
    assert small.decode(small("日本 🙂\x00").input_ids, skip_special_tokens=True) == "日本 🙂\x00"
    with pytest.raises(ValueError, match="must be 261 or more, got 260"):
        train_bpe(["ab"], 260)


@pytest.mark.parametrize(("notes", "least"), [(301, 10), (100, 10), (50, 5), (3, 2), (1, 1)])
def test_a_name_in_few_notes_is_no_token(notes, least):
    """No token has more of a word in too few documents than the frequent words give."""
    common = "Seen today: fever, cough; the lungs are clear and the plan is rest."
    names = ["Zzyqname"] * (least - 1), ["Frequent"] * least  # one document each, alternately
    texts = [common] * notes
    for name in names:
        for i, word in enumerate(name):
            texts[i] += f" {word} {word}, {word}{word}."
    learned = set(train_bpe(iter(texts), 4096).get_vocab())
    assert {"\u0120fever", "\u0120Frequent", "\u0120FrequentFrequent"} <= learned
    words = re.findall(r"\w+", f"{common} FrequentFrequent")
    parts = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 1, len(w) + 1)}
    plain = {token.removeprefix("\u0120") for token in learned if not token.startswith("[")}
    assert {p for p in plain if len(p) > 1 and p.isalpha() and p.isascii()} <= parts
    assert fewest_documents(notes) == least


PARTS = "a B é e\u0301 's 're ' 1 2 - . \u00a0 日 🙂 \u3000 \x0b \n \t".split(" ") + [" "] * 6


@hypothesis.given(st.lists(st.sampled_from(PARTS), max_size=30))
def test_words_are_those_of_the_pre_tokenizer(parts):
    """They are found part by part, and counted as in the text as a whole."""
    text, nfc = "".join(parts), tokenizers.normalizers.NFC()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = collections.Counter(bpe._frequent_words([text, text], nfc, byte_level))
    whole = byte_level.pre_tokenize_str(nfc.normalize_str(text)) * 2
    assert found == collections.Counter(word for word, _ in whole)


@needs_real
def test_training_keeps_the_pipeline_of_the_real_tokenizer(tiny):
    real = json.loads((REAL / "tokenizer.json").read_text())
    ours = json.loads(tiny.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        assert ours[part] == real[part]
    for part in ("single", "pair"):
        assert ours["post_processor"][part] == real["post_processor"][part]
    named = {t["content"]: {**t, "id": 0} for t in real["added_tokens"]}
    assert [{**t, "id": 0} for t in ours["added_tokens"]] == [
        named[t["content"]] for t in ours["added_tokens"]
    ]
    assert {**ours["model"], "vocab": 0, "merges": 0} == {**real["model"], "vocab": 0, "merges": 0}
