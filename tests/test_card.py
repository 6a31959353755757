"""Model cards: what the hub reads of them, the snippets at work, and the facts of runs."""

import dataclasses
import json
import re

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard, ModelCardData

import modernbert_jax as mj
from modernbert_jax.card import MARK, model_card
from modernbert_jax.checkpoint.hf import write_card
from train.common.card import start_facts
from train.corpora.build.bpe import train_bpe
from train.finetune import retrieval
from train.finetune.card import finetuning_facts
from train.finetune.config import FinetuneConfig
from train.finetune.tasks.task import Data, Task
from train.pretrain.card import pretraining_facts
from train.pretrain.config import Phase, TrainConfig
from train.tokens.store import TokenStore

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=300, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
    max_position_embeddings=128,
)  # fmt: skip
FACTS = {
    "base_model": "answerdotai/ModernBERT-base",
    "language": ["en"],
    "license": "apache-2.0",
    "datasets": ["bigbio/med_qa"],
    "metrics": ["accuracy"],
    "tags": ["clinical"],
    "training": {"Tokens seen": 1_234_567, "Peak rate": 3e-4, "Corpora": ["a", "b"]},
    "tables": {"Scores": [{"task": "x | y", "f1": 0.5}, {"task": "z", "support": 3}]},
    "limits": ["One\nline."],
    "citations": ["Someone 2020"],
}
CLASSES = {
    mj.ModernBertModel: "feature-extraction",
    mj.ModernBertForMaskedLM: "fill-mask",
    mj.ModernBertForSequenceClassification: "text-classification",
    mj.ModernBertForTokenClassification: "token-classification",
    mj.ModernBertForQuestionAnswering: "question-answering",
    mj.ModernBertForMultipleChoice: "multiple-choice",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model) of a masked LM saved with all facts and a tokenizer."""
    folder = tmp_path_factory.mktemp("card") / "m"
    tokenizer = train_bpe(["A text of some words."] * 3, 300)
    model = mj.ModernBertForMaskedLM(CONFIG.replace(vocab_size=len(tokenizer)), rngs=nnx.Rngs(0))
    model.save_pretrained(folder, tokenizer=tokenizer, card=FACTS)
    return folder, model


def test_the_hub_reads_its_part(saved):
    folder, model = saved
    found = ModelCard.load(folder / "README.md")
    assert isinstance(found.data, ModelCardData)
    for name in ("base_model", "license", "datasets", "metrics", "language"):
        assert getattr(found.data, name) == FACTS[name], name
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "fill-mask"
    assert found.data.tags == ["modernbert", "modernbert_jax", "clinical"]


def test_the_text_says_what_the_model_is(saved):
    folder, model = saved
    text = (folder / "README.md").read_text()
    size = sum(np.prod(v.get_value().shape) for _, v in nnx.to_flat_state(nnx.state(model)))
    assert f"with its masked-LM head; layers: 2, width: 16, parameters: {size:,} in" in text
    assert "Context: 128 tokens." in text
    assert "- Tokens seen: 1,234,567\n- Peak rate: 0.0003\n- Corpora: a, b\n" in text
    assert "| task | f1 | support |\n|---|---|---|\n| x \\| y | 0.5 |  |\n| z |  | 3 |" in text
    assert "- One line.\n" in text and "- Someone 2020\n" in text and "2412.13663" in text


@pytest.mark.parametrize("library", ["modernbert_jax", "transformers"])
def test_the_snippets_run(saved, library):
    if library == "transformers":
        pytest.importorskip("torch")
    folder, model = saved
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (snippet,) = (block for block in blocks if f"from {library} import" in block)
    names = {}
    exec(snippet.replace("FOLDER_OR_HUB_ID", str(folder)), names)
    logits = names["outputs"].logits
    assert logits.shape[0] == 1 and logits.shape[2] == model.config.vocab_size


@pytest.mark.parametrize("cls, task", CLASSES.items())
def test_each_class_has_its_task_and_its_auto_class(cls, task):
    config = {"architectures": [cls.__name__], "model_type": "modernbert"}
    found = ModelCard(model_card(config, 1))
    assert found.data.pipeline_tag == task
    (auto,) = set(re.findall(r"(AutoModel\w*)\.from_pretrained", found.text))
    assert getattr(mj, auto) is cls


def test_unknown_stays_out_and_another_encoder_has_its_card():
    config = {"architectures": ["BertForTokenClassification"], "model_type": "bert"}
    config |= {"num_hidden_layers": 2, "hidden_size": 8, "id2label": {"0": "O", "1": "B-AGE"}}
    text = model_card(config, 7, {"base_model": None, "datasets": [], "training": {}})
    found = ModelCard(text)
    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag"}
    assert "Labels: O, B-AGE." in text
    for absent in ("modernbert_jax import", "## Training", "None", "Warner", "tokens."):
        assert absent not in text


@pytest.mark.parametrize(
    "facts, expect",
    [
        ({"author": "me"}, "expected base_model, .*; got author"),
        ({"base_model": "/data/secret/model"}, "base_model: expected a hub id"),
        ({"datasets": ["our notes"]}, "datasets: expected a hub id"),
    ],
)
def test_refused_before_anything_is_written(saved, tmp_path, facts, expect):
    with pytest.raises(ValueError, match=expect) as raised:
        saved[1].save_pretrained(tmp_path / "m", card=facts)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "m").exists()


def test_ours_is_renewed_and_a_persons_kept(saved, tmp_path):
    model = saved[1]
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert MARK in path.read_text() and "apache" not in path.read_text()
    model.save_pretrained(tmp_path, card=FACTS)
    assert path.read_text() == (saved[0] / "README.md").read_text()
    write_card(tmp_path, {"license": "mit"})
    assert ModelCard.load(path).data.license == "mit"
    path.write_text(path.read_text().replace(MARK, "") + "My own words.\n")
    mine = path.read_text()
    model.save_pretrained(tmp_path, card=FACTS)
    write_card(tmp_path, FACTS)
    assert path.read_text() == mine


# What runs say. That a run writes them is in the tests of the runs.


def store(tokens: int) -> dict[str, TokenStore]:
    class Unread:
        def read(self, pieces):
            raise AssertionError("a card reads no text")

    return {"train": TokenStore(np.full(tokens // 10, 10, np.int32), "", Unread())}


def test_facts_of_pretraining(tmp_path):
    prepared = tmp_path / "private" / "mimic3"
    (prepared / "tokens").mkdir(parents=True)
    manifest = {"source": "mimic3", "title": "MIMIC-III", "license": "PhysioNet", "documents": 12}
    (prepared / "tokens" / "manifest.json").write_text(json.dumps(manifest | {"dropped": "text"}))
    plain = tmp_path / "private" / "notes"
    plain.mkdir()
    phases = (
        Phase("one", tokens=9_000, corpus=(str(prepared), str(plain)), warmup_tokens=100),
        Phase("two", tokens=500, mlm_probability=0.15, corpus=(str(plain),), decay_tokens=500),
    )
    config = TrainConfig(
        phases=phases, init_from="answerdotai/ModernBERT-base", global_batch_size=8
    )
    scores = {"loss": 2.5, "accuracy": 0.511, "unigram_accuracy": 0.04}
    parts = {"mimic3/loss": 2.0, "mimic3/accuracy": 0.6, "notes/loss": 3.0, "notes/accuracy": 0.4}
    result = {
        "phases": [{"phase": "one", **scores, **parts}, {"phase": "two", **scores}],
        "steps": 42,
        "total_tokens": 9_512,
    }
    stores = [{"mimic3": store(80), "notes": store(30)}, {"notes": store(30)}]
    facts = pretraining_facts(config, result, stores, recipe="demo", hardware="a TPU")
    text = model_card({"architectures": ["ModernBertForMaskedLM"]}, 1, facts)
    assert ModelCard(text).data.base_model == "answerdotai/ModernBERT-base"
    for line in (
        "- Recipe: demo",
        "- Tokens seen: 9,512",
        "- Steps: 42",
        "| one | 9,000 | 30% | 0.0003 | warm-up over 100 tokens, then constant | mimic3, notes |",
        "| two | 500 | 15% | 0.0003 | 1 - sqrt decay over the last 500 tokens | notes |",
        "| mimic3 | mimic3 | MIMIC-III | PhysioNet | 12 | 80 |",
        "| notes |  |  |  |  | 30 |",
        "| one | all | 2.500 | 51.1% | 4.0% |",
        "| one | mimic3 | 2.000 | 60.0% |  |",
        "credentialed",
    ):
        assert line in text, line
    assert "private" not in text and str(tmp_path) not in text
    assert "- Tokenizer" not in text
    scratch = dataclasses.replace(config, init_from=None)
    facts = pretraining_facts(scratch, result, stores, recipe="", hardware="a TPU")
    text = model_card({"architectures": ["ModernBertForMaskedLM"]}, 1, facts)
    assert "- Tokenizer: byte-level BPE, trained on the words that occur in at least 10 " in text


@pytest.mark.parametrize(
    "start, name",
    [
        ("checkpoints/base_context", "base_context"),
        ("runs/a/checkpoints/00000200", "a, step 200"),
        ("runs/a/export", "a"),
    ],
)
def test_a_folder_is_called_by_its_name(start, name, tmp_path):
    (tmp_path / start).mkdir(parents=True)
    assert start_facts(str(tmp_path / start)) == {"name": name}


def test_facts_of_fine_tuning_and_retrieval(tmp_path):
    load = lambda folder: Data((), [], [], [])  # noqa: E731
    task = Task("mine", "My task", "classification", "weighted_f1", "", load)
    config = FinetuneConfig(task="mine", data="secret", model=str(tmp_path), seeds=(1, 2))
    settings = dataclasses.asdict(config) | {"seed": 2}
    saved = {"settings": settings, "best_epoch": 3, "validation": {"weighted_f1": 0.9}}
    saved |= {"test": {"weighted_f1": 0.875, "per_label": {}, "confusion": []}}
    ways = {"mean": 0.85, "median": 0.85, "std": 0.01, "min": 0.8, "max": 0.875}
    summary = {"points": [{"point": "default", "test": {"weighted_f1": ways}}]}
    facts = finetuning_facts(config, task, {"train": 1_000, "test": 7}, summary, saved)
    text = model_card({"architectures": ["ModernBertForSequenceClassification"]}, 1, facts)
    assert ModelCard(text).data.metrics == ["f1"]
    assert f"# {tmp_path.name}, fine-tuned: My task\n" in text
    assert "- Examples: 1,000 train, 7 test\n" in text and "- Seed: 2\n" in text
    assert "## Test weighted_f1 over 2 seeds, in percent" in text
    assert "| default | 85.00 | 85.00 | 1.00 | 80.00 | 87.50 |" in text
    assert "| validation | 90.00 |\n| test | 87.50 |" in text
    assert "secret" not in text and str(tmp_path) not in text

    config = retrieval.RetrievalConfig(data="secret", model="a/b")
    facts = retrieval.retrieval_facts(config, 9, 3, {"ndcg@10": 0.1}, {"ndcg@10": 0.2})
    found = ModelCard(model_card({"architectures": ["ModernBertModel"]}, 1, facts))
    assert found.data.library_name == "sentence-transformers"
    assert found.data.pipeline_tag == "sentence-similarity"
    assert "sentence-transformers" in found.data.tags
    assert "| ndcg@10 | 0.1000 | 0.2000 |" in found.text and "secret" not in found.text
    assert "SentenceTransformer(" in found.text
