"""The tokenizer against transformers' AutoTokenizer, and against literal ids that it made."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st

from modernbert_jax.tokenizer import AutoTokenizer, Tokenizer
from train.corpora.build.bpe import train_bpe

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

TEXTS = (
    "The quick ward nurse checks the chart, then the chart checks the nurse.",
    "It's the patient's third visit; they'll check the ward's charts at 10:45.",
    "Dose: 500 mg twice a day.\n\nPlan: check the dose, then check the chart.",
    "Fièvre à 39 °C, naïve café, and a chart of the dose.",
)
# Text that breaks tokenizers which are nearly right.
ODD = (
    "",
    " ",
    "\n",
    "\r\n\t",
    "a",
    "The ward is [MASK].",
    "The ward is[MASK].",
    "[MASK][MASK] [MASK]",
    "[CLS] a [SEP] b [PAD][UNK]",
    "cafe\u0301 and café",
    "naïve 39 °C ½ Ⅳ ﬁ",
    "日本語の医療記録",
    "🙂👩🏽‍⚕️",
    "مرحبا بالعالم",
    "a\x00b\x07c",
    "     five    four   three  two one",
    "x" * 300,
    "The quick ward. " * 200,
    "don't DON'T I'll we've it's 's",
    "line one\nline two\r\nline three\n\n\n",
    "|||IP_ADDRESS||| <|endoftext|> [unused0]",
    "1234567890 3.14e-10 #$%^&*()",
)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_folder):
    """(transformers' tokenizer, ours) on the tiny files and on the real ones where they are."""
    transformers = pytest.importorskip("transformers")
    folders = [tiny_folder] + ([REAL] if REAL.is_dir() else [])
    return [
        (transformers.AutoTokenizer.from_pretrained(str(f)), Tokenizer.from_pretrained(f))
        for f in folders
    ]


def same(theirs, ours, *args, **options):
    expected, got = theirs(*args, **options), ours(*args, **options)
    assert dict(got) == dict(expected)
    for row in range(len(expected.encodings)):
        assert got.tokens(row) == expected.tokens(row)
        assert got.word_ids(row) == expected.word_ids(row)
        assert got.sequence_ids(row) == expected.sequence_ids(row)


# Against transformers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 9},
        {"truncation": False, "max_length": 9},
        {"max_length": 9},
        {"truncation": True},
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 16},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"padding": True, "padding_side": "left", "truncation": True, "max_length": 7},
        {"padding": True, "truncation": True, "max_length": 2},
        {"return_attention_mask": False},
        {"return_special_tokens_mask": True, "return_offsets_mapping": True, "padding": True},
    ],
)
def test_every_option_gives_what_transformers_gives(pairs, options):
    for theirs, ours in pairs:
        same(theirs, ours, list(ODD), **options)
        for text in ODD:
            same(theirs, ours, text, **options)


@pytest.mark.parametrize("strategy", [True, "longest_first", "only_first", "only_second", False])
@pytest.mark.parametrize("max_length", [9, 16, 40])
def test_pairs_are_truncated_as_transformers_does(pairs, strategy, max_length):
    texts = ["The ward is quick.", "a b c d e f g h i j", "chart " * 30, "chart " * 12]
    others = ["They check the ward.", "chart " * 30, "no", "dose " * 12]
    options = {"truncation": strategy, "max_length": max_length, "return_offsets_mapping": True}
    one_side = {"only_first": 0, "only_second": 1}.get(strategy)
    for theirs, ours in pairs:
        for pair in zip(texts, others, strict=True):
            other = None if one_side is None else pair[1 - one_side]
            if other and len(theirs.tokenize(other)) + 3 >= max_length:
                # Cutting one text cannot be enough, and neither library returns anything.
                with pytest.raises(ValueError, match="the other alone is too long"):
                    ours(*pair, **options)
            else:
                same(theirs, ours, *pair, **options)
        if one_side is None:
            same(theirs, ours, texts, others, **options)
            same(theirs, ours, list(zip(texts, others, strict=True)), **options)
            same(theirs, ours, texts[0], "", **options)


def test_words_are_tokenized_as_transformers_does(pairs):
    words = [["New", "York", "ward", ","], [], ["", "a", " b", "日本"], ["[MASK]", "x y"]]
    for theirs, ours in pairs:
        for options in ({}, {"padding": True}, {"truncation": True, "max_length": 4}):
            same(theirs, ours, words, is_split_into_words=True, **options)
            if "max_length" in options:
                options = {**options, "max_length": 8}
            same(theirs, ours, words, words[::-1], is_split_into_words=True, **options)
        same(theirs, ours, words[0], is_split_into_words=True)
        same(theirs, ours, words[0], words[2], is_split_into_words=True)
        same(theirs, ours, [], is_split_into_words=True)


fragments = st.sampled_from(
    ["[MASK]", " [MASK]", "[SEP]", "[PAD]", "  ", "\n", "é", "e\u0301", "the ward", "'s", "|||"]
)
odd_text = st.lists(fragments | st.text(max_size=12), max_size=8).map("".join)


@given(
    texts=st.lists(odd_text, min_size=1, max_size=4),
    others=st.none() | st.lists(odd_text, min_size=4, max_size=4),
    padding=st.sampled_from([False, True, "max_length"]),
    max_length=st.integers(3, 24),
    truncation=st.booleans(),
    special=st.booleans(),
    side=st.sampled_from(["left", "right"]),
)
def test_any_text_gives_what_transformers_gives(
    pairs, texts, others, padding, max_length, truncation, special, side
):
    for theirs, ours in pairs:
        same(
            theirs,
            ours,
            texts,
            others and others[: len(texts)],
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            add_special_tokens=special,
            padding_side=side,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )


@given(text=odd_text)
def test_any_ids_decode_as_in_transformers(pairs, text):
    for theirs, ours in pairs:
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
            expected = theirs.convert_ids_to_tokens(ids, skip_special_tokens=skip)
            assert ours.convert_ids_to_tokens(ids, skip_special_tokens=skip) == expected
        assert ours.encode(text) == theirs.encode(text)
        assert ours.tokenize(text) == theirs.tokenize(text)
        tokens = theirs.tokenize(text)
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)


def test_attributes_are_those_of_transformers(pairs):
    names = [f"{n}_token{i}" for n in "bos eos unk sep pad cls mask".split() for i in ("", "_id")]
    names += ["all_special_ids", "all_special_tokens", "vocab_size", "model_max_length"]
    names += ["padding_side", "truncation_side"]
    for theirs, ours in pairs:
        assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
        assert len(ours) == len(theirs)
        assert ours.get_vocab() == theirs.get_vocab()
        assert [ours.num_special_tokens_to_add(p) for p in (False, True)] == [
            theirs.num_special_tokens_to_add(p) for p in (False, True)
        ]
        for token in ("[MASK]", "no such token"):
            assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)
        assert ours.convert_ids_to_tokens(len(ours)) is theirs.convert_ids_to_tokens(len(theirs))


def test_sides_set_as_attributes_act_as_in_transformers(pairs):
    for theirs, ours in pairs:
        theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
        for tokenizer in (theirs, ours):
            tokenizer.padding_side = tokenizer.truncation_side = "left"
            tokenizer.model_max_length = 11
        same(theirs, ours, list(ODD), padding=True, truncation=True)
        same(theirs, ours, list(ODD), padding="max_length", truncation=True)
        same(theirs, ours, "The ward is [MASK] and quick", truncation=True, max_length=5)


def test_settings_baked_into_tokenizer_json_are_read_as_transformers_reads_them(
    pairs, tiny_folder, tmp_path
):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 6},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["padding_side"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.padding_side == theirs.padding_side == "left"
    same(theirs, ours, "The ward is quick and quick.")
    same(theirs, ours, ["The ward", "a"], padding=True)


@pytest.mark.parametrize("add_prefix_space", [None, True])
def test_transformers_loads_what_save_pretrained_writes(pairs, tmp_path, add_prefix_space):
    transformers = pytest.importorskip("transformers")
    sources = [REAL] if REAL.is_dir() else []
    for i, source in enumerate([*sources, pairs[0][0].name_or_path]):
        ours = Tokenizer.from_pretrained(
            source, add_prefix_space=add_prefix_space, truncation_side="left", model_max_length=77
        )
        ours.padding_side = "left"
        written = ours.save_pretrained(tmp_path / str(i))
        assert sorted(Path(path).name for path in written) == sorted(FILES)
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / str(i)))
        assert (theirs.padding_side, theirs.truncation_side) == ("left", "left")
        assert theirs.model_max_length == 77
        assert theirs.mask_token_id == ours.mask_token_id
        same(theirs, ours, list(ODD), padding=True, truncation=True)
        same(theirs, ours, [["New", "York"], ["x", "[MASK]"]], is_split_into_words=True)
        again = Tokenizer.from_pretrained(tmp_path / str(i))
        same(again, ours, list(ODD), padding=True, truncation=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real tokenizer beside the checkout")
def test_the_real_files_are_saved_as_they_were(tmp_path):
    Tokenizer.from_pretrained(REAL).save_pretrained(tmp_path)
    assert (tmp_path / FILES[0]).read_bytes() == (REAL / FILES[0]).read_bytes()
    for name in FILES[1:]:
        assert json.loads((tmp_path / name).read_text()) == json.loads((REAL / name).read_text())


# Without transformers: ids that transformers 5.23 gave for the tiny tokenizer


LITERAL = {
    "": [1, 2],
    "The quick chart is [MASK].": [1, 297, 225, 315, 308, 272, 225, 306, 4, 18, 2],
    "the ward's dose": [1, 88, 261, 286, 274, 284, 2],
    "Fièvre\n\n 39 °C": [1, 294, 132, 106, 90, 317, 203, 203, 225, 290, 225, 131, 113, 39, 2],
    "[SEP] check[MASK]": [1, 2, 271, 4, 2],
}


@pytest.mark.parametrize("text", LITERAL)
def test_literal_ids(tiny, text):
    assert tiny(text)["input_ids"] == LITERAL[text]


def test_literal_batch(tiny):
    got = tiny(["The ward", "a"], ["is quick", "b"], padding=True, return_tensors="np")
    assert got.input_ids.tolist() == [
        [1, 297, 286, 2, 306, 225, 315, 308, 2],
        [1, 69, 2, 70, 2, 3, 3, 3, 3],
    ]
    assert got.attention_mask.tolist() == [[1] * 9, [1] * 5 + [0] * 4]


# Calling convention


def test_an_encoding_is_a_mapping_for_a_model(tiny):
    def model(input_ids, attention_mask):
        return input_ids.shape, attention_mask.shape

    encoding = tiny(["The ward", "a"], padding=True, return_tensors="jax")
    length = encoding.input_ids.shape[1]
    assert model(**encoding) == ((2, length), (2, length))
    assert encoding["input_ids"] is encoding.input_ids
    assert list(encoding) == ["input_ids", "attention_mask"]
    assert isinstance(encoding.input_ids, jax.Array) and encoding.input_ids.dtype == jnp.int32
    with pytest.raises(AttributeError, match="no 'labels'.*input_ids, attention_mask"):
        _ = encoding.labels
    encoding["labels"] = [1, 2]
    assert encoding.labels == [1, 2]
    assert pickle.loads(pickle.dumps(encoding)).word_ids(0) == encoding.word_ids(0)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_np_and_pt_are_numpy_int64(tiny, kind):
    encoding = tiny("The ward", return_tensors=kind, return_offsets_mapping=True)
    assert type(encoding.input_ids) is np.ndarray and encoding.input_ids.dtype == np.int64
    assert encoding.input_ids.tolist() == [tiny("The ward").input_ids]
    assert encoding.offset_mapping.shape == (*encoding.input_ids.shape, 2)


def test_an_empty_batch_is_empty(tiny):
    assert dict(tiny([])) == {"input_ids": [], "attention_mask": []}
    assert tiny([], padding=True, return_tensors="np").input_ids.shape == (0, 0)


def test_decode_takes_every_kind_of_ids(tiny):
    ids = tiny("The ward is quick.", add_special_tokens=False).input_ids
    forms = [ids, tuple(ids), np.array(ids), jnp.array(ids), list(jnp.array(ids))]
    assert [tiny.decode(form) for form in forms] == ["The ward is quick."] * len(forms)
    one = tiny.convert_tokens_to_ids("T")
    forms = [one, [one], np.int64(one), np.array(one), jnp.array(one)]
    assert [tiny.decode(form) for form in forms] == ["T"] * len(forms)
    rows = tiny(["The ward", "a"], padding=True, return_tensors="jax").input_ids
    assert tiny.decode(rows, skip_special_tokens=True) == ["The ward", "a"]
    assert tiny.batch_decode(rows, skip_special_tokens=True) == ["The ward", "a"]
    assert tiny.decode([]) == ""


def test_add_prefix_space_is_a_space_before_each_word(tiny_folder):
    plain = Tokenizer.from_pretrained(tiny_folder)
    spaced = Tokenizer.from_pretrained(tiny_folder, add_prefix_space=True)
    assert spaced("the ward").input_ids == plain(" the ward").input_ids
    assert spaced("the ward").input_ids != plain("the ward").input_ids
    words = ["the", "ward", ",", "quick"]
    expected = plain([f" {word}" for word in words], is_split_into_words=True)
    got = spaced(words, is_split_into_words=True)
    assert got.input_ids == expected.input_ids and got.word_ids() == expected.word_ids()
    assert spaced.fingerprint != plain.fingerprint
    same = Tokenizer.from_pretrained(tiny_folder, add_prefix_space=False)
    assert same.fingerprint == plain.fingerprint


def test_fingerprint_is_the_sha256_of_the_file_and_survives_saving(tiny, tiny_folder, tmp_path):
    content = (tiny_folder / "tokenizer.json").read_bytes()
    assert tiny.fingerprint == hashlib.sha256(content).hexdigest()
    # Any layout of the file is kept as it is: compact, and with CRLF.
    (tmp_path / "tokenizer.json").write_bytes(content.replace(b"\n", b"\r\n"))
    crlf = Tokenizer.from_pretrained(tmp_path)
    crlf.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == content.replace(b"\n", b"\r\n")
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == crlf.fingerprint
    assert crlf.fingerprint != tiny.fingerprint


def test_a_lone_tokenizer_json_has_the_usual_special_tokens(tiny, tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert alone.all_special_ids == tiny.all_special_ids == [0, 2, 3, 1, 4]
    assert alone("x", padding="max_length", max_length=6) == tiny(
        "x", padding="max_length", max_length=6
    )


def test_special_tokens_map_is_read_where_the_config_is_silent(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "[CLS]"}}')
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.bos_token_id, loaded.cls_token) == ("[CLS]", 1, None)


def test_from_tokenizers_makes_plain_entries_special():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "<m>": 2, "ward": 3}, "[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert backend.encode("ward <m>").ids == [3, 0, 0, 0]
    ours = Tokenizer.from_tokenizers(
        backend, mask_token="<m>", pad_token="[PAD]", model_max_length=4, padding_side="left"
    )
    assert ours("ward <m>", padding="max_length").input_ids == [1, 1, 3, 2]
    backend.add_tokens(["<new>"])
    added = Tokenizer.from_tokenizers(backend, unk_token="[UNK]")
    assert (added.vocab_size, len(added), added("<new>").input_ids) == (4, 5, [4])
    assert backend.encode("ward <m>").ids == [3, 0, 0, 0]  # the original is as it was
    with pytest.raises(TypeError, match="unknown special token 'masc_token'"):
        Tokenizer.from_tokenizers(backend, masc_token="<m>")
    with pytest.raises(ValueError, match="'<x>' of the config is not in the vocabulary"):
        Tokenizer.from_tokenizers(backend, mask_token="<x>")


def test_threads_do_not_mix_their_settings(tiny):
    def work(i):
        options = [
            {},
            {"truncation": True, "max_length": 5},
            {"padding": "max_length", "max_length": 60},
        ]
        return [len(ids) for ids in tiny(["The ward is quick."] * 5, **options[i % 3]).input_ids]

    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(work, range(300)))
    plain = len(tiny("The ward is quick.").input_ids)
    assert lengths == [[plain] * 5, [5] * 5, [60] * 5] * 100


def test_it_can_be_pickled_and_copied(tiny):
    for other in (pickle.loads(pickle.dumps(tiny)), copy.deepcopy(tiny)):
        assert other("The ward is [MASK].") == tiny("The ward is [MASK].")
        assert other.fingerprint == tiny.fingerprint


# Training


def test_training_is_the_same_every_time(tiny):
    code = (
        "from train.corpora.build.bpe import train_bpe; import ast, sys; "
        "print(train_bpe(ast.literal_eval(sys.argv[1]), 320).fingerprint)"
    )
    root = Path(__file__).resolve().parents[1]
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, repr(TEXTS)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, parallel in (("1", "false"), ("2", "true"))
    }
    assert prints == {tiny.fingerprint}


def test_a_small_corpus_gives_a_smaller_vocabulary():
    small = train_bpe(iter(["ab ab"]), 1000)
    # 5 special tokens, 256 bytes, and the merges "ab" and " ab".
    assert len(small) == 5 + 256 + 2
    assert small.decode(small("日本 🙂\x00").input_ids, skip_special_tokens=True) == "日本 🙂\x00"
    with pytest.raises(ValueError, match="must be 261 or more, got 260"):
        train_bpe(["ab"], 260)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real tokenizer beside the checkout")
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


# The hub's cache, and refusals


def hub_cache(folder: Path, source: Path, names=FILES) -> Path:
    repo = folder / "models--org--bert"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name in names:
        shutil.copy(source / name, snapshot / name)
    return folder


def test_a_cached_hub_id_loads_without_the_hub(tiny, tiny_folder, tmp_path):
    cache = hub_cache(tmp_path, tiny_folder)
    for revision in (None, "main", "0" * 40):
        loaded = AutoTokenizer.from_pretrained(
            "org/bert", cache_dir=cache, local_files_only=True, revision=revision
        )
        assert loaded.fingerprint == tiny.fingerprint and loaded.mask_token_id == 4
    with pytest.raises(FileNotFoundError, match="'org/other' is no local folder.*not in the hub"):
        AutoTokenizer.from_pretrained("org/other", cache_dir=cache, local_files_only=True)


def test_the_hub_variables_are_honoured(tiny, tiny_folder, tmp_path):
    code = (
        "from modernbert_jax.tokenizer import AutoTokenizer as A; "
        "print(A.from_pretrained('org/bert').fingerprint); A.from_pretrained('org/other')"
    )
    cache = hub_cache(tmp_path, tiny_folder, ("tokenizer.json",))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == tiny.fingerprint
    last = done.stderr.strip().splitlines()[-1]
    assert "'org/other' is no local folder" in last and "hub is switched off" in last


def test_files_that_cannot_be_used_are_named(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in the folder"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no local folder"):
        Tokenizer.from_pretrained("/no/such/folder/here")
    for name in FILES:
        shutil.copy(tiny_folder / name, tmp_path)
    for name, content in (
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\udcff"),
        ("tokenizer_config.json", "[1]"),
        ("special_tokens_map.json", "{"),
        ("tokenizer_config.json", '{"padding_side": "middle"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "<new>"}}}'),
    ):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError) as refusal:
            Tokenizer.from_pretrained(tmp_path)
        assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)
        shutil.copy(tiny_folder / name, tmp_path)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((None,), {}, "text 0 must be a str or a pair of them, got NoneType"),
        ((["a", 5],), {}, "text 1 must be a str or a pair of them, got int"),
        ((["a", ["b"]],), {}, "text 1 must be a str or a pair of them, got list"),
        (("a b",), {"is_split_into_words": True}, "text 0 must be a list of words"),
        ((["a"], "b"), {}, "a batch of 1 texts needs as many in text_pair, got str"),
        ((["a", "b"], ["c"]), {}, "a batch of 2 texts needs as many in text_pair, got 1"),
        (("\ud800",), {}, "half of a surrogate pair"),
        (("a",), {"padding": "yes"}, "padding must be one of longest.*got 'yes'"),
        (("a",), {"padding": "max_length"}, "needs max_length"),
        (("a",), {"truncation": "yes"}, "truncation must be one of"),
        (("a",), {"truncation": True, "max_length": 1}, "max_length=1 has no room for 2 special"),
        (("a", "b"), {"max_length": 2}, "max_length=2 has no room for 3 special"),
        (("a",), {"padding_side": "top"}, "padding_side must be one of"),
        (("a",), {"return_tensors": "tf"}, "return_tensors must be one of np, jax, pt; got 'tf'"),
        ((["a", "the ward"],), {"return_tensors": "np"}, "make no array: pass padding=True"),
        (
            ("a",),
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            "max_length=9 is not a multiple of pad_to_multiple_of=8",
        ),
    ],
)
def test_bad_input_gets_one_line(tiny, args, options, message):
    with pytest.raises((TypeError, ValueError), match=message) as refusal:
        tiny(*args, **options)
    assert "\n" not in str(refusal.value)
    # And nothing of it stays behind in the backend.
    assert tiny("a").input_ids == [1, tiny.convert_tokens_to_ids("a"), 2]


def test_negative_ids_are_refused(tiny):
    with pytest.raises(ValueError, match="token ids are 0 or more, got -100"):
        tiny.decode([1, -100, 2])
