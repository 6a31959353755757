"""The models in idiomatic flax.nnx and transformers code, written from their documentation."""

import functools
import inspect
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax import losses
from modernbert_jax.checkpoint.params import flatten, module_of

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, local_attention=4, num_labels=3,
)  # fmt: skip
DROPOUT = CONFIG.replace(mlp_dropout=0.3, embedding_dropout=0.1, classifier_dropout=0.2)
IDS = np.random.default_rng(0).integers(5, 64, (2, 12))


def make(cls=mj.ModernBertForMaskedLM, config=DROPOUT, seed=0):
    return cls(config, rngs=nnx.Rngs(seed))


def same(a, b) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


HEADS = (mj.ModernBertForMaskedLM, mj.ModernBertForTokenClassification)


class TestDropout:
    """The modes and arguments of nnx.Dropout."""

    @pytest.mark.parametrize("cls", HEADS)
    def test_modes(self, cls):
        model = make(cls)
        still = model(IDS).logits  # a new model is in evaluation mode
        assert same(still, model(IDS).logits)
        assert model.train() is model
        first, second = model(IDS).logits, model(IDS).logits
        assert not same(first, still) and not same(first, second)
        assert same(model(IDS, deterministic=True).logits, still)
        assert same(nnx.view(model, deterministic=True)(IDS).logits, still)
        assert not same(model(IDS).logits, still)  # the view left the model in its mode
        assert model.eval() is model and same(model(IDS).logits, still)
        assert not same(model(IDS, deterministic=False).logits, still)
        assert not same(nnx.view(model, deterministic=False)(IDS).logits, still)
        assert same(model.train(False)(IDS).logits, still)

    @pytest.mark.parametrize("cls", HEADS)
    def test_where_a_key_comes_from(self, cls):
        """nnx folds the number of the call into a stream's key: the same bits as dropout_key."""
        model = make(cls).train()
        stream = jax.random.key(7)
        want = [model(IDS, dropout_key=jax.random.fold_in(stream, i)).logits for i in range(2)]
        rngs = nnx.Rngs(dropout=7)
        assert [same(model(IDS, rngs=rngs).logits, w) for w in want] == [True, True]
        rngs = nnx.Rngs(7)  # the default stream
        assert same(model(IDS, rngs=rngs).logits, want[0])
        assert same(model(IDS, rngs=nnx.Rngs(dropout=7).dropout).logits, want[0])
        key = jax.random.fold_in(stream, 0)
        assert same(model(IDS, rngs=key).logits, want[0])
        model.eval()
        assert same(model(IDS, rngs=key).logits, model(IDS).logits)
        assert same(model(IDS, rngs=key, deterministic=False).logits, want[0])
        assert same(model(IDS, dropout_key=key).logits, want[0])

    def test_compiled_draws_go_on(self):
        """A stream advances in nnx.jit, and through nnx.grad, as it does eagerly."""
        eager, compiled = make().train(), make().train()
        call = nnx.jit(lambda model: model(IDS).logits)
        for _ in range(2):
            np.testing.assert_allclose(call(compiled), eager(IDS).logits, rtol=1e-4, atol=1e-5)
        nnx.grad(lambda model: model(IDS).logits.sum())(eager)
        assert int(eager.model.dropout_rngs.count[...]) == 3

    def test_scan_and_remat(self):
        config = DROPOUT.replace(num_hidden_layers=5)
        want = make(config=config).train()(IDS).logits
        got = make(config=config).train()(IDS, scan_layers=True, remat=True).logits
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def test_weights_do_not_depend_on_the_rates(self):
        for cls in (mj.ModernBertForMaskedLM, mj.ModernBertForSequenceClassification):
            plain, dropping = flatten(make(cls, CONFIG)), flatten(make(cls, DROPOUT))
            assert all(same(plain[path], dropping[path]) for path in plain)

    def test_a_model_without_dropout_holds_no_random_state(self):
        model = make(config=CONFIG).train()
        assert not nnx.to_flat_state(nnx.state(model, nnx.RngState))
        assert same(model(IDS).logits, model.eval()(IDS).logits)

    def test_loaded_models_draw_from_their_seed(self, tmp_path):
        make().save_pretrained(tmp_path)
        load = functools.partial(
            mj.ModernBertForMaskedLM.from_pretrained, tmp_path, mlp_dropout=0.5
        )
        a, b, c = (load(seed=seed).train()(IDS).logits for seed in (0, 0, 1))
        assert same(a, b) and not same(a, c)

    def test_a_module_with_its_own_dropout(self, tmp_path):
        class Tagger(mj.ModernBertForTokenClassification):
            def __init__(self, config, *, rngs):
                super().__init__(config, rngs=rngs)
                self.mine = nnx.Dropout(0.5, rngs=rngs)

            def __call__(self, *args, **kwargs):
                return self.mine(super().__call__(*args, **kwargs).logits)

        model = make(Tagger, CONFIG)
        model.save_pretrained(tmp_path)
        loaded = Tagger.from_pretrained(tmp_path).eval()
        assert same(loaded(IDS), model.eval()(IDS))
        assert not same(loaded.train()(IDS), loaded.eval()(IDS))
        built = jax.jit(lambda p: module_of(Tagger, CONFIG, p).eval()(IDS))(flatten(model))
        np.testing.assert_allclose(built, model(IDS), rtol=1e-4, atol=1e-5)

    def test_capture_is_inference(self):
        model = make().train()
        found = mj.capture(model, "logits", input_ids=IDS)["logits"]
        np.testing.assert_allclose(found, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)

    def test_refused(self):
        key, model = jax.random.key(0), make().train()
        with pytest.raises(ValueError, match="dropout_key, rngs: expected one of them, got both"):
            model(IDS, dropout_key=key, rngs=key)
        with pytest.raises(ValueError, match="dropout_key, deterministic=True: expected one"):
            model(IDS, dropout_key=key, deterministic=True)
        with pytest.raises(TypeError, match="rngs: expected an nnx.Rngs.*got int"):
            model(IDS, rngs=3)
        keyless = mj.ModernBertForMaskedLM(DROPOUT, rngs=nnx.Rngs(params=0)).train()
        with pytest.raises(TypeError, match=r"rngs: .*got NoneType; pass rngs= to the call"):
            keyless(IDS)


def torch_pair(head: str, changes=None):
    """transformers' model and ours with its weights."""
    from modernbert_jax.checkpoint.hf import hf_to_params
    from tests.parity_cases import hf_model

    theirs = hf_model(head, {"num_hidden_layers": 3, "num_labels": 5, **(changes or {})})
    config = mj.ModernBertConfig.from_dict(theirs.config.to_dict())
    tensors = {name: t.detach().numpy().copy() for name, t in theirs.state_dict().items()}
    cls = getattr(mj, head)
    if config.tie_word_embeddings:
        tensors.pop("decoder.weight", None)
    return theirs, module_of(cls, config, hf_to_params(cls, config, tensors))


RNG = np.random.default_rng(1)
TOKEN_LABELS = np.where(RNG.random((3, 14)) < 0.4, RNG.integers(0, 5, (3, 14)), -100)
# name -> (head, changes, labels)
FURTHER = ("choices", "multi", "regression")  # the same losses as in other cases
LABELED = {
    "masked_lm": ("ModernBertForMaskedLM", {}, {"labels": np.where(
        RNG.random((3, 14)) < 0.3, RNG.integers(4, 97, (3, 14)), -100)}),
    "tokens": ("ModernBertForTokenClassification", {}, {"labels": TOKEN_LABELS}),
    "single": ("ModernBertForSequenceClassification", {}, {"labels": np.array([4, -100, 1])}),
    "multi": ("ModernBertForSequenceClassification", {},
              {"labels": RNG.integers(0, 2, (3, 5)).astype(np.float32)}),
    "regression": ("ModernBertForSequenceClassification", {"num_labels": 1},
                   {"labels": np.array([0.5, -2.0, 3.0], np.float32)}),
    "regressions": ("ModernBertForSequenceClassification", {"problem_type": "regression"},
                    {"labels": RNG.normal(size=(3, 5)).astype(np.float32)}),
    "named_single": ("ModernBertForSequenceClassification",
                     {"problem_type": "single_label_classification"},
                     {"labels": np.array([0, 3, 1])}),
    "named_multi": ("ModernBertForSequenceClassification",
                    {"problem_type": "multi_label_classification"},
                    {"labels": RNG.integers(0, 2, (3, 5)).astype(np.float32)}),
    "answers": ("ModernBertForQuestionAnswering", {"num_labels": 2},
                {"start_positions": np.array([3, 14, -1]), "end_positions": np.array([5, 20, 2])}),
    "choices": ("ModernBertForMultipleChoice", {}, {"labels": np.array([1, 0, 3])}),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.optimized
@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[pytest.mark.matrix] * (case in FURTHER)) for case in LABELED
])  # fmt: skip
def test_losses_and_gradients_are_those_of_transformers(case):
    """`labels=`: the loss and the gradient of each weight."""
    torch = pytest.importorskip("torch")
    from modernbert_jax.checkpoint.hf import params_to_hf

    head, changes, labels = LABELED[case]
    theirs, ours = torch_pair(head, changes)
    shape = (3, 4, 14) if case == "choices" else (3, 14)
    ids = np.random.default_rng(2).integers(4, 97, shape)
    want = theirs(torch.tensor(ids), **{k: torch.tensor(v) for k, v in labels.items()}).loss
    want.backward()

    @nnx.jit
    def step(model, labels):
        return nnx.value_and_grad(lambda m: m(ids, **labels).loss)(model)

    got, grads = step(ours, labels)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, want.item(), rtol=2e-5)
    np.testing.assert_allclose(ours(ids, **labels).loss, want.item(), rtol=2e-5)
    flat = {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(grads)}
    flat = params_to_hf(type(ours), ours.config, flat)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert len(gradients) > 10
    # The rounding of a gradient that is 0 in exact arithmetic, such as that of an answer's bias.
    rounding = 1e-6 * max(np.abs(g).max() for g in gradients.values())
    for name, g in gradients.items():
        atol = 1e-4 * np.abs(g).max() + rounding
        np.testing.assert_allclose(flat[name], g, rtol=0, atol=atol, err_msg=name)


class TestLosses:
    def test_nothing_labeled_is_nan_as_in_torch(self):
        torch = pytest.importorskip("torch")
        ours = losses.cross_entropy(np.ones((2, 3)), np.array([-100, -100]))
        theirs = torch.nn.functional.cross_entropy(torch.ones(2, 3), torch.tensor([-100, -100]))
        assert np.isnan(ours) and np.isnan(theirs.item())

    def test_jax_labels_outside_give_nan(self):
        logits = np.ones((2, 3), np.float32)
        for bad in (3, -1, -99):
            assert np.isnan(losses.cross_entropy(logits, jnp.array([0, bad])))

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda: losses.cross_entropy(np.ones((2, 3)), [0, 3]), "labels: expected 0 to 2.*got"),
            (lambda: losses.cross_entropy(np.ones((2, 3)), [0, -1]), "-100 to leave one out, got"),
            (lambda: losses.cross_entropy(np.ones((2, 3)), [0]), r"the shape \(2,\), got \(1,\)"),
            (lambda: losses.cross_entropy(np.ones((2, 3)), [0.0, 1.0]), "class indices .*float64"),
            (
                lambda: losses.sequence_classification(np.ones((2, 3)), [0.5, 1.0]),
                r"labels: expected the shape \(2, 3\), got \(2,\)",
            ),
            (
                lambda: losses.sequence_classification(np.ones((2, 3)), [0, 1], "ranking"),
                "problem_type: expected None or one of regression, .*got 'ranking'",
            ),
            (
                lambda: losses.question_answering(*[np.ones((2, 3))] * 2, [0.0, 1], [1, 1]),
                "start_positions: expected positions",
            ),
        ],
    )  # fmt: skip
    def test_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_packed_sequences(self):
        """The loss of packed sequences is that of the same sequences in rows of their own."""
        model = make(mj.ModernBertForSequenceClassification, CONFIG)
        apart = model(IDS, labels=np.array([2, 0])).loss
        packed = {
            "input_ids": IDS.reshape(1, -1), "segment_ids": np.repeat([[1, 2]], 12, axis=1),
            "num_segments": 3,
        }  # fmt: skip
        got = model(**packed, labels=np.array([[2, 0, -100]])).loss
        np.testing.assert_allclose(got, apart, rtol=1e-5)
        with pytest.raises(ValueError, match="labels: packed sequences need one class index each"):
            make(
                mj.ModernBertForSequenceClassification,
                CONFIG.replace(problem_type="multi_label_classification"),
            )(**packed, labels=np.zeros((1, 3, 3)))

    def test_where_labels_do_not_belong(self):
        with pytest.raises(TypeError, match="labels: an argument of the models for masked LM"):
            make(mj.ModernBertModel)(IDS, labels=IDS)
        answers = make(mj.ModernBertForQuestionAnswering, CONFIG.replace(num_labels=2))
        with pytest.raises(TypeError, match="takes start_positions and end_positions"):
            answers(IDS, labels=IDS)
        with pytest.raises(ValueError, match="expected both or neither, got one"):
            answers(IDS, start_positions=np.array([0, 1]))
        assert answers(IDS).loss is None


@pytest.mark.parity
@pytest.mark.optimized
def test_a_training_loop_follows_torch():
    """Ten steps of nnx.Optimizer: the losses of torch.optim.AdamW on transformers' model."""
    torch = pytest.importorskip("torch")
    theirs, model = torch_pair("ModernBertForSequenceClassification")
    ids = np.random.default_rng(3).integers(4, 97, (4, 14))
    labels = np.array([0, 1, 4, 2])
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    want = []
    for _ in range(10):
        loss = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        want.append(loss.item())

    optimizer = nnx.Optimizer(model, optax.adamw(1e-3, weight_decay=0.01), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, input_ids, labels):
        def loss_fn(model):
            return model(input_ids, labels=labels).loss

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    model.train()
    got = [float(train_step(model, optimizer, ids, labels)) for _ in range(10)]
    np.testing.assert_allclose(got, want, rtol=2e-3)
    assert want[-1] < want[0] / 2


class TestTokenizedBatches:
    """What a tokenizer returns goes into compiled functions."""

    texts = ("the patient has no fever", "a rash")

    def test_a_batch_is_a_pytree(self, small_tokenizer):
        model = make(config=CONFIG.replace(vocab_size=300))
        call = nnx.jit(lambda model, batch: model(**batch).logits)
        lists = small_tokenizer(list(self.texts), padding=True)
        arrays = small_tokenizer(list(self.texts), padding=True, return_tensors="np")
        want = model(arrays["input_ids"], arrays["attention_mask"]).logits
        for batch in (lists, arrays):
            np.testing.assert_allclose(call(model, batch), want, rtol=1e-4, atol=1e-5)
        got = nnx.jit(model)(**arrays).logits
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        again = jax.tree.map(lambda x: x, arrays)
        assert type(again) is type(arrays) and same(again["input_ids"], arrays["input_ids"])

    def test_lists_are_refused_when_compiled(self, small_tokenizer):
        lists = small_tokenizer(list(self.texts), padding=True)
        with pytest.raises(TypeError, match="input_ids: .*got lists.*return_tensors"):
            nnx.jit(make(config=CONFIG.replace(vocab_size=300)))(**lists)


class TestNamesOfTransformers:
    def test_auto_config(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        make(mj.ModernBertForTokenClassification).save_pretrained(tmp_path)
        config = mj.AutoConfig.from_pretrained(tmp_path)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, mj.ModernBertConfig)
        assert config.num_labels == theirs.num_labels == 3
        assert config.hidden_size == theirs.hidden_size
        assert mj.AutoConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
        with pytest.raises(TypeError, match="hue: expected a field of ModernBertConfig"):
            mj.AutoConfig.from_pretrained(tmp_path, hue=1)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"expected config\.json, found none"):
            mj.AutoConfig.from_pretrained(tmp_path / "empty")

    def test_from_config(self):
        model = mj.AutoModelForMaskedLM.from_config(CONFIG, seed=3)
        want = flatten(make(config=CONFIG, seed=3))
        assert all(same(value, want[path]) for path, value in flatten(model).items())

    @pytest.mark.parametrize("tied", [True, False])
    def test_num_parameters(self, tied):
        pytest.importorskip("torch")
        theirs, ours = torch_pair("ModernBertForMaskedLM", {"tie_word_embeddings": tied})
        assert ours.num_parameters() == theirs.num_parameters()
        got = ours.num_parameters(exclude_embeddings=True)
        assert got == theirs.num_parameters(exclude_embeddings=True)
        assert ours.model.num_parameters() == theirs.model.num_parameters()

    def test_push_to_hub(self, tmp_path, monkeypatch):
        """Creates the repository and uploads one commit, which transformers loads."""
        torch = pytest.importorskip("torch")
        import huggingface_hub
        import transformers

        calls = []

        class Api:
            def __init__(self, token=None):
                calls.append(("token", token))

            def create_repo(self, repo_id, **options):
                calls.append(("create", repo_id, options))
                return types.SimpleNamespace(repo_id="me/" + repo_id)

            def upload_folder(self, *, folder_path, **options):
                calls.append(("upload", options))
                shutil.copytree(folder_path, tmp_path / "sent")
                return types.SimpleNamespace(commit_url="https://hub/me/notes/commit/1")

        for name in ("create_repo", "upload_folder"):  # the stub takes what huggingface_hub takes
            known = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
            assert {"repo_id", "private", "exist_ok"} <= set(known) or name == "upload_folder"
            assert name == "create_repo" or {"commit_message", "revision"} <= set(known)
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        model = make(config=CONFIG)
        assert model.push_to_hub("notes", private=True, token="t").endswith("/commit/1")
        assert calls == [
            ("token", "t"),
            ("create", "notes", {"private": True, "exist_ok": True}),
            (
                "upload",
                {"repo_id": "me/notes", "commit_message": "Upload ModernBERT", "revision": None},
            ),
        ]
        theirs = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "sent").eval()
        with torch.no_grad():
            want = theirs(torch.tensor(IDS)).logits.numpy()
        np.testing.assert_allclose(model(IDS).logits, want, rtol=1e-3, atol=1e-4)
        calls.clear()
        with pytest.raises(ValueError):
            model.push_to_hub("notes", card={"no_such_fact": 1})
        assert [call[0] for call in calls] == ["token"]  # nothing was sent


class TestToolsOfJax:
    def test_tabulate(self):
        model = make(mj.ModernBertForSequenceClassification, CONFIG)
        table = nnx.tabulate(model, IDS, np.ones_like(IDS), console_kwargs={"width": 300})
        for path in ("model/embeddings", "model/layers/1/attn/Wqkv", "model/layers/0/mlp", "head"):
            assert f" {path} " in table, path
        total = sum(value.size for value in flatten(model).values())
        assert f"Total Parameters: {total:,}" in table
        # It puts public methods back as plain functions, which breaks static ones.
        assert same(make(type(model), CONFIG)(IDS).logits, model(IDS).logits)

    def test_forward_derivatives(self):
        """jvp with the reference attention: a difference quotient along the tangent."""
        model = make(config=CONFIG)
        attention = functools.partial(mj.attention.attention, implementation="reference")
        rng = np.random.default_rng(5)
        x, dx = (rng.normal(size=(1, 8, 16)).astype(np.float32) for _ in range(2))
        f = jax.jit(lambda x: model(inputs_embeds=x, attention=attention).logits)
        got = jax.jit(lambda x, dx: jax.jvp(f, (x,), (dx,))[1])(x, dx)
        want = (np.float64(f(x + 1e-2 * dx)) - np.float64(f(x - 1e-2 * dx))) / 2e-2
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * np.abs(want).max())

    def test_transfer_guard_and_debug_infs(self):
        """Compiled calls pass, with padding too, whose log-sum-exp is -inf."""
        model, call = make(config=CONFIG), nnx.jit(lambda m, i, a: m(i, a).logits)
        ids, mask = jnp.asarray(IDS), jnp.asarray([[1] * 12, [1] * 7 + [0] * 5])
        want = model(ids, mask).logits
        with jax.transfer_guard("disallow"):
            got = call(model, ids, mask)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        jax.config.update("jax_debug_infs", True)
        try:
            assert same(call(model, ids, mask), got)
        finally:
            jax.config.update("jax_debug_infs", False)
