"""Models on meshes with explicit axes (the default of jax) and auto axes, against one device."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import modernbert_jax as mj
from modernbert_jax import lora
from modernbert_jax.attention import attention, make_bounds, sharded
from modernbert_jax.checkpoint import pretrained
from modernbert_jax.checkpoint.hf import SafetensorsFolder
from modernbert_jax.checkpoint.orbax import save_orbax
from modernbert_jax.checkpoint.params import flatten

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, local_attention=4, num_labels=3,
)  # fmt: skip
RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 64, (8, 12)).astype(np.int32)
MASK = (np.arange(12) < RNG.integers(6, 13, (8, 1))).astype(np.int32)
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def make(cls=mj.ModernBertForMaskedLM, config=CONFIG, seed=0):
    return cls(config, rngs=nnx.Rngs(seed))


def mesh_of(kind: str, sizes=(2, 2, 2), names=("data", "fsdp", "tensor")):
    return jax.make_mesh(sizes, names, axis_types=(KINDS[kind],) * len(names))


def test_the_default_is_explicit():
    """What these tests call explicit is what a reader of jax's documentation gets."""
    assert jax.make_mesh((8,), ("data",)) == mesh_of("explicit", (8,), ("data",))


CASES = {
    "ModernBertModel": {},
    "ModernBertForMaskedLM": {"labels": np.where(MASK, IDS, -100)},
    "ModernBertForSequenceClassification": {"labels": np.arange(8) % 3},
    "ModernBertForTokenClassification": {"labels": np.where(MASK, IDS % 3, -100)},
    "ModernBertForQuestionAnswering": {
        "start_positions": np.arange(8) % 5, "end_positions": np.full(8, 5),
    },
    "ModernBertForMultipleChoice": {"labels": np.arange(8) % 2},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_model_on_explicit_axes(name):
    """Weights over fsdp and tensor, rows over data: logits and loss, eagerly and compiled."""
    labels = CASES[name]
    answers = name == "ModernBertForQuestionAnswering"
    model = make(getattr(mj, name), CONFIG.replace(num_labels=2) if answers else CONFIG)
    inputs = {"input_ids": IDS, "attention_mask": MASK} | labels
    if name == "ModernBertForMultipleChoice":
        inputs |= {k: np.stack([inputs[k], inputs[k][::-1]], 1) for k in list(inputs)[:2]}
    call = nnx.jit(lambda model, inputs: model(**inputs))
    want = call(model, inputs)
    mesh = mesh_of("explicit")
    model = mj.shard_params(model, mesh)
    placed = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    runs = [call(model, placed)] + ([model(**placed)] if name == "ModernBertForMaskedLM" else [])
    for got in runs:
        leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        for ours, plain in leaves:
            close(ours, plain)
            assert ours.sharding.spec == (
                P("data", *[None] * (ours.ndim - 1)) if ours.ndim else P()
            )
    if name != "ModernBertModel":
        assert got.loss is not None


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_axis(kind, context):
    """A mesh of eight over data, also through jax.set_mesh, with NumPy arrays or placed ones."""
    mesh = mesh_of(kind, (8,), ("data",))
    want = jax.jit(lambda ids: make()(ids).logits)(IDS)
    model = mj.shard_params(make(), mesh)
    call = nnx.jit(lambda model, ids: model(ids).logits)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        placed = jax.device_put(IDS, NamedSharding(mesh, P("data")))
        got = call(model, placed)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
        close(got, want)
        close(call(model, IDS), want)
        attend = sharded(mesh, rows="data")
        close(nnx.jit(lambda m, ids: m(ids, attention=attend).logits)(model, placed), want)


def steps(model, *batch):
    """Losses of three steps, and the parameters after them."""
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
                              wrt=nnx.Param)  # fmt: skip

    @nnx.jit
    def step(model, optimizer, ids, labels):
        loss, grads = nnx.value_and_grad(lambda m: m(ids, labels=labels).loss)(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, *batch)) for _ in range(3)], flatten(model)


@pytest.mark.parametrize("kind", ["explicit", pytest.param("auto", marks=pytest.mark.matrix)])
def test_training_steps(kind):
    """The same losses and weights as on one device, with dropout, from keys of the same stream."""
    config = CONFIG.replace(mlp_dropout=0.2, classifier_dropout=0.2)
    labels = np.arange(8) % 3
    build = lambda: make(mj.ModernBertForSequenceClassification, config)  # noqa: E731
    losses, params = steps(build().train(), IDS, labels)
    mesh = mesh_of(kind)
    model = mj.shard_params(build(), mesh).train()
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    got, ours = steps(model, *(jax.device_put(x, rows) for x in (IDS, labels)))
    close(got, losses)
    for path, value in params.items():
        close(ours[path], value, atol=1e-4, err_msg=path)
        assert ours[path].sharding.mesh.shape == mesh.shape
    plain, _ = steps(build(), IDS, labels)
    assert abs(plain[0] - losses[0]) > 1e-3  # dropout was active


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_attention(kind):
    mesh = mesh_of(kind, (4, 2), ("data", "tensor"))
    q, k, v = (RNG.normal(size=(4, 24, 2, 8)).astype(np.float32) for _ in range(3))
    bounds = make_bounds(np.repeat([[1, 2]], 12, axis=1).repeat(4, axis=0), 3)
    want = attention(*map(jnp.asarray, (q, k, v)), bounds, scale=0.3)
    run = sharded(mesh, rows="data", heads="tensor")
    place = NamedSharding(mesh, P("data", None, "tensor"))
    placed = [jax.device_put(x, place) for x in (q, k, v)]
    close(run(*placed, bounds, scale=0.3), want)
    close(jax.jit(functools.partial(run, scale=0.3))(*placed, bounds), want)
    close(jax.jit(functools.partial(run, scale=0.3))(q, k, v, bounds), want)
    with jax.set_mesh(mesh):
        close(jax.jit(functools.partial(run, scale=0.3))(*placed, bounds), want)


class TestShardParams:
    def test_what_each_device_holds(self):
        model = mj.shard_params(make(), mesh_of("explicit"))
        parts = {p: v.addressable_shards[0].data.shape for p, v in flatten(model).items()}
        assert parts["model.embeddings.tok_embeddings.weight"] == (32, 8)
        assert parts["model.layers.1.attn.Wqkv.weight"] == (8, 3, 1, 8)
        assert parts["model.layers.0.mlp.Wo.weight"] == (6, 8)
        assert parts["model.final_norm.weight"] == (16,)

    def test_everything_moves(self):
        config = CONFIG.replace(mlp_dropout=0.1)
        model = mj.shard_params(make(config=config), mesh_of("auto", (8,), ("data",)))
        for _, leaf in nnx.to_flat_state(nnx.state(model)):
            assert len(leaf.get_value().devices()) == 8

    def test_a_class_of_your_own(self):
        class Scorer(nnx.Module):
            def __init__(self, rngs):
                self.model = mj.ModernBertModel(CONFIG, rngs=rngs)
                self.out = nnx.Linear(16, 3, rngs=rngs)

        scorer = mj.shard_params(Scorer(nnx.Rngs(0)), mesh_of("explicit"))
        assert scorer.out.kernel[...].sharding.spec == P()
        assert scorer.model.layers[0].mlp.Wo.weight[...].sharding.spec == P("tensor", "fsdp")

    def test_a_size_that_does_not_divide(self):
        mesh = mesh_of("explicit", (1, 8), ("data", "tensor"))
        with pytest.raises(ValueError, match="expected 2 to be a multiple of mesh axis tensor = 8"):
            mj.shard_params(make(), mesh)


class TestInPlace:
    """What changes a model keeps it where it is."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "n, mean",
        [
            (72, True),
            *(pytest.param(*x, marks=pytest.mark.matrix) for x in [(72, False), (60, True)]),
        ],
    )
    def test_resize(self, kind, n, mean):
        plain, model = make(), mj.shard_params(make(), mesh_of(kind))
        for one in (plain, model):
            one.resize_token_embeddings(n, None, mean)
        for (path, want), got in zip(flatten(plain).items(), flatten(model).values(), strict=True):
            close(got, want, err_msg=path)
        assert model.model.embeddings.tok_embeddings.weight[...].sharding.spec == P(
            "tensor", "fsdp"
        )
        close(model(IDS % n).logits, plain(IDS % n).logits)

    def test_a_size_that_does_not_divide(self):
        model = mj.shard_params(make(), mesh_of("explicit"))
        with pytest.raises(ValueError, match="expected 71 to be a multiple of mesh axis tensor"):
            model.resize_token_embeddings(71, None)
        assert model.config.vocab_size == 64

    @pytest.mark.parametrize("late", [False, True])
    def test_adapters(self, late):
        def adapted(place):
            model = make() if late else place(make())
            lora.add_lora(model, rank=2)
            for i, (_, leaf) in enumerate(nnx.iter_graph(nnx.state(model, lora.LoRAParam))):
                if isinstance(leaf, lora.LoRAParam):
                    leaf.set_value(leaf + np.float32(0.01 * (i % 7)))
            return place(model)

        model = adapted(lambda m: mj.shard_params(m, mesh_of("explicit")))
        want = adapted(lambda m: m)(IDS).logits
        assert np.abs(want - make()(IDS).logits).max() > 0.01
        for change in (lambda m: None, lora.merge, lora.unmerge):
            change(model)
            close(model(IDS).logits, want)
            weight = model.model.layers[1].mlp.Wo.weight[...]
            assert weight.sharding.spec == P("tensor", "fsdp")


@pytest.mark.parametrize("kind", KINDS)
def test_embedder(kind, small_tokenizer, tmp_path):
    """Texts need not fill the mesh: an Embedder's rows are whole on every device."""
    config = CONFIG.replace(vocab_size=len(small_tokenizer))
    mj.ModernBertModel(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    texts = ["the patient has no fever", "no cough", "seen today with a rash and pain"]
    embedder = mj.Embedder.from_pretrained(tmp_path)
    want, mesh = embedder.encode(texts), mesh_of(kind, (8,), ("data",))
    with jax.set_mesh(mesh):
        close(embedder.encode(texts), want)
        close(mj.Embedder.from_pretrained(tmp_path).encode(texts), want)
    model = mj.ModernBertModel.from_pretrained(tmp_path, mesh=mesh)
    close(mj.Embedder(model, small_tokenizer).encode(texts), want)


class TestFromPretrained:
    """Weights go from the file to their devices."""

    @staticmethod
    def check(folder, model, kind="explicit", **options):
        mesh = mesh_of(kind)
        loaded = type(model).from_pretrained(folder, mesh=mesh, **options)
        parts = mj.shard_params(make(type(model), model.config), mesh)
        for (path, want), (_, got) in zip(
            flatten(parts).items(), flatten(loaded).items(), strict=True
        ):
            assert got.sharding == want.sharding, path
        for path, want in flatten(model).items():
            np.testing.assert_array_equal(flatten(loaded)[path], want, err_msg=path)
        return loaded

    @pytest.mark.parametrize("kind", KINDS)
    def test_hugging_face(self, tmp_path, kind):
        model = make(seed=3)
        model.save_pretrained(tmp_path)
        loaded = self.check(tmp_path, model, kind)
        close(loaded(IDS).logits, model(IDS).logits)

    def test_orbax(self, tmp_path, monkeypatch):
        model = make(seed=3)
        save_orbax(tmp_path / "c", architecture="ModernBertForMaskedLM", config=CONFIG,
                   params=flatten(model))  # fmt: skip
        # NumPy arrays would be complete ones.
        monkeypatch.setattr(pretrained, "put", lambda *_: pytest.fail("read as NumPy array"))
        self.check(tmp_path / "c", model)

    def test_one_tensor_at_a_time(self, tmp_path, monkeypatch):
        model = make()
        model.save_pretrained(tmp_path, max_shard_size=20_000)
        events = []
        read, put = SafetensorsFolder.__getitem__, pretrained.put
        monkeypatch.setattr(
            SafetensorsFolder, "__getitem__", lambda s, key: (events.append("r"), read(s, key))[1]
        )
        monkeypatch.setattr(pretrained, "put", lambda a, s: (events.append("p"), put(a, s))[1])
        self.check(tmp_path, model)
        assert events == ["r", "p"] * len(flatten(model))

    def test_a_new_head(self, tmp_path):
        make().save_pretrained(tmp_path)
        mesh = mesh_of("explicit")
        with pytest.warns(UserWarning, match="weights of the head are new"):
            model = mj.ModernBertForSequenceClassification.from_pretrained(
                tmp_path, mesh=mesh, num_labels=5, mlp_dropout=0.1
            )
        for _, leaf in nnx.to_flat_state(nnx.state(model)):
            assert leaf.get_value().sharding.mesh.shape == mesh.shape
