"""Folders that are not the model one expects: pointers, adapters, other layouts, lost files."""

import gc
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import modernbert_jax as mj
from convert import files
from modernbert_jax.auto import read_params
from modernbert_jax.checkpoint.files import copy_tokenizer
from modernbert_jax.checkpoint.orbax import save_orbax

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "tiny"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
# Source: the specification of Git LFS.
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""

load = mj.ModernBertForMaskedLM.from_pretrained


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "golden")


@pytest.mark.parametrize(
    "name, read",
    [
        ("config.json", load),
        ("model.safetensors", load),
        ("model.safetensors.index.json", load),
        ("config.json", files.load),
        ("model.safetensors", files.load),
        ("pytorch_model.bin", files.load),
        ("pytorch_model.bin.index.json", files.load),
        ("tokenizer.json", mj.AutoTokenizer.from_pretrained),
        ("tokenizer_config.json", mj.AutoTokenizer.from_pretrained),
    ],
)
def test_a_git_lfs_pointer_is_named(golden, name, read):
    if "model" in name:
        (golden / "model.safetensors").unlink()
    (golden / "tokenizer.json").write_text("{}")
    (golden / name).write_text(POINTER)
    with pytest.raises(ValueError) as error:
        read(golden)
    assert f"{golden / name}: expected the file, found a Git LFS pointer" in str(error.value)


def test_a_pointer_is_not_copied_as_a_tokenizer(golden, tmp_path):
    (golden / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match="tokenizer.json: expected the file, found a Git LFS"):
        copy_tokenizer(golden, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("also", [True, False])
@pytest.mark.parametrize("read", [load, read_params, files.load])
def test_a_peft_adapter_is_no_model(golden, read, also):
    """Beside a model, too: transformers would apply it."""
    if not also:
        shutil.rmtree(golden)
        golden.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (golden / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="found a PEFT adapter.*merge it into someone/base with"):
        read(golden)


def test_the_model_is_in_a_folder_below(golden, tmp_path):
    """As in old folders of sentence-transformers, and in the output of a Trainer."""
    folder = tmp_path / "old"
    shutil.copytree(golden, folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load(folder)
    assert str(error.value).endswith(f"load that: {folder / '0_Transformer'}")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_may_name_the_tied_decoder_without_its_tensor(golden, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tensors = safetensors.numpy.load_file(golden / "model.safetensors")
    file, index = f"model-00001-of-00001.{kind}", f"model.{kind}.index.json"
    (golden / "model.safetensors").rename(golden / file)
    if kind == "bin":
        index = f"pytorch_{index}"
        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, golden / file)

    def list_also(key):
        names = dict.fromkeys([*tensors, key], file)
        (golden / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))

    list_also("decoder.weight")
    for read in [files.load] if kind == "bin" else [files.load, read_params, load]:
        read(golden)
    _, report = transformers.ModernBertForMaskedLM.from_pretrained(golden, output_loading_info=True)
    assert not report["missing_keys"]
    list_also("decoder.extra")
    with pytest.raises(ValueError, match="no shard has decoder.extra"):
        files.load(golden)
    list_also("decoder.weight")
    config = json.loads((golden / "config.json").read_text())
    (golden / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="no shard has decoder.weight"):
        files.load(golden)


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA"])
def test_a_damaged_orbax_folder_is_named_by_every_reader(golden, tmp_path, lost):
    cls, config, params = read_params(golden)
    params = {k: np.asarray(v) for k, v in params.items()}
    save_orbax(tmp_path / "c", architecture=cls.__name__, config=config, params=params)
    for path in (tmp_path / "c").rglob(lost):
        path.unlink()
    for read in (load, read_params, files.load):
        with pytest.raises(ValueError, match="c/params: not a complete Orbax checkpoint") as error:
            read(tmp_path / "c")
        assert "\n" not in str(error.value)
    # Orbax leaves futures with exceptions. Python logs them when they are collected, and Python
    # 3.11 fails if that happens while another test parses a file into a syntax tree.
    del error
    gc.collect()
