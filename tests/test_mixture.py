"""Token budgets of a mixture, the flags that train on it, and that a run obeys them."""

import json

import numpy as np
import pytest

from modernbert_jax import ModernBertConfig
from train import cli
from train.common.sharding import MeshShape
from train.corpora.build.bpe import train_bpe
from train.corpora.build.prepare import prepare
from train.corpora.reports.mixture import Part, budget, flags, mixture, picture, table
from train.corpora.synthetic import synthetic_notes
from train.pretrain import run as loop
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.corpora import open_corpora
from train.pretrain.setup import open_workdir, prepare as make_tokenizer
from train.tokens.store import open_store

PARTS = [
    Part("pubmed", "biomedical", 10, 700, (3, 0), "o/pubmed"),
    Part("mimic3", "clinical", 5, 200, (3, 3), "o/mimic3"),
    Part("medqa", "clinical", 2, 50, (3, 6), "o/medqa"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two corpora, one of them clinical by name, and their tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    texts = list(synthetic_notes(60, seed=2))
    train_bpe(iter(texts), 400).save_pretrained(root / "tokenizer")
    for name, some in (("a", texts[:40]), ("b", texts[40:])):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in some))
        prepare(
            str(root / f"{name}.jsonl"), str(root / "tokenizer"), str(root / "out" / name),
            sequence_length=64, eval_fraction=0.2, workers=1,
        )  # fmt: skip
    manifest = root / "out" / "a" / "tokens" / "manifest.json"
    facts = json.loads(manifest.read_text()) | {"kind": "biomedical", "source": "pubmed"}
    manifest.write_text(json.dumps(facts))
    return root


def test_budgets_and_flags():
    assert [budget(PARTS, phase) for phase in (0, 1)] == [3 * 950, 3 * 200 + 6 * 50]
    assert flags(PARTS, 0) == ("--phases.0.tokens 2850 --phases.0.corpus o/pubmed o/mimic3 o/medqa")
    assert flags(PARTS, 1) == "--phases.1.tokens 900 --phases.1.corpus o/mimic3 o/medqa o/medqa"


def test_table_and_picture():
    rows = [line.split() for line in table(PARTS).splitlines()]
    assert rows[1] == "pubmed biomedical 10 700 3 x 2,100 73.7% 0 x 0 0%".split()
    assert rows[3] == "medqa clinical 2 50 3 x 150 5.26% 6 x 300 33.3%".split()
    assert rows[4] == "total 17 950 2,850 100% 900 100%".split()
    png = picture(PARTS)
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 5_000


def test_plan_is_the_published_one(capsys, tmp_path):
    """Three epochs of everything and of the clinical 20: 160 and 8 billion tokens."""
    assert cli.main(["mixture", "--png", str(tmp_path / "m.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 20 + 1
    # The reference's budgets; the card's tokens of the sources are rounded and sum to 5 % more.
    numbers = [int(cell.replace(",", "")) for cell in lines[-1].split() if "," in cell]
    assert numbers[-2] == pytest.approx(160_453_000_000, rel=0.01)
    assert numbers[-1] == pytest.approx(8_247_337_000, rel=0.06)
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_prepared_folders_and_a_run_that_obeys(prepared, tmp_path):
    out = prepared / "out"
    lines = mixture((str(out),), epochs=2, repeat=("b=2,4",)).splitlines()
    tokens = {name: int(open_store(out / name)["train"].lengths.sum()) for name in "ab"}
    assert lines[-2] == (
        f"--phases.0.tokens {2 * tokens['a'] + 2 * tokens['b']} "
        f"--phases.0.corpus {out / 'a'} {out / 'b'}"
    )
    assert lines[-1] == f"--phases.1.tokens {4 * tokens['b']} --phases.1.corpus {out / 'b'}"
    both = mixture((str(out / "a"), str(out / "b")), repeat=("pubmed=1,2", "b=1,1"))
    corpus = tuple(both.splitlines()[-1].split(" --phases.1.corpus ")[1].split())
    assert corpus == (str(out / "a"), str(out / "a"), str(out / "b"))
    phase = Phase("p", tokens=10_000, corpus=corpus)
    config = TrainConfig(
        phases=(phase,), sequence_length=64, global_batch_size=4, workdir=str(tmp_path),
        tokenizer=str(prepared / "tokenizer"),
    )  # fmt: skip
    workdir = open_workdir(config)
    make_tokenizer(config, workdir)
    (stores,) = open_corpora(config, workdir)
    assert set(stores) == {"a", "b"}
    once = open_store(out / "a")["train"]
    twice = stores["a"]["train"]
    assert len(twice.lengths) == 2 * len(once.lengths)
    last = np.array([2 * len(once.lengths) - 1])
    assert twice.read(last)[0].tolist() == once.read(last // 2)[0].tolist()
    assert len(stores["b"]["train"].lengths) == len(open_store(out / "b")["train"].lengths)
    assert len(stores["a"]["eval"].lengths) == len(open_store(out / "a")["eval"].lengths)


@pytest.mark.parametrize(
    "args, problem",
    [
        ({"repeat": ("b",)}, "expected NAME=PHASE 1,PHASE 2 of one of pubmed, b"),
        ({"repeat": ("c=1,1",)}, "repeat c=1,1: expected"),
        ({"epochs": 0}, "epochs: expected at least 1"),
    ],
)
def test_refusals(prepared, args, problem):
    with pytest.raises(ValueError, match=problem):
        mixture((str(prepared / "out"),), **args)
    with pytest.raises(FileNotFoundError, match="expected an output of"):
        mixture((str(prepared / "tokenizer"),))
    with pytest.raises(ValueError, match="each source once"):
        mixture((str(prepared / "out"), str(prepared / "out" / "b")))


def test_corpora_without_an_evaluation_split(prepared, tmp_path):
    """One alone is refused before training; beside another it is only not scored."""
    none = tmp_path / "none"
    prepare(
        str(prepared / "b.jsonl"), str(prepared / "tokenizer"), str(none), sequence_length=64,
        eval_fraction=0.0, workers=1,
    )  # fmt: skip

    def config(*corpus):
        return TrainConfig(
            phases=(Phase("p", tokens=10_000, corpus=corpus),),
            sequence_length=64, global_batch_size=4,
            workdir=str(tmp_path / "-".join(c[-4:] for c in corpus)),
            tokenizer=str(prepared / "tokenizer"),
        )  # fmt: skip

    with pytest.raises(ValueError, match="phase p: its corpora have no evaluation split"):
        open_corpora(config(str(none)), tmp_path)
    (stores,) = open_corpora(config(str(none), str(prepared / "out" / "a")), tmp_path)
    assert not len(stores["none"]["eval"].lengths) and len(stores["a"]["eval"].lengths)


@pytest.mark.slow
def test_run_beside_a_corpus_that_holds_nothing_out(prepared, tmp_path):
    none = tmp_path / "none"
    prepare(
        str(prepared / "b.jsonl"), str(prepared / "tokenizer"), str(none), sequence_length=64,
        eval_fraction=0.0, workers=1,
    )  # fmt: skip
    model = ModernBertConfig.tiny(vocab_size=448, num_hidden_layers=3)
    phase = Phase("p", tokens=600, corpus=(str(none), str(prepared / "out" / "a")))
    config = TrainConfig(
        model=model, phases=(phase,), sequence_length=64, global_batch_size=4,
        workdir=str(tmp_path / "w"),
        tokenizer=str(prepared / "tokenizer"), mesh=MeshShape(data=1), eval_sequences=8,
    )  # fmt: skip
    scores = loop.run(config)["phases"][0]
    assert 0 < scores["loss"] < 20 and "none/loss" not in scores
