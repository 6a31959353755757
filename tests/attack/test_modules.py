"""The files of sentence-transformers that somebody else made: read, or refused in one line."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import modernbert_jax as mj
from modernbert_jax.inference.pipelines.text_ranking import read_ranking
from modernbert_jax.inference.sentence import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    SentenceModel,
    read_sentence,
)
from tests.attack.test_folders import CONFIG, FEW, mutated, refused

POOLING = "sentence_transformers.models.Pooling"
RANDOM = np.random.default_rng(0)
MODULES = (
    Pooling(("cls",)),
    Dense({"weight": RANDOM.normal(size=(4, 8)).astype(np.float32)}, "GELU"),
    LayerNorm({"weight": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}),
    Normalize(),
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("valid") / "m"
    model = mj.ModernBertModel(CONFIG, rngs=nnx.Rngs(0))
    mj.Embedder(model, small_tokenizer, sentence=SentenceModel(MODULES, max_length=64)).save(folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path):
    return pathlib.Path(shutil.copytree(valid, tmp_path / "m"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_module(folder, **changes):
    """Changes the entry of the Pooling."""
    modules = json.loads((folder / "modules.json").read_text())
    modules[1] |= changes
    (folder / "modules.json").write_text(json.dumps(modules))


def link(folder):
    outside = folder.parent / "outside"
    (folder / "2_Dense").rename(outside)
    (folder / "2_Dense").symlink_to(outside)


HOSTILE = {
    "a parent": (lambda f: edit_module(f, path="../outside"), "folders within the model's"),
    "two parents": (lambda f: edit_module(f, path=".."), "folders within the model's"),
    "hidden parents": (
        lambda f: edit_module(f, path="1_Pooling/../../outside"), "folders within the model's",
    ),
    "a folder of a folder": (lambda f: edit_module(f, path="1_Pooling/x"), "folders within the"),
    "an absolute path": (lambda f: edit_module(f, path="/etc"), "folders within the model's"),
    "a drive": (lambda f: edit_module(f, path="C:\\x"), "folders within the model's"),
    "a zero byte": (lambda f: edit_module(f, path="1\0x"), "folders within the model's"),
    "an escape sequence": (lambda f: edit_module(f, path="\x1b[2J"), "folders within the mode"),
    "a name without an end": (lambda f: edit_module(f, path="x" * 5000), "folders within the"),
    "a path that is no text": (lambda f: edit_module(f, path=["1_Pooling"]), "a type and a path"),
    "a link out of the folder": (link, "2_Dense.: expected a folder, found a symbolic link"),
    "another package": (lambda f: edit_module(f, type="evil.models.Pooling"), "not supported"),
    "a package that begins alike": (
        lambda f: edit_module(f, type="sentence_transformers_evil.Pooling"), "not supported",
    ),
    "no package": (lambda f: edit_module(f, type="Pooling"), "not supported"),
    "a class of the machine": (
        lambda f: edit_module(f, type="sentence_transformers.os.system"), "not supported",
    ),
    "arguments": (lambda f: edit_module(f, kwargs={"x": 1}), "kwargs are not supported"),
    "no module": (lambda f: (f / "modules.json").write_text("[]"), "got none"),
    "many modules": (
        lambda f: (f / "modules.json").write_text(
            json.dumps([{"path": "1_Pooling", "type": POOLING}] * 10**5)
        ),
        "expected at most 100 modules, got 100,000",
    ),
    "a negative size": (
        lambda f: edit(f / "2_Dense/config.json", out_features=-4), "a number from 1 to .*, got -4",
    ),
    "a size of no text": (
        lambda f: edit(f / "2_Dense/config.json", out_features=True), "from 1 to .*, got True",
    ),
    "a huge size": (
        lambda f: edit(f / "2_Dense/config.json", out_features=2**62, in_features=2**62),
        "in_features: expected a number from 1 to 1,048,576, got 4611686018427387904",
    ),
    "a number of many digits": (
        lambda f: edit(f / "2_Dense/config.json", in_features=10**4000),
        "in_features: expected a number from 1 to .*, got an integer of 13,288 bits",
    ),
    "a size without weights": (
        lambda f: edit(f / "2_Dense/config.json", out_features=2**20),
        "expected linear.weight .1048576, 8., got linear.weight .4, 8.",
    ),
    "a huge LayerNorm": (
        lambda f: edit(f / "3_LayerNorm/config.json", dimension=2**40), "to 1,048,576, got 10995",
    ),
    "a negative length": (
        lambda f: edit(f / "sentence_bert_config.json", max_seq_length=-1), "from 1 on, got -1",
    ),
    "a length of many digits": (
        lambda f: edit(f / "sentence_bert_config.json", max_seq_length=-(10**4000)), "from 1 on",
    ),
    "a mode that is a list": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode=[["cls"]]), "expected cls, max",
    ),
    "many modes": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode=["cls"] * 10**5),
        "or several, each once, got a list of 100,000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_modules_are_refused_in_one_line(folder, name):
    outside = folder.parent / "outside"
    change, message = HOSTILE[name]
    if name != "a link out of the folder":
        shutil.copytree(folder / "1_Pooling", outside)  # it would be read
    change(folder)
    with pytest.raises((ValueError, OSError), match=message):
        read_sentence(folder)
    assert refused(mj.Embedder.from_pretrained, folder)


def test_files_may_be_links(folder):
    """As in the hub's cache, where each file of a snapshot links to a blob."""
    before = mj.Embedder.from_pretrained(folder).encode("no fever")
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    after = mj.Embedder.from_pretrained(folder).encode("no fever")
    np.testing.assert_array_equal(before, after)


def test_huge_lengths_are_cut_to_the_models(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=10**4000)
    embedder = mj.Embedder.from_pretrained(folder)
    assert embedder.max_length == CONFIG.max_position_embeddings


FILES = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "2_Dense/config.json", "3_LayerNorm/config.json",
    "4_Normalize/config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_any_file_is_read_or_refused(valid, tmp_path_factory, name):
    folder = pathlib.Path(shutil.copytree(valid, tmp_path_factory.mktemp("any") / "m"))
    content = json.loads((valid / name).read_text())

    @FEW
    @given(mutated(content))
    def judge(data):
        (folder / name).write_text(json.dumps(data))
        refused(lambda: read_sentence(folder).dimension(CONFIG.hidden_size))
        refused(read_ranking, folder)

    judge()
