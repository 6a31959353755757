"""Fine-tuning: against torch step by step, its rows, its files, and resuming half a grid."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tokenizers

from modernbert_jax import ModernBertForSequenceClassification, ModernBertModel, lora
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.packing import IGNORE_INDEX, row_size
from modernbert_jax.tokenizer import AutoTokenizer
from train import cli
from train.corpora.build.bpe import train_bpe
from train.finetune import run as module
from train.finetune.config import FinetuneConfig
from train.finetune.encode import Encoded, answer_of, encode, pack
from train.finetune.jax_backend import JaxBackend
from train.finetune.run import Experiment, finetune
from train.finetune.tasks.task import Data, Example, Task
from train.finetune.torch_backend import TorchBackend

WORDS = ("fever", "cough", "pain", "no", "denies", "possible", "rash", "edema", "today", "left")
KINDS = ("classification", "multilabel", "tokens", "qa")
LABELS = {
    "classification": ("affirmed", "negated", "possible"),
    "multilabel": ("a", "b", "c", "d"),
    "tokens": ("O", "B-X", "I-X"),
    "qa": (),
}


def examples(kind, count, seed):
    """Random words; the answer follows from them."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        words = tuple(rng.choice(WORDS, rng.integers(3, 30)))
        if kind == "classification":
            label = 1 if "denies" in words else 2 if "possible" in words else 0
        elif kind == "multilabel":
            label = tuple(int(w in words) for w in ("fever", "rash", "no", "left"))
        elif kind == "qa":
            place = int(rng.integers(0, len(words)))
            start = len(" ".join(words[:place])) + (place > 0)
            label = (start, start + len(words[place]))
            out.append(Example(f"where is {words[place]}", " ".join(words), label=label))
            continue
        else:
            label = tuple(1 if w == "pain" else 2 if w == "edema" else 0 for w in words)
        out.append(Example(" ".join(words), words=words, label=label))
    return out


def task(kind, train=40):
    def load(folder):
        splits = (examples(kind, n, i) for i, n in enumerate((train, 12, 12)))
        return Data(LABELS[kind], *splits)

    metric = "f1" if kind in ("tokens", "qa") else "weighted_f1"
    return Task(kind, kind.title(), kind, metric, "https://example.org", load, {"someone": 50.0})


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(module, "task_named", task)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = train_bpe([" ".join(WORDS)] * 50, 400)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """kind -> a checkpoint made by transformers, its head included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = AutoTokenizer.from_pretrained(tokenizer)
    folders = {}
    for kind in KINDS:
        torch.manual_seed(0)
        config = transformers.ModernBertConfig(
            vocab_size=448, hidden_size=32, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, max_position_embeddings=256, num_labels=len(LABELS[kind]) or 2,
            pad_token_id=ours.pad_token_id, cls_token_id=ours.cls_token_id,
            bos_token_id=ours.cls_token_id, sep_token_id=ours.sep_token_id,
            eos_token_id=ours.sep_token_id, initializer_range=0.1, classifier_pooling="mean",
        )  # fmt: skip
        name = {"tokens": "TokenClassification", "qa": "QuestionAnswering"}.get(
            kind, "SequenceClassification"
        )
        model = getattr(transformers, f"ModernBertFor{name}")(config)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        ours.save_pretrained(folders[kind])
    return folders


def config_of(kind, start, out, **changes):
    config = FinetuneConfig(
        kind, "", str(start[kind]), str(out), seeds=(42,), learning_rate=1e-3, epochs=2,
        batch_size=8, max_length=256, save_model=False,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def runs(out):
    return [json.loads(p.read_text()) for p in sorted(out.rglob("result.json"))]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_step_by_step(kind, start, tmp_path):
    """Same weights, order and seed: the losses of every step and the final scores."""
    changes = {"gradient_accumulation_steps": 2, "batch_size": 6} if kind == "multilabel" else {}
    for backend in ("jax", "torch"):
        finetune(config_of(kind, start, tmp_path / backend, backend=backend, **changes))
    (ours,), (theirs,) = runs(tmp_path / "jax"), runs(tmp_path / "torch")
    assert len(ours["losses"]) == 2 * -(-40 // (12 if changes else 8))
    assert theirs["losses"][0] - theirs["losses"][-1] > 0.1  # it learns
    np.testing.assert_allclose(ours["losses"], theirs["losses"], atol=1e-3)
    assert ours["test"] == theirs["test"]
    assert ours["epochs"] == theirs["epochs"]


def test_any_model_of_transformers(tmp_path):
    """A BERT, whose tokenizer and inputs are others."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=24)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    for kind in ("classification", "tokens"):
        start = {kind: tmp_path / "bert"}
        out = tmp_path / kind
        finetune(
            config_of(
                kind, start, out, backend="torch", learning_rate=5e-3, epochs=4, save_model=True
            )
        )
        (result,) = runs(out)
        assert result["losses"][0] - np.mean(result["losses"][-5:]) > 0.1
        assert transformers.AutoConfig.from_pretrained(out / "model").model_type == "bert"
    with pytest.raises(ValueError, match="model_type"):
        finetune(config_of(kind, start, tmp_path / "ours"))


def test_the_tokenizers_limit_holds(start, tmp_path):
    """Its model_max_length is smaller than the model's limit and --max-length."""
    folder = tmp_path / "model"
    shutil.copytree(start["classification"], folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 6}))
    config = config_of("classification", {"classification": folder}, tmp_path / "out")
    lengths = {len(e.input_ids) for e in Experiment(config).splits["train"]}
    assert max(lengths) == 6
    with pytest.raises(ValueError, match="max_length: expected at least 4 tokens, got 3"):
        Experiment(dataclasses.replace(config, max_length=3))


class TestRows:
    def test_few_sizes_and_never_too_small(self):
        sizes = [row_size(n) for n in range(1, 20_000)]
        assert all(size >= n and size <= max(64, 1.25 * n + 1) for n, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 4 * 9 + 1

    @pytest.mark.parametrize(
        "smallest, per_octave, sizes",
        [(128, 1, [128, 256, 512, 1024]), (1, 2, [1, 2, 3, 4, 6, 8, 12, 16, 24])],
    )
    def test_other_lists_of_sizes(self, smallest, per_octave, sizes):
        for n in range(1, sizes[-1] + 1):
            assert row_size(n, smallest, per_octave) == next(s for s in sizes if s >= n)

    def test_pack(self):
        batch = [Encoded(np.arange(5, 8), 2), Encoded(np.arange(9, 13), 0)]
        rows, where = pack(batch, 3, "classification", 3)
        np.testing.assert_array_equal(rows["input_ids"][0, :8], [9, 10, 11, 12, 5, 6, 7, 0])
        np.testing.assert_array_equal(rows["segment_ids"][0, :8], [1, 1, 1, 1, 2, 2, 2, 0])
        np.testing.assert_array_equal(rows["targets"], [[0, 2, IGNORE_INDEX]])
        assert where == [(0, 1, 4), (0, 0, 0)]

    def test_pack_holds_every_text_once_in_few_shapes(self):
        rng = np.random.default_rng(0)
        shapes = set()
        for _ in range(60):
            batch = [
                Encoded(rng.integers(1, 99, n), np.full(n, 1)) for n in rng.integers(2, 400, 16)
            ]
            rows, where = pack(batch, 16, "tokens", 3)
            shapes.add(rows["input_ids"].shape)
            for e, (r, number, start) in zip(batch, where, strict=True):
                place = slice(start, start + len(e.input_ids))
                np.testing.assert_array_equal(rows["input_ids"][r, place], e.input_ids)
                assert (rows["segment_ids"][r, place] == number + 1).all()
            assert (rows["segment_ids"] > 0).sum() == sum(len(e.input_ids) for e in batch)
        assert len(shapes) <= 8

    def test_the_first_token_of_a_word_has_its_label(self, tokenizer):
        ours = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
        words = ("fever", "xylophone", "no")
        (e,) = encode([Example(words=words, label=(0, 1, 2))], ours, "tokens", 64)
        pieces = [len(ours([[w]], is_split_into_words=True)["input_ids"][0]) - 2 for w in words]
        assert pieces[1] > 1
        want = [IGNORE_INDEX]
        for label, count in zip((0, 1, 2), pieces, strict=True):
            want += [label] + [IGNORE_INDEX] * (count - 1)
        assert e.target.tolist() == [*want, IGNORE_INDEX]
        (cut,) = encode([Example(words=words, label=(0, 1, 2))], ours, "tokens", 4)
        assert len(cut.input_ids) == len(cut.target) == 4
        assert cut.truncated and not e.truncated

    @pytest.mark.parametrize("kind", ["classification", "tokens", "qa"])
    def test_special_tokens_in_texts_are_text(self, tokenizer, kind):
        """As without the tokenizer's special tokens, and labels and offsets stay in place."""
        ours = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
        text = "no [SEP] fever [MASK] [CLS] rash"
        start = text.index("[MASK]")
        example = {
            "classification": Example(text=text, text_pair=text, label=0),
            "tokens": Example(words=tuple(text.split()), label=(0, 1, 2, 3, 4, 5)),
            "qa": Example(text="fever?", text_pair=text, label=(start, start + 6)),
        }[kind]
        (e,) = encode([example], ours, kind, 256)
        content = json.loads(ours.backend_tokenizer.to_str())
        content |= {"added_tokens": [], "post_processor": None}
        plain = tokenizers.Tokenizer.from_str(json.dumps(content))
        ids = lambda text: plain.encode(text).ids  # noqa: E731
        cls, sep = ours.cls_token_id, ours.sep_token_id
        want = {
            "classification": [cls, *ids(text), sep, *ids(text), sep],
            "tokens": [cls, *ids(text), sep],
            "qa": [cls, *ids("fever?"), sep, *ids(text), sep],
        }[kind]
        assert e.input_ids.tolist() == want
        if kind == "tokens":
            assert [label for label in e.target if label >= 0] == [0, 1, 2, 3, 4, 5]
        elif kind == "qa":
            logits = np.full((len(e.input_ids), 2), -9.0)
            logits[e.target[0], 0] = logits[e.target[1], 1] = 9.0
            assert answer_of(e, logits).strip() == e.answer == "[MASK]"
        # A prompt for fill-mask is read by the same tokenizer, where [MASK] is a token.
        assert ours.mask_token_id in ours(text)["input_ids"]


class TestQuestions:
    def test_targets_and_answers_are_text(self, tokenizer):
        ours = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
        some = examples("qa", 20, 3)
        for e, example in zip(encode(some, ours, "qa", 256), some, strict=True):
            logits = np.full((len(e.input_ids), 2), -9.0)
            logits[e.target[0], 0] = logits[e.target[1], 1] = 9.0
            logits[:3] = 20.0  # the question's own tokens are no answer
            assert answer_of(e, logits).strip() == example.text_pair[slice(*example.label)]
        (cut,) = encode([dataclasses.replace(some[0], label=(0, 5))], ours, "qa", 5)
        assert (cut.target == IGNORE_INDEX).all() or cut.target.max() < 5

    def test_spans_are_in_order_and_not_too_long(self):
        places = [None, (0, 1), (2, 3), (4, 5), (6, 7)]
        e = Encoded(np.zeros(5), None, ("a b c d", places))
        logits = np.zeros((5, 2))
        logits[3, 0], logits[1, 1], logits[4, 1] = 5.0, 5.0, 1.0  # end before start: not a span
        assert answer_of(e, logits) == "c d"
        logits = np.zeros((5, 2))
        logits[1, 0] = logits[4, 1] = 5.0
        assert answer_of(e, logits) == "a b c d"
        assert answer_of(e, logits, longest=2) in ("a b", "c d", "a")

    def test_files(self, tmp_path):
        from train.finetune.tasks import questions

        qas = [
            {"question": "who?", "answers": [{"text": "Mary", "answer_start": 0}]},
            {"question": "what?", "answers": []},
            {"question": "off?", "answers": [{"text": "runs", "answer_start": 3}]},
        ]
        squad = {"data": [{"paragraphs": [{"context": "Mary runs.", "qas": qas}]}]}
        for name in ("train", "dev"):
            (tmp_path / f"{name}.json").write_text(json.dumps(squad))
        with pytest.raises(ValueError, match="expected train and test, .* found train, validation"):
            questions.load(tmp_path)
        line = {"question": "how?", "context": "Mary runs.", "answer": "runs", "answer_start": 5}
        (tmp_path / "test.jsonl").write_text(json.dumps(line) + "\n")
        data = questions.load(tmp_path)
        assert data.train == [Example("who?", "Mary runs.", label=(0, 4))] == data.validation
        assert data.test == [Example("how?", "Mary runs.", label=(5, 9))]
        assert data.skipped == {
            "questions without an answer": 2,
            "answers that are not at answer_start, in train.json": 1,
            "answers that are not at answer_start, in dev.json": 1,
        }
        (tmp_path / "train.json").write_text('{"data": 3}')
        with pytest.raises(ValueError, match="SQuAD's form"):
            questions.load(tmp_path)


class TestFiles:
    def test_what_it_leaves_behind_and_going_on(self, start, tmp_path, monkeypatch):
        config = config_of(
            "classification", start, tmp_path, seeds=(1, 2), grid=("learning_rate=1e-3,1e-2",),
            epochs=1, save_model=True,
        )  # fmt: skip
        summary = finetune(config)
        assert [p["point"] for p in summary["points"]] == [
            "learning_rate=0.001",
            "learning_rate=0.01",
        ]
        found = runs(tmp_path)
        assert len(found) == 4
        scores = [r["test"]["weighted_f1"] for r in found[:2]]
        first = summary["points"][0]["test"]["weighted_f1"]
        np.testing.assert_allclose(
            [first[k] for k in ("mean", "median", "min", "max", "std")],
            [np.mean(scores), np.median(scores), min(scores), max(scores), np.std(scores, ddof=1)],
        )
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / "table.md").read_text()
        assert "| someone | 50.0 |" in text and "| negated |" in text and "Confusion" in text
        model = ModernBertForSequenceClassification.from_pretrained(tmp_path / "model")
        assert model.config.id2label == LABELS["classification"]
        best = max(r["validation"]["weighted_f1"] for r in found)
        kept = json.loads((tmp_path / "model/score.json").read_text())
        assert kept["validation"] == best
        assert json.loads((tmp_path / kept["run"] / "result.json").read_text()) in found
        card = (tmp_path / "model/README.md").read_text()
        mean = summary["points"][1]["test"]["weighted_f1"]["mean"]
        assert f"| learning_rate=0.01 | {100 * mean:.2f} |" in card and f"{100 * best:.2f}" in card
        assert f"- Seed: {kept['run'][-1]}\n" in card and str(tmp_path) not in card
        # One of the four runs is lost: it alone is done again, and to the same bits.
        lost = tmp_path / "learning_rate=0.01" / "seed-2" / "result.json"
        before = json.loads(lost.read_text())
        lost.unlink()
        started = []
        real = JaxBackend.start
        monkeypatch.setattr(JaxBackend, "start", lambda *a: started.append(a) or real(*a))
        assert finetune(config)["points"][1]["test"] == summary["points"][1]["test"]
        assert len(started) == 1
        assert json.loads(lost.read_text())["losses"] == before["losses"]
        with pytest.raises(ValueError, match="has other settings"):
            finetune(dataclasses.replace(config, epochs=2))

    def test_each_seed_has_its_own_head_and_all_the_same_encoder(self, start, tmp_path):
        """The weights are read once; each run starts as from_pretrained(seed=...) does."""
        folder = tmp_path / "headless"
        encoder = ModernBertModel.from_pretrained(start["qa"])
        encoder.save_pretrained(folder, tokenizer=AutoTokenizer.from_pretrained(start["qa"]))
        config = config_of("classification", {"classification": folder}, tmp_path)
        with pytest.warns(UserWarning, match="weights of the head are new"):
            backend = Experiment(config).backend
        for seed in (1, 2):
            with pytest.warns(UserWarning, match="weights of the head are new"):
                want = flatten(
                    ModernBertForSequenceClassification.from_pretrained(
                        folder, num_labels=3, seed=seed
                    )
                )
            got = backend.start(config, seed).weights()
            assert got.keys() == want.keys()
            for path, value in want.items():
                np.testing.assert_array_equal(got[path], value, err_msg=path)

    def test_seeds_on_several_devices(self, start, tmp_path):
        config = config_of("classification", start, tmp_path / "a", seeds=(1, 2), epochs=1)
        alone = finetune(config)
        both = finetune(dataclasses.replace(config, out=str(tmp_path / "b"), devices=2))
        assert alone["points"][0]["test"] == both["points"][0]["test"]


class TestLora:
    @pytest.mark.parametrize(
        "kind", ["classification", pytest.param("qa", marks=pytest.mark.matrix)]
    )
    def test_equals_peft_step_by_step(self, kind, start, tmp_path):
        """From the same first adapter: the losses of some steps, and then each logit."""
        peft = pytest.importorskip("peft")
        config = config_of(kind, start, tmp_path / "out", lora_rank=3, lora_alpha=9.0)
        experiment = Experiment(config)
        ours = experiment.backend.start(config, 1)
        ours.save(ours.weights(), tmp_path / "start" / "model")
        backend = TorchBackend(dataclasses.replace(config, backend="torch"), kind, LABELS[kind])
        plain = TorchBackend.start(backend, config, 1)
        peft_model = peft.PeftModel.from_pretrained(
            plain.model, tmp_path / "start" / "adapter", is_trainable=True
        )
        trained = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
        flat = [p for n, p in trained if n.endswith(".bias") or "norm" in n]
        rest = [p for _, p in trained if not any(p is other for other in flat)]
        plain.model = peft_model
        plain.optimizer = plain.torch.optim.AdamW(
            [{"params": rest}, {"params": flat, "weight_decay": 0.0}],
            weight_decay=config.weight_decay,
        )
        examples = experiment.splits["train"]
        for first in range(0, 40, 8):
            batch = [examples[first : first + 8]]
            losses = [model.step(batch, 1e-2) for model in (ours, plain)]
            np.testing.assert_allclose(*losses, atol=1e-4)
        some = examples[:6]
        for a, b in zip(ours.predict(some), plain.predict(some), strict=True):
            if kind == "qa":  # no gradient moves all positions at once, only Adam's noise does
                a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            np.testing.assert_allclose(a, b, atol=2e-3)

    def test_retrieval_refuses_the_flag_by_name(self, capsys):
        assert cli.main(["finetune", "--task", "retrieval", "--data", "d", "--lora-rank", "8"]) == 2
        assert "--lora-rank" in capsys.readouterr().err

    def test_only_adapters_and_the_head_train(self, start, tmp_path):
        config = config_of("tokens", start, tmp_path, lora_rank=2, lora_targets=("mlp.Wo",))
        experiment = Experiment(config)
        model = experiment.backend.start(config, 1)
        before = model.weights()
        for _ in range(2):  # the first changes only lora_B, because it was zero
            model.step([experiment.splits["train"][:8]], 1e-2)
        after = model.weights()
        changed = {k for k in after if not np.array_equal(before[k], after[k])}
        layers = (f"model.layers.{i}.mlp.Wo.lora_{x}.weight" for i in range(4) for x in "AB")
        head = ("head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias")
        assert changed == {*layers, *head}
        other = experiment.backend.start(config, 2).weights()
        assert not np.array_equal(other["model.layers.0.mlp.Wo.lora_A.weight"],
                                  before["model.layers.0.mlp.Wo.lora_A.weight"])  # fmt: skip

    def test_the_folders(self, start, tmp_path):
        """OUT/model is complete, OUT/adapter is peft's, and both give the same logits."""
        peft = pytest.importorskip("peft")
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = config_of("classification", start, tmp_path, lora_rank=2, save_model=True)
        finetune(config)
        assert "LoRA of rank 2 and alpha 16" in (tmp_path / "model" / "README.md").read_text()
        cls = transformers.ModernBertForSequenceClassification
        ids = np.arange(10, 30)[None]
        base = cls.from_pretrained(start["classification"], num_labels=3)
        with torch.no_grad():
            before = base(torch.tensor(ids)).logits.numpy()
            adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            expected = adapted(torch.tensor(ids)).logits.numpy()
        merged = ModernBertForSequenceClassification.from_pretrained(tmp_path / "model")
        np.testing.assert_allclose(merged(ids).logits, expected, atol=1e-4)
        assert np.abs(before - expected).max() > 0.01
        ours = ModernBertForSequenceClassification.from_pretrained(start["classification"])
        lora.load_adapter(ours, tmp_path / "adapter")
        np.testing.assert_allclose(ours(ids).logits, expected, atol=1e-4)
        stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] is None  # no path of this machine


class TestChoices:
    def test_frozen_encoder_and_layer_decay(self, start, tmp_path):
        config = config_of("classification", start, tmp_path, freeze_encoder=True)
        experiment = Experiment(config)
        model = experiment.backend.start(config, 1)
        before = model.weights()
        batch = [experiment.splits["train"][:8]]
        model.step(batch, 1e-2)
        after = model.weights()
        changed = {k for k in after if not np.array_equal(before[k], after[k])}
        assert changed and all(k.startswith(("head.", "classifier.")) for k in changed)
        assert "classifier.weight" in changed
        config = dataclasses.replace(config, freeze_encoder=False, layer_decay=0.5)
        factors = experiment.backend.start(config, 1).factors
        assert factors["classifier.bias"] == factors["model.final_norm.weight"] == 1
        assert factors["model.layers.3.mlp.Wi.weight"] == 0.5
        assert factors["model.layers.0.mlp.Wi.weight"] == 0.5**4
        assert factors["model.embeddings.norm.weight"] == 0.5**5

    @pytest.mark.parametrize(
        "changes, expect",
        [
            ({"grid": ("lr=1",)}, "grid: expected learning_rate"),
            ({"grid": ("epochs=few",)}, "grid: epochs: expected numbers"),
            ({"batch_size": 0}, "batch_size: expected at least 1"),
            ({"seeds": ()}, "seeds: expected at least one"),
            ({"layer_decay": 0.0}, "layer_decay: expected above 0"),
            ({"layer_decay": 0.9, "backend": "torch"}, "layer_decay: expected 1 with"),
            ({"grid": ("layer_decay=0.9",), "backend": "torch"}, "layer_decay: expected 1 with"),
            ({"devices": 99}, "devices: expected at most"),
            ({"lora_rank": 0}, "rank: expected 1 to 65,536, got 0"),
            ({"lora_rank": -1}, "rank: expected 1 to 65,536, got -1"),
            ({"lora_alpha": 8.0}, "lora_alpha, lora_targets: expected lora_rank as well, got None"),
            ({"lora_rank": 4, "lora_alpha": 0.0}, "alpha: expected a positive number, got 0.0"),
            ({"lora_rank": 4, "lora_targets": ()}, "targets: expected names"),
            ({"lora_rank": 4, "lora_targets": ("dense",)}, "targets: expected some of Wo, Wqkv, W"),
            ({"lora_rank": 4, "freeze_encoder": True}, "freeze_encoder, lora_rank: expected one"),
            ({"lora_rank": 4, "backend": "torch"}, "lora_rank: expected None with --backend torch"),
        ],
        ids=str,
    )
    def test_refused_in_one_line(self, start, tmp_path, changes, expect):
        with pytest.raises(ValueError, match=expect):
            finetune(config_of("classification", start, tmp_path, **changes))
