"""Folders that somebody else made: each mutation loads, or is refused with one printable line."""

import base64
import copy
import json
import pathlib
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from hypothesis import HealthCheck, given, settings, strategies as st

import modernbert_jax as mj
from convert import files as convert_files, flexbert, torch_file
from modernbert_jax.card import model_card
from modernbert_jax.checkpoint.hf import SafetensorsFolder, hf_to_params, params_to_hf, write_hf
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.inference.embedder import Embedder
from modernbert_jax.tokenizer import AutoTokenizer, from_backend
from modernbert_jax.untrusted import MAX_HEADER, MAX_MODEL_JSON, MAX_VALUES, printable
from train.finetune.config import FinetuneConfig
from train.finetune.retrieval.config import RetrievalConfig

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    id2label=("a", "b"),
)  # fmt: skip
REFUSALS = (ValueError, OSError, TypeError)
FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=600)
NASTY = [
    None, True, False, -1, 0, 1, 2**31, 2**62, 2**70, 10**5, -0.5, 1e308, "", "x", "\x1b[2J\n",
    [], [1], [[]], {}, {"a": {}}, "mean", "gelu", "default", "x" * 3000,
]  # fmt: skip


def refused(function, *args):
    """Calls a function; returns its refusal, one printable line, or "" if it refused nothing."""
    try:
        function(*args)
    except REFUSALS as error:
        text = str(error)
        assert text.isprintable(), repr(text[:300])
        assert len(text) < 3000, len(text)
        return text
    return ""


def folder_of(folder: pathlib.Path) -> pathlib.Path:
    cls, random = mj.ModernBertForSequenceClassification, np.random.default_rng(0)
    shapes = param_shapes(cls, CONFIG)
    params = {k: random.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
    write_hf(folder, CONFIG, params_to_hf(cls, CONFIG, params), architecture=cls.__name__)
    return folder


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("valid") / "m")


@pytest.fixture
def folder(valid, tmp_path):
    for file in valid.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@st.composite
def mutated(draw, data):
    """JSON data in which a few values, at any depth, are replaced, removed or added."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        node = data
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.integers(0, 3)):
                node = node[key]
                continue
            if draw(st.integers(0, 4)):
                node[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            else:
                del node[key]
            break
    return data


# config.json.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**5}, "num_hidden_layers: expected at most 1,000, got 100000"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers: expected at most 1,000, got"),
        ({"num_hidden_layers": 15, "layer_types": None}, "num_hidden_layers: expected 2, as in"),
        ({"vocab_size": 2**40}, "vocab_size: expected at most"),
        ({"vocab_size": 2**24}, "tok_embeddings.weight: expected shape .16777216, 8., got .300, 8"),
        ({"hidden_size": 2**62}, "hidden_size: expected at most"),
        ({"hidden_size": 2**16}, "tok_embeddings.weight: expected shape .300, 65536., got"),
        ({"local_attention": 2**62}, "local_attention: expected at most"),
        ({"num_labels": 2**40, "id2label": None}, "num_labels: expected at most"),
        ({"eos_token_id": []}, "eos_token_id: expected an integer or null, got an empty list"),
        ({"rope_parameters": "x"}, "rope_parameters: expected an object or null, got 'x'"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.*: expected an object, got"),
        ({"norm_eps": True}, "norm_eps: expected a finite number, got True"),
        ({"norm_bias": 1}, "norm_bias: expected true or false, got 1"),
        ({"pad_token_id": True}, "pad_token_id: expected an integer or null, got True"),
        ({"initializer_range": 10**400}, "initializer_range: expected a finite number, got an int"),
        ({"mlp_dropout": -0.5}, "mlp_dropout: expected 0 <= rate < 1, got -0.5"),
        ({"initializer_cutoff_factor": -2.0}, "initializer_cutoff_factor: expected a positive"),
        ({"id2label": {"0": {}, "1": "b"}}, "id2label: expected names"),
        ({"layer_types": "full"}, "layer_types: expected a list, got 'full'"),
        ({"hidden_activation": "\x1b[2J" + "x" * 9999}, r"hidden_activation: .*\\x1b\[2J.*"),
    ],
)
def test_a_config_is_judged_before_anything_is_built(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        mj.ModernBertForSequenceClassification.from_pretrained(folder)
    assert refused(mj.ModernBertForSequenceClassification.from_pretrained, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "expected at most 32 levels of nesting"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "expected at most 32 levels of nesting"),
        ('{"norm_eps": 1e-5, "norm_eps": 1e-6}', "expected each key once, got 'norm_eps' twice"),
        ('{"global_rope_theta": NaN}', "expected JSON, got NaN"),
        ('{"global_rope_theta": -Infinity}', "expected JSON, got -Infinity"),
        ('{"global_rope_theta": 1e999}', "expected finite numbers, got 1e999"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "4300 digits"),
        ('"\x1b"', "Invalid control character"),
        (" " * (MAX_MODEL_JSON + 1), "expected at most 16,777,216 bytes"),
        ("[" + "[]," * (MAX_VALUES + 1), "expected at most 2,000,000 values, got about 2,000,001"),
        ("", "Expecting value"),
    ],
)
def test_json_is_bounded_and_strict(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        mj.ModernBertConfig.from_json(tmp_path / "config.json")


@FEW
@given(data=mutated(CONFIG.to_dict() | {"architectures": ["X"]}))
def test_any_config_is_read_or_refused(tmp_path_factory, data):
    check_config(tmp_path_factory, data)


@pytest.mark.slow
@MANY
@given(data=mutated(CONFIG.to_dict() | {"architectures": ["X"]}))
def test_many_configs_are_read_or_refused(tmp_path_factory, data):
    check_config(tmp_path_factory, data)


def check_config(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(data))

    def read_and_write():
        config = mj.ModernBertConfig.from_json(path)
        again = mj.ModernBertConfig.from_dict(config.to_dict())
        assert again.num_hidden_layers == config.num_hidden_layers <= 1000
        model_card(data, 5)

    refused(read_and_write)


# Safetensors.


def tensors_file(path, header, body=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_tensors_are_those_that_safetensors_reads(folder):
    ours = SafetensorsFolder(folder)
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array)
        assert ours[key].dtype == array.dtype
        assert ours.shape(key) == array.shape


def test_a_header_is_bounded_and_read_once(folder, monkeypatch):
    reads = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a: reads.append(a) or real(*a))
    tensors = SafetensorsFolder(folder)
    assert len([tensors[key] for key in tensors]) > 10
    assert len(reads) == 1
    tensors_file(folder / "model.safetensors", b" " * (MAX_HEADER + 1))
    assert "expected a header of at most 4,194,304 bytes" in refused(SafetensorsFolder, folder)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "x" * 5000, "\u202e"])
def test_a_tensor_name_never_reaches_the_terminal(folder, name):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    tensors_file(folder / "model.safetensors", {name: entry})
    assert "short names of printable characters" in refused(SafetensorsFolder, folder)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@FEW
@given(data=mutated({"__metadata__": {"format": "pt"}, "head.dense.weight": ENTRY}))
def test_any_header_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    tensors_file(folder / "model.safetensors", data)

    def read():
        tensors = SafetensorsFolder(folder)
        assert all(tensors[key].shape == tensors.shape(key) for key in tensors)
        hf_to_params(mj.ModernBertForMaskedLM, CONFIG, tensors)

    assert refused(read)  # it never is a complete model


# Tokenizers.


def charsmap(size: int, rest: bytes) -> str:
    return base64.b64encode(struct.pack("<I", size) + rest).decode()


def sequence(part: dict, count: int) -> dict:
    return {"type": "Sequence", "normalizers": [part] * count}


HUGE = {"type": "Precompiled", "precompiled_charsmap": charsmap(2**32 - 4, b"")}
OUTSIDE = {"type": "Precompiled", "precompiled_charsmap": charsmap(4, bytes(64))}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": sequence(DOUBLE, 40)}, "replacements that make a text at most 256 times"),
        ({"normalizer": {**DOUBLE, "content": "a" * 10**4}}, "replacements that make a text"),
        ({"normalizer": HUGE}, "expected a complete precompiled_charsmap"),
        ({"normalizer": OUTSIDE}, "expected a complete precompiled_charsmap"),
        ({"normalizer": {**HUGE, "precompiled_charsmap": ""}}, "complete precompiled_charsmap"),
        ({"padding": {"strategy": {"Fixed": 2**40}}}, "padding: expected sizes of at most"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, "without nested repetitio"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a" * 9999}}}, "at most 1,024 charact"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "expected one of BertPreTok"),
        (
            {"post_processor": {
                "type": "TemplateProcessing", "special_tokens": {}, "pair": [],
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            }},
            "the reader gave up|expected tokenizer files",
        ),
        ({"model": {
            "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
            "continuing_subword_prefix": "##########",
        }}, "the reader gave up"),
        ({"added_tokens": [{"content": "x" * 2**21, "id": 9}]}, "added_tokens: expected at most"),
    ],
)  # fmt: skip
def test_a_tokenizer_is_judged_before_it_is_loaded(small_tokenizer, tmp_path, changes, message):
    small_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)
    assert refused(AutoTokenizer.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"model_max_length": Infinity', "expected JSON, got Infinity"),
        ('"model_max_length": NaN', "expected JSON, got NaN"),
        ('"model_max_length": true', "model_max_length: expected a number from 1 on, or null"),
        ('"cls_token": {}', "cls_token: expected a token's text, got {}"),
        ('"cls_token": [1]', "cls_token: expected a token's text, got a list of 1"),
        ('"x": ' + "[" * 5000 + "]" * 5000, "expected at most 32 levels"),
    ],
)
def test_settings_of_a_tokenizer_are_judged(small_tokenizer, tmp_path, changes, message):
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{" + changes + "}")
    text = refused(AutoTokenizer.from_pretrained, tmp_path)
    assert "tokenizer_config.json: " in text
    assert message in text


def test_a_charsmap_is_followed_as_the_library_does(small_tokenizer, tmp_path):
    """A trie with one rule, "A" to "b": the library applies it, and no other index is touched."""
    units = np.zeros(512, "<u4")
    units[0] = 256 << 10  # the root: its children are at 256 ^ letter
    units[256 ^ ord("A")] = ord("A") | 1 << 8 | (256 ^ ord("A")) << 10  # a leaf at index 0 ^ ...
    leaf = (256 ^ ord("A")) ^ (256 ^ ord("A"))
    assert leaf == 0
    content = struct.pack("<I", units.nbytes) + units.tobytes() + b"b\0"
    # The leaf's value is the root's unit, which as an index lies beyond the replacements.
    text = base64.b64encode(content).decode()
    small_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": text}
    path.write_text(json.dumps(data))
    assert "precompiled_charsmap" in refused(AutoTokenizer.from_pretrained, tmp_path)
    # With the leaf on a unit of its own the same trie is sound.
    units[256 ^ ord("A")] = ord("A") | 1 << 8 | ((256 ^ ord("A")) ^ 3) << 10
    units[3] = 1 << 31
    content = struct.pack("<I", units.nbytes) + units.tobytes() + b"b\0"
    data["normalizer"]["precompiled_charsmap"] = base64.b64encode(content).decode()
    path.write_text(json.dumps(data))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("cAt A") == "cbt b"


TRIALS = """
import json, pathlib, sys, warnings
from modernbert_jax.tokenizer import AutoTokenizer
warnings.simplefilter("error")
folder = pathlib.Path(sys.argv[1])
for number, files in enumerate(json.loads((folder / "trials.json").read_text())):
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    print(number, flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("", "a fever", "ABC" * 50, "e\\u0301\\x00\\U0001f600"):
            tokenizer(text, truncation=True, max_length=16)
    except (ValueError, OSError, TypeError) as error:
        assert "\\n" not in str(error) and len(str(error)) < 3000, str(error)[:3000]
    except Exception as error:
        if type(error) is not Exception:  # of the library, for a text
            raise
print("done")
"""


def tokenizer_trials(small_tokenizer, tmp_path, examples):
    """Collects mutations and loads them in one process, which must survive all of them."""
    small_tokenizer.save_pretrained(tmp_path)
    files = {
        name: json.loads((tmp_path / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    kinds = {
        "normalizer": {"type": "Sequence", "normalizers": [DOUBLE, {"type": "NFC"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {**SPLIT, "pattern": {"Regex": "a+"}}, files["tokenizer.json"]["pre_tokenizer"],
        ]},
    }  # fmt: skip
    # The vocabulary is most of the file, and not what aborts.
    backend = files["tokenizer.json"] | kinds
    small = {"vocab", "merges"}
    model = {key: value for key, value in backend["model"].items() if key not in small}
    trials = []

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(
        data=mutated({key: value for key, value in backend.items() if key != "model"}),
        model=mutated(model),
        config=mutated(files["tokenizer_config.json"]),
        which=st.integers(0, 2),
    )
    def collect(data, model, config, which):
        own = {**backend, **(data if which == 0 else {})}
        own["model"] = {**backend["model"], **(model if which == 1 else {})}
        used = config if which == 2 else files["tokenizer_config.json"]
        trials.append({"tokenizer.json": own, "tokenizer_config.json": used})

    collect()
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    command = [sys.executable, "-c", TRIALS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.split()[-1:]
    assert last == ["done"], (last, done.stderr[-3000:])


def test_any_tokenizer_is_read_or_refused(small_tokenizer, tmp_path):
    tokenizer_trials(small_tokenizer, tmp_path, 60)


@pytest.mark.slow
def test_many_tokenizers_are_read_or_refused(small_tokenizer, tmp_path):
    tokenizer_trials(small_tokenizer, tmp_path, 1000)


# Files of PyTorch.


def test_a_tensor_of_stride_0_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(1).expand(2**20, 2**20)}, tmp_path / "x.pt")
    assert "repeats the same memory" in refused(torch_file.read, tmp_path / "x.pt")
    shared = torch.ones(2**18)
    torch.save({str(i): shared.view(-1) for i in range(100)}, tmp_path / "x.pt")
    assert "repeats the same memory" in refused(torch_file.read, tmp_path / "x.pt")


def test_lists_that_name_each_other_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    value = ["x"]
    for _ in range(40):
        value = [value, value]
    torch.save(value, tmp_path / "x.pt")
    assert "name each other too often" in refused(torch_file.read, tmp_path / "x.pt")


def test_an_index_of_the_memo_takes_no_memory(tmp_path):
    """LONG_BINPUT with 2**31: the unpickler in C makes a table of 34 GB for it."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}r" + struct.pack("<I", 2**31) + b".")
        archive.writestr("x/version", b"3")
    assert torch_file.read(tmp_path / "x.pt") == {}


def test_a_flexbert_of_any_depth_is_judged():
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 8
    )
    flex = flexbert.flex_config(mj.ModernBertConfig()) | sizes | {"num_hidden_layers": 2**70}
    with pytest.raises(ValueError, match="num_hidden_layers: expected at most 1,000"):
        flexbert.hf_config(flex)


@FEW
@given(at=st.floats(0, 1), byte=st.integers(0, 255), count=st.integers(1, 4))
def test_any_bytes_of_a_checkpoint_are_read_or_refused(tmp_path_factory, at, byte, count):
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.getbasetemp()
    path = folder / "valid.pt"
    if not path.exists():
        model = {"model.bert.embeddings.tok_embeddings.weight": torch.ones(4, 4)}
        torch.save({"state": {"model": model, "integrations": {}}, "rng": [1]}, path)
    content = bytearray(path.read_bytes())
    start = int(at * (len(content) - count))
    content[start : start + count] = bytes([byte]) * count
    (folder / "x.pt").write_bytes(content)
    text = refused(convert_files.load_composer, folder / "x.pt", folder)
    assert "x.pt" in text  # it holds no configuration


# What people give, and what they read.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1e-5}, "learning_rate: expected above 0, got -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate: expected above 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate: expected above 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0 and below 1, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay: expected at least 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("kind", [FinetuneConfig, RetrievalConfig])
def test_settings_of_training_are_judged(kind, changes, message):
    task = {"task": "chemprot"} if kind is FinetuneConfig else {}
    with pytest.raises(ValueError, match=message):
        kind(data="d", model="m", **task, **changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_ratio": 1.5}, "warmup_ratio: expected 0 to 1, got 1.5"),
        ({"warmup_ratio": float("nan")}, "warmup_ratio: expected 0 to 1, got nan"),
        ({"temperature": float("nan")}, "temperature: expected above 0, got nan"),
        ({"grid": ("learning_rate=1e-5,-1",)}, "learning_rate: expected above 0, got -1.0"),
        ({"grid": ("epochs=0",)}, "epochs: expected at least 1, got 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: expected above 0, got nan"),
    ],
)
def test_settings_of_one_kind_of_training_are_judged(changes, message):
    kind = FinetuneConfig if {"grid", "max_grad_norm"} & changes.keys() else RetrievalConfig
    task = {"task": "chemprot"} if kind is FinetuneConfig else {}
    with pytest.raises(ValueError, match=message):
        kind(data="d", model="m", **task, **changes).validate()


def test_a_text_without_tokens_has_a_finite_vector(small_tokenizer):
    backend = tokenizers.Tokenizer.from_str(small_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = tokenizers.processors.Sequence([])  # adds no special tokens
    encoder = mj.ModernBertModel(CONFIG, rngs=nnx.Rngs(0))
    vectors = Embedder(encoder, from_backend(backend)).encode(["", "[CLS][SEP]", "a fever"])
    assert np.isfinite(vectors).all()
    assert not vectors[0].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=-1), 1.0, rtol=1e-5)


def test_a_foreign_config_is_plain_text_in_a_card():
    config = CONFIG.to_dict() | {
        "architectures": ["`x`\n---\n# Title ForSequenceClassification"],
        "id2label": {"0": "a|b\n---", "1": "<script>\x1b[31m![x](y)", "2": "`code`"},
        "dtype": "\x1b]0;title\x07",
        "hidden_size": "wide\n# Title",
        "max_position_embeddings": "1,000",
    }
    card = model_card(config, 5)
    assert "\x1b" not in card and "\x07" not in card
    assert card.count("\n---\n") == 1  # the end of the header
    lines = [line for line in card.split("\n") if line.startswith("#")]
    assert [line for line in lines if "Title" in line] == [lines[0]]
    assert r"\<script\>\\x1b\[31m\!\[x\](y)" in card
    assert r"\`code\`" in card
    assert r"a\|b\\n---" in card


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u2028", "\u202eabc", "\ud800"])
def test_printable_escapes_what_a_terminal_obeys(text):
    assert printable(text).isprintable()
    assert printable("été, 注 µg") == "été, 注 µg"
    assert len(printable("x" * 10**6)) < 250
