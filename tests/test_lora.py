"""LoRA adapters: equality with peft in both directions, merging, training, scans and meshes."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import modernbert_jax as mj
from modernbert_jax import lora
from modernbert_jax.fused_local_layer import _matrices
from modernbert_jax.layers import Linear
from modernbert_jax.weights import to_hf
from tests.parity_cases import BIASES, hf_model, inputs, relative_error
from train.common.sharding import MeshShape, make_mesh, param_shardings

IDS, MASK = inputs(24, padding="right")
SMALL = {"num_hidden_layers": 3}


def tiny(cls=mj.ModernBertForMaskedLM, **changes):
    config = mj.ModernBertConfig.tiny(
        vocab_size=98, hidden_size=32, intermediate_size=24, num_attention_heads=2,
        num_hidden_layers=5, pad_token_id=3,
    ).replace(**changes)  # fmt: skip
    return cls(config, rngs=nnx.Rngs(1))


def randomized(model, seed: int = 0):
    """The model with second factors that are not zero."""
    rngs = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.lora_B is not None:
            weight = module.lora_B.weight
            weight[...] = jnp.asarray(rngs.normal(0, 0.1, weight.shape), jnp.float32)
    return model


def adapted(**changes):
    model = tiny(**changes)
    lora.add_lora(model, rank=4, alpha=6)
    return randomized(model)


def base(cls: str, folder: Path, **changes):
    """transformers' model, and ours with the same weights."""
    reference = hf_model(cls, SMALL | changes)
    reference.save_pretrained(folder)
    return reference, getattr(mj, cls).from_pretrained(folder)


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    return out[0].numpy()


def logits(model, **options) -> np.ndarray:
    out = model(IDS, MASK, **options)
    return np.asarray(out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits)


def where(array: np.ndarray) -> np.ndarray | None:
    return MASK if array.ndim == 3 else None


PEFT_CASES = {
    "masked_lm": ("ModernBertForMaskedLM", BIASES, {"target_modules": ["Wqkv", "Wo", "Wi"]}),
    "encoder": ("ModernBertModel", {}, {"target_modules": ["Wqkv"], "use_rslora": True}),
    "some_layers": (
        "ModernBertForMaskedLM",
        {},
        {"target_modules": ["mlp.Wo", "dense"], "bias": "none"},
    ),
    "one_layer": (
        "ModernBertForTokenClassification",
        {},
        {"target_modules": ["Wqkv"], "layers_to_transform": [1]},
    ),
    "with_a_head": (
        "ModernBertForSequenceClassification",
        {**BIASES, "num_labels": 3},
        {"target_modules": ["Wqkv", "Wo"], "modules_to_save": ["head"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.optimized
@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_of_peft_gives_its_logits(case, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    cls, changes, settings = copy.deepcopy(PEFT_CASES[case])  # peft adds to its lists
    reference, ours = base(cls, tmp_path / "base", **changes)
    before = logits(ours)
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=9, **settings))
    with torch.no_grad():  # also changes a head that is saved in full
        for name, p in reference.named_parameters():
            if p.requires_grad:
                p.normal_(1.0 if "norm" in name else 0.0, 0.1)
    reference.eval().save_pretrained(tmp_path / "adapter")

    lora.load_adapter(ours, tmp_path / "adapter")
    expected = torch_logits(reference)
    assert relative_error(logits(ours), expected, where(expected)) < 2e-5
    assert relative_error(before, expected, where(expected)) > 0.01


@pytest.mark.optimized
@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_reads_what_we_write(case, tmp_path):
    peft = pytest.importorskip("peft")
    cls, changes, settings = copy.deepcopy(PEFT_CASES[case])  # peft adds to its lists
    reference, ours = base(cls, tmp_path / "base", **changes)
    full = tuple(settings.get("modules_to_save", ()))
    full += ("classifier",) if "task_type" in settings else ()
    if only := settings.get("layers_to_transform"):
        lora.add_lora(ours, 4, 9, [f"model.layers.{i}.attn.Wqkv" for i in only])
    else:
        lora.add_lora(ours, 4, 9, settings["target_modules"])
    randomized(ours)
    for name in full:
        state = nnx.state(getattr(ours, name))
        nnx.update(getattr(ours, name), jax.tree.map(lambda x: x + 0.1, state))
    lora.save_adapter(ours, tmp_path / "adapter", base_model="base", modules_to_save=full)

    before = torch_logits(reference)
    expected = torch_logits(peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval())
    assert relative_error(logits(ours), expected, where(expected)) < 2e-5
    assert relative_error(before, expected, where(expected)) > 0.001


@pytest.mark.optimized
def test_the_formula_in_torch(tmp_path):
    """Needs no peft: W + alpha / r * B A, written into transformers' own model."""
    torch = pytest.importorskip("torch")
    reference, ours = base("ModernBertForMaskedLM", tmp_path / "base", **BIASES)
    lora.add_lora(ours, rank=3, alpha=7)
    lora.save_adapter(randomized(ours), tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * SMALL["num_hidden_layers"]
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for key, a in tensors.items():
            name = key.removeprefix("base_model.model.")
            if ".lora_A." in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                weights[name.replace(".lora_A", "")] += torch.tensor(7 / 3 * b @ a)
    assert relative_error(logits(ours), torch_logits(reference), MASK) < 2e-5


def test_a_new_adapter_changes_nothing_and_is_drawn_as_in_peft():
    model = tiny()
    before = logits(model)
    lora.add_lora(model, rank=4, rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(logits(model), before)
    a = model.model.layers[0].attn.Wo.lora_A.weight[...]
    assert a.shape == (2, 16, 4) and a.dtype == jnp.float32
    assert 0.9 * 32**-0.5 < np.abs(a).max() < 32**-0.5
    assert abs(float(a.std()) - (32 * 3) ** -0.5) < 0.1 * (32 * 3) ** -0.5


def test_merge_and_unmerge(tmp_path):
    model = adapted()
    original = {p: np.asarray(v) for p, v in plain(model).items()}
    active = logits(model)
    lora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="expected merged adapters, got none"):
        lora.unmerge(model)
    lora.merge(model)
    assert not jax.tree.leaves(nnx.state(model, lora.LoRAParam))
    assert relative_error(logits(model), active) < 1e-6
    with pytest.raises(ValueError, match="expected active adapters, got none"):
        lora.merge(model)

    model.save_pretrained(tmp_path / "merged")  # a complete model, without adapters
    saved = mj.ModernBertForMaskedLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(logits(saved), logits(model))
    lora.save_adapter(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("adapter", "again")]
        assert files[0] == files[1]

    lora.unmerge(model)
    assert relative_error(logits(model), active) < 1e-6
    for path, value in plain(model).items():
        np.testing.assert_allclose(value, original[path], atol=1e-6, rtol=0)


def plain(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(lora.LoRAParam))))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def test_unmerge_of_rounded_weights_is_refused():
    model = adapted(param_dtype="bfloat16")
    lora.merge(model)
    with pytest.raises(ValueError, match="expected float32 weights, got bfloat16"):
        lora.unmerge(model)


def test_only_adapters_train():
    """One filter in nnx.Optimizer. The gradients follow from those of the complete weights."""
    model = adapted()
    before = {p: np.asarray(v) for p, v in plain(model).items()}

    def loss_of(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(IDS, MASK).logits, IDS)
        return jnp.mean(losses * MASK)

    @nnx.jit
    def step(model, optimizer):
        argnums = nnx.DiffState(0, lora.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_of, argnums=argnums)(model)
        optimizer.update(model, grads)
        return loss, grads

    merged = adapted()
    lora.merge(merged)
    d_weight = nnx.grad(loss_of)(merged).model.layers[2].attn.Wo.weight.get_value()  # [H, K, D]
    wo = model.model.layers[2].attn.Wo
    a, b = (np.asarray(f.weight[...], np.float64) for f in (wo.lora_A, wo.lora_B))

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.LoRAParam)
    first, grads = step(model, optimizer)
    d = grads.model.layers[2].attn.Wo
    d_a = 6 / 4 * np.einsum("HKD,RD->HKR", d_weight, b)
    d_b = 6 / 4 * np.einsum("HKR,HKD->RD", a, d_weight)
    assert relative_error(d.lora_A.weight.get_value(), d_a) < 1e-4
    assert relative_error(d.lora_B.weight.get_value(), d_b) < 1e-4
    for _ in range(5):
        last, _ = step(model, optimizer)
    assert float(last) < 0.95 * float(first)
    for path, value in plain(model).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
    model = adapted(num_hidden_layers=7)
    assert model.model._groups() == (2, 3)
    expected = logits(model)
    run = nnx.jit(lambda model: model(IDS, MASK, scan_layers=True, remat=remat).logits)
    assert relative_error(run(model), expected) < 1e-5

    model = tiny(num_hidden_layers=7)
    lora.add_lora(model, targets=["model.layers.0.attn.Wqkv"])
    logits(model, scan_layers=True)  # the first layer is not scanned
    model = tiny(num_hidden_layers=7)
    lora.add_lora(model, targets=["layers.3.attn.Wqkv"])
    with pytest.raises(ValueError, match="scan_layers: expected layers 1 and up that are alike"):
        logits(model, scan_layers=True)


def test_meshes():
    """Weights and adapters split by their axes, and adapters that are added to split weights."""
    expected = logits(adapted())
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    run = nnx.jit(lambda model, ids, mask: model(ids, mask).logits)
    batch = [
        jax.device_put(np.repeat(x, 4, axis=0), NamedSharding(mesh, P(("data", "fsdp"))))
        for x in (IDS[:1], MASK[:1])
    ]
    for late in (False, True):
        model = tiny() if late else adapted()
        flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        shapes = {".".join(map(str, path)): v.get_value() for path, v in flat.items()}
        for path, sharding in param_shardings(shapes, mesh).items():
            variable = flat[tuple(int(p) if p.isdecimal() else p for p in path.split("."))]
            variable[...] = jax.device_put(variable[...], sharding)
        nnx.update(model, nnx.from_flat_state(flat))
        if late:
            lora.add_lora(model, rank=4, alpha=6)
            randomized(model)
        out = run(model, *batch)
        assert len(out.sharding.device_set) == 8
        for row in np.asarray(out):
            assert relative_error(row, expected[0]) < 1e-5


def test_q_k_and_v_side_by_side():
    """As a TPU's kernels read them: another order of the outputs, in the adapter, too."""

    def attention(qkv, k, v, bounds, *, scale, rope):
        if k is None:
            B, L, G, _, J, K = qkv.shape
            qkv = jnp.swapaxes(qkv, 2, 3).reshape(B, L, 3, G * J, K)
            qkv, k, v = (qkv[:, :, i] for i in range(3))
        return mj.attention.attention(qkv, k, v, bounds, scale=scale, rope=rope)

    model = adapted(attention_bias=True, num_attention_heads=4)
    expected = logits(model)
    assert relative_error(logits(model, attention=attention), expected) < 1e-6
    attention.heads_in_a_block = lambda q, bounds: 2
    assert relative_error(logits(model, attention=attention), expected) < 1e-5


def test_a_fused_layer_reads_the_complete_weights():
    layer = adapted().model.layers[1]
    shapes = [(1, 32), (32, 96), (32, 32), (1, 32), (32, 48), (24, 32)]
    got = _matrices(layer, SimpleNamespace(weight_shapes=shapes))
    for ours, linear in ((got[2], layer.attn.Wo), (got[5], layer.mlp.Wo)):
        a, b, w = (
            np.asarray(v, np.float64).reshape(-1, v.shape[-1])
            for v in (linear.lora_A.weight[...], linear.lora_B.weight[...], linear.weight[...])
        )
        np.testing.assert_allclose(ours, w + 6 / 4 * a @ b, atol=1e-6)


def test_bfloat16():
    """Adapters stay float32, and follow the model's dtype in computation."""
    model, exact = adapted(dtype="bfloat16", param_dtype="bfloat16"), adapted()
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model, lora.LoRAParam))} == {
        jnp.dtype("float32")
    }
    assert relative_error(logits(model), logits(exact)) < 0.05


def test_what_has_no_place_for_adapters_refuses_them(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"call lora.merge\(model\) first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: expected 1 to 65,536, got 0"),
        ({"rank": True}, "rank: expected 1 to"),
        ({"alpha": -1}, "alpha: expected a positive number, got -1"),
        ({"targets": "Wqkv"}, "targets: expected names such as"),
        ({"targets": ("Wqkv", "query")}, "targets: expected some of dense, Wo, Wqkv, Wi, got 'que"),
    ],
)
def test_arguments(arguments, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, **arguments)
    assert not jax.tree.leaves(nnx.state(model, lora.LoRAParam))


def edit(folder, key, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type: expected 'LORA', got 'IA3'"),
        ("use_dora", True, "use_dora: not supported, got True; merge the adapter with peft"),
        ("bias", "all", "bias: not supported, got 'all'"),
        ("rank_pattern", {"Wi": 3}, "rank_pattern: not supported"),
        ("a_setting_of_tomorrow", 1, "a_setting_of_tomorrow: not supported"),
        ("r", 5, r"Wo.lora_A.weight: expected shape \(5, 32\), got \(4, 32\)"),
        ("r", "4", "r: expected 1 to"),
        ("lora_alpha", None, "lora_alpha: expected a number, got None"),
        ("modules_to_save", "head", "modules_to_save: expected names, got 'head'"),
        ("modules_to_save", ["head"], "expected head.dense.weight, head.norm.weight, found none"),
    ],
)
def test_settings_that_are_not_supported(key, value, message, tmp_path):
    lora.save_adapter(adapted(), tmp_path)
    edit(tmp_path, key, value)
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(tiny(), tmp_path)


def test_folders_that_do_not_fit(tmp_path):
    model = adapted()
    lora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="expected one without adapters"):
        lora.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="expected one without adapters"):
        lora.add_lora(model)
    with pytest.raises(ValueError, match="expected an adapter of a linear layer of ModernBertMod"):
        lora.load_adapter(tiny(mj.ModernBertModel), tmp_path)
    with pytest.raises(ValueError, match="expected a model with adapters, got none"):
        lora.save_adapter(tiny(), tmp_path / "none")
    with pytest.raises(ValueError, match="modules_to_save: expected modules of the model"):
        lora.save_adapter(model, tmp_path / "none", modules_to_save=["classifier"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    key = next(k for k in tensors if "lora_B" in k)
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(ValueError, match=f"expected {key.removeprefix('base_model.model.')}"):
        lora.load_adapter(tiny(), tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="expected adapter_model.safetensors of a PEFT"):
        lora.load_adapter(tiny(), tmp_path)


def test_axes_of_the_factors():
    """A row per factor: PEFT's [R, in] and [out, R], from our axes."""
    a = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # [H, K, R]
    np.testing.assert_array_equal(
        to_hf("model.layers.0.attn.Wo.lora_A.weight", a), a.reshape(6, 4).T
    )
    b = np.arange(4 * 6).reshape(4, 3, 2, 1)  # [R, T, H, K]
    np.testing.assert_array_equal(to_hf("layers.7.attn.Wqkv.lora_B.weight", b), b.reshape(4, 6).T)
