"""Shared word spans: against sets of strings, from every kind of corpus, without a text."""

import json
import random
import re

import pytest

from train import cli
from train.corpora.build.bpe import train_bpe
from train.corpora.build.prepare import prepare
from train.corpora.reports import decontaminate as module
from train.corpora.reports.decontaminate import Spans, decontaminate

WORDS = "the patient was seen for chest pain and left arm numbness on day two of stay".split()


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[:6], k=draw.randrange(2, 40))) for _ in range(count)]


def spans_of(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.mark.parametrize("n", [1, 4, 13])
def test_shared_against_sets_of_strings(n):
    task, corpus = texts(0, 30), texts(1, 60) + ["", "Unknown " + " ".join(WORDS)]
    spans = Spans.of(iter(task), n)
    by_document = [set(spans_of(text, n)) for text in task]
    everything = set().union(*by_document)
    for text in corpus:
        own = spans_of(text, n)
        positions = sum(span in everything for span in own)
        documents = [i for i, some in enumerate(by_document) if some & set(own)]
        assert spans.shared(text) == (positions, documents)


def test_canonical_equivalents_share_a_span():
    spans = Spans.of(iter(["fie\u0300vre \u00e0 domicile"]), 3)
    assert spans.shared("Fi\u00e8vre a\u0300 domicile") == (1, [0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A task of three texts and a corpus that has a span of the first, with other punctuation."""
    root = tmp_path_factory.mktemp("decontaminate")
    span = "one two three four five six seven eight nine ten eleven twelve thirteen"
    task = [f"Before {span} after it", "short", f"{span} again, and {span} more"]
    task.append("alpha " * 20)
    (root / "task.tsv").write_text("sentence\n" + "".join(f"{line}\n" for line in task))
    corpus = [
        "nothing of it here, " * 6,
        "It says: " + span.replace(" ", ", ").upper() + ".",
        span.replace("seven", "7"),
        " ".join(span.split()[:12]),
        "alpha beta " * 20,
    ]
    corpus += [f"filler number {i} of the corpus" for i in range(20)]
    (root / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in corpus))
    train_bpe(iter([*task, *corpus] * 10), 350).save_pretrained(root / "tokenizer")
    prepare(
        str(root / "corpus.jsonl"), str(root / "tokenizer"), str(root / "out"), sequence_length=128,
        eval_fraction=0.3, workers=1,
    )  # fmt: skip
    return root


@pytest.mark.parametrize("corpus", ["corpus.jsonl", "out", "out/text", "out/tokens"])
def test_every_kind_of_corpus(folders, corpus, tmp_path, capsys):
    report = tmp_path / "report.jsonl"
    command = [
        "decontaminate",
        "--corpus",
        str(folders / corpus),
        "--task",
        str(folders / "task.tsv"),
    ]
    command += ["--task-column", "sentence", "--out", str(report), "--workers", "1"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "1 of 25 documents" in said and "(1 positions); 2 of its 4 documents" in said
    assert "(1 are too short to check)" in said
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {
            "id": "corpus.jsonl:2",
            "spans": 1,
            "task": ["task.tsv:1", "task.tsv:3"],
            "task_documents": 2,
        }
    ]


def test_tokens_without_their_text(folders, tmp_path, monkeypatch):
    (tmp_path / "alone").symlink_to(folders / "out" / "tokens")
    task = str(folders / "task.tsv")
    arguments = {"task_column": "sentence", "workers": 2, "out": str(tmp_path / "r.jsonl")}
    with pytest.raises(ValueError, match="pass --tokenizer"):
        decontaminate(str(tmp_path / "alone"), task, **arguments)
    monkeypatch.setattr(module, "_CHUNKS", 4)
    line = decontaminate(
        str(tmp_path / "alone"), task, tokenizer=str(folders / "tokenizer"), **arguments
    )
    assert line.startswith("1 of 25 documents") and "2 of its 4 documents" in line
    found = json.loads((tmp_path / "r.jsonl").read_text())
    assert re.fullmatch(r"(train|eval):\d+", found["id"]) and found["spans"] == 1


def test_words_must_be_positive(folders):
    with pytest.raises(ValueError, match="words: expected at least 1"):
        decontaminate(str(folders / "out"), str(folders / "task.tsv"), words=0)
