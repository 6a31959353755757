"""25 snippets as flax's and transformers' documents have them, with one import changed.

Each is what a reader of those documents types in a notebook. What they know must work here too, or
be refused with advice.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import modernbert_jax
from modernbert_jax import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Embedder,
    ModernBertConfig,
    pipeline,
)

TEXTS = ["the patient has no fever", "denies cough and pain today"]
LABELS = np.array([0, 1])
CONFIG = ModernBertConfig(
    vocab_size=300, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, local_attention=8, pad_token_id=0, bos_token_id=1, cls_token_id=1,
    eos_token_id=2, sep_token_id=2, initializer_range=0.3, classifier_pooling="mean",
)  # fmt: skip
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_tokenizer):
    """A folder of each kind of checkpoint: mlm, classifier (2 labels), choice."""
    found = tmp_path_factory.mktemp("models")
    for name, cls in (
        ("mlm", AutoModelForMaskedLM),
        ("classifier", AutoModelForSequenceClassification),
        ("choice", AutoModelForMultipleChoice),
    ):
        cls.from_config(CONFIG).save_pretrained(found / name, tokenizer=small_tokenizer)
    return found


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "mlm")


@pytest.fixture(scope="module")
def batch(tokenizer):
    return tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")


@pytest.fixture
def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "classifier")


def of_transformers(head, folder, inputs, **labels):
    """The output of transformers' model for NumPy arrays."""
    torch = pytest.importorskip("torch")
    import transformers

    model = getattr(transformers, head).from_pretrained(folder).eval()
    arrays = {k: torch.tensor(v) for k, v in {**inputs, **labels}.items()}
    with torch.no_grad():
        return model(**arrays, output_hidden_states=head == "ModernBertModel")


class TestFlax:
    def test_01_display_a_model_and_its_state(self, classifier):
        nnx.display(classifier)
        params = nnx.state(classifier, nnx.Param)
        total = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
        assert f"Param: {total:,}" in str(classifier)
        shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(params))
        assert shapes["classifier"] == {"bias": (2,), "weight": (16, 2)}
        assert total == 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 12) + 5 * 16 + 16 * 16 + 16 + 34

    def test_02_train_and_evaluate_with_metrics(self, classifier, batch):
        optimizer = nnx.Optimizer(classifier, optax.adamw(5e-3, 0.9), wrt=nnx.Param)
        metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

        def loss_fn(model, batch, labels):
            logits = model(**batch).logits
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, logits

        @nnx.jit
        def train_step(model, optimizer, metrics, batch, labels):
            grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
            (loss, logits), grads = grad_fn(model, batch, labels)
            metrics.update(loss=loss, logits=logits, labels=labels)
            optimizer.update(model, grads)
            return loss

        classifier.train()
        losses = [train_step(classifier, optimizer, metrics, batch, LABELS) for _ in range(8)]
        found = metrics.compute()
        close(found["loss"], np.mean(losses))
        assert losses[-1] < losses[0] / 2 and found["accuracy"] >= 0.5
        classifier.eval()
        assert (classifier(**batch).logits.argmax(-1) == LABELS).all()

    def test_03_a_pure_function_of_the_state(self, classifier, batch, folder):
        graphdef, params, rest = nnx.split(classifier, nnx.Param, ...)

        @jax.jit
        def loss_fn(params, batch):
            model = nnx.merge(graphdef, params, rest)
            return model(**batch, labels=LABELS).loss

        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        head = "ModernBertForSequenceClassification"
        close(value, of_transformers(head, folder / "classifier", batch, labels=LABELS).loss)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        assert loss_fn(params, batch) < value
        nnx.update(classifier, params)

    def test_04_freeze_the_encoder_with_labels_of_optax(self, classifier, batch):
        params = nnx.state(classifier, nnx.Param)
        parts = nnx.map_state(lambda path, _: "body" if path[0] == "model" else "head", params)
        tx = optax.multi_transform({"head": optax.adam(1e-3), "body": optax.set_to_zero()}, parts)
        optimizer = nnx.Optimizer(classifier, tx, wrt=nnx.Param)
        before = jax.tree.map(np.asarray, params)
        grads = nnx.jit(nnx.grad(lambda model: model(**batch, labels=LABELS).loss))(classifier)
        optimizer.update(classifier, grads)
        moved = jax.tree.map(
            lambda a, b: abs(a - b).max(), before, nnx.state(classifier, nnx.Param)
        )
        assert all(x == 0 for x in jax.tree.leaves(moved["model"]))
        close(moved["head"]["dense"]["weight"][...], 1e-3)  # Adam's first step

    def test_05_an_abstract_model_filled_from_a_dictionary(self, folder, batch):
        abstract = nnx.eval_shape(lambda: AutoModel(CONFIG, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        loaded = AutoModel.from_pretrained(folder / "mlm")
        nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(loaded)))
        model = nnx.merge(graphdef, state)
        want = of_transformers("ModernBertModel", folder / "mlm", batch)
        close(model(**batch).last_hidden_state, want.last_hidden_state)

    def test_06_save_and_restore_with_orbax(self, folder, batch, tmp_path):
        import orbax.checkpoint as ocp

        load = AutoModelForSequenceClassification.from_pretrained
        model = load(folder / "classifier", mlp_dropout=0.1)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: m(**batch, labels=LABELS).loss)(model)
            optimizer.update(model, grads)
            return loss

        model.train()
        train_step(model, optimizer)
        _, state = nnx.split((model, optimizer))
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()

        def create():
            model = AutoModelForSequenceClassification(model_config, rngs=nnx.Rngs(0)).train()
            return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        model_config = model.config
        graphdef, abstract = nnx.split(nnx.eval_shape(create))
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "state", abstract))
        assert train_step(*restored) == train_step(model, optimizer)  # dropout's keys, too

    def test_07_create_a_model_in_its_sharding(self, batch):
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

        @nnx.jit
        def create_sharded_model():
            model = AutoModelForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
            state = nnx.state(model)
            specs = nnx.get_partition_spec(state)
            nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
            return model

        with jax.set_mesh(mesh):
            model = create_sharded_model()
            ids = jax.device_put(batch["input_ids"], NamedSharding(mesh, P("data", None)))
            got = nnx.jit(lambda model, ids: model(ids).logits)(model, ids)
        plain = AutoModelForMaskedLM(CONFIG, rngs=nnx.Rngs(0))
        assert len(got.sharding.device_set) == 4
        close(got, plain(batch["input_ids"]).logits)

    def test_08_data_parallel_steps(self, classifier, batch):
        alone = nnx.clone(classifier)
        mesh = jax.make_mesh((2,), ("data",))
        optimizer = nnx.Optimizer(classifier, optax.sgd(0.1), wrt=nnx.Param)
        state = nnx.state((classifier, optimizer))
        nnx.update((classifier, optimizer), jax.device_put(state, NamedSharding(mesh, P())))
        data = jax.device_put((batch, LABELS), NamedSharding(mesh, P("data")))

        @nnx.jit
        def train_step(model, optimizer, batch, labels):
            loss, grads = nnx.value_and_grad(lambda m: m(**batch, labels=labels).loss)(model)
            optimizer.update(model, grads)
            return loss

        with jax.set_mesh(mesh):
            first, second = (train_step(classifier, optimizer, *data) for _ in range(2))
        close(first, alone(**batch, labels=LABELS).loss)
        assert second < first

    def test_09_an_ensemble_by_vmap(self, batch):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return AutoModelForSequenceClassification(CONFIG, rngs=rngs)

        models = create(nnx.Rngs(0))
        call = nnx.vmap(lambda model, ids: model(ids).logits, in_axes=(0, None))
        logits = nnx.jit(call)(models, jnp.asarray(batch["input_ids"]))
        graphdef, state = nnx.split(models)
        for i in range(3):
            one = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))
            close(logits[i], one(batch["input_ids"]).logits)
        assert abs(logits[0] - logits[1]).max() > 1e-3

    def test_10_steps_in_a_scan(self, classifier, batch):
        """And nnx.cached_partial gives the losses of the same steps in a loop."""
        again = copy.deepcopy(classifier)
        ids = jnp.stack([batch["input_ids"], batch["input_ids"][::-1], batch["input_ids"]])

        def step(model, optimizer, ids):
            loss, grads = nnx.value_and_grad(lambda m: m(ids, labels=LABELS).loss)(model)
            optimizer.update(model, grads)
            return loss

        @nnx.jit
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def steps(carry, ids):
            return carry, step(*carry, ids)

        optimizer = nnx.Optimizer(classifier, optax.sgd(0.1), wrt=nnx.Param)
        _, losses = steps((classifier, optimizer), ids)
        optimizer = nnx.Optimizer(again, optax.sgd(0.1), wrt=nnx.Param)
        cached = nnx.cached_partial(nnx.jit(step), again, optimizer)
        close(losses, [cached(x) for x in ids])

    def test_11_views_for_training_and_evaluation(self, folder, batch):
        load = AutoModelForSequenceClassification.from_pretrained
        model = load(folder / "classifier", mlp_dropout=0.5)
        train_model = nnx.view(model, deterministic=False)
        eval_model = nnx.view(model, deterministic=True)
        assert "deterministic: bool | None = None" in nnx.view_info(model)
        nnx.reseed(train_model, dropout=0)
        first, second = train_model(**batch).logits, train_model(**batch).logits
        nnx.reseed(train_model, dropout=0)
        assert (train_model(**batch).logits == first).all() and (first != second).any()
        head = "ModernBertForSequenceClassification"
        close(
            eval_model(**batch).logits, of_transformers(head, folder / "classifier", batch).logits
        )

    def test_12_lora_by_surgery(self, classifier, batch):
        before = classifier(**batch).logits
        dense = classifier.head.dense
        classifier.head.dense = nnx.LoRA(16, 4, 16, base_module=dense, rngs=nnx.Rngs(1))
        close(classifier(**batch).logits, before)
        optimizer = nnx.Optimizer(classifier, optax.adam(1e-2), wrt=nnx.LoRAParam)
        frozen = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(classifier.model, nnx.Param)))

        @nnx.jit
        def train_step(model, optimizer):
            loss_fn = lambda model: model(**batch, labels=LABELS).loss  # noqa: E731
            grad_fn = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))
            loss, grads = grad_fn(model)
            optimizer.update(model, grads)
            return loss

        losses = [train_step(classifier, optimizer) for _ in range(3)]
        assert losses[-1] < losses[0]
        after = nnx.to_pure_dict(nnx.state(classifier.model, nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, frozen, after)
        lora, x = classifier.head.dense, jnp.ones((1, 16))
        close(lora(x), dense(x) + x @ lora.lora_a[...] @ lora.lora_b[...])

    def test_13_accumulate_gradients(self, classifier, batch):
        """optax.MultiSteps: one step with the mean of two gradients."""
        grad = nnx.jit(nnx.grad(lambda model, batch, y: model(**batch, labels=y).loss))
        optimizer = nnx.Optimizer(
            classifier, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2), wrt=nnx.Param
        )
        before = jax.tree.map(np.asarray, nnx.state(classifier, nnx.Param))
        grads = []
        for i in range(2):
            one = {name: x[i : i + 1] for name, x in batch.items()}
            grads.append(grad(classifier, one, LABELS[i : i + 1]))
            optimizer.update(classifier, grads[-1])
        want = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, before, *grads)
        jax.tree.map(close, nnx.state(classifier, nnx.Param), want)

    def test_14_part_of_a_sequential(self, folder, batch):
        encoder = AutoModel.from_pretrained(folder / "mlm", embedding_dropout=0.5)
        model = nnx.Sequential(
            encoder, lambda out: out.last_hidden_state[:, 0], nnx.Linear(16, 3, rngs=nnx.Rngs(0))
        )
        got = nnx.jit(model)(batch["input_ids"])
        plain = {"input_ids": batch["input_ids"]}
        first = of_transformers("ModernBertModel", folder / "mlm", plain).last_hidden_state[:, 0]
        linear = model.layers[2]
        close(got, first.numpy() @ np.asarray(linear.kernel) + np.asarray(linear.bias))
        model.train()  # reaches the encoder within
        assert abs(model(batch["input_ids"]) - got).max() > 1e-3
        model.eval()
        close(model(batch["input_ids"]), got)

    def test_15_a_module_of_ones_own_and_what_it_sows(self, folder, batch):
        class Probe(nnx.Module):
            def __init__(self, rngs):
                self.encoder = AutoModel.from_pretrained(folder / "mlm")
                self.out = nnx.Linear(16, 2, rngs=rngs)

            def __call__(self, ids):
                mean = self.encoder(ids).last_hidden_state.mean(1)
                self.sow(nnx.Intermediate, "features", mean)
                return self.out(mean)

        forward = nnx.capture(Probe(nnx.Rngs(0)), nnx.Intermediate, method_outputs=nnx.Intermediate)
        result, intermediates = forward(batch["input_ids"])
        assert result.shape == (2, 2)
        plain = {"input_ids": batch["input_ids"]}
        want = of_transformers("ModernBertModel", folder / "mlm", plain)
        (features,) = intermediates["features"].get_value()
        close(features, want.last_hidden_state.mean(1))
        (layer,) = intermediates["encoder"]["layers"][0]["__call__"].get_value()
        close(layer, want.hidden_states[1])


class TestTransformers:
    def test_16_sequence_classification(self, folder):
        """Quick tour, and "Model outputs": by name, by number, as a tuple."""
        path = str(folder / "classifier")
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
        labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"},
                  "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}  # fmt: skip
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, **labels)
        inputs = tokenizer(
            TEXTS, padding=True, truncation=True, max_length=512, return_tensors="np"
        )
        outputs = model(**inputs, labels=LABELS)
        theirs = of_transformers(type(model).__name__, path, inputs, labels=LABELS)
        loss, logits = outputs[:2]
        close(loss, theirs[0])
        close(logits, theirs["logits"])
        assert tuple(outputs) == outputs.keys() == tuple(theirs.keys())
        assert outputs["loss"] is outputs.loss is outputs[0] is outputs.to_tuple()[0]
        assert {k: v.shape for k, v in dict(outputs).items()} == {"loss": (), "logits": (2, 2)}
        with pytest.raises(KeyError, match="hidden_states: expected one of loss, logits"):
            outputs["hidden_states"]
        predicted_class_id = logits.argmax(axis=-1)[0].item()
        name = model.config.id2label[predicted_class_id]
        assert model.config.label2id[name] == int(theirs.logits[0].argmax())
        probabilities = jax.nn.softmax(model(**inputs, return_dict=True).logits, axis=-1)
        close(probabilities.sum(-1), 1.0)

    def test_17_fill_mask(self, folder, tokenizer):
        """The example of ForMaskedLM, and the course's loop over the best five."""
        model = AutoModelForMaskedLM.from_pretrained(folder / "mlm")
        text = "denies [MASK] and pain today"
        inputs = tokenizer(text, return_tensors="np")
        logits = model(**inputs).logits
        mask_token_index = (inputs.input_ids == tokenizer.mask_token_id)[0].nonzero()[0]
        predicted_token_id = logits[0, mask_token_index].argmax(axis=-1)
        labels = np.where(inputs.input_ids == tokenizer.mask_token_id, 264, -100)
        outputs = model(**inputs, labels=labels)
        theirs = of_transformers("ModernBertForMaskedLM", folder / "mlm", inputs, labels=labels)
        assert round(outputs.loss.item(), 3) == round(theirs.loss.item(), 3)
        best = theirs.logits[0, mask_token_index[0]].topk(5).indices.tolist()
        assert tokenizer.decode(predicted_token_id) == tokenizer.decode(best[0])
        top_5_tokens = np.argsort(-logits[0, mask_token_index[0]])[:5].tolist()
        filled = [
            text.replace(tokenizer.mask_token, tokenizer.decode([token])) for token in top_5_tokens
        ]
        assert filled == [text.replace("[MASK]", tokenizer.decode([token])) for token in best]

    def test_18_token_classification(self, folder, tokenizer):
        model = AutoModelForTokenClassification.from_pretrained(folder / "classifier")
        inputs = tokenizer(TEXTS[0], return_tensors="np")
        predicted_token_class_ids = model(**inputs).logits.argmax(-1)
        labels = predicted_token_class_ids
        head, targets = type(model).__name__, np.asarray(labels, np.int64)
        theirs = of_transformers(head, folder / "classifier", inputs, labels=targets)
        names = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]
        assert names == [f"LABEL_{t}" for t in theirs.logits[0].argmax(-1)]
        close(model(**inputs, labels=labels).loss, theirs.loss)

    def test_19_question_answering(self, folder, tokenizer):
        model = AutoModelForQuestionAnswering.from_pretrained(folder / "classifier")
        inputs = tokenizer("who has pain", "fever", return_tensors="np")
        target = {"start_positions": np.array([3]), "end_positions": np.array([5])}
        outputs = model(**inputs, **target)
        theirs = of_transformers(type(model).__name__, folder / "classifier", inputs, **target)
        assert outputs.keys() == tuple(theirs.keys())
        answer_start_index, answer_end_index = (
            outputs.start_logits.argmax(), outputs.end_logits.argmax(),
        )  # fmt: skip
        tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
        start, end = int(theirs.start_logits.argmax()), int(theirs.end_logits.argmax())
        assert tokenizer.decode(tokens) == tokenizer.decode(inputs.input_ids[0, start : end + 1])
        close(outputs.loss, theirs.loss)

    def test_20_multiple_choice(self, folder, tokenizer):
        model = AutoModelForMultipleChoice.from_pretrained(folder / "choice")
        prompt, candidate1, candidate2 = "who has pain", "fever", "pain"
        inputs = tokenizer(
            [[prompt, candidate1], [prompt, candidate2]], return_tensors="np", padding=True
        )
        inputs = {k: v[None] for k, v in inputs.items()}
        labels = np.array(0)[None]
        outputs = model(**inputs, labels=labels)
        theirs = of_transformers(type(model).__name__, folder / "choice", inputs, labels=labels)
        close(outputs.logits, theirs.logits)
        close(outputs.loss, theirs.loss)

    @pytest.mark.filterwarnings("ignore:.*weights of the head are new")
    def test_21_a_configuration_first(self, folder):
        path = folder / "mlm"
        config = AutoConfig.from_pretrained(path, num_labels=5, mlp_dropout=0.1, dtype="bfloat16")
        model = AutoModelForSequenceClassification.from_pretrained(path, config=config)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoConfig.from_pretrained(path, num_labels=5)
        assert model.config.model_type == theirs.model_type
        assert dict(enumerate(model.config.id2label)) == theirs.id2label
        assert model.config.label2id == theirs.label2id
        assert model.config == config and model.classifier.weight.dtype == jnp.float32
        again = AutoModelForSequenceClassification.from_config(config)
        assert again.num_parameters() == model.num_parameters()
        with pytest.raises(
            TypeError, match="config: expected a ModernBertConfig of modernbert_jax"
        ):
            AutoModel.from_pretrained(path, config=theirs)

    def test_22_new_tokens(self, folder, batch, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(folder / "mlm", padding_side="left")
        model = AutoModelForMaskedLM.from_pretrained(folder / "mlm")
        before = model(**batch).logits
        num_added_toks = tokenizer.add_tokens(["new_tok1", "my_new-tok2"])
        num_added_toks += tokenizer.add_special_tokens({"additional_special_tokens": ["[DRUG]"]})
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=None)
        assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
        assert len(tokenizer) == 300 + num_added_toks == 303
        tokenizer.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, max_shard_size="15KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        theirs = of_transformers("ModernBertForMaskedLM", tmp_path, batch).logits
        close(model(**batch).logits, theirs)
        close(theirs[..., :300], before)
        assert AutoTokenizer.from_pretrained(tmp_path)("[DRUG]")["input_ids"] == [1, 302, 2]
        assert tokenizer(TEXTS + ["a"], padding=True)["input_ids"][2][0] == tokenizer.pad_token_id

    def test_23_data_collators(self, folder, tokenizer):
        pytest.importorskip("torch")
        from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

        features = [{**tokenizer(t), "label": i} for i, t in enumerate(TEXTS)]
        padded = DataCollatorWithPadding(tokenizer=tokenizer, return_tensors="np")(features)
        model = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
        theirs = of_transformers(type(model).__name__, folder / "classifier", padded)
        close(model(**padded).loss, theirs.loss)
        collator = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=0.5, return_tensors="np", seed=0
        )
        masked = collator([tokenizer(t, return_special_tokens_mask=True) for t in TEXTS])
        mlm = AutoModelForMaskedLM.from_pretrained(folder / "mlm")
        theirs = of_transformers("ModernBertForMaskedLM", folder / "mlm", masked)
        close(nnx.jit(mlm)(**masked).loss, theirs.loss)

    def test_24_sentence_vectors_by_mean_pooling(self, folder, tokenizer):
        """The recipe of sentence-transformers' model cards."""

        def mean_pooling(model_output, attention_mask):
            token_embeddings = model_output[0]  # the first element has all token embeddings
            mask = np.expand_dims(attention_mask, -1).astype(np.float32)
            return (token_embeddings * mask).sum(1) / np.clip(mask.sum(1), 1e-9, None)

        model = AutoModel.from_pretrained(folder / "mlm")
        sentences = [TEXTS[0], "a rash"]
        encoded_input = tokenizer(sentences, padding=True, truncation=True, return_tensors="np")
        model_output = model(**encoded_input)
        vectors = mean_pooling(model_output, encoded_input["attention_mask"])
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        embedder = Embedder.from_pretrained(folder / "mlm")
        close(embedder.encode(sentences), vectors)
        close(embedder.similarity(vectors, vectors), vectors @ vectors.T)

    def test_25_pipelines(self, folder):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("torch")
        path = str(folder / "classifier")
        classifier = pipeline("sentiment-analysis", model=path)
        theirs = transformers.pipeline(
            "sentiment-analysis",
            model=transformers.AutoModelForSequenceClassification.from_pretrained(path),
            tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(path),
        )
        wanted = theirs(TEXTS)
        for results in (classifier(TEXTS), list(classifier(text for text in TEXTS))):
            for result, want in zip(results, wanted, strict=True):
                assert result["label"] == want["label"]
                assert round(result["score"], 4) == round(want["score"], 4)
        (result,) = classifier(TEXTS[:1])
        assert f"label: {result['label']}, with score: {round(result['score'], 4)}"


LEFTOVERS = {
    "to": lambda model: model.to("cuda"),
    "device": lambda model: model.device,
    "parameters": lambda model: list(model.parameters()),
    "state_dict": lambda model: model.state_dict(),
    "base_model": lambda model: model.base_model,
    "half": lambda model: model.half(),
}


class TestRefusals:
    """What only torch can do is refused in one line that says what to do."""

    @pytest.mark.parametrize("name", LEFTOVERS)
    def test_methods_of_torch(self, name, classifier):
        assert not hasattr(classifier, name)
        with pytest.raises(AttributeError, match=f"^{name}: not supported, .*") as error:
            LEFTOVERS[name](classifier)
        assert "\n" not in str(error.value)

    def test_another_name_is_not_found(self, classifier):
        with pytest.raises(
            AttributeError, match="^'ModernBertFor.*' object has no attribute 'hue'"
        ):
            classifier.hue  # noqa: B018

    def test_arguments(self, folder, classifier, batch):
        with pytest.raises(TypeError, match=r"return_dict: expected true.* out.to_tuple\(\) is"):
            classifier(**batch, return_dict=False)
        load = AutoTokenizer.from_pretrained
        with pytest.raises(ValueError, match="use_fast: expected True"):
            load(folder / "mlm", use_fast=False)
        with pytest.raises(ValueError, match="padding_side: expected 'left' or 'right', got 'top'"):
            load(folder / "mlm", padding_side="top")
        with pytest.raises(
            ValueError, match="model_max_length: expected a positive integer, got 0"
        ):
            load(folder / "mlm", model_max_length=0)
        assert load(folder / "mlm", model_max_length=7).model_max_length == 7

    def test_the_names_are_those_of_transformers(self):
        """Every name that these snippets import exists there."""
        transformers = pytest.importorskip("transformers")
        names = [n for n in dir(modernbert_jax) if n.startswith(("Auto", "ModernBert"))]
        assert all(hasattr(transformers, name) for name in names) and len(names) >= 14
