"""Conversions: bit for bit there and back, every refusal, and nothing left behind by one."""

import collections
import datetime
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import check, cli, composer, files, flexbert, torch_file
from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, heads, layers, model
from modernbert_jax.checkpoint import hf as hf_layout, hub, orbax
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.weights import weight_of

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "local_attention": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "cls_token_id": 0,
    "eos_token_id": 1,
    "sep_token_id": 1,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
VARIANTS = {
    "plain": {},
    "biases": BIASES,
    "untied": {"tie_word_embeddings": False, "decoder_bias": False},
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
QUICK = {("plain", "float32"), ("biases", "bfloat16"), ("untied", "float16")}
VARIANTS_AND_DTYPES = [
    pytest.param(v, d, marks=() if (v, d) in QUICK else pytest.mark.matrix)
    for v in VARIANTS
    for d in DTYPES
]
WQKV = "model.layers.1.attn.Wqkv.weight"

TOKENIZER = {
    "tokenizer.json": {
        "added_tokens": [
            {"id": 0, "content": "[CLS]", "lstrip": False},
            {"id": 1, "content": "[SEP]", "lstrip": False},
            {"id": 3, "content": "[PAD]", "lstrip": False},
            {"id": 4, "content": "[MASK]", "lstrip": False},
        ],
        "model": {"type": "BPE", "vocab": {"é": 5}, "merges": [["a", "b"]]},
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": {"4": {"content": "[MASK]", "lstrip": False}},
        "model_max_length": 128,
        "extra_special_tokens": {},
    },
    "special_tokens_map.json": {"mask_token": {"content": "[MASK]", "lstrip": False}},
}


def config_of(**changes):
    return ModernBertConfig.from_dict({**TINY, **changes})


def random_tensors(config, cls: type = ModernBertForMaskedLM, dtype="float32", seed=0):
    """HF's tensors of a model, every value random."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(size=weight_of(key).hf_shape(tuple(v.shape))).astype(DTYPES[dtype])
        for key, v in param_shapes(cls, config).items()
    }


def make_hf(folder, config, tensors, tokenizer=TOKENIZER, cls: type | None = None):
    """An HF folder, written without the library's own writer of weights."""
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype)
    names = {"architectures": [cls.__name__]} if cls else {}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": dtype} | names))
    for name, content in tokenizer.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def hf(tmp_path):
    return make_hf(tmp_path / "hf", config_of(), random_tensors(config_of()))


def write_pt(path, obj):
    pytest.importorskip("torch")
    torch_file.write(path, obj)


def run(*args):
    if "composer" in args[0]:
        pytest.importorskip("torch")
    return cli.main([str(arg) for arg in args])


def ok(*args):
    assert run(*args) == 0


def refused(capsys, message, *args):
    """Exit code 2 and one line on stderr that matches."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    return err


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        assert found[key].shape == array.shape, key
        assert found[key].tobytes() == array.tobytes(), key


def weights(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def read_json(path):
    return json.loads(path.read_text())


# HF and Orbax.


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS_AND_DTYPES)
def test_hf_to_orbax_to_hf_is_bit_exact(tmp_path, dtype, variant):
    config = config_of(**VARIANTS[variant])
    tensors = random_tensors(config, dtype=dtype)
    source = make_hf(tmp_path / "hf", config, tensors)
    ok("from-hf", source, tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)
    back = ModernBertConfig.from_json(tmp_path / "back/config.json")
    assert back == ModernBertConfig.from_json(tmp_path / "orbax/config.json")
    assert read_json(tmp_path / "back/config.json") == config.to_dict() | {
        "dtype": dtype,
        "torch_dtype": dtype,
        "architectures": ["ModernBertForMaskedLM"],
    }
    for name, content in TOKENIZER.items():
        assert read_json(tmp_path / "back" / name) == content


@pytest.mark.parametrize(
    "cls",
    [
        model.ModernBertModel,
        heads.ModernBertForSequenceClassification,
        heads.ModernBertForTokenClassification,
        heads.ModernBertForQuestionAnswering,
        heads.ModernBertForMultipleChoice,
    ],
)
def test_every_class_goes_there_and_back(tmp_path, cls):
    config = config_of()
    tensors = random_tensors(config, cls)
    source = make_hf(tmp_path / "hf", config, tensors, cls=cls)
    ok("from-hf", source, tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)
    assert read_json(tmp_path / "back/config.json")["architectures"] == [cls.__name__]


def test_odd_bit_patterns_survive(tmp_path):
    """NaN payloads, infinities, minus zero and subnormals, once they are asked for."""
    config = config_of()
    tensors = random_tensors(config)
    patterns = np.random.default_rng(0).integers(0, 2**32, tensors[WQKV].shape, np.uint32)
    tensors[WQKV] = patterns.view(np.float32)
    source = make_hf(tmp_path / "hf", config, tensors)
    ok("from-hf", source, tmp_path / "orbax", "--allow-nonfinite")
    ok("to-composer", tmp_path / "orbax", tmp_path / "c.pt", "--allow-nonfinite")
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax2", "--allow-nonfinite")
    ok("to-hf", tmp_path / "orbax2", tmp_path / "back", "--allow-nonfinite")
    assert_same_tensors(weights(tmp_path / "back"), tensors)


def test_the_model_of_the_orbax_folder_gives_the_logits_of_the_hf_folder(tmp_path, hf):
    ok("from-hf", hf, tmp_path / "orbax")
    ids = np.arange(24).reshape(2, 12)
    first, second = (
        np.asarray(ModernBertForMaskedLM.from_pretrained(folder)(ids).logits)
        for folder in (hf, tmp_path / "orbax")
    )
    np.testing.assert_array_equal(first, second)


def test_report_says_how_much_how_long_and_how_large(tmp_path, hf, capsys):
    ok("from-hf", hf, tmp_path / "orbax")
    out = capsys.readouterr().out
    tensors = weights(hf)
    assert f"{len(tensors)} tensors, {sum(t.size for t in tensors.values()):,} parameters" in out
    assert re.search(r"[\d.]+ s, peak memory \d+ MiB \([\d.]+ times the file\)", out)


# pytorch_model.bin


def test_reads_a_bin_file(tmp_path, hf):
    tensors = weights(hf)
    (hf / "model.safetensors").unlink()
    # As torch saves a model: the tied decoder is there, over the embedding's storage.
    tied = tensors | {"decoder.weight": tensors["model.embeddings.tok_embeddings.weight"]}
    write_pt(hf / "pytorch_model.bin", tied)
    ok("from-hf", hf, tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)


def make_bin_shards(folder, tensors):
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {"a.bin": keys[:9], "b.bin": keys[9:]}
    for name, part in parts.items():
        write_pt(folder / name, {k: tensors[k] for k in part})
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return index


def test_reads_bin_shards(tmp_path, hf):
    tensors = weights(hf)
    make_bin_shards(hf, tensors)
    ok("from-hf", hf, tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)


def test_refuses_bin_shards_that_do_not_fit(tmp_path, hf, capsys):
    tensors = weights(hf)
    index = make_bin_shards(hf, tensors)
    path, dst = hf / "pytorch_model.bin.index.json", tmp_path / "orbax"
    first = sorted(tensors)[0]

    write_pt(hf / "b.bin", {k: tensors[k] for k in [*sorted(tensors)[9:], first]})
    refused(capsys, f"b.bin: {first} is set twice", "from-hf", hf, dst)
    write_pt(hf / "b.bin", {k: tensors[k] for k in sorted(tensors)[10:]})
    refused(capsys, f"no shard has {sorted(tensors)[9]}", "from-hf", hf, dst)
    write_pt(hf / "b.bin", {"epoch": 3})
    refused(capsys, "b.bin: expected a state_dict", "from-hf", hf, dst)
    (hf / "b.bin").unlink()
    refused(capsys, "b.bin: named by the index, not found", "from-hf", hf, dst)
    for unsafe in ("../b.bin", "/etc/b.bin", "x/../../b.bin", ".."):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {first: unsafe}}))
        refused(capsys, "expected plain file names", "from-hf", hf, dst)
    assert not dst.exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_a_pt_file_is_not_kept_in_memory_beside_its_conversion(tmp_path):
    path, size = tmp_path / "x.pt", 4 * 2**20
    write_pt(path, {str(i): np.full(size // 4, i, np.float32) for i in range(8)})
    tensors = files._OneByOne(torch_file.read(path))
    assert [float(tensors[key].mean()) for key in tensors] == list(range(8))
    resident, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = line.rstrip().endswith(str(path))
        elif mapped and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    assert 0 < resident < 2 * size


# Composer.


def flex_content(**changes):
    """The FlexBertConfig of a published checkpoint, as its YAML and class defaults make it."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "transformers_version": "4.44.1",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "attention_layer": "rope",
        "attention_probs_dropout_prob": 0.0,
        "attn_out_bias": False,
        "attn_out_dropout_prob": 0.1,
        "attn_qkv_bias": False,
        "bert_layer": "prenorm",
        "embed_dropout_prob": 0.0,
        "embed_norm": True,
        "final_norm": True,
        "skip_first_prenorm": True,
        "embedding_layer": "sans_pos",
        "encoder_layer": "base",
        "loss_function": "fa_cross_entropy",
        "loss_kwargs": {"reduction": "mean"},
        "mlp_dropout_prob": 0.0,
        "mlp_in_bias": False,
        "mlp_layer": "glu",
        "mlp_out_bias": False,
        "normalization": "layernorm",
        "norm_kwargs": {"eps": 1e-5, "bias": False},
        "hidden_act": "gelu",
        "head_pred_act": "gelu",
        "head_class_act": "silu",
        "head_class_bias": False,
        "head_class_dropout": 0.0,
        "head_class_norm": False,
        "head_pred_bias": False,
        "head_pred_dropout": 0.0,
        "head_pred_norm": True,
        "pooling_type": "cls",
        "padding": "unpadded",
        "rotary_emb_dim": 16,
        "rotary_emb_base": 160000.0,
        "rotary_emb_scale_base": None,
        "rotary_emb_interleaved": False,
        "local_attn_rotary_emb_base": 10000.0,
        "local_attn_rotary_emb_dim": None,
        "sliding_window": 16,
        "global_attn_every_n_layers": 3,
        "init_method": "full_megatron",
        "init_std": 0.02,
        "init_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "deterministic_fa2": False,
        "gradient_checkpointing": False,
        **changes,
    }


def composer_names(config):
    """HF's key -> Composer's, in the order of FlexBERT's parameters; written out, not derived."""
    names = {
        "model.embeddings.tok_embeddings.weight": "model.bert.embeddings.tok_embeddings.weight"
    }
    names["model.embeddings.norm.weight"] = "model.bert.embeddings.norm.weight"
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}", f"model.bert.encoder.layers.{i}"
        if i > 0:
            names[f"{ours}.attn_norm.weight"] = f"{theirs}.attn_norm.weight"
        for part in ("attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"):
            names[f"{ours}.{part}.weight"] = f"{theirs}.{part}.weight"
    names["model.final_norm.weight"] = "model.bert.final_norm.weight"
    names["head.dense.weight"] = "model.head.dense.weight"
    names["head.norm.weight"] = "model.head.norm.weight"
    names["decoder.bias"] = "model.decoder.bias"
    return names


STEP = 52988


def moments_of(tensors):
    """Moments that tell every parameter apart."""
    rng = np.random.default_rng(1)
    return {k: (rng.normal(size=t.shape), rng.random(t.shape)) for k, t in tensors.items()}


def make_composer(
    path,
    tensors,
    *,
    content=None,
    keyed="name",
    groups="no_decay first",
    step="group",
    optimizer="StableAdamW",
    change=lambda checkpoint: None,
):
    """A checkpoint in the published layout, saved by torch; returns the moments by HF's keys."""
    torch = pytest.importorskip("torch")
    names = composer_names(config_of())
    weights = {names[k]: torch.from_numpy(tensors[k].copy()) for k in names}
    state_dict = collections.OrderedDict()
    for key, value in weights.items():
        if key == "model.decoder.bias":
            state_dict["model.decoder.weight"] = weights[
                "model.bert.embeddings.tok_embeddings.weight"
            ]
        state_dict[key] = value

    moments = moments_of(tensors)
    numbers = list(names)
    decay = [k for k in numbers if tensors[k].ndim > 1]
    no_decay = [k for k in numbers if tensors[k].ndim <= 1]
    order = {
        "no_decay first": [no_decay, decay],
        "decay first": [decay, no_decay],
        "one": [numbers],
    }[groups]
    flat = [k for group in order for k in group]
    key_of = (lambda k: names[k]) if keyed == "name" else flat.index
    when = torch.tensor(STEP, dtype=torch.int32)
    states = {
        key_of(k): {
            "exp_avg": torch.tensor(moments[k][0], dtype=torch.float32),
            "exp_avg_sq": torch.tensor(moments[k][1], dtype=torch.float32),
            "eps_sq": torch.tensor(1e-12),
            "kahan_comp": None,
            **({"step": when.clone()} if step == "state" else {}),
        }
        for k in flat
    }
    param_groups = [
        {
            "params": [key_of(k) for k in group],
            "lr": 3e-4,
            "beta1": 0.9,
            "beta2": 0.98,
            "weight_decay": 1e-5,
            **({"step": when.clone()} if step == "group" else {}),
            **({"step": STEP} if step == "plain" else {}),
        }
        for group in order
    ]
    checkpoint = {
        "state": {
            "model": state_dict,
            "optimizers": {optimizer: {"state": states, "param_groups": param_groups}},
            "schedulers": {"LambdaLR": {"base_lrs": [3e-4], "last_epoch": 3, "lr_lambdas": [None]}},
            "algorithms": [],
            "callbacks": {"SpeedMonitor": {"total_eval_wct": 1.5}},
            "timestamp": {
                "Timestamp": {"token": 10**12, "total_wct": datetime.timedelta(seconds=90)}
            },
            "rank_zero_seed": 17,
            "run_name": "base",
            "dataset_state": {"train": None, "eval": {}},
            "integrations": {
                "huggingface": {
                    "model": {
                        "config": {
                            "file_extension": ".json",
                            "content": content or flex_content(),
                            "class": "src.bert_layers.model.FlexBertForMaskedLM",
                        }
                    },
                    "tokenizer": {
                        # One name with and one without its extension, as two versions write them.
                        name.removesuffix(".json") if i else name: {
                            "file_extension": ".json",
                            "content": file,
                        }
                        for i, (name, file) in enumerate(TOKENIZER.items())
                    },
                }
            },
            "metadata": {"torch_version": torch.__version__, "precision": "amp_bf16"},
        },
        "rng": [
            {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.random.get_rng_state(),
            }
        ],
    }
    change(checkpoint)
    torch.save(checkpoint, path)
    return moments


@pytest.fixture
def tensors():
    return random_tensors(config_of())


def test_composer_to_hf(tmp_path, tensors):
    make_composer(tmp_path / "c.pt", tensors)
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)
    assert not (tmp_path / "orbax/optimizer").exists()

    config = ModernBertConfig.from_json(tmp_path / "back/config.json")
    assert config.layer_types == ModernBertConfig(num_hidden_layers=4).layer_types
    assert (config.local_attention, config.window) == (16, 8)
    assert (config.global_rope_theta, config.local_rope_theta) == (160000.0, 10000.0)
    assert (config.attention_out_dropout, config.attention_dropout) == (0.1, 0.0)
    assert config.classifier_activation == "gelu"
    assert config.classifier_pooling == "mean"
    assert config.max_position_embeddings == 8192
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (3, 0, 1)
    assert (config.norm_eps, config.norm_bias) == (1e-5, False)

    tokenizer = {name: read_json(tmp_path / "back" / name) for name in TOKENIZER}
    by_token = {t["content"]: t for t in tokenizer["tokenizer.json"]["added_tokens"]}
    assert by_token["[MASK]"]["lstrip"] and not by_token["[CLS]"]["lstrip"]
    assert tokenizer["tokenizer.json"]["model"] == TOKENIZER["tokenizer.json"]["model"]
    assert tokenizer["tokenizer_config.json"]["added_tokens_decoder"]["4"]["lstrip"]
    assert tokenizer["tokenizer_config.json"]["model_max_length"] == 8192
    assert "extra_special_tokens" not in tokenizer["tokenizer_config.json"]
    assert tokenizer["special_tokens_map.json"]["mask_token"]["lstrip"]


@pytest.mark.parametrize(
    ("keyed", "groups", "step"),
    [
        ("name", "no_decay first", "group"),
        ("name", "one", "state"),
        ("number", "no_decay first", "group"),
        ("number", "decay first", "state"),
        ("number", "one", "plain"),
    ],
)
def test_moments_and_step_come_along(tmp_path, tensors, keyed, groups, step):
    moments = make_composer(tmp_path / "c.pt", tensors, keyed=keyed, groups=groups, step=step)
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax", "--optimizer")
    loaded = orbax.load_orbax(tmp_path / "orbax", optimizer=True)
    assert loaded["optimizer"]["step"] == STEP
    for name, i in (("mu", 0), ("nu", 1)):
        found = hf_layout.params_to_hf(
            ModernBertForMaskedLM, loaded["config"], loaded["optimizer"][name]
        )
        assert set(found) == set(moments)
        for key, pair in moments.items():
            np.testing.assert_array_equal(found[key], pair[i].astype(np.float32), err_msg=key)


def test_numbers_as_the_optimizer_itself_gives_them(tmp_path, tensors):
    """The state_dict of the StableAdamW that ModernBERT trained with, after a step."""
    torch = pytest.importorskip("torch")
    optimi = pytest.importorskip("optimi")
    names = composer_names(config_of())
    params = {k: torch.nn.Parameter(torch.from_numpy(tensors[k].copy())) for k in names}
    optimizer = optimi.StableAdamW(
        [
            {"params": [p for p in params.values() if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [p for p in params.values() if p.ndim > 1]},
        ],
        lr=1e-3,
        weight_decay=1e-5,
        decouple_lr=True,
    )
    for i, p in enumerate(params.values()):
        p.grad = torch.full_like(p, 1.0 + i)
    optimizer.step()

    def change(checkpoint):
        checkpoint["state"]["optimizers"] = {"StableAdamW": optimizer.state_dict()}

    make_composer(tmp_path / "c.pt", tensors, change=change)
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax", "--optimizer")
    loaded = orbax.load_orbax(tmp_path / "orbax", optimizer=True)
    assert loaded["optimizer"]["step"] == 1
    mu = hf_layout.params_to_hf(ModernBertForMaskedLM, loaded["config"], loaded["optimizer"]["mu"])
    for key, p in params.items():
        np.testing.assert_array_equal(mu[key], optimizer.state[p]["exp_avg"].numpy(), err_msg=key)


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS_AND_DTYPES)
def test_hf_to_composer_to_hf_is_bit_exact(tmp_path, variant, dtype):
    config = config_of(**VARIANTS[variant])
    tensors = random_tensors(config, dtype=dtype)
    source = make_hf(tmp_path / "hf", config, tensors)
    ok("to-composer", source, tmp_path / "c.pt")
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), tensors)
    found, expected = read_json(tmp_path / "back/config.json"), read_json(source / "config.json")
    expected["architectures"] = ["ModernBertForMaskedLM"]
    assert found == expected | {"torch_dtype": dtype}


def test_torch_reads_the_composer_file(tmp_path, hf):
    torch = pytest.importorskip("torch")
    ok("to-composer", hf, tmp_path / "c.pt")
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    state_dict = checkpoint["state"]["model"]
    names = composer_names(config_of())
    assert list(state_dict) == [
        *list(names.values())[:-1],
        "model.decoder.weight",
        names["decoder.bias"],
    ]
    for key, array in weights(hf).items():
        np.testing.assert_array_equal(state_dict[names[key]].numpy(), array)
    embedding = state_dict["model.bert.embeddings.tok_embeddings.weight"]
    assert state_dict["model.decoder.weight"].data_ptr() == embedding.data_ptr()
    content = composer.flex_config_of(checkpoint) or {}
    published = flex_content()
    shared = set(content) & set(published) - {
        # Said differently, to the same effect or to none.
        "attn_out_dropout_prob", "head_class_act", "local_attn_rotary_emb_base", "pad_token_id",
        "pooling_type", "rotary_emb_dim", "rotary_emb_base",
    }  # fmt: skip
    assert {k: content[k] for k in shared} == {k: published[k] for k in shared}


def test_composer_optimizer_there_and_back(tmp_path, tensors):
    torch = pytest.importorskip("torch")
    moments = make_composer(tmp_path / "c.pt", tensors)
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax", "--optimizer")
    ok("to-composer", tmp_path / "orbax", tmp_path / "d.pt", "--optimizer", "--lr", "5e-5")
    state = torch.load(tmp_path / "d.pt", weights_only=True)["state"]
    optimizer = state["optimizers"]["StableAdamW"]
    names = composer_names(config_of())
    for key, (mu, nu) in moments.items():
        entry = optimizer["state"][names[key]]
        np.testing.assert_array_equal(entry["exp_avg"].numpy(), mu.astype(np.float32))
        np.testing.assert_array_equal(entry["exp_avg_sq"].numpy(), nu.astype(np.float32))
    no_decay, decay = optimizer["param_groups"]
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 1e-5)
    assert no_decay["params"] == [names[k] for k in names if tensors[k].ndim == 1]
    assert decay["params"] == [names[k] for k in names if tensors[k].ndim > 1]
    assert {int(g["step"]) for g in (no_decay, decay)} == {STEP}
    assert {g["lr"] for g in (no_decay, decay)} == {5e-5}
    ok("from-composer", tmp_path / "d.pt", tmp_path / "again", "--optimizer")
    first, second = (
        orbax.load_orbax(tmp_path / name, optimizer=True)["optimizer"]
        for name in ("orbax", "again")
    )
    assert first["step"] == second["step"]
    assert_same_tensors(second["mu"], first["mu"])
    assert_same_tensors(second["nu"], first["nu"])


def test_a_checkpoint_without_its_configuration_needs_one(tmp_path, tensors, capsys):
    def change(checkpoint):
        del checkpoint["state"]["integrations"]

    source, dst = tmp_path / "c.pt", tmp_path / "orbax"
    make_composer(source, tensors, change=change)
    refused(capsys, "give one with --config FILE", "from-composer", source, dst)
    flex, hf_file = tmp_path / "flex.json", tmp_path / "hf.json"
    flex.write_text(json.dumps(flex_content()))
    err = refused(capsys, "no tokenizer", "from-composer", source, dst, "--config", flex)
    assert "HF config.json" in err
    hf_file.write_text(json.dumps({"model_type": "modernbert", **TINY}))
    ok("from-composer", source, dst, "--config", hf_file)
    assert orbax.load_orbax(dst)["config"].max_position_embeddings == 512
    hf_file.write_text("[1]")
    refused(capsys, "hf.json: expected a JSON object", "from-composer", source, tmp_path / "x",
            "--config", hf_file)  # fmt: skip


@pytest.mark.parametrize(
    "key",
    [
        "model.bert.layers.1.attn.Wqkv.weight",
        "model.bert.encoder.layers.01.attn.Wqkv.weight",
        "model.bert.encoder.final_norm.weight",
        "model.final_norm.weight",
        "bert.final_norm.weight",
        "model.classifier.weight",
        "model.model.final_norm.weight",
        "decoder.bias",
        "",
    ],
)
def test_near_misses_of_composers_names_are_unknown(key):
    with pytest.raises(ValueError, match=f"unknown keys for a FlexBERT masked LM: {key}"):
        composer.to_hf_keys({key: 0})


def test_names_are_in_the_order_of_registration_whatever_the_order_of_the_input():
    config = config_of(num_hidden_layers=12)
    names = composer_names(config)
    shuffled = sorted(names)  # by text layer 10 comes before layer 2
    renamed = composer.to_composer_keys(dict.fromkeys(shuffled, 0))
    assert list(renamed) == list(names.values())
    assert set(composer.to_hf_keys(renamed)) == set(names)


def test_modernberts_own_vocabulary_needs_no_tokenizer():
    config = flexbert.hf_config(flex_content(vocab_size=50368))
    assert [config[k] for k in ("pad_token_id", "cls_token_id", "sep_token_id")] == [
        50283, 50281, 50282,
    ]  # fmt: skip


# The two bugs of the official converter, and the options that HF's architecture lacks.


@pytest.mark.parametrize("local", [-1, -1.0, 0, None])
def test_bug_a_no_local_theta_means_the_global_one(local):
    flex = flex_content(rotary_emb_base=10000.0, local_attn_rotary_emb_base=local)
    config = flexbert.hf_config(flex, TOKENIZER)
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (10000.0, 10000.0)


def test_bug_a_ends_in_finite_logits(tmp_path, tensors):
    content = flex_content(rotary_emb_base=500.0, local_attn_rotary_emb_base=-1)
    make_composer(tmp_path / "c.pt", tensors, content=content)
    ok("from-composer", tmp_path / "c.pt", tmp_path / "orbax")
    ok("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert read_json(tmp_path / "back/config.json")["local_rope_theta"] == 500.0
    mlm = ModernBertForMaskedLM.from_pretrained(tmp_path / "back")
    assert np.isfinite(mlm(np.arange(40)[None]).logits).all()


@pytest.mark.parametrize(
    ("pred", "expected"), [("gelu", "gelu"), ("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_bug_b_the_mlm_head_has_its_own_activation_and_bias(pred, expected):
    flex = flex_content(
        head_pred_act=pred, head_class_act="relu", head_pred_bias=True, head_class_bias=False
    )
    config = flexbert.hf_config(flex, TOKENIZER)
    assert config["classifier_activation"] == expected
    assert config["classifier_bias"] is True


def test_what_flexbert_leaves_out_is_its_own_default():
    flex = flex_content()
    for name in ("head_pred_act", "norm_kwargs", "decoder_bias", "tie_word_embeddings"):
        flex.pop(name, None)
    config = flexbert.hf_config(flex, TOKENIZER)
    assert config["classifier_activation"] == "silu"
    assert (config["norm_eps"], config["norm_bias"]) == (1e-5, True)  # torch's LayerNorm
    assert config["decoder_bias"] is True and config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_layer": "base"},
        {"attention_layer": "rope_parallel"},
        {"bert_layer": "postnorm"},
        {"bert_layer": "parallel_prenorm"},
        {"embedding_layer": "absolute_pos"},
        {"mlp_layer": "mlp"},
        {"normalization": "rmsnorm"},
        {"normalization": "triton_rmsnorm"},
        {"embed_norm": False},
        {"final_norm": False},
        {"skip_first_prenorm": False},
        {"head_pred_norm": False},
        {"rotary_emb_interleaved": True},
        {"rotary_emb_scale_base": 512.0},
        {"rotary_emb_dim": 8},
        {"local_attn_rotary_emb_dim": 8},
        {"initial_mlp_layer": "mlp"},
        {"initial_bert_layer": "postnorm"},
        {"alibi_starting_size": 512},
        {"hidden_act": "mish"},
        {"head_pred_act": "mish"},
        {"attn_qkv_bias": True},
        {"mlp_in_bias": True},
        {"attention_probs_dropout_prob": 0.05},
        {"global_attn_every_n_layers": 3, "sliding_window": -1},
    ],
)
def test_refuses_options_that_hf_lacks_by_name(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"FlexBERT's {name}: HF's ModernBERT has only"):
        flexbert.hf_config(flex_content(**changes), TOKENIZER)


def test_layers_all_full_and_all_sliding():
    full = flexbert.hf_config(
        flex_content(sliding_window=-1, global_attn_every_n_layers=-1), TOKENIZER
    )
    assert set(full["layer_types"]) == {"full_attention"}
    sliding = flexbert.hf_config(flex_content(global_attn_every_n_layers=-1), TOKENIZER)
    assert set(sliding["layer_types"]) == {"sliding_attention"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BIASES,
        {"layer_types": ["full_attention"] * 4, "local_attention": 128, "local_rope_theta": 16e4},
        {"layer_types": ["sliding_attention"] * 4},
        {"num_hidden_layers": 7, "global_attn_every_n_layers": 2},
        {"attention_dropout": 0.1},
        {"attention_out_dropout": 0.1, "mlp_dropout": 0.2, "embedding_dropout": 0.3},
        {"hidden_activation": "silu", "classifier_activation": "gelu_pytorch_tanh"},
        {"global_rope_theta": 10000.0, "local_rope_theta": -1},
        {"tie_word_embeddings": False, "decoder_bias": False, "norm_eps": 1e-6},
        {"classifier_pooling": "mean", "initializer_cutoff_factor": 3.0},
    ],
)
def test_configuration_there_and_back(changes):
    config = config_of(**changes)
    flex = json.loads(json.dumps(flexbert.flex_config(config)))
    back = ModernBertConfig.from_dict(flexbert.hf_config(flex))
    assert back.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_attention": 7}, "local_attention: FlexBERT has even windows from 2 on, got 7"),
        ({"local_attention": 0}, "local_attention: FlexBERT has even windows from 2 on, got 0"),
        ({"hidden_activation": "mish"}, "hidden_activation: FlexBERT has gelu, .*got mish"),
        ({"num_hidden_layers": 5}, "layer_types: FlexBERT has full attention in every n-th layer"),
        (
            {"layer_types": ["sliding_attention", *["full_attention"] * 3]},
            "got full attention in layers \\[1, 2, 3\\] of 4",
        ),
        ({"attention_dropout": 0.1, "attention_out_dropout": 0.1}, "attention_out_dropout"),
    ],
)
def test_refuses_what_flexbert_lacks(changes, message):
    with pytest.raises(ValueError, match=message):
        flexbert.flex_config(config_of(**changes))


# Refusals, and what they leave behind: nothing.


@pytest.fixture
def untouched(tmp_path):
    """Fails a test that leaves anything new in the folder, beside the sources it names itself."""
    yield
    left = {path.name for path in tmp_path.iterdir()} - {"hf", "c.pt", "orbax_source"}
    assert not left


def edit(folder, change):
    tensors = weights(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_refuses_hf_weights_that_do_not_fit(tmp_path, hf, capsys, untouched):
    args = ("from-hf", hf, tmp_path / "dst")
    original = (hf / "model.safetensors").read_bytes()

    def trial(message, change):
        (hf / "model.safetensors").write_bytes(original)
        edit(hf, change)
        err = refused(capsys, message, *args)
        assert str(hf) in err

    trial("unknown keys: extra.weight", lambda t: t.update({"extra.weight": np.ones(2, "f")}))
    trial(f"missing keys: {WQKV}", lambda t: t.pop(WQKV))
    trial(
        rf"{WQKV}: expected shape \(96, 32\), got \(32, 96\)",
        lambda t: t.update({WQKV: np.ascontiguousarray(t[WQKV].T)}),
    )
    trial(
        "decoder.weight: expected the same values as the embedding",
        lambda t: t.update({"decoder.weight": np.ones((64, 32), np.float32)}),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_nan_and_inf_by_key(tmp_path, capsys, dtype, value):
    tensors = random_tensors(config_of(), dtype=dtype)
    tensors[WQKV][3, 4] = value
    tensors["decoder.bias"][0] = value
    source = make_hf(tmp_path / "hf", config_of(), tensors)
    err = refused(capsys, "NaN or infinite", "from-hf", source, tmp_path / "dst")
    assert WQKV in err and "decoder.bias" in err and "--allow-nonfinite" in err
    assert not (tmp_path / "dst").exists()
    ok("from-hf", source, tmp_path / "dst", "--allow-nonfinite")


def test_refuses_weights_that_are_no_floats(tmp_path, hf, capsys, untouched):
    edit(hf, lambda t: t.update({WQKV: t[WQKV].astype(np.int8)}))
    message = f"{WQKV}: expected float32, bfloat16 or float16, got int8"
    refused(capsys, message, "from-hf", hf, tmp_path / "dst")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_refuses_a_truncated_safetensors_file(tmp_path, hf, capsys, untouched, keep):
    path = hf / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(capsys, "not a complete safetensors file", "from-hf", hf, tmp_path / "dst")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", ".."])
def test_refuses_an_index_that_leaves_the_folder(tmp_path, hf, capsys, untouched, name):
    (hf / "model.safetensors").unlink()
    index = {"weight_map": {WQKV: name}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, "expected plain file names", "from-hf", hf, tmp_path / "dst")


def test_refuses_folders_that_are_none(tmp_path, hf, capsys, untouched):
    dst = tmp_path / "dst"
    refused(capsys, "neither", "from-hf", tmp_path / "nowhere", dst)
    refused(capsys, "holds no optimizer", "to-composer", hf, dst, "--optimizer")
    (hf / "config.json").write_text('{"model_type": "bert"}')
    refused(capsys, "model_type: expected 'modernbert', got 'bert'", "from-hf", hf, dst)
    (hf / "config.json").write_text("{")
    refused(capsys, "config.json", "from-hf", hf, dst)
    (hf / "config.json").unlink()
    refused(capsys, "expected config.json, found none", "from-hf", hf, dst)


def test_refuses_an_orbax_folder_that_is_not_whole(tmp_path, hf, capsys):
    ok("from-hf", hf, tmp_path / "orbax")
    refused(capsys, "no optimizer/", "to-composer", tmp_path / "orbax", tmp_path / "x.pt",
            "--optimizer")  # fmt: skip
    for path in (tmp_path / "orbax/params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()
    refused(capsys, "orbax", "to-hf", tmp_path / "orbax", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_composer_holds_masked_lms_only(tmp_path, capsys, untouched):
    for cls, message in (
        (heads.ModernBertForSequenceClassification, "holds masked LMs only: classifier"),
        (model.ModernBertModel, "holds masked LMs only: embeddings"),
    ):
        config = config_of()
        source = tmp_path / "hf"
        if source.exists():
            (source / "model.safetensors").unlink()
            safetensors.numpy.save_file(random_tensors(config, cls), source / "model.safetensors")
        else:
            make_hf(source, config, random_tensors(config, cls), cls=cls)
        refused(capsys, message, "to-composer", source, tmp_path / "x.pt")


def pop(*path):
    def change(checkpoint):
        *parents, last = path
        for name in parents:
            checkpoint = checkpoint[name]
        del checkpoint[last]

    return change


def put(value, *path):
    def change(checkpoint):
        *parents, last = path
        for name in parents:
            checkpoint = checkpoint[name]
        checkpoint[last] = value(checkpoint.get(last)) if callable(value) else value

    return change


C_WQKV = "model.bert.encoder.layers.1.attn.Wqkv.weight"
OPTIMIZER = ("state", "optimizers", "StableAdamW")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop("state"), "expected a Composer checkpoint"),
        (pop("state", "model"), "expected a Composer checkpoint"),
        (put(3, "state", "model", "x"), "expected a Composer checkpoint"),
        (pop("state", "model", C_WQKV), f"missing keys: {WQKV}"),
        (
            put(lambda x: x.T, "state", "model", C_WQKV),
            rf"{WQKV}: expected shape \(96, 32\), got \(32, 96\)",
        ),
        (
            lambda c: c["state"]["model"].update({"model.bert.x.weight": c["rng"][0]["torch"]}),
            "unknown keys for a FlexBERT masked LM: model.bert.x.weight",
        ),
        (
            put(lambda x: x + 1, "state", "model", "model.decoder.weight"),
            "decoder.weight: expected the same values as the embedding",
        ),
        (
            put(lambda x: x * float("nan"), "state", "model", C_WQKV),
            f"NaN or infinite: {WQKV}",
        ),
        (pop("state", "optimizers"), "holds no optimizer"),
        (pop(*OPTIMIZER, "state"), "expected state and param_groups"),
        (
            put(lambda x: x, "state", "optimizers", "Other"),
            "expected StableAdamW, got StableAdamW, Other",
        ),
        (pop(*OPTIMIZER, "state", C_WQKV), f"missing keys: {WQKV}"),
        (pop(*OPTIMIZER, "state", C_WQKV, "exp_avg"), f"{C_WQKV} has no exp_avg"),
        (
            put(lambda x: x[1:], *OPTIMIZER, "state", C_WQKV, "exp_avg_sq"),
            rf"{WQKV}: expected shape \(96, 32\), got \(95, 32\)",
        ),
        (
            put(lambda x: x * float("inf"), *OPTIMIZER, "state", C_WQKV, "exp_avg_sq"),
            f"optimizer nu weights are NaN or infinite: {WQKV}",
        ),
        (
            lambda c: c["state"]["optimizers"]["StableAdamW"]["param_groups"][0].update(step=3),
            rf"expected one step, got \[3.0, {STEP}.0\]",
        ),
        (
            lambda c: [
                g.pop("step") for g in c["state"]["optimizers"]["StableAdamW"]["param_groups"]
            ],
            "expected one step, got none",
        ),
        (
            lambda c: c["state"]["optimizers"]["StableAdamW"]["state"].update(
                {"model.decoder.weight": c["state"]["optimizers"]["StableAdamW"]["state"][
                    "model.bert.embeddings.tok_embeddings.weight"]}
            ),
            "set twice, also as the tied decoder.weight",
        ),
        (put(5, "state", "integrations", "huggingface"), "give one with --config"),
        (
            put("wide", "state", "integrations", "huggingface", "model", "config", "content",
                "hidden_size"),
            "damaged|hidden_size",
        ),
    ],
)  # fmt: skip
def test_refuses_composer_files_that_do_not_fit(
    tmp_path, tensors, capsys, untouched, change, message
):
    make_composer(tmp_path / "c.pt", tensors, change=change)
    dst = tmp_path / "dst"
    err = refused(capsys, message, "from-composer", tmp_path / "c.pt", dst, "--optimizer")
    assert "c.pt" in err or "optimizer nu" in err or "NaN" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop(*OPTIMIZER, "state", 3), "expected moments of the 29 parameters in its groups"),
        (
            lambda c: c["state"]["optimizers"]["StableAdamW"]["param_groups"].append(
                {"params": []}
            ),
            "expected one or two, got 3",
        ),
        (
            lambda c: c["state"]["optimizers"]["StableAdamW"]["param_groups"][0]["params"].append(
                c["state"]["optimizers"]["StableAdamW"]["param_groups"][1]["params"].pop()
            ),
            "got two that mix them",
        ),
        (
            lambda c: c["state"]["model"].update({"model.bert.extra.weight": c["rng"][0]["torch"]}),
            "unknown keys",
        ),
    ],
)
def test_refuses_numbers_that_cannot_be_named(
    tmp_path, tensors, capsys, untouched, change, message
):
    make_composer(tmp_path / "c.pt", tensors, keyed="number", change=change)
    args = ("from-composer", tmp_path / "c.pt", tmp_path / "dst", "--optimizer")
    refused(capsys, message, *args)


def test_the_moments_of_another_optimizer_are_refused(tmp_path, tensors, capsys, untouched):
    make_composer(tmp_path / "c.pt", tensors, optimizer="DecoupledAdamW")
    args = ("from-composer", tmp_path / "c.pt", tmp_path / "dst")
    refused(capsys, "expected StableAdamW, got DecoupledAdamW", *args, "--optimizer")


def test_a_hostile_file_is_refused_by_name_and_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    torch.save({"state": {"model": {}, "callbacks": Hostile()}}, tmp_path / "c.pt")
    err = refused(capsys, "system", "from-composer", tmp_path / "c.pt", tmp_path / "dst")
    assert "refused, nothing of it was run" in err
    assert not (tmp_path / "mark").exists() and not (tmp_path / "dst").exists()


# DST.


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_dst_is_replaced_only_when_asked_and_only_a_checkpoint(tmp_path, hf, capsys):
    dst = tmp_path / "dst"
    dst.mkdir()
    ok("from-hf", hf, dst)  # an empty folder is free
    before = listing(dst)
    refused(capsys, "exists already; choose another DST or give --overwrite", "from-hf", hf, dst)
    assert listing(dst) == before
    edit(hf, lambda t: t.update({"decoder.bias": np.full(64, 5.0, np.float32)}))
    ok("from-hf", hf, dst, "--overwrite")
    assert (orbax.load_orbax(dst)["params"]["decoder.bias"] == 5).all()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    refused(capsys, "remove it yourself", "from-hf", hf, tmp_path / "notes", "--overwrite")
    assert (tmp_path / "notes/a.txt").read_text() == "mine"
    file = tmp_path / "c.pt"
    file.write_text("mine")
    refused(capsys, "exists already", "to-composer", hf, file)
    refused(capsys, "expected a folder to create", "from-hf", hf, file, "--overwrite")
    refused(capsys, "expected a file to create", "to-composer", hf, tmp_path / "notes")
    ok("to-composer", hf, file, "--overwrite")
    assert composer.model_of(torch_file.read(file))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt", "dst", "hf", "notes"]


@pytest.mark.parametrize("verb", ["from-hf", "to-hf", "to-composer"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_fails_leaves_dst_as_it_was(
    tmp_path, hf, capsys, monkeypatch, verb, overwrite
):
    """The disk fills up at the last file."""
    dst = tmp_path / "dst"
    if overwrite:
        ok(verb, hf, dst)
        before = dst.read_bytes() if dst.is_file() else listing(dst)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_layout, "write_text", full)
    monkeypatch.setattr(orbax, "write_text", full)
    monkeypatch.setattr(torch_file, "write", full)
    refused(capsys, "No space left", verb, hf, dst, *(["--overwrite"] if overwrite else []))
    if overwrite:
        assert (dst.read_bytes() if dst.is_file() else listing(dst)) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "hf"][not overwrite :]


def test_each_names_the_right_command(tmp_path, hf, capsys):
    dst = tmp_path / "dst"
    file = tmp_path / "latest.pt"
    file.write_bytes(b"")
    refused(capsys, "got a file; convert a Composer file with from-composer", "from-hf", file, dst)
    refused(capsys, "got a folder; from-hf converts a Hugging", "from-composer", hf, dst)
    ok("from-hf", hf, dst)
    refused(capsys, "got an Orbax folder, which training", "from-composer", dst, tmp_path / "x")


def test_interrupted(tmp_path, hf, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax, "save_orbax", interrupt)
    assert run("from-hf", hf, tmp_path / "dst") == 130
    assert "DST is unchanged" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


# The command itself.


def python(*args, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs
    )


def test_only_pt_files_need_torch(tmp_path, hf):
    program = """
import sys

class Absent:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
from convert import cli
codes = [cli.main(["from-hf", *sys.argv[1:3]]), cli.main(["to-hf", *sys.argv[2:4]])]
print(codes, cli.main(["to-composer", sys.argv[2], sys.argv[4]]))
"""
    made = [tmp_path / name for name in ("orbax", "back", "c.pt")]
    done = python("-c", program, hf, *made)
    assert done.stdout.endswith("[0, 0] 2\n"), done.stderr
    assert done.stderr == "error: writing .pt files needs torch: pip install torch\n"
    assert [path.exists() for path in made] == [True, True, False]


def test_the_command_explains_itself(tmp_path):
    done = python("-m", "convert", "--help")
    assert done.returncode == 0 and "python -m convert from-composer" in done.stdout
    done = python("-m", "convert", "from-hf", tmp_path / "nowhere", tmp_path / "dst")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# check


@pytest.fixture
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


CHECKED = [
    ModernBertForMaskedLM,
    *(
        pytest.param(cls, marks=pytest.mark.matrix)
        for cls in (
            model.ModernBertModel,
            heads.ModernBertForSequenceClassification,
            heads.ModernBertForTokenClassification,
            heads.ModernBertForQuestionAnswering,
            heads.ModernBertForMultipleChoice,
        )
    ),
]


@pytest.mark.parity
@pytest.mark.parametrize("cls", CHECKED)
def test_check_reports_a_folder_and_its_conversion(tmp_path, capsys, reference, cls):
    config = config_of(classifier_pooling="mean")
    tensors = {k: t / 4 for k, t in random_tensors(config, cls).items()}
    source = make_hf(tmp_path / "hf", config, tensors, cls=cls)
    ok("from-hf", source, tmp_path / "orbax")
    reports = []
    for name in ("hf", "orbax"):
        out = tmp_path / f"{name}.json"
        ok("check", tmp_path / name, "--json", out)
        reports.append(read_json(out))
    first, second = reports
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["model"] == cls.__name__
    assert first["passed"] and 0 < first["worst"] <= 1e-5
    rows = ["embeddings", *(f"layer {i}" for i in range(4)), "final_norm"]
    rows += {
        model.ModernBertModel: [],
        heads.ModernBertForMultipleChoice: ["logits"],
    }.get(cls, ["head", "logits"])
    assert list(first["errors"]) == rows
    assert {"jax", "torch", "transformers", "modernbert_jax"} <= set(first["versions"])
    assert max(first["inputs"]["long"]) > 2 * config.window + 1
    table = capsys.readouterr().out
    assert "sliding_attention" in table and "passed" in table


@pytest.mark.parity
def test_check_fails_where_the_models_differ(tmp_path, hf, capsys, reference, monkeypatch):
    assert run("check", hf, "--tolerance", "0") == 1
    capsys.readouterr()
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu", layers.ACTIVATIONS["gelu_tanh"])
    out = tmp_path / "parity.json"
    assert run("check", hf, "--json", out) == 1
    assert capsys.readouterr().out.endswith("FAILED\n")
    report = read_json(out)
    assert not report["passed"] and report["worst"] > 1e-5
    assert max(report["errors"]["embeddings"].values()) < 1e-6
    assert max(report["errors"]["layer 0"].values()) > 1e-5  # where the fault begins


@pytest.mark.parity
def test_check_reports_a_reference_that_is_nan(tmp_path, hf, capsys, reference):
    """What the official converter makes of a checkpoint with one theta (bug a)."""
    config = read_json(hf / "config.json")
    config["local_rope_theta"] = -1
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = -1
    (hf / "config.json").write_text(json.dumps(config))
    out = tmp_path / "parity.json"
    assert run("check", hf, "--json", out) == 1
    report = read_json(out)
    assert report["worst"] is None
    assert None not in report["errors"]["layer 0"].values()
    assert None in report["errors"]["layer 1"].values()


def test_check_without_torch_says_so(hf, capsys, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    refused(capsys, "not installed: torch, transformers", "check", hf)


def test_check_of_the_published_model_needs_no_torch(tmp_path, hf, capsys, monkeypatch):
    """Another model under its name: the golden values must not fit."""
    vocab = {"Hello": 5, "World": 6, "!": 7, "[UNK]": 8}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(hub, "resolve", lambda *args, **kwargs: hf)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "parity.json"
    assert run("check", check.GOLDEN_ID, "--json", out) == 1
    assert "golden logits: largest error" in capsys.readouterr().out
    assert not read_json(out)["passed"]

    ids = np.asarray([[5, 6, 7]])
    mlm = ModernBertForMaskedLM.from_pretrained(hf)
    monkeypatch.setattr(check, "GOLDEN_LOGITS", np.asarray(mlm(ids).logits)[0, :3, :3].tolist())
    hidden = np.asarray(mlm.model(ids).last_hidden_state)[0, :3, :3]
    monkeypatch.setattr(check, "GOLDEN_HIDDEN", hidden.tolist())
    assert run("check", check.GOLDEN_ID, "--json", out) == 0
    assert read_json(out)["passed"]
